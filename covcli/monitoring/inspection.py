"""The result of `inspect`: what a file is and contains, and its table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from covcli.core.errors import first_few
from covcli.data.images import DataRecord
from covcli.models.spec import ModelSpec
from covcli.monitoring.drift import DriftStatus
from covcli.monitoring.exported import ExportedMonitor
from covcli.reporting.documents import EvaluatedSignature, Guaranteed
from covcli.reporting.tables import Table

SHOWN = 12  # names that a table lists one by one


@dataclass(frozen=True)
class NetworkFacts:
    """A network, as a file describes it.

    Attributes
    ----------
    name
        The architecture.
    classes
        The number of classes.
    input
        The shape of its inputs, and the preprocessing.
    mean, deviation
        Mean and deviation of the pixels in [0, 1], per channel.
    fingerprint
        The fingerprint of its weights.
    parameters
        The number of values in its weights and buffers; None if the file does not contain them.
    """

    name: str
    classes: int
    input: str
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    fingerprint: str
    parameters: int | None = None

    @classmethod
    def of(
        cls, spec: ModelSpec, fingerprint: str, state: Mapping[str, Tensor] | None = None
    ) -> "NetworkFacts":
        """Describe a network by its specification."""
        parameters = None if state is None else sum(tensor.numel() for tensor in state.values())
        how = "prepared by a program" if spec.is_own else spec.preprocess.describe(spec.shape)
        return cls(
            spec.name, spec.classes, f"{'×'.join(map(str, spec.shape))}, {how}", spec.mean,
            spec.deviation, fingerprint, parameters,
        )  # fmt: skip


@dataclass(frozen=True)
class PointFacts:
    """A coverage point, and its number of neurons."""

    name: str
    neurons: int


@dataclass(frozen=True)
class SetFacts:
    """A set of images that a file refers to.

    Attributes
    ----------
    role
        "trusted", "calibration" or "untrusted".
    name
        The specification.
    images
        The number of images; None if it is not recorded.
    fingerprint
        The fingerprint of the images.
    """

    role: str
    name: str
    images: int | None
    fingerprint: str

    @classmethod
    def of(cls, role: str, record: DataRecord, images: int | None) -> "SetFacts":
        """Describe a set by its record."""
        return cls(role, record.spec, images, record.images)


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of a state dict."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """The description of a file; attributes that its kind does not have are None or empty.

    Attributes
    ----------
    path
        The file, or the folder.
    kind
        "checkpoint", "state dict", "signature", "evaluation", "training log", "paused training",
        "scores", "exported monitor", "drift state" or "run"; in a run also "damaged".
    bytes, digest
        The file's size, and the SHA-256 of its content; for a folder, the total size of its files.
    network
        The network that it contains or belongs to.
    classes
        Class names.
    method
        The specification of the signature's method, or of the training's.
    granularity, precision
        The granularity and the precision of the signature's neurons.
    points
        Its coverage points.
    data
        The image sets that it refers to.
    mergeable
        Whether the signature holds what `merge-signatures` needs.
    guarantee
        The guarantee of the verdicts.
    signature
        The signature that an evaluation measured.
    exported
        What an exported monitor says of itself.
    settings
        The settings of the training.
    epochs
        The number of epochs in a training log.
    drift
        The state of a drift watch.
    provenance
        Versions, command line, device, seed and time.
    tensors
        The tensors of a state dict.
    nearest
        The architecture with the most tensors of the same shapes; empty if none is similar.
    files
        The files of a run.
    problem
        The error of a damaged file in a run.

    Examples
    --------
    >>> from covcli.monitoring.inspect import inspect_file
    >>> run = inspect_file(Path("runs/latest"))
    >>> [file.kind for file in run.files][:2]
    ['checkpoint', 'training log']
    """

    path: Path
    kind: str
    bytes: int
    digest: str = ""
    network: NetworkFacts | None = None
    classes: tuple[str, ...] = ()
    method: str = ""
    granularity: str = ""
    precision: str = ""
    points: tuple[PointFacts, ...] = ()
    data: tuple[SetFacts, ...] = ()
    mergeable: bool | None = None
    guarantee: Guaranteed | None = None
    signature: EvaluatedSignature | None = None
    exported: ExportedMonitor | None = None
    settings: Mapping[str, Any] | None = None
    epochs: int | None = None
    drift: DriftStatus | None = None
    provenance: Mapping[str, Any] | None = None
    tensors: tuple[TensorFacts, ...] = ()
    nearest: str = ""
    files: tuple["Inspection", ...] = ()
    problem: str = ""


def as_table(inspection: Inspection) -> Table:
    """Return the description of a file as a table of two columns.

    Examples
    --------
    >>> as_table(Inspection(Path("a.csv.gz"), "scores", 1024)).rows
    [['size', '1,024 bytes']]
    """
    rows = [[what, value] for what, value in _rows(inspection) if value]
    return Table(f"{inspection.path}: {inspection.kind}", ["what", "value"], rows)


def _rows(inspection: Inspection) -> Iterator[tuple[str, str]]:
    yield "size", f"{inspection.bytes:,} bytes"
    yield "SHA-256", inspection.digest
    if inspection.network is not None:
        yield from _of_network(inspection.network)
    yield "classes", first_few(inspection.classes, SHOWN)
    yield "method", inspection.method
    yield "granularity", inspection.granularity
    yield "precision", inspection.precision
    if inspection.mergeable is not None:
        yield "can be merged", "yes" if inspection.mergeable else "no, built without --mergeable"
    yield "coverage points", _points(inspection.points)
    yield from map(_of_data, inspection.data)
    if inspection.guarantee is not None:
        yield "guarantee", f"{inspection.guarantee.mode}, α = {inspection.guarantee.alpha:g}"
        yield "which means", inspection.guarantee.statement
    if inspection.signature is not None:
        yield from _of_evaluated(inspection.signature)
    if inspection.exported is not None:
        yield "outputs", ", ".join(inspection.exported.outputs)
        yield "signature", f"SHA-256 {inspection.exported.signature_fingerprint}"
        yield "verified", str(inspection.exported.verification)
    yield "epochs", "" if inspection.epochs is None else str(inspection.epochs)
    for key, value in ({} if inspection.drift is None else vars(inspection.drift)).items():
        yield key.replace("_", " "), "" if value is None else str(value)
    for key, value in (inspection.settings or {}).items():
        yield f"setting {key}", "" if value in (None, [], "") else str(value)
    for key, value in (inspection.provenance or {}).items():
        yield key, str(value)
    yield from _of_tensors(inspection)
    for inside in inspection.files:
        yield inside.path.name, f"{_in_short(inside)}{_belongs(inside, inspection)}"


def _of_network(network: NetworkFacts) -> Iterator[tuple[str, str]]:
    yield "network", f"{network.name}, {network.classes} classes"
    yield "input", network.input
    yield "numbers in weights", "" if network.parameters is None else f"{network.parameters:,}"
    yield "weights' fingerprint", network.fingerprint


def _of_data(data: SetFacts) -> tuple[str, str]:
    count = "" if data.images is None else f", {data.images:,} images"
    known = f", fingerprint {data.fingerprint[:12]}" if data.fingerprint else ""
    return data.role, f"{data.name}{count}{known}"


def _of_evaluated(signature: EvaluatedSignature) -> Iterator[tuple[str, str]]:
    yield "signature", f"{signature.path}, SHA-256 {signature.signature_fingerprint}"
    yield "checkpoint", signature.checkpoint
    yield "weights' fingerprint", signature.checkpoint_fingerprint


def _of_tensors(inspection: Inspection) -> Iterator[tuple[str, str]]:
    if inspection.kind != "state dict":
        return
    yield "tensors", str(len(inspection.tensors))
    for tensor in inspection.tensors[:SHOWN]:
        yield tensor.name, f"{tensor.dtype} {'×'.join(map(str, tensor.shape)) or 'scalar'}"
    if len(inspection.tensors) > SHOWN:
        yield "and", f"{len(inspection.tensors) - SHOWN} more"
    yield "nearest architecture", inspection.nearest or "none of those that covcli knows"


def _points(points: tuple[PointFacts, ...]) -> str:
    if not points:
        return ""
    neurons = sum(point.neurons for point in points)
    return (
        f"{len(points)} ({neurons:,} neurons): {first_few([point.name for point in points], SHOWN)}"
    )


def _in_short(entry: Inspection) -> str:
    """Return a description of a run's file in a line."""
    parts = [entry.problem, entry.network.name if entry.network is not None else "", entry.method]
    if entry.epochs is not None:
        parts.append(f"{entry.epochs} epochs")
    parts += [f"{s.name} ({s.images:,})" for s in entry.data if s.images is not None]
    return ", ".join([f"{entry.kind}, {entry.bytes:,} bytes", *filter(None, parts)])


def _belongs(entry: Inspection, run: Inspection) -> str:
    """Return a warning if a signature or an evaluation is not of the run's checkpoint."""
    own = [e.network.fingerprint for e in run.files if e.kind == "checkpoint" and e.network]
    if entry.kind == "signature" and entry.network is not None:
        theirs = entry.network.fingerprint
    elif entry.signature is not None:
        theirs = entry.signature.checkpoint_fingerprint
    else:
        return ""
    return "" if not own or own[0] == theirs else "; NOT of this checkpoint"
