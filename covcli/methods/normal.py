"""Normal models of low rank: the leading directions of each point's values, and a rest.

Tipping and Bishop, "Probabilistic Principal Component Analysis", Journal of the Royal Statistical
Society B 61 (1999): a covariance UΛUᵀ + σ²(I − UUᵀ), with the leading eigenvalues Λ, their
directions U, and the mean σ² of the other eigenvalues. Here it approximates the correlation of the
values around their class means, shrunk towards the identity.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.methods.codes import Coding, coding_expected, coding_of, coding_tensors
from covcli.methods.layout import Layout
from covcli.methods.moments import Products, Sketch, moments
from covcli.methods.state import Expected, State

# The largest number of leading directions of a point.
MOST_RANK = 64
# Up to this width all eigenvectors are computed at once; above, the leading ones by iteration.
DECOMPOSED = 512
# In the iteration: directions beside those wanted, and the number of its steps.
SPARE, STEPS = 16, 8
# The smallest deviation of a neuron, as a share of its point's root mean square deviation. Without
# it, a neuron that never fired on trusted images would outweigh all others.
LEAST_DEVIATION = 0.01
# Eigenvalues of a sketch's core below this share of the largest are rounding.
ROUNDED = 1e-10
POSITIVE = ("deviation", "eigenvalues", "rest")
FINITE = (*POSITIVE, "mean", "basis", "direction")


@dataclass(frozen=True)
class PointModel:
    """The normal model of one point's values, divided by their deviations.

    Attributes
    ----------
    basis
        The leading directions, largest eigenvalue first, orthonormal rows of shape (r, V).
    eigenvalues
        Their eigenvalues, shape (r,).
    direction
        Σ⁻¹d/√(dᵀΣ⁻¹d) of a displacement d, shape (V,); None if none was given.
    """

    basis: Tensor
    eigenvalues: Tensor
    direction: Tensor | None = None

    def rest(self, rank: int) -> Tensor:
        """Return the mean of the eigenvalues but the leading ones; the sum of all is V."""
        width = self.basis.shape[1]
        if rank == width:
            return torch.ones((), dtype=torch.float64)
        return (width - self.eigenvalues[:rank].sum()) / (width - rank)


@dataclass(frozen=True)
class NormalModel:
    """The mean, the deviation and the models of all points, as computed from sums, in float64.

    Attributes
    ----------
    mean
        The mean of each class, shape (classes, V).
    deviation
        The deviation around the class means, shape (V,).
    points
        The model of each point.
    """

    mean: Tensor
    deviation: Tensor
    points: list[PointModel]

    def exact(self) -> dict[str, Tensor]:
        """Return the tensors in float32, with all directions."""
        return {
            "mean": self.mean.float(),
            "deviation": self.deviation.float(),
            **self._factors(MOST_RANK, torch.float32),
        }

    def compact(self, rank: int) -> dict[str, Tensor]:
        """Return the tensors in codes and half precision, with at most `rank` directions."""
        return {
            **self._coded_mean,
            "deviation": self.deviation.bfloat16(),
            **self._factors(rank, torch.float16),
        }

    @cached_property
    def _coded_mean(self) -> dict[str, Tensor]:
        mean = self.mean.float()
        coding = Coding.over(mean.amin(0), mean.amax(0))
        return {"mean": coding.encode(mean, torch.round), **coding_tensors(coding, "mean")}

    def _factors(self, most: int, kind: torch.dtype) -> dict[str, Tensor]:
        ranks = [min(most, len(point.eigenvalues)) for point in self.points]
        pairs = list(zip(self.points, ranks, strict=True))
        tensors = {
            "ranks": torch.tensor(ranks, dtype=torch.int32),
            "eigenvalues": torch.cat([point.eigenvalues[:r] for point, r in pairs]).float(),
            "rest": torch.stack([point.rest(r) for point, r in pairs]).float(),
            "basis": torch.cat([point.basis[:r].reshape(-1) for point, r in pairs]).to(kind),
        }
        directions = [point.direction for point in self.points if point.direction is not None]
        if directions:
            tensors["direction"] = torch.cat(directions).to(kind)
        return tensors


def fit_normal(
    sums: State, shrinkage: float, where: str, shift: Tensor | None = None
) -> NormalModel:
    """Compute the normal model of each point from a complete state of `gauss`.

    Parameters
    ----------
    sums
        The complete state, on the CPU.
    shrinkage
        See `Gauss`.
    where
        The method's name, for errors.
    shift
        A displacement of all values, to compute `PointModel.direction`; float64 of shape (V,).

    Raises
    ------
    CovcliError
        If a point's covariance is singular: too few images for so little shrinkage.
    """
    layout, mean, count = sums.layout, class_means(sums), sums["count"].double()
    shifts: Sequence[Tensor | None] = [None] * len(layout.values)
    if shift is not None:
        shifts = shift.split(layout.values)
    parts = zip(
        moments(sums), mean.split(layout.values, 1),
        sums["unit"].split(layout.values), shifts, strict=True,
    )  # fmt: skip
    deviations, points = [], []
    for number, (products, center, unit, moved) in enumerate(parts, 1):
        data = _Data(center, count, unit, shrinkage)
        try:
            if isinstance(products, Sketch):
                deviation, point = _fit_sketch(products, data, moved)
            else:
                deviation, point = _fit_products(products, data, moved)
        except _SingularError:
            raise CovcliError(
                f"the covariance at coverage point {number} is singular",
                where=where,
                fix="take more trusted images or more shrinkage",
            ) from None
        deviations.append(deviation)
        points.append(point)
    return NormalModel(mean, torch.cat(deviations), points)


class _SingularError(Exception):
    """A covariance has no inverse."""


@dataclass(frozen=True)
class _Data:
    """The class means of a point's values, the images of each class, and the values' units."""

    center: Tensor
    count: Tensor
    unit: Tensor
    shrinkage: float

    @property
    def images(self) -> Tensor:
        """The number of images, at least 1."""
        return self.count.sum().clamp_min(1)

    def between(self, other: Tensor) -> Tensor:
        """Return the sum over the images of (class mean)·(class mean)ᵀ times a matrix (V, m)."""
        return (self.center * self.count[:, None]).T @ (self.center @ other)


def _fit_products(
    products: Products, data: _Data, moved: Tensor | None
) -> tuple[Tensor, PointModel]:
    sums = products.square() * data.unit * data.unit[:, None]
    between = (data.center * data.count[:, None]).T @ data.center
    covariance = (sums - between) / data.images
    deviation = _deviation(covariance.diagonal())
    shrunk = (1 - data.shrinkage) * (covariance / deviation / deviation[:, None])
    shrunk.diagonal().fill_(1.0)  # shrinkage does not change the diagonal
    basis, eigenvalues = _leading(shrunk)
    kept = _distinguishable(eigenvalues, len(shrunk), data.images)
    point = PointModel(basis[:kept], eigenvalues[:kept])
    _check_invertible(point)
    if moved is None:
        return deviation, point
    return deviation, replace(point, direction=_direction(shrunk, moved / deviation))


def _check_invertible(point: PointModel) -> None:
    width = point.basis.shape[1]
    variances = torch.cat([point.eigenvalues, point.rest(len(point.eigenvalues))[None]])
    if bool((variances <= width * torch.finfo(variances.dtype).eps).any()):
        raise _SingularError


def _direction(shrunk: Tensor, apart: Tensor) -> Tensor:
    """Return Σ⁻¹d/√(dᵀΣ⁻¹d) by the whole covariance."""
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if bool(failed):
        raise _SingularError
    return _normalised(torch.cholesky_solve(apart[:, None], factor)[:, 0], apart)


def _fit_sketch(sketch: Sketch, data: _Data, moved: Tensor | None) -> tuple[Tensor, PointModel]:
    unit = data.unit.amax()  # all values of the point have the same
    squares = sketch.squares * unit**2
    between = (data.center.square() * data.count[:, None]).sum(0)
    deviation = _deviation((squares - between) / data.images)
    signs = sketch.signs
    products = (sketch.products * unit**2 - data.between(signs)) / data.images
    # Correlation times signs·deviation, from covariance times signs.
    basis, eigenvalues = _from_sketch(products / deviation[:, None], signs * deviation[:, None])
    eigenvalues = (1 - data.shrinkage) * eigenvalues + data.shrinkage
    kept = _distinguishable(eigenvalues, len(deviation), data.images)
    point = PointModel(basis[:kept], eigenvalues[:kept])
    _check_invertible(point)
    if moved is None:
        return deviation, point
    apart = moved / deviation
    along = point.basis @ apart
    solved = (apart - point.basis.T @ along) / point.rest(kept)
    solved += point.basis.T @ (along / point.eigenvalues)
    return deviation, replace(point, direction=_normalised(solved, apart))


def _normalised(solved: Tensor, apart: Tensor) -> Tensor:
    """Return Σ⁻¹d/√(dᵀΣ⁻¹d)."""
    return solved / (apart @ solved).clamp_min(1e-24).sqrt()


def _deviation(variance: Tensor) -> Tensor:
    deviation = variance.clamp_min(0).sqrt()
    typical = float(deviation.square().mean().sqrt())
    least = max(LEAST_DEVIATION * typical, torch.finfo(torch.float32).tiny) if typical > 0 else 1.0
    return deviation.clamp_min(least)


def _distinguishable(eigenvalues: Tensor, width: int, images: Tensor) -> int:
    """Return how many leading eigenvalues are larger than chance makes the largest of the rest.

    That limit is σ²(1 + √(V/n))² for n images (Marchenko and Pastur, 1967). A point that is narrow
    enough keeps all.
    """
    if width <= MOST_RANK:
        return len(eigenvalues)
    rest = (width - eigenvalues.sum()) / (width - len(eigenvalues))
    limit = rest * (1 + (width / images).sqrt()) ** 2
    return int((eigenvalues > limit).sum())


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvectors as rows, and their eigenvalues in descending order."""
    width = len(matrix)
    rank = min(MOST_RANK, width)
    if width <= DECOMPOSED:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
    else:
        generator = torch.Generator().manual_seed(width)
        vectors = torch.randn(width, rank + SPARE, generator=generator, dtype=matrix.dtype)
        for _ in range(STEPS):
            vectors = torch.linalg.qr(matrix @ vectors).Q
        eigenvalues, turned = torch.linalg.eigh(vectors.T @ matrix @ vectors)
        vectors = vectors @ turned
    return vectors[:, -rank:].flip(1).T.contiguous(), eigenvalues[-rank:].flip(0)


