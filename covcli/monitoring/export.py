"""export: network and monitor in one file, which runs without covcli and describes itself."""

import io
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from covcli.core import distributed, file_checks, files, run_folders, runtime
from covcli.core.choices import ExportFormat
from covcli.core.errors import CovcliError
from covcli.core.opening import open_regular, reading
from covcli.core.progress import Progress, Silent
from covcli.core.signals import Interrupts
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.monitoring import onnx_format
from covcli.monitoring.export_config import ExportConfig
from covcli.monitoring.exported import (
    KEY,
    SCHEMA,
    VERDICTS,
    ExportedMonitor,
    MonitorGraph,
    Verification,
    quiet,
    traced,
)
from covcli.monitoring.verification import verify
from covcli.reporting.terminal import say
from covcli.signature import judge as judges
from covcli.signature.guarantee import GuaranteeRequest
from covcli.signature.judge import Judge
from covcli.signature.newest import find_files
from covcli.signature.record import Record

ENDINGS: Mapping[ExportFormat, str] = {"onnx": ".onnx", "torch": ".pt2"}
ONNX_BEGINS = {bytes([8, version]) for version in range(3, 32)}  # its field 1, the IR's version
LARGEST_DOCUMENT = 64 << 20
EXTRA = f"{KEY}.json"  # the description of a torch program is a file in its archive


@dataclass(frozen=True)
class ExportResult:
    """The result of `export`.

    Attributes
    ----------
    path, bytes
        The file and its size.
    monitor
        The file's description, including the verification.

    Examples
    --------
    >>> from covcli import ExportConfig, export
    >>> config = ExportConfig("monitor.pt2", input="normalised")
    >>> result = export(config)  # of the signature in runs/latest
    >>> result.bytes == result.path.stat().st_size, result.monitor.format, result.monitor.input
    (True, 'torch', 'normalised')
    """

    path: Path
    bytes: int
    monitor: ExportedMonitor


class Packed(Protocol):
    """A monitor in the form of a file."""

    def content(self, document: str | None = None) -> bytes:
        """Return the file's bytes, with its description."""

    def run(self, images: Tensor) -> Mapping[str, np.ndarray]:
        """Run the file on images; return its outputs by name."""


class OnnxFile:
    """A monitor as an ONNX model."""

    def __init__(self, graph: MonitorGraph) -> None:
        onnx_format.check_packages()
        if graph.chain.model.precision != "float32":
            raise CovcliError(
                f"was built in {graph.chain.model.precision}, in which ONNX Runtime does not "
                "compute on every machine",
                where="the signature",
                fix="use --format torch, or build it with --amp off",
            )
        model = graph.chain.model
        graph.chain.layout = torch.contiguous_format
        with onnx_format.plain_layout(model):
            self._model = onnx_format.convert(traced(graph), graph.outputs, model.spec.name)
        self.run = onnx_format.OnnxProgram(self.content())

    def content(self, document: str | None = None) -> bytes:
        """Return the file's bytes."""
        return onnx_format.packed(self._model, document)


class TorchFile:
    """A monitor as a program of torch.export."""

    def __init__(self, graph: MonitorGraph) -> None:
        self._program = traced(graph)
        self._outputs = graph.outputs
        again = torch.export.load(io.BytesIO(self.content())).module()
        self._module: Callable[[Tensor], Any] = again

    def content(self, document: str | None = None) -> bytes:
        """Return the file's bytes."""
        buffer = io.BytesIO()
        extra = {} if document is None else {EXTRA: document}
        with quiet():
            torch.export.save(self._program, buffer, extra_files=extra)
        return buffer.getvalue()

    def run(self, images: Tensor) -> Mapping[str, np.ndarray]:
        """Run the program."""
        with torch.no_grad():
            tensors = self._module(images)
        return {name: t.numpy() for name, t in zip(self._outputs, tensors, strict=True)}


FORMATS: Mapping[ExportFormat, Callable[[MonitorGraph], Packed]] = {
    "onnx": OnnxFile, "torch": TorchFile,
}  # fmt: skip


