"""Output of a check, line by line: a table, CSV or JSON, and a summary."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.cells import cell_len

from covcli.core import distributed, output
from covcli.core.errors import CovcliError, one_line
from covcli.core.files import plain
from covcli.core.wrapping import wrapped
from covcli.monitoring.check import REFRESH_SECONDS, Check
from covcli.monitoring.config import RowFormat
from covcli.monitoring.prometheus import write_metrics
from covcli.monitoring.results import CheckedImage, CheckSummary
from covcli.reporting.terminal import columns, say

# A cell that begins like this is a formula to a spreadsheet, which may run programs.
FORMULAS = ("=", "+", "-", "@", "\t", "\r")
PLAIN = (
    "path", "predicted", "class_name", "softmax_confidence", "score", "p_value", "confidence",
    "verdict", "reason",
)  # fmt: skip


class Writer(Protocol):
    """Formats results."""

    def begin(self) -> str:
        """Return the text before the first image."""

    def lines(self, images: Sequence[CheckedImage]) -> str:
        """Return the text for some images."""

    def end(self) -> str:
        """Return the text after the last image."""


def show(job: Check, form: RowFormat, metrics: Path | None, prints: bool) -> None:
    """Check the images and write each result immediately; stop if stdout is closed.

    Parameters
    ----------
    job
        The check.
    form
        The format on stdout.
    metrics
        A file of metrics, written every 15 seconds and at the end; None for none.
    prints
        Whether this rank writes anything.
    """
    writer, due = _writer(job, form), 0.0
    _emit(writer.begin(), prints)
    for images in job.batches():
        _emit(writer.lines(images), prints)
        if metrics is not None and prints and time.monotonic() >= due:
            write_metrics(metrics, job)
            due = time.monotonic() + REFRESH_SECONDS
        if output.reader_left() and distributed.size() == 1:
            break
    _emit(writer.end(), prints)
    if metrics is not None and prints:
        write_metrics(metrics, job)


def chosen_format(named: RowFormat | None, as_json: bool) -> RowFormat:
    """Return the requested format; by default a table on a terminal, and CSV elsewhere.

    Raises
    ------
    CovcliError
        If both `--json` and another format are requested.
    """
    if as_json and named not in (None, "json"):
        raise CovcliError("and --json exclude each other", where=f"--format {named}")
    if as_json:
        return "json"
    return named or ("table" if output.results().isatty() else "csv")


def _emit(text: str, prints: bool) -> None:
    """Write text to stdout immediately; to a pipe in UTF-8 in every locale, to keep names exact."""
    if not prints or not text:
        return
    stream = output.results()
    if stream.isatty() or not hasattr(stream, "buffer"):
        stream.write(text)
    else:
        stream.flush()
        stream.buffer.write(text.encode("utf-8", "backslashreplace"))
    stream.flush()


def _writer(job: Check, form: RowFormat) -> Writer:
    writers: dict[RowFormat, Callable[[Check], Writer]] = {
        "table": _Table, "csv": _Csv, "jsonl": _JsonLines, "json": _Json,
    }  # fmt: skip
    return writers[form](job)


def _columns(job: Check) -> list[str]:
    extra = {"why": job.config.why, "log10_martingale": job.watch is not None}
    return [*PLAIN, *(name for name, wanted in extra.items() if wanted)]


@dataclass(frozen=True)
class _Csv:
    """Comma-separated values; without a value a cell is empty. No text is a formula."""

    job: Check

    def begin(self) -> str:
        return _row(_columns(self.job))

    def lines(self, images: Sequence[CheckedImage]) -> str:
        columns = _columns(self.job)
        return "".join(_row(_cells(image, columns)) for image in images)

    def end(self) -> str:
        return ""


def _row(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)  # quotes a name with either character
    return line.getvalue().removesuffix("\r\n") + "\n"


def _cells(image: CheckedImage, columns: Sequence[str]) -> Iterator[object]:
    for name in columns:
        value = _why(image, "; ") if name == "why" else getattr(image, name)
        if isinstance(value, str) and value.startswith(FORMULAS):
            yield f"./{value}" if name == "path" else f"'{value}"
        else:
            yield "" if value is None else value


def _why(image: CheckedImage, between: str) -> str:
    return between.join(f"{point.name} {100 * point.share:.1f}%" for point in image.why or ())


@dataclass(frozen=True)
class _JsonLines:
    """One JSON object per line."""

    job: Check

    def begin(self) -> str:
        return ""

    def lines(self, images: Sequence[CheckedImage]) -> str:
        return "".join(f"{_object(image, self.job)}\n" for image in images)

    def end(self) -> str:
        return ""


def _object(image: CheckedImage, job: Check) -> str:
    values = asdict(image)
    return json.dumps({name: plain(values[name]) for name in _columns(job)}, allow_nan=False)


class _Json:
    """One JSON document, written in parts; without its end it is not valid JSON."""

    def __init__(self, job: Check) -> None:
        self._job = job
        self._between = "\n    "

    def begin(self) -> str:
        job = self._job
        guarantee = job.judge.rule.guarantee
        head: dict[str, Any] = {
            "schema": 1,
            "checkpoint": str(job.checkpoint),
            "signature": str(job.signature),
            "guarantee": {**vars(guarantee), "statement": guarantee.statement()},
        }
        lines = json.dumps(plain(head), indent=2, allow_nan=False).removesuffix("\n}")
        return f'{lines},\n  "images": ['

    def lines(self, images: Sequence[CheckedImage]) -> str:
        text = ""
        for image in images:
            text += self._between + _object(image, self._job)
            self._between = ",\n    "
        return text

    def end(self) -> str:
        summary = json.dumps(plain(asdict(self._job.summary())), indent=2, allow_nan=False)
        return '\n  ],\n  "summary": ' + summary.replace("\n", "\n  ") + "\n}\n"


class _Table:
    """Aligned columns; what does not fit the terminal beside them is below, never truncated."""

    def __init__(self, job: Check) -> None:
        names = [cell_len(one_line(name)) for name in job.judge.signature.classes]
        self._class = min(24, max([*names, len("class")]))
        self._heads = ["softmax", "score", "p-value", "confidence"]
        self._heads += ["log10 M"] if job.watch is not None else []
        self._width = columns()

    def begin(self) -> str:
        return self._line("verdict", "class", self._heads, ["path"])

    def lines(self, images: Sequence[CheckedImage]) -> str:
        return "".join(map(self._image, images))

    def end(self) -> str:
        return ""

    def _image(self, image: CheckedImage) -> str:
        path = one_line(image.path)
        if image.reason is not None:
            blank = [""] * len(self._heads)
            return self._line(image.verdict, "", blank, [f"{path}: {one_line(image.reason)}"])
        values = (image.softmax_confidence, image.score, image.p_value, image.confidence)
        numbers = [f"{value:.4g}" for value in values]
        if image.log10_martingale is not None:
            numbers.append(f"{image.log10_martingale:.2f}")
        why = [f"({_why(image, ', ')})"] if image.why else []
        return self._line(image.verdict, one_line(image.class_name or ""), numbers, [path, *why])

    def _line(self, verdict: str, name: str, numbers: Sequence[str], texts: list[str]) -> str:
        while cell_len(name) > self._class:
            name = name[:-2] + "…"
        start = f"{verdict:<10}  {name}{' ' * (self._class - cell_len(name))}"
        cells = "".join(f"  {number:>10}" for number in numbers)
        line = "  ".join([start + cells, *texts])
        if cell_len(line) <= self._width:
            return f"{line}\n"
        below = [start + cells] if cell_len(start + cells) <= self._width else [start, cells[2:]]
        below += [f"    {part}" for text in texts for part in wrapped(text, self._width - 4)]
        return "".join(f"{part.rstrip()}\n" for part in below)


def describe(job: Check) -> None:
    """Print a summary on stderr."""
    for line in sentences(job.summary(), job.judge.rule.guarantee.alpha):
        say(line)


def sentences(summary: CheckSummary, alpha: float) -> Iterator[str]:
    """Yield a summary in sentences.

    Parameters
    ----------
    summary
        The summary.
    alpha
        The guaranteed false-alarm rate of images exchangeable with the calibration images.

    Examples
    --------
    >>> counts = {"trusted": 90, "unsure": 0, "untrusted": 8, "unreadable": 2}
    >>> for line in sentences(CheckSummary(100, counts), 0.05):
    ...     print(line)
    100 images: 90 trusted, 0 unsure, 8 untrusted, 2 unreadable
    8 of 98 that can be read are untrusted; of images like the calibration images 0.05 may be
    """
    counts = ", ".join(f"{n} {verdict}" for verdict, n in summary.verdicts.items())
    yield f"{summary.images} images: {counts}"
    readable = summary.images - summary.verdicts["unreadable"]
    if readable:
        yield (
            f"{summary.verdicts['untrusted']} of {readable} that can be read are untrusted; of "
            f"images like the calibration images {alpha:.3g} may be"
        )
    if (drift := summary.drift) is None:
        return
    value = f"the martingale is 10^{drift.log10_martingale:.2f}"
    if drift.alarm:
        name = f" ({drift.alarm_name})" if drift.alarm_name else ""
        yield (
            f"drift: alarm since image {drift.alarm_image}{name} of {drift.images} seen; the "
            f"change came about after image {drift.lowest_image}; {value}"
        )
    else:
        yield (
            f"drift: no alarm in {drift.images} images; {value}, the alarm is at "
            f"{1 / drift.delta:g}"
        )
    if drift.quick_alarms:
        yield (
            f"drift: {drift.quick_alarms} quick alarms, the last at image {drift.quick_image}; "
            f"without a change one comes in {drift.run_length} images, in the mean"
        )
