"""The differences between two signatures: the coverage points, channels and classes that moved.

Points and classes are matched by name. Every distance is computed for each class and neuron, in
units of the first signature: how far an end of the trusted range moved, in widths of that range,
and how far the distribution of the activations moved, if the method stores one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.methods.contributions import BinScorer
from covcli.methods.ensemble import EnsembleScorer
from covcli.methods.gaussian import SPAN, GaussScorer
from covcli.methods.ranges import SectionScorer
from covcli.methods.ranks import NeuronRank
from covcli.methods.state import Granularity
from covcli.models.points import Point
from covcli.models.pooling import name_channel
from covcli.signature.calibration import Calibration
from covcli.signature.record import Record
from covcli.signature.signature import Signature

RANGES = "ranges, in widths"
MOST_CHANNELS = 10
# A range narrower than this share of its neuron's mean width over the classes counts as that wide.
LEAST_WIDTH = 0.05
# The name of the distance, the distances, and their mean by chance if it is known.
Distances: TypeAlias = tuple[str, Tensor, float | None]
Relation: TypeAlias = Literal["same", "data", "network", "method"]
RELATIONS: Mapping[Relation, str] = {
    "same": "The same network, data and method: nothing should have moved.",
    "data": "The same network on other data: differences come from the data.",
    "network": (
        "Two networks of one architecture: differences come from the release. Channels of a "
        "network that was trained again have no counterpart in the old one."
    ),
    "method": "The same network and data with another method: differences come from the method.",
}


@dataclass(frozen=True)
class StoredSignature:
    """A signature read from a file: a name for it, its parts and its record."""

    name: str
    signature: Signature
    calibration: Calibration
    record: Record


@dataclass(frozen=True)
class PointChange:
    """How far a coverage point moved.

    Attributes
    ----------
    name, neurons
        The point.
    moved
        The mean distance over its neurons and the classes.
    largest
        The largest one.
    classes
        The mean distance over its neurons for each class, in the order of `Change.classes`.
    """

    name: str
    neurons: int
    moved: float
    largest: float
    classes: list[float]


@dataclass(frozen=True)
class ChannelChange:
    """A neuron that moved far for one class.

    Attributes
    ----------
    point, neuron, label, class_name
        The neuron and the class.
    moved
        The distance.
    before, after
        The ends of its trusted range.
    """

    point: str
    neuron: int
    label: str
    class_name: str
    moved: float
    before: tuple[float, float]
    after: tuple[float, float]


@dataclass(frozen=True)
class Change:
    """The changes by one kind of distance.

    Attributes
    ----------
    distance
        Name and unit of the distance.
    moved
        The mean over the points.
    by_chance
        The expected mean distance for other images of the same kind; None if it is unknown.
    classes
        Names of the classes of which both signatures have trusted images.
    by_class
        The mean distance of each class, over all neurons.
    points, channels
        The points in the network's order, and the neurons that moved farthest.

    Examples
    --------
    >>> from covcli import compare
    >>> signature = "runs/latest/signature-ensemble.safetensors"
    >>> change = compare(signature, signature).signatures.changes[0]
    >>> change.distance, change.moved, len(change.classes), len(change.points)
    ('ranges, in widths', 0.0, 10, 3)
    """

    distance: str
    moved: float
    by_chance: float | None
    classes: list[str]
    by_class: list[float]
    points: list[PointChange]
    channels: list[ChannelChange]


@dataclass(frozen=True)
class SignatureChange:
    """The differences between two signatures.

    Attributes
    ----------
    relation, meaning
        What the two have in common, and what a difference then means.
    thresholds
        The overall score threshold of each.
    only_before, only_after
        Coverage points and classes of one signature only.
    changes
        The changes by each kind of distance.

    Examples
    --------
    >>> from covcli import compare
    >>> signature = "runs/latest/signature-ensemble.safetensors"
    >>> change = compare(signature, signature).signatures
    >>> [point.moved for point in change.changes[0].points]
    [0.0, 0.0, 0.0]
    """

    relation: Relation
    meaning: str
    thresholds: tuple[float, float]
    only_before: list[str]
    only_after: list[str]
    changes: list[Change]

    @property
    def largest(self) -> float:
        """The largest distance of a coverage point, by the first kind of distance."""
        return max(point.moved for point in self.changes[0].points)


@dataclass(frozen=True)
class _Pair:
    """Two signatures with their common points and classes.

    Attributes
    ----------
    before, after
        The signatures.
    points
        The common points, as recorded in the first signature.
    columns
        The indices of their neurons in each signature, int64 of shape (N,) each.
    classes
        Names of the classes of which both have trusted images.
    rows
        The indices of these classes in each signature, int64 of shape (K,) each.
    """

    before: StoredSignature
    after: StoredSignature
    points: list[Point]
    columns: tuple[Tensor, Tensor]
    classes: list[str]
    rows: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, before: StoredSignature, after: StoredSignature) -> "_Pair":
        """Match points and classes by name; raise a CovcliError if none are common."""
        first, second = before.signature, after.signature
        theirs = {point.name: point.neurons for point in second.points}
        points = [point for point in first.points if theirs.get(point.name) == point.neurons]
        if not points:
            raise CovcliError(f"shares no coverage point with {before.name}", where=after.name)
        counts = [
            dict(zip(each.signature.classes, each.record.trusted_counts, strict=True))
            for each in (before, after)
        ]
        classes = [name for name in first.classes if all(count.get(name) for count in counts)]
        if not classes:
            raise CovcliError(f"shares no class with {before.name}", where=after.name)
        rows = (torch.tensor([each.classes.index(name) for name in classes])
                for each in (first, second))  # fmt: skip
        columns = (_columns(each, points) for each in (first, second))
        return cls(before, after, points, _two(columns), classes, _two(rows))

    @property
    def sides(self) -> list[tuple[StoredSignature, Tensor, Tensor]]:
        """Each signature with the indices of the classes and of the neurons."""
        return [(self.before, self.rows[0], self.columns[0]),
                (self.after, self.rows[1], self.columns[1])]  # fmt: skip

    @cached_property
    def spans(self) -> list[tuple[Tensor, Tensor]]:
        """The ends of the trusted ranges of each signature, float64 of shape (K, N)."""
        spans = []
        for stored, rows, columns in self.sides:
            low, high = stored.signature.scorer.span(rows)
            spans.append((low[:, columns].double(), high[:, columns].double()))
        return spans


def compare_signatures(before: StoredSignature, after: StoredSignature) -> SignatureChange:
    """Measure the differences from one signature to another.

    Raises
    ------
    CovcliError
        If they have no common coverage point or no common class, or another granularity.
    """
    first, second = before.signature, after.signature
    if first.granularity != second.granularity:
        raise CovcliError(
            f"reads {second.granularity} neurons, {before.name} {first.granularity} ones",
            where=after.name,
        )
    pair = _Pair.of(before, after)
    relation = _relation(before, after)
    kinds: list[Distances] = [(RANGES, range_distances(pair), None)]
    if (distributions := _distributions(pair)) is not None:
        kinds.append(distributions)
    changes = [_measured(kind, pair) for kind in kinds if bool(kind[1].isfinite().any())]
    if not changes:
        raise CovcliError(f"has nothing to be measured beside {before.name}", where=after.name)
    rules = [
        each.calibration.rule(each.calibration.guarantee, each.signature.classes)
        for each in (before, after)
    ]
    return SignatureChange(
        relation=relation,
        meaning=RELATIONS[relation],
        thresholds=(rules[0].overall, rules[1].overall),
        only_before=_only(first, second),
        only_after=_only(second, first),
        changes=changes,
    )


def _relation(before: StoredSignature, after: StoredSignature) -> Relation:
    if before.signature.fingerprint != after.signature.fingerprint:
        return "network"
    if before.record.trusted.images != after.record.trusted.images:
        return "data"
    return "same" if before.signature.method == after.signature.method else "method"


def _only(one: Signature, other: Signature) -> list[str]:
    theirs = {*(point.name for point in other.points), *other.classes}
    own = (*(point.name for point in one.points), *one.classes)
    return [name for name in own if name not in theirs]


def _two(values: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    one, two = values
    return one, two


def _columns(signature: Signature, points: Sequence[Point]) -> Tensor:
    """Return the indices of the neurons of some points among all neurons of a signature."""
    begins = dict(zip((p.name for p in signature.points), np.cumsum([0, *signature.sizes]).tolist(),
                      strict=False))  # fmt: skip
    return torch.cat([torch.arange(begins[p.name], begins[p.name] + p.neurons) for p in points])


# Distances, float64 of shape (classes, neurons); NaN for no distance.


def range_distances(pair: _Pair) -> Tensor:
    """Return the Hausdorff distance of the two ranges of each neuron, in widths of the first.

    It is the larger of the distances by which the two ends moved.
    """
    (low, high), (new_low, new_high) = pair.spans
    distance = torch.maximum((new_low - low).abs(), (new_high - high).abs())
    return distance / _widths(low, high)


def _widths(low: Tensor, high: Tensor) -> Tensor:
    """Return the widths of ranges, at least a share of the neuron's mean over the classes."""
    width = high - low
    typical = width.mean(0)
    least = torch.where(typical > 0, LEAST_WIDTH * typical, 1.0)
    return torch.maximum(width, least)


