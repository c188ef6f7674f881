"""inspect: describe a file, without building a network."""

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from covcli.core import file_checks, files
from covcli.core.errors import CovcliError
from covcli.core.opening import is_folder, misread, open_regular, reading
from covcli.core.weights_only import load_weights_only
from covcli.data.images import DataRecord
from covcli.models import checkpoint as checkpoints
from covcli.models.nearest import nearest_architecture
from covcli.models.spec import ModelSpec
from covcli.models.weights import places
from covcli.monitoring.drift import STATE, read_status
from covcli.monitoring.export import is_exported, read_exported
from covcli.monitoring.inspection import Inspection, NetworkFacts, PointFacts, SetFacts, TensorFacts
from covcli.reporting import documents, per_image
from covcli.reporting.documents import Guaranteed
from covcli.signature import signature as signatures
from covcli.training.paused import PAUSED, PAUSED_FILE

KNOWN = (
    "checkpoints, state dicts, signatures, evaluations, training logs, scores, exported monitors, "
    "drift states and run folders"
)


def inspect_file(path: Path) -> Inspection:
    """Describe a file by its content, not by its name; no network is built.

    Parameters
    ----------
    path
        A checkpoint, a state dict, a signature, an evaluation.json, a training log, the file of a
        paused training, a table of scores, the state of a drift watch, or a run folder.

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
    raise misread(path, "is no file that covcli knows", f"it inspects {KNOWN}")


def _torch_file(path: Path) -> Inspection:
    document = load_weights_only(path)
    kind = document.get("format")
    if kind == checkpoints.CHECKPOINT.name:
        return _checkpoint(path)
    if kind == PAUSED.name:
        return _paused(path)
    if kind == STATE.name:
        return Inspection(path, "drift state", 0, drift=read_status(path))
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
        data = [] if trusted is None else [SetFacts.of("trusted", DataRecord.read(trusted), None)]
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
            SetFacts.of("trusted", record.trusted, record.trusted_images),
            SetFacts.of("calibration", record.calibration, record.calibration_images),
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
