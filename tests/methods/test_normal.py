"""Normal models of low rank, against NumPy on the same matrices, and against what they condense."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covcli.methods import Layout, Method, State, make_method, normal
from covcli.methods import moments as sums_of_products
from covcli.methods.ensemble import stored_ranges
from covcli.methods.normal import StoredModel
from covcli.signature.fit import fold

CLASSES = 3
SHRINKAGE = 0.05


def layout_of(*widths: int) -> Layout:
    return Layout(CLASSES, widths, widths)


def neurons_of(layout: Layout, images: int, factors: int, noise: float = 0.2) -> torch.Tensor:
    """Values of each point that follow a few common factors, at different scales."""
    generator = torch.Generator().manual_seed(3)
    parts = []
    for width in layout.sizes:
        loadings = torch.randn(factors, width, generator=generator)
        loadings /= loadings.norm(dim=0)  # so that noise has the same share of every value
        common = torch.randn(images, factors, generator=generator) @ loadings
        own = noise * torch.randn(images, width, generator=generator)
        parts.append((common + own) * torch.logspace(-1, 1, width))
    return torch.cat(parts, 1) + 5


def complete(method: Method, layout: Layout, neurons: torch.Tensor) -> tuple[State, torch.Tensor]:
    labels = torch.arange(len(neurons)) % layout.classes
    sums = fold(method, layout, lambda: zip(neurons.split(64), labels.split(64), strict=True))
    noisy = method.begin_noisy(sums)
    if noisy is not None:
        moved = 0.3 * torch.linspace(-1, 1, layout.neurons) * neurons.std(0)
        method.observe_noisy(noisy, neurons[:50] + moved, labels[:50])
        sums.include(noisy)
    return sums, labels


def correlation(
    values: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values' class means, deviations and shrunk correlation, in NumPy."""
    means = np.stack([values[labels == k].mean(0) for k in range(CLASSES)])
    away = values - means[labels]
    covariance = away.T @ away / len(values)
    deviation = np.sqrt(covariance.diagonal())
    shrunk = (1 - SHRINKAGE) * covariance / deviation / deviation[:, None]
    np.fill_diagonal(shrunk, 1)
    return means, deviation, shrunk


@pytest.mark.parametrize("compact", [False, True])
def test_distances_are_those_of_the_matrix_that_is_stored(compact: bool) -> None:
    layout = layout_of(90, 7, 90, 130)
    neurons = neurons_of(layout, 400, 6)
    method = make_method("gauss")
    sums, labels = complete(method, layout, neurons)
    state = method.condense(sums, 9000 if compact else None)
    assert (state["mean"].dtype == torch.uint8) == compact
    model = StoredModel.of(state)
    tested = neurons + 3 * torch.randn(neurons.shape, generator=torch.Generator().manual_seed(1))
    evidence = method.prepare(state)(tested, labels).numpy()
    begin = 0
    for i, width in enumerate(layout.values):
        span = slice(begin, begin + width)
        basis = model.bases[i].double().numpy()
        rest = float(model.rest[i])
        values = model.eigenvalues[i].double().numpy()
        # Float rounding and half precision leave the rows of U not quite orthonormal.
        orthonormal = np.linalg.qr(basis.T)[0].T
        assert np.allclose(np.abs(np.sum(orthonormal * basis, 1)), 1, atol=2e-3)
        matrix = basis.T @ np.diag(values - rest) @ basis + rest * np.eye(width)
        away = tested[:, span].double() - model.mean[labels, span].double()
        z = (away / model.deviation[span].double()).numpy()
        expected = np.log(np.sum(z @ np.linalg.inv(matrix) * z, 1) / width)
        np.testing.assert_allclose(
            evidence[:, i], expected, rtol=1e-3, atol=2e-2 if compact else 1e-4
        )
        begin += width