def _distributions(pair: _Pair) -> Distances | None:
    """Return the distances of the distributions that two signatures of one method store."""
    if len({type(stored.signature.method) for stored, _, _ in pair.sides}) > 1:
        return None
    scorer = pair.before.signature.scorer
    if isinstance(scorer, EnsembleScorer | GaussScorer):
        return (
            "normal distributions (2-Wasserstein), in deviations",
            _normal(pair), _chance(pair),
        )  # fmt: skip
    if isinstance(scorer, SectionScorer):
        return "activations (1-Wasserstein), in widths", _sections(pair), None
    if isinstance(scorer, BinScorer):
        return "contributions (Jensen–Shannon)", _bins(pair), None
    if isinstance(pair.before.signature.method, NeuronRank):
        return "share of images in the top", _ranks(pair), None
    return None


def _normal(pair: _Pair) -> Tensor:
    """Return √((μ − μ')² + (σ − σ')²)/σ of each mean or value; NaN for maxima."""
    parts = []
    for stored, rows, columns in pair.sides:
        low, high = _gauss(stored.signature).span(rows)
        low, high = low[:, columns].double(), high[:, columns].double()
        parts.append(((low + high) / 2, (high - low) / (2 * SPAN)))
    (mean, deviation), (new_mean, new_deviation) = parts
    return torch.hypot(new_mean - mean, new_deviation - deviation) / deviation


