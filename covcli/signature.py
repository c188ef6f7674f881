"""The signature: what a network's neurons do on trusted data, with its calibration, in one file."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covcli import store
from covcli.activations import GRANULARITIES, Granularity, Point
from covcli.calibration import Calibration
from covcli.errors import CovcliError
from covcli.methods import Method, State, make_method
from covcli.models import Classifier, ModelSpec

CALIBRATION = ("neurons", "center", "scale", "scores", "softmax")


@dataclass(frozen=True)
class Signature:
    """A method's state folded over trusted data.

    Attributes
    ----------
    method
        How the state is read.
    granularity
        How activations became neurons.
    points
        The coverage points; their neurons stand side by side in this order.
    state
        The method's complete state.
    model
        The specification of the network that it belongs to.
    fingerprint
        The fingerprint of that network's weights.
    classes
        Class names.
    """

    method: Method
    granularity: Granularity
    points: tuple[Point, ...]
    state: State
    model: ModelSpec
    fingerprint: str
    classes: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        """Neurons of each coverage point."""
        return [point.neurons for point in self.points]

    def point_costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the mean cost over each point's neurons, float64 of shape (B, L).

        Parameters
        ----------
        neurons
            Shape (B, N).
        classes
            The class that each image is measured against, shape (B,).
        """
        return self._means(self.method.costs(self.state, neurons, classes))

    def soft_point_costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return what `point_costs` does of costs that have a gradient in the neurons."""
        return self._means(self.method.soft_costs(self.state, neurons, classes))

    def coverage(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the share of each point's neurons inside their range, float64 of shape (B, L)."""
        return self._means(self.method.inside(self.state, neurons, classes))

    def _means(self, values: Tensor) -> Tensor:
        parts = [part.mean(1, dtype=torch.float64) for part in values.split(self.sizes, 1)]
        return torch.stack(parts, 1)

    def to(self, device: torch.device) -> "Signature":
        """Return the signature with its state on a device."""
        return replace(self, state=self.state.to(device))

    def check_model(self, model: Classifier, where: object) -> None:
        """Raise a CovcliError unless the signature was built from exactly this network."""
        if store.fingerprint(model.state_dict()) != self.fingerprint:
            raise CovcliError(
                "belongs to another checkpoint: the weights' fingerprints differ",
                where=where,
                fix="build one with `covcli build-signature CHECKPOINT`",
            )
        if tuple(model.points(self.granularity)) != self.points:
            raise CovcliError("names coverage points that the network does not have", where=where)


def save(
    path: Path, signature: Signature, calibration: Calibration, record: dict[str, Any]
) -> None:
    """Write a signature with its calibration, and a record of how it was made."""
    tensors = {f"state.{name}": tensor for name, tensor in signature.state.tensors.items()}
    tensors |= {f"calibration.{name}": getattr(calibration, name) for name in CALIBRATION}
    metadata = {
        "method": signature.method.spec(),
        "granularity": signature.granularity,
        "points": [vars(point) for point in signature.points],
        "reductions": signature.state.reductions,
        "model": signature.model.as_dict(),
        "fingerprint": signature.fingerprint,
        "classes": list(signature.classes),
        "calibration_floor": calibration.floor,
        "record": record,
    }
    store.save_signature(path, tensors, metadata)


def load(path: Path) -> tuple[Signature, Calibration, dict[str, Any]]:
    """Read what `save` wrote.

    Raises
    ------
    CovcliError
        If the file is missing, damaged, of another kind, or does not hold together.
    """
    tensors, metadata = store.load_signature(path)
    try:
        method = make_method(metadata["method"])
        granularity = metadata["granularity"]
        points = tuple(Point(**entry) for entry in metadata["points"])
        model = ModelSpec.from_dict(metadata["model"], path)
        state = State(
            {name: tensors[f"state.{name}"] for name in metadata["reductions"]},
            metadata["reductions"],
        )
        parts = {name: tensors[f"calibration.{name}"] for name in CALIBRATION}
        calibration = Calibration(floor=float(metadata["calibration_floor"]), **parts)
        signature = Signature(
            method, granularity, points, state, model,
            str(metadata["fingerprint"]), tuple(str(name) for name in metadata["classes"]),
        )  # fmt: skip
        record = dict(metadata["record"])
        _check(signature, calibration)
        _check_record(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CovcliError(f"does not hold together ({error!r})", where=path) from None
    return signature, calibration, record


def _check_record(record: dict[str, Any]) -> None:
    """Raise a KeyError, TypeError or ValueError unless an evaluation can rely on the record."""
    for key in ("trusted", "calibration"):
        entry = record[key]
        if not all(isinstance(entry[name], str) for name in ("spec", "source", "images")):
            raise ValueError(f"a malformed entry {key!r}")
    rows = torch.tensor(record["calibration_rows"], dtype=torch.int64)
    if rows.ndim != 1:
        raise ValueError("malformed calibration rows")


def _check(signature: Signature, calibration: Calibration) -> None:
    """Raise a ValueError unless every part has the shape, type and values that it must have."""
    if signature.granularity not in GRANULARITIES:
        raise ValueError(f"granularity {signature.granularity!r}")
    if not signature.points or any(size < 1 for size in signature.sizes):
        raise ValueError("a coverage point without neurons")
    expected = signature.method.expected(signature.model.classes, sum(signature.sizes))
    found = {k: (v.dtype, tuple(v.shape)) for k, v in signature.state.tensors.items()}
    if found != dict(expected) or len(signature.classes) != signature.model.classes:
        raise ValueError("tensors of other shapes than the points and classes ask for")
    points = len(signature.points)
    if [tuple(getattr(calibration, n).shape) for n in CALIBRATION[:3]] != [(points,)] * 3:
        raise ValueError("a calibration of other points")
    if calibration.neurons.tolist() != [float(size) for size in signature.sizes]:
        raise ValueError("a calibration of other points")
    scores = calibration.scores
    if scores.ndim != 1 or len(scores) < 1 or scores.shape != calibration.softmax.shape:
        raise ValueError("calibration scores of other shapes")
    if bool((scores.diff() < 0).any() | (calibration.softmax.diff() < 0).any()):
        raise ValueError("calibration scores out of order")
    numbers = [getattr(calibration, name) for name in CALIBRATION]
    if not all(t.dtype == torch.float64 and bool(t.isfinite().all()) for t in numbers):
        raise ValueError("a calibration that is not finite")
    if bool((calibration.scale <= 0).any()):
        raise ValueError("a calibration without scale")
    if any(
        bool(t.isnan().any()) for t in signature.state.tensors.values() if t.is_floating_point()
    ):
        raise ValueError("a state that holds NaN")
