"""Explanations of verdicts: which coverage points and channels left their range, and how far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from covcli.core.progress import Silent
from covcli.data.images import ImageSet
from covcli.evaluation.scores import MeasuredSet
from covcli.models.points import Outputs, Point
from covcli.models.pooling import locate
from covcli.models.sweep import to_network
from covcli.reporting.documents import Explanation, LeftChannel, PointShare
from covcli.reporting.per_image import ExplainedImage
from covcli.signature.judge import Judge
from covcli.signature.signature import Signature

POINTS = 3  # the number of points of an image whose channels are listed
CHANNELS = 3  # the number of channels listed for such a point


def explain(judge: Judge, images: ImageSet, rows: Sequence[int]) -> list[Explanation]:
    """Run the network on some images again, and attribute each score to points and channels.

    Parameters
    ----------
    judge
        The judge of the set.
    images
        The set; its name and class names appear in the explanations.
    rows
        Positions of the images to explain.

    Raises
    ------
    CovcliError
        If an activation is not finite.

    Examples
    --------
    >>> from pathlib import Path
    >>> from covcli.data import datasets
    >>> from covcli.signature import judge as judges
    >>> run = Path("runs/latest")
    >>> judge, _ = judges.load(run / "checkpoint.pt", run / "signature-ensemble.safetensors")
    >>> (explanation,) = explain(judge, datasets.load("noise:uniform?limit=3", "test"), [2])
    >>> explanation.row, explanation.untrusted, round(sum(p.share for p in explanation.points), 6)
    (2, True, 1.0)
    """
    signature = judge.signature
    chosen = images.select(torch.tensor(rows, dtype=torch.int64))
    shapes: dict[str, tuple[int, ...]] = {}

    def see(point: Point, output: Tensor) -> None:
        shapes[point.name] = tuple(output.shape[1:])

    explanations: list[Explanation] = []
    with Outputs(judge.model.network, signature.points, see):
        for batch in judge.sweep(chosen, Silent(), images.name):
            verdicts = judge(batch.logits, batch.neurons)
            z, shares = by_point(judge, verdicts.evidence)
            view = _View.at(signature, shapes, batch.neurons, verdicts.predicted)
            for i, row in enumerate(batch.rows.tolist()):
                points = view.points(i, z[i], shares[i])
                explanation = Explanation(
                    set=images.name,
                    row=int(rows[row]),
                    predicted=signature.classes[int(verdicts.predicted[i])],
                    label=_label(chosen, row),
                    score=float(verdicts.score[i]),
                    p_value=float(verdicts.p_value[i]),
                    untrusted=bool(verdicts.untrusted[i]),
                    points=points,
                    logits=_share_of_logits(signature, shares[i]),
                    mapped=view.mapped(points),
                )
                explanations.append(explanation)
    return explanations


def _share_of_logits(signature: Signature, shares: Tensor) -> float:
    return max(0.0, 1 - float(shares.sum())) if signature.arrangement.logits else 0.0


def heat_map(judge: Judge, images: ImageSet, explanation: Explanation) -> np.ndarray | None:
    """Return the output of the worst channel at the point `mapped`, float32 of shape (h, w)."""
    point = next((p for p in judge.signature.points if p.name == explanation.mapped), None)
    if point is None:
        return None
    listed = next(p.channels for p in explanation.points if p.name == point.name)
    seen: list[Tensor] = []

    def see(point: Point, output: Tensor) -> None:
        seen.append(output.select(point.channel_dim, listed[0].channel)[0].clone())

    model = judge.model
    pixels = images.batch(torch.tensor([explanation.row]), model.spec.shape)
    with Outputs(model.network, [point], see), torch.inference_mode():
        model(to_network(pixels, model.mean.device))
    heat: np.ndarray = seen[0].float().cpu().numpy()
    return heat


def explain_sets(
    judge: Judge, sets: Mapping[str, MeasuredSet], most: int
) -> tuple[list[Explanation], list[ExplainedImage]]:
    """Explain the most suspicious images of each set, and collect the data for their pictures.

    Parameters
    ----------
    judge
        The judge of the sets.
    sets
        The sets, by name.
    most
        The number of images of each set.

    Returns
    -------
    tuple
        The explanations, and the pixels and the `heat_map` of each.
    """
    explanations: list[Explanation] = []
    pictures: list[ExplainedImage] = []
    if most == 0:
        return explanations, pictures
    for name, entry in sets.items():
        rows = np.argsort(-entry.measured.scores["coverage"], kind="stable")[:most].tolist()
        named = replace(entry.images, name=name)
        for explanation in explain(judge, named, rows):
            row = torch.tensor([explanation.row])
            image = named.batch(row, judge.model.spec.shape)[0].numpy()
            pictures.append(ExplainedImage(image, heat_map(judge, named, explanation)))
            explanations.append(explanation)
    return explanations, pictures


def by_point(judge: Judge, evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest z and the share of each point, over the blocks of the evidence.

    Parameters
    ----------
    judge
        What gave the evidence.
    evidence
        float64 of shape (B, P).

    Returns
    -------
    tuple of Tensor
        Both float64 of shape (B, L) for L coverage points; an image's shares sum to 1.
    """
    z, shares = judge.calibration.combination.shares(evidence)
    blocks = (len(evidence), -1, len(judge.signature.points))
    return z.view(blocks).amax(1), shares.view(blocks).sum(1)