def _gauss(signature: Signature) -> GaussScorer:
    scorer = signature.scorer
    assert isinstance(scorer, EnsembleScorer | GaussScorer)
    return scorer.gauss if isinstance(scorer, EnsembleScorer) else scorer


def _chance(pair: _Pair) -> float:
    """Return the expected |μ − μ'|/σ, averaged over the classes, if only the draw differs."""
    counts = [
        torch.tensor(stored.record.trusted_counts)[rows].double() for stored, rows, _ in pair.sides
    ]
    return float((2 / math.pi * (1 / counts[0] + 1 / counts[1])).sqrt().mean())


def _sections(pair: _Pair) -> Tensor:
    """Return the 1-Wasserstein distance of activations, spread evenly over their sections."""
    # Class by class, to save memory with many classes.
    apart = [
        wasserstein(*_steps(pair, 0, k), *_steps(pair, 1, k)) for k in range(len(pair.classes))
    ]
    return torch.stack(apart) / _widths(*pair.spans[0])


def _steps(pair: _Pair, side: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the edges of a class's sections, and the share of images up to each, (N, Q + 1)."""
    stored, rows, columns = pair.sides[side]
    low, high = (end[k, :, None] for end in pair.spans[side])
    counts = stored.signature.state["sections"][rows[k]][columns].double()
    shares = torch.nn.functional.pad(counts.cumsum(1) / counts.sum(1, keepdim=True), (1, 0))
    return low + (high - low) * torch.linspace(0, 1, shares.shape[1], dtype=torch.float64), shares


def wasserstein(edges: Tensor, shares: Tensor, new_edges: Tensor, new_shares: Tensor) -> Tensor:
    """Return ∫|F⁻¹ − G⁻¹| of distribution functions that are linear between edges.

    Parameters
    ----------
    edges, new_edges
        Ascending, shapes (..., n) and (..., m).
    shares, new_shares
        The functions at the edges, ascending from 0 to 1, of the same shapes.
    """
    levels = torch.cat([shares, new_shares], -1).sort(-1).values
    middle = (levels[..., 1:] + levels[..., :-1]) / 2
    weight = levels[..., 1:] - levels[..., :-1]
    # Between two levels both quantile functions are linear, and so is their difference.
    ends = []
    for towards in (levels[..., :-1], levels[..., 1:]):
        near = middle + (towards - middle) * (1 - 1e-9)
        ends.append(_quantiles(edges, shares, near) - _quantiles(new_edges, new_shares, near))
    one, two = ends
    crossing = one * two < 0
    total = one.abs() + two.abs()
    mean = torch.where(
        crossing, (one.square() + two.square()) / (2 * total.clamp_min(1e-300)), total / 2
    )
    return (mean * weight).sum(-1)


def _quantiles(edges: Tensor, shares: Tensor, levels: Tensor) -> Tensor:
    """Return where a distribution function reaches levels inside (0, 1)."""
    place = torch.searchsorted(shares.contiguous(), levels.contiguous()).clamp(
        1, shares.shape[-1] - 1
    )
    below, above = (shares.gather(-1, place - k) for k in (1, 0))
    left, right = (edges.gather(-1, place - k) for k in (1, 0))
    rise = (above - below).clamp_min(1e-300)
    return left + (right - left) * ((levels - below) / rise).clamp(0, 1)


def _bins(pair: _Pair) -> Tensor:
    """Return the Jensen–Shannon distance of the bins' counts, from 0 to 1."""
    counts = [stored.signature.state["counts"][rows][:, columns].double().numpy()
              for stored, rows, columns in pair.sides]  # fmt: skip
    if counts[0].shape != counts[1].shape:
        return torch.full(counts[0].shape[:2], math.nan, dtype=torch.float64)
    return torch.from_numpy(np.asarray(jensenshannon(*counts, base=2, axis=2)))


def _ranks(pair: _Pair) -> Tensor:
    """Return by how much the share of images with a neuron in their top changed."""
    shares = []
    for stored, rows, columns in pair.sides:
        state = stored.signature.state
        shares.append(state["top"][rows][:, columns] / state["count"][rows].double()[:, None])
    return (shares[1] - shares[0]).abs()


# From distances to results


def _measured(kind: Distances, pair: _Pair) -> Change:
    name, distances, by_chance = kind
    known = torch.where(distances.isfinite(), distances, math.nan)
    parts = known.split([point.neurons for point in pair.points], 1)
    points = [
        PointChange(p.name, p.neurons, _mean(part), _most(part), [_mean(row) for row in part])
        for p, part in zip(pair.points, parts, strict=True)
        if bool(part.isfinite().any())
    ]
    return Change(
        distance=name,
        moved=float(np.mean([point.moved for point in points])),
        by_chance=by_chance,
        classes=pair.classes,
        by_class=[_mean(row) for row in known],
        points=points,
        channels=_farthest(known, pair),
    )


def _mean(values: Tensor) -> float:
    return float(values.nanmean())


def _most(values: Tensor) -> float:
    return float(values.nan_to_num(nan=0.0).max())


def _farthest(known: Tensor, pair: _Pair) -> list[ChannelChange]:
    """Return the neurons that moved farthest, each with the class of its largest distance."""
    worst, classes = known.nan_to_num(nan=-1.0).max(0)
    order = worst.argsort(descending=True, stable=True)[:MOST_CHANNELS]
    owners = [point for point in pair.points for _ in range(point.neurons)]
    begins = [n for point in pair.points for n in range(point.neurons)]
    neurons = []
    for column in order[worst[order] > 0].tolist():
        k, point, neuron = int(classes[column]), owners[column], begins[column]
        ends = [(float(low[k, column]), float(high[k, column])) for low, high in pair.spans]
        label = _label(point, neuron, pair.before.signature.granularity)
        neurons.append(
            ChannelChange(
                point.name, neuron, label, pair.classes[k], float(worst[column]), ends[0], ends[1]
            )
        )
    return neurons


def _label(point: Point, neuron: int, granularity: Granularity) -> str:
    """Describe a neuron as `locate` does, without the shape of the point's output."""
    if granularity == "contribution" or point.neurons == 2 * point.values:
        return name_channel(neuron, point.values, granularity)[1]
    return f"unit {neuron}"