def _from_sketch(products: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvectors and eigenvalues of R from R·Ω and Ω, each (V, m).

    The Nyström approximation R·Ω·(Ωᵀ·R·Ω)⁺·(R·Ω)ᵀ, which is exact if R has no higher rank than Ω.
    """
    core = test.T @ products
    values, turned = torch.linalg.eigh((core + core.T) / 2)
    sound = values > ROUNDED * values[-1]  # the others are 0 but for rounding
    root = products @ turned[:, sound] / values[sound].sqrt()
    vectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
    rank = min(MOST_RANK, len(singular))
    return vectors.T[:rank].contiguous(), singular.square()[:rank]


def class_means(state: State) -> Tensor:
    """Return each class's mean (K, V), float64; the overall mean for a class without images."""
    count = state["count"].to(torch.float64)[:, None]
    total = state["total"] * state["unit"]
    overall = total.sum(0) / count.sum().clamp_min(1)
    means = total.div_(count.clamp_min(1))
    means[count[:, 0] == 0] = overall
    return means


def within(
    layout: Layout,
    room: int | None,
    exact: Callable[[], dict[str, Tensor]],
    compact: Callable[[int], dict[str, Tensor]],
) -> State:
    """Return the state of exact tensors if it fits, else the compact one of the largest rank.

    Parameters
    ----------
    layout
        The state's layout.
    room
        The number of bytes that the tensors may take; None for no limit. A compact state of rank 1
        may take more.
    exact, compact
        Make the tensors; a compact state's for a rank.
    """
    tensors = exact()
    if room is not None and _bytes(tensors) > room:
        fits = bisect_right(range(2, MOST_RANK + 1), room, key=lambda r: _bytes(compact(r)))
        tensors = compact(1 + fits)
    return State(layout, tensors, dict.fromkeys(tensors, "same"))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True)
