"""Results of a check as Prometheus text, for the textfile collector of a node exporter."""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from covcli.core import files
from covcli.core.errors import CovcliError
from covcli.core.opening import check_overwritable, real
from covcli.core.version import __version__
from covcli.monitoring.check import Check

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)
BEGINS = "# HELP covcli_"
Labelled = list[tuple[Mapping[str, str], float]]


def check_output(path: Path | None, state: Path | None) -> None:
    """Raise a CovcliError if the metrics would overwrite anything but earlier ones.

    Parameters
    ----------
    path
        The file of the metrics, if there is one.
    state
        The file of the drift watch's state, if there is one.
    """
    if path is None:
        return
    check_overwritable(path, (BEGINS.encode(),), "metrics of covcli")
    if state is not None and real(path) == real(state):
        raise CovcliError("is named by --metrics and --drift-state", where=path)


def write_metrics(path: Path, job: Check) -> None:
    """Write the results of a check so far, atomically.

    Raises
    ------
    CovcliError
        If the file cannot be written.
    """
    files.write_bytes(path, exposition(job, path).encode())


def exposition(job: Check, path: Path) -> str:
    """Return the metrics as text (Prometheus, "Exposition formats", version 0.0.4).

    Each sample has the labels `signature` and `file`, the name of the file that it is written to:
    an exporter refuses all files if two of them hold samples with the same labels, and several
    streams may be checked with one signature.
    """
    mine = {"signature": str(real(job.signature)), "file": path.name}
    text = ""
    for name, help, samples in _metrics(job):
        text += f"# HELP {name} {help}\n# TYPE {name} gauge\n"
        text += "".join(f"{name}{_labels({**mine, **of})} {_number(v)}\n" for of, v in samples)
    return text


def _metrics(job: Check) -> Iterator[tuple[str, str, Labelled]]:
    summary, spec = job.summary(), job.judge.model.spec
    monitor = {"version": __version__, "network": spec.name}
    yield "covcli_monitor_info", "What checked the images.", [(monitor, 1.0)]
    yield "covcli_check_timestamp_seconds", "When this was written.", [({}, time.time())]
    counts: Labelled = [({"verdict": v}, float(n)) for v, n in summary.verdicts.items()]
    yield "covcli_check_images", "Images of the last check, by verdict.", counts
    quantiles: Labelled = [({"quantile": f"{q:g}"}, job.tally.quantile(q)) for q in QUANTILES]
    yield "covcli_check_p_value", "Quantiles of the last check's p-values.", quantiles
    if (drift := summary.drift) is None:
        return
    figures = {
        "images": ("Images that the drift watch has seen, over all checks.", drift.images),
        "log10_martingale": ("Decimal logarithm of the martingale.", drift.log10_martingale),
        "log10_threshold": ("Where the alarm is.", -math.log10(drift.delta)),
        "alarm": ("Whether the martingale has ever raised the alarm.", drift.alarm),
        "log10_shiryaev_roberts": (
            "Decimal logarithm of the statistic of quick alarms.", drift.log10_quick
        ),
        "quick_alarms": ("Quick alarms so far.", drift.quick_alarms),
    }  # fmt: skip
    for name, (help, value) in figures.items():
        yield f"covcli_drift_{name}", help, [({}, float(value))]


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items()) + "}"


def _escaped(text: str) -> str:
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return whole.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
