"""Explain a flag: which coverage points and channels left their range, and by how much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from covcli.core.progress import Silent
from covcli.data.images import ImageSet
from covcli.models.architectures import Classifier
from covcli.models.points import Outputs, Point
from covcli.models.pooling import locate
from covcli.models.sweep import sweep, to_network
from covcli.signature.calibration import Calibration
from covcli.signature.combination import Combination
from covcli.signature.guarantee import Rule
from covcli.signature.signature import Signature

POINTS = 3  # how many points of an image list their channels
CHANNELS = 3  # how many channels such a point lists


@dataclass(frozen=True)
class LeftChannel:
    """A neuron that left the trusted range of the predicted class.

    Attributes
    ----------
    neuron
        Its number within the coverage point.
    channel, label
        The channel's number, and what is taken of it, as "channel 37, maximum".
    value
        Its activation.
    low, high
        The trusted range; infinite where it has no end on that side.
    outside_by
        How far outside the range the value lies, in widths of the range; infinite where that width
        is none (trusted images gave it one value only) or has no end.
    """

    neuron: int
    channel: int
    label: str
    value: float
    low: float
    high: float
    outside_by: float


@dataclass(frozen=True)
class PointShare:
    """A coverage point's part in the score of an image.

    Attributes
    ----------
    name
        The coverage point.
    z, share
        As of `Combination.shares`: the largest of the point's columns, and their sum.
    coverage, left
        Share of its neurons inside their range, and how many are outside.
    channels
        The worst of those outside: by cost, then by distance in widths of the range, then by
        distance. Listed for the first three points only.
    """

    name: str
    z: float
    share: float
    coverage: float
    left: int
    channels: list[LeftChannel]


@dataclass(frozen=True)
class Explanation:
    """Why an image got its score.

    Attributes
    ----------
    set, row
        The set's name, and the image's row in it, as in scores.csv.gz.
    predicted, label
        Class names; the label is None where unknown.
    score, p_value, untrusted
        The verdict.
    points
        All coverage points, the largest share first.
    mapped
        The first of them that lists a channel and has a height and a width: `heat_map` draws that
        channel. None where there is none.
    """

    set: str
    row: int
    predicted: str
    label: str | None
    score: float
    p_value: float
    untrusted: bool
    points: list[PointShare]
    mapped: str | None


def explain(
    model: Classifier,
    signature: Signature,
    calibration: Calibration,
    images: ImageSet,
    rows: Sequence[int],
    rule: Rule,
) -> list[Explanation]:
    """Run the network on a few images of a set again, and trace each score to points and channels.

    Parameters
    ----------
    model, signature, calibration
        What scored the set.
    images
        The set; its name and class names are taken over.
    rows
        Which of its images to explain.
    rule
        Gives the verdicts.

    Raises
    ------
    CovcliError
        If an activation is not finite.
    """
    points, granularity = signature.points, signature.granularity
    chosen = images.select(torch.tensor(rows, dtype=torch.int64))
    shapes: dict[str, tuple[int, ...]] = {}

    def see(point: Point, output: Tensor) -> None:
        shapes[point.name] = tuple(output.shape[1:])

    made: list[Explanation] = []
    with Outputs(model.network, points, see):
        for batch in sweep(model, chosen, points, granularity, Silent(), images.name):
            best = batch.logits.argmax(1)
            evidence = signature.evidence(batch.neurons, best).cpu()
            scores = calibration.score(evidence)
            p_values, flagged = calibration.p_value(scores), rule.untrusted(scores, best.cpu())
            z, shares = _by_point(calibration.combination, evidence, len(points))
            look = _Look.at(signature, shapes, batch.neurons, best)
            for i, row in enumerate(batch.rows.tolist()):
                ranked = look.points(i, z[i], shares[i])
                made.append(
                    Explanation(
                        set=images.name,
                        row=int(rows[row]),
                        predicted=signature.classes[int(best[i])],
                        label=_label(chosen, row),
                        score=float(scores[i]),
                        p_value=float(p_values[i]),
                        untrusted=bool(flagged[i]),
                        points=ranked,
                        mapped=next(
                            (p.name for p in ranked if p.channels and len(shapes[p.name]) == 3),
                            None,
                        ),
                    )
                )
    return made


def heat_map(
    model: Classifier, signature: Signature, images: ImageSet, explanation: Explanation
) -> np.ndarray | None:
    """Return where the worst channel of the point `mapped` fires, float32 of shape (h, w)."""
    point = next((p for p in signature.points if p.name == explanation.mapped), None)
    if point is None:
        return None
    listed = next(p.channels for p in explanation.points if p.name == point.name)
    seen: list[Tensor] = []

    def see(point: Point, output: Tensor) -> None:
        seen.append(output.select(point.channel_dim, listed[0].channel)[0].clone())

    pixels = images.batch(torch.tensor([explanation.row]), model.spec.shape)
    with Outputs(model.network, [point], see), torch.inference_mode():
        model.eval()(to_network(pixels, model.mean.device))
    found: np.ndarray = seen[0].float().cpu().numpy()
    return found


def explain_sets(
    model: Classifier,
    signature: Signature,
    calibration: Calibration,
    images: Mapping[str, ImageSet],
    scores: Mapping[str, np.ndarray],
    most: int,
    rule: Rule,
) -> tuple[list[Explanation], dict[str, np.ndarray]]:
    """Explain the most suspicious images of each set, and gather what their pictures need.

    Parameters
    ----------
    images, scores
        The sets and their scores, by name.
    most
        How many images of each set.

    Returns
    -------
    tuple
        The explanations, and of number k among them the arrays `explained_k`, uint8 of shape
        (C, H, W), and `explained_k_map`, as of `heat_map` and only where there is one.
    """
    made: list[Explanation] = []
    arrays: dict[str, np.ndarray] = {}
    if most == 0:
        return made, arrays
    for name, images_of_set in images.items():
        rows = np.argsort(-scores[name], kind="stable")[:most].tolist()
        named = replace(images_of_set, name=name)
        for explanation in explain(model, signature, calibration, named, rows, rule):
            key = f"explained_{len(made)}"
            arrays[key] = named.batch(torch.tensor([explanation.row]), model.spec.shape)[0].numpy()
            fires = heat_map(model, signature, named, explanation)
            if fires is not None:
                arrays[f"{key}_map"] = fires
            made.append(explanation)
    return made, arrays


def _by_point(combination: Combination, evidence: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Return the largest z and the share of each point, over the blocks of the evidence."""
    z, shares = combination.shares(evidence)
    blocks = (len(evidence), -1, points)
    return z.view(blocks).amax(1), shares.view(blocks).sum(1)