class StoredModel:
    """The normal model as scoring reads it, in float32.

    Attributes
    ----------
    mean, deviation
        See `NormalModel`.
    bases
        The directions of each point, shape (r, V).
    eigenvalues
        Their eigenvalues, shape (r,).
    rest
        The mean of the other eigenvalues of each point, shape (L,).
    directions
        See `PointModel`, shape (V,) each; empty if there are none.
    """

    mean: Tensor
    deviation: Tensor
    bases: Sequence[Tensor]
    eigenvalues: Sequence[Tensor]
    rest: Tensor
    directions: Sequence[Tensor]

    @classmethod
    def of(cls, state: State) -> "StoredModel":
        """Read a state with the tensors of `NormalModel`."""
        layout, device, ranks = state.layout, state["mean"].device, state["ranks"].tolist()
        mean = state["mean"]
        if mean.dtype == torch.uint8:
            mean = coding_of(state.tensors, "mean").decode(mean).to(device)
        sizes = [r * n for r, n in zip(ranks, layout.values, strict=True)]
        bases = state["basis"].float().split(sizes)
        direction = state.tensors.get("direction")
        return cls(
            mean, state["deviation"].float(),
            [part.view(r, n) for part, r, n in zip(bases, ranks, layout.values, strict=True)],
            state["eigenvalues"].split(ranks), state["rest"],
            () if direction is None else direction.float().split(layout.values),
        )  # fmt: skip


