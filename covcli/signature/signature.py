"""The signature: a summary of a network's neurons on trusted images, and its file."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from covcli.core import file_checks, files, runtime
from covcli.core.errors import CovcliError
from covcli.core.files import fingerprint, write_bytes
from covcli.core.opening import open_regular, reading
from covcli.methods import Layout, Method, Scorer, State, make_method
from covcli.methods.logits import LOGIT_EVIDENCE, read_logits
from covcli.methods.state import GRANULARITIES, Granularity, Reduction, check_tensors
from covcli.models.architectures import Classifier, ModelSpec, Precision, precision
from covcli.models.points import Point
from covcli.signature.calibration import Calibration
from covcli.signature.combination import Arrangement, Combination
from covcli.signature.guarantee import MODES, Guarantee
from covcli.signature.record import Record
from covcli.signature.tails import SHARES, Tails

COMBINATION = ("center", "scale", "generalists", "weights", "level", "spread")
RANKING = ("fitting", "scores", "softmax", "predicted")

TAILS = ("knots", "slopes")

SIGNATURE_SCHEMA = 6  # 5 had other experts and another combination with the logits
# A signature takes at most a tenth of the weights' bytes, of which so many are for the record and a
# calibration on a thousand images. The least room of a state is for networks that are tiny.
PART, RECORDED, LEAST_ROOM = 10, 50_000, 128 << 10


@dataclass(frozen=True)
class Signature:
    """A method's condensed state over trusted images, for one network.

    Attributes
    ----------
    method
        The method.
    granularity
        How activations became neurons.
    points
        The coverage points; their neurons are concatenated in this order.
    state
        The method's condensed state, which scoring reads.
    model
        The specification of the network that it belongs to.
    fingerprint
        The fingerprint of that network's weights.
    classes
        Class names.
    precision
        The precision in which the network computed the activations; scoring uses the same.
    sums
        The complete state that was condensed; None if it was not kept, or if the condensed state
        can be merged itself.

    Examples
    --------
    >>> signature, *_ = load(Path("runs/latest/signature-ensemble.safetensors"))
    >>> signature.sizes, signature.layout.classes, signature.scorer.columns
    ([16, 32, 32], 10, 9)
    """

    method: Method
    granularity: Granularity
    points: tuple[Point, ...]
    state: State
    model: ModelSpec
    fingerprint: str
    classes: tuple[str, ...]
    precision: Precision = "float32"
    sums: State | None = None

    @property
    def mergeable(self) -> bool:
        """Whether the signature holds what merging needs."""
        return self.method.mergeable or self.sums is not None

    @property
    def to_merge(self) -> State | None:
        """The state that can be merged with another's; None if the signature does not have it."""
        return self.method.complete(self.state) if self.method.mergeable else self.sums

    @property
    def sizes(self) -> list[int]:
        """The number of neurons of each coverage point."""
        return [point.neurons for point in self.points]

    @property
    def layout(self) -> Layout:
        """The assignment of neurons to coverage points."""
        return self.state.layout

    @cached_property
    def scorer(self) -> Scorer:
        """The scorer of the state, created on first use."""
        # It may be created in inference mode, but must allow gradients later.
        with torch.inference_mode(False), runtime.one_thread():
            return self.method.prepare(self.state)

    def evidence(self, logits: Tensor, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the evidence against trust, float64 of shape (B, P + L).

        The P columns of the coverage points, see `Scorer`, and the L columns of the logits.

        Parameters
        ----------
        logits
            Shape (B, number of classes).
        neurons
            Shape (B, N).
        classes
            The class against which each image is measured, int64 of shape (B,).
        """
        return self._with_logits(self.scorer(neurons, classes), logits)

    def soft_evidence(self, logits: Tensor, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return a differentiable substitute of `evidence`, with the same parameters."""
        return self._with_logits(self.scorer.soft(neurons, classes), logits)

    def _with_logits(self, evidence: Tensor, logits: Tensor) -> Tensor:
        if not self.arrangement.logits:
            return evidence
        return torch.cat([evidence, read_logits(self.method.logit_evidence, logits)], 1)

    @cached_property
    def arrangement(self) -> Arrangement:
        """The meaning of the columns of the evidence."""
        return Arrangement.of(self.method, len(self.points))

    def to(self, device: torch.device) -> "Signature":
        """Return a copy of the signature with its state on a device."""
        return replace(self, state=self.state.to(device))

    def check_model(self, model: Classifier, where: object) -> None:
        """Raise a CovcliError unless the signature was built from exactly this network."""
        if files.fingerprint(model.state_dict()) != self.fingerprint:
            raise CovcliError(
                "belongs to another checkpoint: the weights' fingerprints differ",
                where=where,
                fix="build one with `covcli build-signature CHECKPOINT`",
            )
        if not model.shows(self.points, self.granularity):
            raise CovcliError("names coverage points that the network does not have", where=where)


def layout_of(points: Sequence[Point], classes: int) -> Layout:
    """Return the layout of coverage points."""
    sizes, values = [p.neurons for p in points], [p.values for p in points]
    return Layout(classes, tuple(sizes), tuple(values))


def condensed(signature: Signature, sums: State, model: Classifier, keep: bool) -> Signature:
    """Return a signature with the condensed state of complete sums.

    Parameters
    ----------
    signature
        The signature.
    sums
        The complete state.
    model
        The network; the signature takes at most a tenth of its weights' bytes if it has few
        classes.
    keep
        Whether to keep the sums for merging.
    """
    room = max(LEAST_ROOM, weights_bytes(model) // PART - RECORDED)
    with torch.inference_mode(False), runtime.one_thread():
        state = signature.method.condense(sums, room)
    kept = sums if keep and not signature.method.mergeable else None
    return replace(signature, state=state, sums=kept)


def weights_bytes(model: Classifier) -> int:
    """Return the bytes of a network's weights and buffers."""
    return sum(tensor.nbytes for tensor in model.network.state_dict().values())


def save(path: Path, signature: Signature, calibration: Calibration, record: Record) -> None:
    """Write a signature with its calibration and its record, atomically.

    Raises
    ------
    CovcliError
        If the file cannot be written.

    Examples
    --------
    >>> from pathlib import Path
    >>> parts = load(Path("runs/latest/signature-ensemble.safetensors"))
    >>> save(Path("copy.safetensors"), *parts)
    >>> load(Path("copy.safetensors"))[2] == parts[2]
    True
    """
    tensors = {f"state.{name}": tensor for name, tensor in signature.state.tensors.items()}
    if signature.sums is not None:
        tensors |= {f"sums.{name}": tensor for name, tensor in signature.sums.tensors.items()}
    combination = calibration.combination
    tensors |= {f"combination.{name}": getattr(combination, name) for name in COMBINATION}
    if combination.tails is not None:
        tensors |= {f"tails.{name}": getattr(combination.tails, name) for name in TAILS}
    tensors |= {f"calibration.{name}": getattr(calibration, name) for name in RANKING}
    if calibration.wrong is not None:
        tensors["calibration.wrong"] = calibration.wrong
    metadata = {
        "method": signature.method.spec(),
        "granularity": signature.granularity,
        "points": [vars(point) for point in signature.points],
        "reductions": signature.state.reductions,
        "sums": None if signature.sums is None else signature.sums.reductions,
        "model": signature.model.as_dict(),
        "fingerprint": signature.fingerprint,
        "classes": list(signature.classes),
        "precision": signature.precision,
        "floor": combination.floor,
        "guarantee": vars(calibration.guarantee),
        "record": record.as_dict(),
    }
    save_signature(path, tensors, metadata)


def load(path: Path) -> tuple[Signature, Calibration, Record]:
    """Read a file that `save` wrote.

    Raises
    ------
    CovcliError
        If the file is missing, damaged, of another kind, or inconsistent.

    Examples
    --------
    >>> from pathlib import Path
    >>> signature, calibration, record = load(Path("runs/latest/signature-ensemble.safetensors"))
    >>> signature.method.name, record.trusted.spec, record.calibration_images
    ('ensemble', 'digits', 359)
    """
    tensors, metadata = load_signature(path)
    try:
        method = make_method(metadata["method"])
        granularity = metadata["granularity"]
        points = tuple(Point(**entry) for entry in metadata["points"])
        model = ModelSpec.from_dict(metadata["model"], path)
        layout = layout_of(points, len(metadata["classes"]))
        state = _state(layout, tensors, "state", metadata["reductions"])
        sums = metadata["sums"]
        scales = {name: tensors[f"combination.{name}"] for name in COMBINATION}
        logits = LOGIT_EVIDENCE[method.logit_evidence]
        tails = Tails(*(tensors[f"tails.{n}"] for n in TAILS)) if logits else None
        combination = Combination(
            floor=float(metadata["floor"]), logits=logits, tails=tails, **scales
        )
        ranking = {name: tensors[f"calibration.{name}"] for name in RANKING}
        guarantee = _read_guarantee(metadata["guarantee"])
        wrong = tensors.get("calibration.wrong")
        calibration = Calibration(combination, wrong=wrong, guarantee=guarantee, **ranking)
        signature = Signature(
            method, granularity, points, state, model,
            str(metadata["fingerprint"]), tuple(str(name) for name in metadata["classes"]),
            precision(metadata["precision"]),
            None if sums is None else _state(layout, tensors, "sums", sums),
        )  # fmt: skip
        _check(signature, calibration)
        record = Record.from_dict(metadata["record"], len(signature.classes))
        record = record.known_to(signature.fingerprint)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CovcliError(f"is inconsistent ({error!r})", where=path) from None
    return signature, calibration, record


def _state(
    layout: Layout, tensors: Mapping[str, Tensor], kind: str, reductions: dict[str, Reduction]
) -> State:
    """Return the state of a kind from a file's tensors; raise a KeyError if one is missing."""
    return State(layout, {name: tensors[f"{kind}.{name}"] for name in reductions}, reductions)


def _read_guarantee(entry: dict[str, Any]) -> Guarantee:
    """Return a guarantee from a file; raise a KeyError, TypeError or ValueError if malformed."""
    alpha, mode, max_error = entry["alpha"], entry["mode"], entry["max_error"]
    rates = [alpha] if max_error is None else [alpha, max_error]
    if not all(isinstance(rate, float) and 0 < rate < 1 for rate in rates) or len(entry) != 3:
        raise ValueError("a malformed guarantee")
    if mode not in MODES:
        raise ValueError("an unknown guarantee")
    return Guarantee(alpha, mode, max_error)


def _check(signature: Signature, calibration: Calibration) -> None:
    """Raise a ValueError unless every part has a valid shape, type and values."""
    if signature.granularity not in GRANULARITIES:
        raise ValueError(f"granularity {signature.granularity!r}")
    if not signature.points or any(not 1 <= p.values <= p.neurons for p in signature.points):
        raise ValueError("a coverage point without neurons")
    if len(signature.classes) != signature.model.classes:
        raise ValueError("other classes than the network has")
    signature.method.check(signature.state)
    if signature.sums is not None:
        check_tensors(signature.sums, signature.method.expected(signature.layout))
    _check_combination(calibration.combination, signature)
    _check_ranking(calibration, signature.model.classes)


def _is_finite(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64 and bool(tensor.isfinite().all())


def _check_combination(combination: Combination, signature: Signature) -> None:
    """Raise a ValueError unless a combination can be that of the signature's evidence."""
    tensors = [getattr(combination, name) for name in COMBINATION]
    if not all(map(_is_finite, tensors)):
        raise ValueError("a combination that is not finite")
    columns = signature.method.kinds * len(signature.points)
    generalists = signature.arrangement.generalists(columns)
    experts = len(combination.weights)
    voices = len(generalists) + experts
    shapes = [(columns,), (columns,), generalists.shape, (experts, columns), (voices,), (voices,)]
    if [tuple(tensor.shape) for tensor in tensors] != shapes:
        raise ValueError("a combination of other columns")
    if not torch.equal(combination.generalists, generalists):
        raise ValueError("generalists of other columns")
    if bool((combination.scale <= 0).any() | (combination.spread <= 0).any()):
        raise ValueError("a calibration without scale")
    if not math.isfinite(combination.floor) or bool((combination.weights < 0).any()):
        raise ValueError("an invalid combination")
    _check_tails(combination.tails, len(signature.arrangement.logits))


def _check_ranking(calibration: Calibration, classes: int) -> None:
    """Raise a ValueError unless the scores of calibration images can be those of a network."""
    scores, predicted = calibration.scores, calibration.predicted
    if not _is_finite(scores) or not _is_finite(calibration.softmax):
        raise ValueError("calibration scores that are not finite")
    if scores.ndim != 1 or len(scores) < 1 or scores.shape != calibration.softmax.shape:
        raise ValueError("calibration scores of other shapes")
    if bool((scores.diff() < 0).any()):
        raise ValueError("calibration scores out of order")
    if predicted.dtype != torch.int64 or predicted.shape != scores.shape:
        raise ValueError("calibration classes of another shape or type than the scores")
    if bool(((predicted < 0) | (predicted >= classes)).any()):
        raise ValueError("calibration classes that the network does not have")
    fitting, wrong = calibration.fitting, calibration.wrong
    if fitting.dtype != torch.bool or fitting.ndim != 1 or int((~fitting).sum()) != len(scores):
        raise ValueError("other calibration images than scores")
    if wrong is not None and (wrong.dtype != torch.bool or wrong.shape != scores.shape):
        raise ValueError("calibration answers of another shape or type than the scores")


def _check_tails(tails: Tails | None, columns: int) -> None:
    """Raise a ValueError unless the tails can be those of so many columns of the logits."""
    if tails is None:
        return
    for tensor in (tails.knots, tails.slopes):
        if tensor.shape != (2 + columns, len(SHARES)) or tensor.dtype != torch.float64:
            raise ValueError("tails of other columns")
        if not bool(tensor.isfinite().all()):
            raise ValueError("tails that are not finite")
    if bool((tails.slopes <= 0).any()) or bool((tails.knots.diff(dim=1) < 0).any()):
        raise ValueError("tails that cannot be")


def save_signature(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON document as a signature file, with a checksum."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    document = {"schema": SIGNATURE_SCHEMA, **metadata}
    document["checksum"] = _checksum(stored, document)
    text = json.dumps(document, allow_nan=False, sort_keys=True)
    write_bytes(path, safetensors.torch.save(stored, {"covcli": text}))


def load_signature(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a signature's tensors and its document.

    Raises
    ------
    CovcliError
        If the file is missing, of another kind or version, damaged, or not finite.
    """
    with reading(path, "is not a covcli signature", says=True), open_regular(path) as file:
        content = file.read()
        metadata = file_checks.parse_json(file_checks.safetensors_metadata(content)["covcli"])
        tensors = safetensors.torch.load(content)
    if not isinstance(metadata, dict) or metadata.get("schema") != SIGNATURE_SCHEMA:
        reason = f"has another schema, this covcli reads {SIGNATURE_SCHEMA}"
        raise CovcliError(
            reason, where=path, fix="build it again: covcli build-signature CHECKPOINT"
        )
    if metadata.get("checksum") != _checksum(tensors, metadata):
        raise CovcliError("is damaged: its content does not match its checksum", where=path)
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> str:
    """Return the digest of a signature's tensors and of its document without the digest."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True) + fingerprint(tensors)
    return hashlib.sha256(text.encode()).hexdigest()