def _label(images: ImageSet, row: int) -> str | None:
    if images.labels is None:
        return None
    label = int(images.labels[row])
    return images.classes[label] if 0 <= label < len(images.classes) else str(label)


@dataclass(frozen=True)
class _Look:
    """What a method says of the neurons of a batch; the arrays have shape (B, N)."""

    signature: Signature
    shapes: Mapping[str, tuple[int, ...]]
    values: np.ndarray
    costs: np.ndarray
    inside: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def at(
        cls,
        signature: Signature,
        shapes: Mapping[str, tuple[int, ...]],
        neurons: Tensor,
        classes: Tensor,
    ) -> "_Look":
        method, ready, layout = signature.method, signature.ready, signature.layout
        low, high = method.span(ready, layout, classes)
        parts = (
            neurons.double(), method.costs(ready, layout, neurons, classes),
            method.inside(ready, layout, neurons, classes), low.double(), high.double(),
        )  # fmt: skip
        return cls(signature, shapes, *(part.cpu().numpy() for part in parts))

    def points(self, i: int, z: Tensor, shares: Tensor) -> list[PointShare]:
        """Rank the coverage points of image i, and list the channels of the first ones."""
        begins = np.cumsum([0, *self.signature.sizes]).tolist()
        made = []
        for rank, j in enumerate(shares.argsort(descending=True, stable=True).tolist()):
            point, begin = self.signature.points[j], begins[j]
            left = begin + np.flatnonzero(~self.inside[i, begin : begins[j + 1]])
            channels = self._channels(i, point, begin, left) if rank < POINTS else []
            coverage = 1 - len(left) / point.neurons
            made.append(
                PointShare(point.name, float(z[j]), float(shares[j]), coverage, len(left), channels)
            )
        return made

    def _channels(self, i: int, point: Point, begin: int, left: np.ndarray) -> list[LeftChannel]:
        """List the worst of the neurons that left; `begin` is the number of the point's first."""
        distance, widths = self._outside(i, left)
        worst = np.lexsort((-distance, -widths, -self.costs[i, left]))[:CHANNELS]
        made = []
        for place, by in zip(left[worst].tolist(), widths[worst].tolist(), strict=True):
            channel, label = locate(
                place - begin, self.shapes[point.name], point.channel_dim,
                self.signature.granularity,
            )  # fmt: skip
            value, low, high = (float(a[i, place]) for a in (self.values, self.low, self.high))
            made.append(LeftChannel(place - begin, channel, label, value, low, high, by))
        return made

    def _outside(self, i: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how far outside their range those neurons of image i lie, and in widths of it."""
        value, low, high = (a[i, places] for a in (self.values, self.low, self.high))
        distance = np.maximum(np.maximum(low - value, value - high), 0)
        width = high - low
        measurable = (width > 0) & np.isfinite(width)
        infinite = np.full_like(width, np.inf)
        return distance, np.divide(distance, width, out=infinite, where=measurable)