def expected_normal(state: State, directed: bool) -> Expected:
    """Return the tensors of the normal model that a state claims to hold, to check files.

    Raises
    ------
    ValueError
        If the ranks cannot be.
    """
    layout = state.layout
    classes, width, ranks = layout.classes, sum(layout.values), state["ranks"]
    if ranks.dtype != torch.int32 or ranks.shape != (len(layout.values),):
        raise ValueError("ranks of another shape or type than the points require")
    pairs = list(zip(ranks.tolist(), layout.values, strict=True))
    if any(not 0 <= r <= min(n, MOST_RANK) for r, n in pairs):
        raise ValueError("a rank that cannot be")
    compact = state["mean"].dtype == torch.uint8
    kind = torch.float16 if compact else torch.float32
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "mean": (torch.uint8 if compact else torch.float32, (classes, width)),
        "deviation": (torch.bfloat16 if compact else torch.float32, (width,)),
        "ranks": (torch.int32, (len(pairs),)),
        "eigenvalues": (torch.float32, (sum(r for r, _ in pairs),)),
        "rest": (torch.float32, (len(pairs),)),
        "basis": (kind, (sum(r * n for r, n in pairs),)),
    }
    if compact:
        expected |= coding_expected("mean", width)
    if directed:
        expected["direction"] = (kind, (width,))
    return expected


def check_normal(state: State) -> None:
    """Raise a ValueError unless the values of the tensors of `expected_normal` can be."""
    tensors = {name: tensor for name, tensor in state.tensors.items() if name in FINITE}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError("a normal model that is not finite")
    if not all(bool((state[name] > 0).all()) for name in POSITIVE):
        raise ValueError("a normal model without a positive variance")