def export(
    config: ExportConfig, progress: Progress = Silent(), interrupts: Interrupts | None = None
) -> ExportResult:
    """Write network and monitor as one file, after it has said of images what the monitor says.

    Parameters
    ----------
    config
        The file to write, and the signature.
    progress
        Receives the progress of the verification.
    interrupts
        Handles signals; by default the caller does.

    Raises
    ------
    CovcliError
        If a file or a name is bad, the method takes gradients, torch or onnxscript cannot export
        the network, the file says something else than the monitor, or the output exists already.

    Examples
    --------
    >>> from covcli import ExportConfig, export
    >>> result = export(ExportConfig("monitor.pt2"))  # of the signature in runs/latest
    >>> result.monitor.outputs[:3], result.monitor.verification.images
    (('logits', 'predicted', 'score'), 256)
    """
    signals = interrupts or Interrupts()
    checkpoint, signature_file = find_files(config)
    form = _format(config)
    beside = run_folders.short(signature_file.parent) / f"monitor{ENDINGS[form]}"
    path = config.output or beside
    first = distributed.is_first()  # other ranks only keep it company
    with run_folders.writing(path, config.force) if first else nullcontext():
        judge, record = judges.load(checkpoint, signature_file, GuaranteeRequest.of(config))
        images = _images(config, record)
        graph = MonitorGraph(judge, config.input)
        # An exception of a signal handler inside torch's tracer can abort the process.
        with signals.deferred():
            packed = FORMATS[form](graph)
        verification = verify(judge, packed.run, config.input, images, progress)
        monitor = _described(judge, graph, form, signature_file, verification)
        with signals.deferred():
            content = packed.content(monitor.packed())
        if first:
            files.write_bytes(path, content)
    return ExportResult(path, len(content), monitor)


def _format(config: ExportConfig) -> ExportFormat:
    """Return the requested format, or the one of the output's file name extension."""
    ending = "" if config.output is None else config.output.suffix.lower()
    by_ending = {theirs: name for name, theirs in ENDINGS.items()}.get(ending)
    if config.format is None and ending and by_ending is None:
        raise CovcliError(
            f"ends as a file of no format; known: {', '.join(ENDINGS.values())}",
            where=f"--output {config.output}", fix="pass --format, or name another --output",
        )  # fmt: skip
    if config.format is not None and by_ending not in (None, config.format):
        raise CovcliError(
            f"ends as a file of {by_ending}", where=f"--output {config.output}",
            fix=f"end it with {ENDINGS[config.format]}, or pass --format {by_ending}",
        )  # fmt: skip
    return config.format or by_ending or "onnx"


def _images(config: ExportConfig, record: Record) -> ImageSet:
    if config.calibration is not None:
        return datasets.load(config.calibration, "test", config.data_dir)
    return record.calibration_set(config.data_dir, "name any images by --calibration SPEC")


def _described(
    judge: Judge,
    graph: MonitorGraph,
    form: ExportFormat,
    signature_file: Path,
    verification: Verification,
) -> ExportedMonitor:
    spec, guarantee, signature = judge.model.spec, judge.rule.guarantee, judge.signature
    return ExportedMonitor(
        schema=SCHEMA,
        format=form,
        input=graph.form,
        shape=(spec.shape[0], spec.shape[1], spec.shape[2]),
        preprocess=spec.preprocess.describe(spec.shape),
        mean=spec.mean,
        deviation=spec.deviation,
        outputs=graph.outputs,
        verdicts=VERDICTS if graph.bounded else (),
        classes=signature.classes,
        model=spec.name,
        method=signature.method.spec(),
        granularity=signature.granularity,
        alpha=guarantee.alpha,
        guarantee=guarantee.mode,
        max_error=guarantee.max_error,
        statement=guarantee.statement(),
        checkpoint_fingerprint=signature.fingerprint,
        signature_fingerprint=files.digest_file(signature_file),
        verification=verification,
        provenance=runtime.provenance(torch.device("cpu"), 0),
    )


def is_exported(file: IO[bytes]) -> bool:
    """Return whether an open file looks like an exported program, by covcli or not."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return any(Path(name).name == "archive_format" for name in archive.namelist())
    file.seek(0)
    return file.read(2) in ONNX_BEGINS


def read_exported(path: Path) -> ExportedMonitor:
    """Read the description in an exported file; the program in it is not loaded.

    Raises
    ------
    CovcliError
        If the file is missing, damaged, or not a monitor that covcli exported.
    """
    with reading(path, "is no exported monitor"):
        with open_regular(path) as file:
            text = (
                _torch_document(file) if zipfile.is_zipfile(file) else onnx_format.described(file)
            )
        if text is None:
            raise CovcliError("is a program, but no monitor that covcli has exported", where=path)
        document = file_checks.parse_json(text)
    return ExportedMonitor.unpacked(document, path)


def _torch_document(file: IO[bytes]) -> str | None:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if Path(entry.filename).name == EXTRA and entry.file_size <= LARGEST_DOCUMENT:
                return archive.read(entry).decode()
    return None


def describe_export(result: ExportResult) -> None:
    """Describe the exported file on stderr; stdout gets the path only."""
    monitor = result.monitor
    say(
        f"{monitor.format}: {monitor.model} with {monitor.method}, {monitor.input} images of "
        f"{'×'.join(map(str, monitor.shape))}, {result.bytes / 1e6:.1f} MB; {monitor.verification}"
    )
