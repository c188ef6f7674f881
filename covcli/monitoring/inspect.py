"""inspect: describe a file, without building a network."""

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from covcli.core import file_checks, files
from covcli.core.errors import CovcliError, first_few
from covcli.core.opening import is_folder, open_regular, reading
from covcli.core.weights_only import load_weights_only
from covcli.data.images import DataRecord
from covcli.models import checkpoint as checkpoints
from covcli.models.nearest import nearest_architecture
from covcli.models.spec import ModelSpec
from covcli.models.weights import places
from covcli.monitoring.export import is_exported, read_exported
from covcli.monitoring.exported import ExportedMonitor
from covcli.reporting import documents, per_image
from covcli.reporting.documents import EvaluatedSignature, Guaranteed
from covcli.reporting.tables import Table
from covcli.signature import signature as signatures
from covcli.training.paused import PAUSED, PAUSED_FILE

SHOWN = 12  # names that a table lists one by one
KNOWN = (
    "checkpoints, state dicts, signatures, evaluations, training logs, scores, exported monitors "
    "and run folders"
)


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
        how = "prepared by a program" if spec.is_own else spec.preprocess.describe(spec.shape)
        return cls(
            spec.name, spec.classes, f"{'×'.join(map(str, spec.shape))}, {how}", spec.mean,
            spec.deviation, fingerprint, None if state is None else _numbers(state),
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
        "scores", "exported monitor" or "run"; in a run also "damaged".
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
    provenance: Mapping[str, Any] | None = None
    tensors: tuple[TensorFacts, ...] = ()
    nearest: str = ""
    files: tuple["Inspection", ...] = ()
    problem: str = ""


def inspect_file(path: Path) -> Inspection:
    """Describe a file by its content, not by its name; no network is built.

    Parameters
    ----------
    path
        A checkpoint, a state dict, a signature, an evaluation.json, a training log, the file of a
        paused training, a table of scores, or a run folder.

    Raises
    ------
    CovcliError
        If the file is missing, damaged, or none of these.

    Examples
    --------
    >>> from pathlib import Path
    >>> signature = inspect_file(Path("runs/latest/signature-ensemble.safetensors"))
    >>> signature.kind, signature.network.name, [point.neurons for point in signature.points]
    ('signature', 'tiny', [16, 32, 32])
    """
    if is_folder(path):
        return _run(path)
    with reading(path, "cannot be read"), open_regular(path) as file:
        start = file.read(9)
        archive = zipfile.is_zipfile(file)
        exported = is_exported(file)
    inspection = (_exported if exported else _reader(path, start, archive))(path)
    return replace(inspection, bytes=path.stat().st_size, digest=files.digest_file(path))


def _reader(path: Path, start: bytes, archive: bool) -> Callable[[Path], Inspection]:
    """Return the function that inspects a file with these first bytes."""
    if start[:2] == b"\x1f\x8b":
        return _scores
    if start.lstrip()[:1] == b"{":
        return _document
    if start[8:9] == b"{":
        return _safetensors
    if archive or start[:2] == b"\x80\x02":  # an archive of torch.save, or its files before 1.6
        return _torch_file
    raise CovcliError("is no file that covcli knows", where=path, fix=f"it inspects {KNOWN}")


def _torch_file(path: Path) -> Inspection:
    document = load_weights_only(path)
    kind = document.get("format")
    if kind == checkpoints.CHECKPOINT.name:
        return _checkpoint(path)
    if kind == PAUSED.name:
        return _paused(path)
    if isinstance(kind, str):
        raise CovcliError(f"is of another format ({kind})", where=path)
    return _state_dict(path, document)


def _checkpoint(path: Path) -> Inspection:
    content = checkpoints.load_checkpoint(path)
    spec, state = ModelSpec.from_dict(content["model"], path), content["state"]
    network = NetworkFacts.of(spec, files.fingerprint(state), state)
    try:
        training, trusted = dict(content["training"]), content["trusted"]
        held_out, classes = len(content["calibration_rows"]), tuple(map(str, content["classes"]))
        data = [] if trusted is None else [_set("trusted", DataRecord.read(trusted), None)]
    except (TypeError, ValueError) as error:
        raise CovcliError(f"is inconsistent ({error})", where=path) from None
    if data and held_out:
        data.append(SetFacts("calibration", data[0].name, held_out, ""))
    return Inspection(
        path, "checkpoint", 0, network=network, classes=classes, data=tuple(data),
        method=str(training.get("method", "")), settings=files.plain(training) or None,
    )  # fmt: skip


def _paused(path: Path) -> Inspection:
    content = PAUSED.load(path)
    settings = content["settings"]
    if not isinstance(settings, dict) or not isinstance(content["history"], list):
        raise CovcliError("is inconsistent (settings or history)", where=path)
    return Inspection(
        path, "paused training", 0, method=str(settings.get("method", "")),
        settings=files.plain(settings), epochs=len(content["history"]),
    )  # fmt: skip


def _state_dict(path: Path, document: Mapping[str, Any]) -> Inspection:
    state_dicts = places(document, path)
    largest = max(state_dicts, key=lambda place: len(place.tensors)).tensors
    nearest = nearest_architecture([place.tensors for place in state_dicts])
    return Inspection(
        path, "state dict", 0, nearest="" if nearest is None else str(nearest),
        tensors=tuple(
            TensorFacts(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in largest.items()
        ),
    )  # fmt: skip


def _safetensors(path: Path) -> Inspection:
    with reading(path, "is not a sound safetensors file"), open_regular(path) as file:
        metadata = file_checks.safetensors_metadata(file.read())
    return _signature(path) if "covcli" in metadata else _state_dict(path, load_weights_only(path))


def _signature(path: Path) -> Inspection:
    signature, calibration, record = signatures.load(path)
    return Inspection(
        path, "signature", 0,
        network=NetworkFacts.of(signature.model, signature.fingerprint),
        classes=signature.classes,
        method=signature.method.spec(),
        granularity=signature.granularity,
        precision=signature.precision,
        points=tuple(PointFacts(point.name, point.neurons) for point in signature.points),
        data=(
            _set("trusted", record.trusted, record.trusted_images),
            _set("calibration", record.calibration, record.calibration_images),
        ),
        mergeable=signature.mergeable,
        guarantee=calibration.guarantee.described(),
        provenance=record.provenance,
    )  # fmt: skip


def _document(path: Path) -> Inspection:
    document = files.read_json(path)
    if isinstance(document, dict) and "epochs" in document:
        return _training_log(path, document)
    if isinstance(document, dict) and "untrusted" in document:
        return _evaluation(path)
    raise CovcliError(
        "is a JSON document, but neither an evaluation nor a training log", where=path
    )


def _evaluation(path: Path) -> Inspection:
    result = documents.read_evaluation(path)
    trusted, signature = result.trusted, result.signature
    return Inspection(
        path, "evaluation", 0,
        classes=tuple(alarms.name for alarms in trusted.false_alarms_by_class),
        method=signature.parameters,
        granularity=signature.granularity,
        precision=signature.precision,
        points=tuple(PointFacts(point.name, point.neurons) for point in result.points),
        data=(
            SetFacts("trusted", trusted.name, trusted.images, trusted.fingerprint),
            *(SetFacts("untrusted", e.name, e.images, e.fingerprint) for e in result.untrusted),
        ),
        guarantee=result.guarantee,
        signature=signature,
        provenance=result.provenance,
    )  # fmt: skip


def _training_log(path: Path, document: Mapping[str, Any]) -> Inspection:
    log = documents.read_training_log(path)
    settings, provenance = document.get("settings"), document.get("provenance")
    settings = settings if isinstance(settings, dict) else {}
    return Inspection(
        path, "training log", 0, method=str(settings.get("method", "")), settings=settings,
        epochs=len(log.epochs), provenance=provenance if isinstance(provenance, dict) else None,
    )  # fmt: skip


def _exported(path: Path) -> Inspection:
    monitor = read_exported(path)
    sides = "×".join(map(str, monitor.shape))
    return Inspection(
        path, "exported monitor", 0,
        network=NetworkFacts(
            monitor.model, len(monitor.classes), f"{monitor.input}, {sides}, {monitor.preprocess}",
            monitor.mean, monitor.deviation, monitor.checkpoint_fingerprint,
        ),
        classes=monitor.classes,
        method=monitor.method,
        granularity=monitor.granularity,
        guarantee=Guaranteed(
            monitor.guarantee, monitor.alpha, None, monitor.statement
        ),
        exported=monitor,
        provenance=monitor.provenance,
    )  # fmt: skip


def _scores(path: Path) -> Inspection:
    sets = per_image.read_scores(path)
    data = (
        SetFacts("trusted" if name == "trusted" else "untrusted", name, len(of.predicted), "")
        for name, of in sets.items()
    )
    return Inspection(path, "scores", 0, data=tuple(data))


def _run(folder: Path) -> Inspection:
    inside = tuple(_of_run(folder))
    if not inside:
        raise CovcliError("holds no file of a run", where=folder, fix=f"covcli inspects {KNOWN}")
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Inspection(folder, "run", total, files=inside)


def _of_run(folder: Path) -> Iterator[Inspection]:
    """Yield the files of a run folder, in the order in which the stages write them."""
    for pattern in (
        "checkpoint.pt", PAUSED_FILE, "training_results_*.json", "*.safetensors",
        "evaluation.json", per_image.SCORES, "*.onnx", "*.pt2",
    ):  # fmt: skip
        for path in sorted(folder.glob(pattern)):
            try:
                yield inspect_file(path)
            except CovcliError as error:
                reason = str(error).removeprefix(f"{path}: ")
                yield Inspection(path, "damaged", path.lstat().st_size, problem=reason)


def _set(role: str, record: DataRecord, images: int | None) -> SetFacts:
    return SetFacts(role, record.spec, images, record.images)


def _numbers(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


# How it is shown


def as_table(inspection: Inspection) -> Table:
    """Return the description of a file as a table of two columns."""
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