def _label(images: ImageSet, row: int) -> str | None:
    if images.labels is None:
        return None
    label = int(images.labels[row])
    return images.classes[label] if 0 <= label < len(images.classes) else str(label)


@dataclass(frozen=True)
class _View:
    """A method's results on the neurons of a batch; the arrays have shape (B, N)."""

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
    ) -> "_View":
        scorer = signature.scorer
        low, high = scorer.span(classes)
        parts = (
            neurons.double(), scorer.costs(neurons, classes),
            scorer.inside(neurons, classes), low.double(), high.double(),
        )  # fmt: skip
        return cls(signature, shapes, *(part.cpu().numpy() for part in parts))

    def points(self, i: int, z: Tensor, shares: Tensor) -> list[PointShare]:
        """Rank the coverage points of image i, and list the channels of the first ones."""
        begins = np.cumsum([0, *self.signature.sizes]).tolist()
        ranked = []
        for rank, j in enumerate(shares.argsort(descending=True, stable=True).tolist()):
            point, begin = self.signature.points[j], begins[j]
            left = begin + np.flatnonzero(~self.inside[i, begin : begins[j + 1]])
            channels = self._channels(i, point, begin, left) if rank < POINTS else []
            coverage = 1 - len(left) / point.neurons
            ranked.append(
                PointShare(point.name, float(z[j]), float(shares[j]), coverage, len(left), channels)
            )
        return ranked

    def mapped(self, points: Sequence[PointShare]) -> str | None:
        """Return the first point with listed channels whose output has positions; None without."""
        shown = (p.name for p in points if p.channels and len(self.shapes[p.name]) == 3)
        return next(shown, None)

    def _channels(self, i: int, point: Point, begin: int, left: np.ndarray) -> list[LeftChannel]:
        """List the worst neurons outside their range; `begin` is the point's first column."""
        distance, widths = self._outside(i, left)
        worst = np.lexsort((-distance, -widths, -self.costs[i, left]))[:CHANNELS]
        channels = []
        for place, by in zip(left[worst].tolist(), widths[worst].tolist(), strict=True):
            channel, label = locate(
                place - begin, self.shapes[point.name], point.channel_dim,
                self.signature.granularity,
            )  # fmt: skip
            value, low, high = (float(a[i, place]) for a in (self.values, self.low, self.high))
            channels.append(LeftChannel(place - begin, channel, label, value, low, high, by))
        return channels

    def _outside(self, i: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the distance of neurons of image i from their range, and in units of its width."""
        value, low, high = (a[i, places] for a in (self.values, self.low, self.high))
        distance = np.maximum(np.maximum(low - value, value - high), 0)
        width = high - low
        measurable = (width > 0) & np.isfinite(width)
        infinite = np.full_like(width, np.inf)
        return distance, np.divide(distance, width, out=infinite, where=measurable)