def test_a_rank_that_suffices_gives_the_distance_of_the_whole_covariance() -> None:
    """Six factors over noise of one variance: what low rank means; and a narrow point, of all."""
    layout = layout_of(64, 200)
    neurons = neurons_of(layout, 20_000, 6)
    method = make_method(f"gauss?shrinkage={SHRINKAGE}")
    sums, labels = complete(method, layout, neurons)
    state = method.condense(sums)
    assert state["ranks"].tolist() == [64, 6]
    evidence = method.prepare(state)(1.5 * neurons[:200], labels[:200]).numpy()
    for i, span in enumerate((slice(0, 64), slice(64, 264))):
        values = neurons[:, span].double().numpy()
        means, deviation, shrunk = correlation(values, labels.numpy())
        z = (1.5 * values[:200] - means[labels[:200]]) / deviation
        expected = np.log(np.sum(z @ np.linalg.inv(shrunk) * z, 1) / len(deviation))
        tolerance = 1e-4 if i == 0 else 0.05
        np.testing.assert_allclose(evidence[:, i], expected, atol=tolerance)


def test_the_iteration_finds_the_leading_eigenvectors() -> None:
    generator = torch.Generator().manual_seed(0)
    width, images = 700, 900
    values = torch.randn(images, 20, generator=generator) @ torch.randn(
        20, width, generator=generator
    )
    values = values.double() + torch.randn(images, width, generator=generator, dtype=torch.float64)
    matrix = torch.from_numpy(np.corrcoef(values.numpy().T))
    basis, eigenvalues = normal._leading(matrix)
    again = normal._leading(matrix)
    assert torch.equal(basis, again[0])
    expected, vectors = np.linalg.eigh(matrix.numpy())
    np.testing.assert_allclose(eigenvalues[:20], expected[::-1][:20], rtol=1e-6)
    np.testing.assert_allclose(eigenvalues, expected[::-1][:64], rtol=0.05)
    inner = (basis[:20].numpy() @ vectors[:, ::-1][:, :20]) ** 2
    np.testing.assert_allclose(inner.sum(0), 1, atol=1e-6)  # the same subspace


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let points of more than 100 values be wide."""
    monkeypatch.setattr(sums_of_products, "WIDEST", 100)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("name", ["gauss", "ensemble"])
def test_a_sketch_gives_the_covariance_of_low_rank(name: str) -> None:
    layout = layout_of(40, 300)
    neurons = neurons_of(layout, 3000, 6, noise=0.0)
    method = make_method(f"{name}?shrinkage={SHRINKAGE}")
    sums, labels = complete(method, layout, neurons)
    assert sums["sketch"].shape == (300 * sums_of_products.COMBINATIONS,)
    state = method.condense(sums)
    values = neurons[:, 40:].double().numpy()
    _, deviation, shrunk = correlation(values, labels.numpy())
    model = StoredModel.of(state)
    np.testing.assert_allclose(model.deviation[40:], deviation, rtol=2e-2)  # few bits a value
    basis = model.bases[1].double().numpy()
    stored = basis.T @ np.diag(model.eigenvalues[1].double() - model.rest[1]) @ basis
    stored += float(model.rest[1]) * np.eye(300)
    np.testing.assert_allclose(stored, shrunk, atol=0.01)


@pytest.mark.parametrize("rank", [1, 57, 79])
def test_a_sketch_is_exact_up_to_its_number_of_combinations(rank: int) -> None:
    """So it is for fewer images than that, whatever the values."""
    generator = np.random.default_rng(rank)
    factor = generator.normal(size=(300, rank)) * np.logspace(-1, 1, 300)[:, None]
    matrix = factor @ factor.T
    test = generator.choice([-1.0, 1.0], (300, sums_of_products.COMBINATIONS))
    test *= np.logspace(1, -1, 300)[:, None]
    basis, eigenvalues = normal._from_sketch(*map(torch.from_numpy, (matrix @ test, test)))
    expected, vectors = np.linalg.eigh(matrix)
    known = min(rank, 64)
    np.testing.assert_allclose(eigenvalues[:known], expected[::-1][:known], rtol=1e-6)
    assert float(eigenvalues[known:].sum()) < 1e-6 * expected.sum() or rank > 64
    inner = basis[:known].numpy() @ vectors[:, ::-1][:, :known]
    np.testing.assert_allclose(np.abs(inner), np.eye(known), atol=1e-4)


@pytest.mark.usefixtures("sketched")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 199))
def test_a_sketch_depends_on_no_order_and_is_merged(seed: int, cut: int) -> None:
    layout = layout_of(5, 120)
    method = make_method("gauss")
    neurons = neurons_of(layout, 200, 3)
    whole, labels = complete(method, layout, neurons)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    other = fold(method, layout, lambda: [(neurons[p], labels[p]) for p in order.split(cut)])
    for key, tensor in whole.tensors.items():
        assert torch.equal(other[key], tensor), key
    parts = [fold(method, layout, lambda p=p: [(neurons[p], labels[p])]) for p in order.split(cut)]
    first, *rest = method.align(parts)
    for part in rest:
        first.merge(part)
    assert torch.equal(first["count"], whole["count"])
    for key in ("sketch", "squares", "total"):
        scale = float(whole[key].double().abs().max())
        np.testing.assert_allclose(first[key], whole[key], atol=max(1e-3 * scale, 2 * len(parts)))


def test_sums_of_wide_points_are_exact_in_the_worst_case() -> None:
    """All values at their peak, with the signs that add up, for two million images."""
    for width in (4097, 1 << 16, 1 << 20):
        largest = 2 ** sums_of_products.bits(width)
        assert width * largest**2 * 2**11 <= 2**53  # a batch, in float64
        assert width * largest**2 * 2**21 <= 2**63  # all images, in int64


@pytest.mark.parametrize("room", [None, 40_000, 12_000, 1])
def test_a_condensed_state_takes_the_room_that_it_gets(room: int | None) -> None:
    layout = Layout(CLASSES, (160, 160, 20), (80, 80, 10))
    neurons = neurons_of(layout, 500, 30)
    method = make_method("ensemble")
    sums, labels = complete(method, layout, neurons)
    state = method.condense(sums, room)
    method.check(state)
    size = sum(tensor.nbytes for tensor in state.tensors.values())
    if room in (40_000, 12_000):
        assert size <= room
        assert size > 0.9 * room or torch.equal(state["ranks"], method.condense(sums)["ranks"])
    if room == 1:
        assert state["ranks"].tolist() == [1, 1, 1]
    exact = method.prepare(method.condense(sums))
    scorer = method.prepare(state)
    assert bool(scorer.inside(neurons, labels).all())
    ends = stored_ranges(state)
    assert bool((ends["low"] <= sums["low"]).all() & (ends["high"] >= sums["high"]).all())
    tested = neurons + 4 * neurons.std(0) * torch.randn(neurons.shape)
    along = slice(6, 9)  # the whole covariance determines it, whatever the rank
    ours, theirs = (s(tested, labels)[:, along].numpy() for s in (scorer, exact))
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.1)


def test_an_impossible_state_is_refused() -> None:
    layout = layout_of(70, 6)
    method = make_method("ensemble")
    sums, _ = complete(method, layout, neurons_of(layout, 300, 4))
    for room in (None, 6000):
        state = method.condense(sums, room)
        method.check(state)
        changes: dict[str, torch.Tensor] = {
            "ranks": torch.tensor([71, 6], dtype=torch.int32),
            "rest": -state["rest"],
            "eigenvalues": state["eigenvalues"] * torch.nan,
            "deviation": torch.zeros_like(state["deviation"]),
            "basis": torch.full_like(state["basis"], torch.inf),
            "direction": state["direction"][:-1],
            "low": state["low"].double(),
        }
        changes["huge ranks"] = torch.tensor([2**31 - 1, 6], dtype=torch.int32)
        changes["negative ranks"] = torch.tensor([-1, 6], dtype=torch.int32)
        for name, tensor in changes.items():
            key = name.split()[-1]
            with pytest.raises(ValueError, match=r"."):
                method.check(state.holding({**state.tensors, key: tensor}))
        with pytest.raises(ValueError, match=r"."):
            method.check(state.holding({**state.tensors, "more": state["rest"]}))
