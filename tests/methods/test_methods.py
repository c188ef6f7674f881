"""The methods' arithmetic, against naive NumPy, on random inputs with ties and constants."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from covcli.core.errors import CovcliError
from covcli.methods import (
    METHODS,
    Layout,
    Method,
    MultiRange,
    SingleRange,
    State,
    base,
    make_method,
)
from covcli.signature.fit import fold

CLASSES, NEURONS = 3, 5
LAYOUT = Layout(CLASSES, (2, 3), (1, 3))
SPECS = ["src", "mrc", "mrc?sections=1", "mrc?sections=7&cost=share", "mrc?sections=3"]
EVERY = [*METHODS, *SPECS[2:]]
# Few distinct values make ties and constant neurons common; some are extreme.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-42, 3e38, -3e38, 0.1]),
    st.floats(-1e3, 1e3, width=32),
)


@st.composite
def samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(1, 24))
    neurons = draw(npst.arrays(np.float32, (n, NEURONS), elements=VALUES))
    labels = draw(npst.arrays(np.int64, n, elements=st.integers(0, CLASSES - 1)))
    return neurons, labels


def folded(spec: str, neurons: np.ndarray, labels: np.ndarray, parts: list[np.ndarray]) -> State:
    def passes() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.from_numpy(neurons[p]), torch.from_numpy(labels[p])) for p in parts]

    return fold(make_method(spec), LAYOUT, passes)


def naive_section(value: float, low: float, high: float, sections: int) -> int:
    if high == low:
        return 0
    with np.errstate(over="ignore"):
        width = np.float64(high) - np.float64(low)
        scale = np.float32(min(sections / width, np.finfo(np.float32).max))
        place = (np.float32(value) - np.float32(low)) * scale
    return int(np.clip(place, 0, sections - 1))


def naive_reach(neurons: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how far rounding may move each neuron: a share of the largest end at its point."""
    classes = [neurons[labels == k] for k in set(labels.tolist())]
    ends = np.max([np.maximum(abs(c.min(0)), abs(c.max(0))) for c in classes], axis=0)
    points = np.split(ends, np.cumsum(LAYOUT.sizes)[:-1])
    return np.concatenate([np.full(len(p), p.max() * np.float32(1e-5)) for p in points])


def naive_cost(spec: str, neurons: np.ndarray, labels: np.ndarray, x: np.ndarray, k: int) -> list:
    """Follow the formulas word by word, one neuron at a time."""
    method = make_method(spec)
    mine, reach = neurons[labels == k], naive_reach(neurons, labels)
    costs = []
    for j in range(NEURONS):
        column = mine[:, j]
        with np.errstate(over="ignore"):
            outside = (
                len(column) == 0 or x[j] < column.min() - reach[j] or x[j] > column.max() + reach[j]
            )
        if isinstance(method, MultiRange):
            c = 0
            if not outside:
                low, high = column.min(), column.max()
                here = naive_section(x[j], low, high, method.sections)
                c = sum(naive_section(v, low, high, method.sections) == here for v in column)
            if method.cost == "share":
                costs.append(1.0 if outside else 1 - c / len(column))
            else:
                costs.append(-math.log((c + 0.5) / (len(column) + method.sections / 2)))
        else:
            costs.append(float(outside))
    return costs


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None)
@given(trusted=samples(), tested=samples())
def test_costs_follow_the_formulas(
    spec: str, trusted: tuple[np.ndarray, np.ndarray], tested: tuple[np.ndarray, np.ndarray]
) -> None:
    neurons, labels = trusted
    state = folded(spec, neurons, labels, [np.arange(len(labels))])
    x = np.concatenate([tested[0], neurons])  # values on the edges too
    classes = np.concatenate([tested[1], labels])
    scorer = make_method(spec).prepare(state)
    costs = scorer.costs(torch.from_numpy(x), torch.from_numpy(classes))
    expected = [naive_cost(spec, neurons, labels, x[i], classes[i]) for i in range(len(x))]
    np.testing.assert_allclose(costs.numpy(), expected, rtol=1e-5, atol=1e-6)
    inside = scorer.inside(torch.from_numpy(x), torch.from_numpy(classes))
    outside = [naive_cost("src", neurons, labels, x[i], classes[i]) for i in range(len(x))]
    np.testing.assert_array_equal(~inside.numpy(), np.array(outside, bool))


@pytest.mark.parametrize("spec", EVERY)
@settings(max_examples=60, deadline=None)
@given(data=samples(), seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 24)))
def test_any_batches_in_any_order_give_the_same_bits(
    spec: str, data: tuple[np.ndarray, np.ndarray], seed: int, cuts: list[int]
) -> None:
    neurons, labels = data
    whole = folded(spec, neurons, labels, [np.arange(len(labels))])
    order = np.random.default_rng(seed).permutation(len(labels))
    other = folded(spec, neurons, labels, np.split(order, sorted(c % len(labels) for c in cuts)))
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("spec", EVERY)
@settings(max_examples=60, deadline=None)
@given(data=samples(), cut=st.integers(0, 24))
def test_merged_parts_give_the_same_bits(
    spec: str, data: tuple[np.ndarray, np.ndarray], cut: int
) -> None:
    neurons, labels = torch.from_numpy(data[0]), torch.from_numpy(data[1])
    method = make_method(spec)
    state: State | None = method.begin(LAYOUT)
    while state is not None:  # each pass folded in two places, then merged
        parts = [copy.deepcopy(state), copy.deepcopy(state)]
        method.observe(parts[0], neurons[:cut], labels[:cut])
        method.observe(parts[1], neurons[cut:], labels[cut:])
        parts[1].merge(parts[0])
        complete, state = parts[1], method.proceed(parts[1])
    whole = folded(spec, data[0], data[1], [np.arange(len(labels))])
    assert complete.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, complete[name]), name


def test_a_method_whose_functions_take_other_parameters_is_refused() -> None:
    """The layout was a parameter once: a state has it now."""
    with pytest.raises(CovcliError, match=r"method Old: observe takes .*layout.*; let it take"):

        class Old(SingleRange):
            def observe(self, state, layout, neurons, labels):  # type: ignore[no-untyped-def]
                """Do nothing."""


def test_parts_that_do_not_belong_together_are_refused() -> None:
    src, mrc = SingleRange(), MultiRange()
    small = Layout(2, (3,), (3,))
    one = src.begin(small)
    with pytest.raises(ValueError, match="layouts"):
        one.merge(src.begin(Layout(2, (4,), (4,))))
    finer = MultiRange(sections=20)
    with pytest.raises(ValueError, match="shape"):
        mrc.proceed(mrc.begin(small)).merge(finer.proceed(finer.begin(small)))
    counting = mrc.proceed(mrc.begin(small))
    assert counting is not None
    with pytest.raises(ValueError, match="different methods"):
        one.merge(counting)
    other = mrc.proceed(mrc.begin(small))
    assert other is not None
    other.tensors["low"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="'low'"):
        counting.merge(other)


def trusted_neurons(seed: int, images: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons of different heights, whose means differ by class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % CLASSES
    heights = torch.arange(NEURONS).float() + 3 * torch.nn.functional.one_hot(labels, NEURONS)
    return heights + 0.3 * torch.randn(images, NEURONS, generator=generator), labels


def complete(method: Method, neurons: torch.Tensor, labels: torch.Tensor) -> State:
    state = fold(method, LAYOUT, lambda: zip(neurons.split(17), labels.split(17), strict=True))
    noisy = method.begin_noisy(state)
    if noisy is not None:
        method.observe_noisy(noisy, neurons[:30] + 0.5, labels[:30])
        state.include(noisy)
    return state


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_keeps_the_contract(name: str) -> None:
    method = METHODS.get(name)()
    assert make_method(method.spec()) == method
    assert method.name == name
    neurons, labels = trusted_neurons(1)
    state = complete(method, neurons, labels)
    kinds = {k: (v.dtype, tuple(v.shape)) for k, v in state.tensors.items()}
    assert kinds == dict(method.expected(LAYOUT))
    scorer = method.prepare(state)
    costs = scorer.costs(neurons, labels)
    inside = scorer.inside(neurons, labels)
    evidence = scorer(neurons, labels)
    assert costs.shape == inside.shape == neurons.shape
    assert evidence.shape == (len(neurons), method.kinds * len(LAYOUT.sizes))
    assert scorer.columns == method.kinds * len(LAYOUT.sizes)
    assert evidence.dtype == torch.float64
    assert bool(evidence.isfinite().all() & (costs >= 0).all())
    assert float(inside.float().mean()) > 0.95
    strange = -20 * neurons  # other sizes, another order, other signs
    assert float(scorer.costs(strange, labels).mean()) > float(costs.mean())
    outside = ~scorer.inside(strange, labels)
    assert float(outside.float().mean()) > 0.1
    far = scorer(strange, labels)
    points = len(LAYOUT.sizes)
    more = far.mean(0)[:points] - evidence.mean(0)[:points]
    assert bool((more >= 0).all())  # a point of one neuron has only one order
    assert float(more.max()) > 0
    low, high = scorer.span(labels)
    assert low.shape == high.shape == neurons.shape
    beyond = (strange < low) | (strange > high)
    assert not bool((scorer.inside(strange, labels) & beyond).any())


@pytest.mark.parametrize("name", list(METHODS))
def test_a_class_without_images_and_a_dead_neuron_are_scored(name: str) -> None:
    method = METHODS.get(name)()
    neurons, labels = trusted_neurons(2)
    neurons[:, 3] = 0
    state = complete(method, neurons[labels != 2], labels[labels != 2])
    scorer = method.prepare(state)
    assert bool(scorer(neurons, labels).isfinite().all())


@settings(max_examples=60, deadline=None)
@given(data=samples())
def test_gauss_sums_whole_numbers_of_a_unit(data: tuple[np.ndarray, np.ndarray]) -> None:
    neurons, labels = data
    state = folded("gauss", neurons, labels, [np.arange(len(labels))])
    columns = LAYOUT.value_columns.numpy()
    whole = []  # Python's integers never round
    for column in neurons[:, columns].T:
        unit = 2.0 ** (math.frexp(np.abs(column).max())[1] - 20)
        whole.append([round(float(v) / unit) for v in column])
        assert np.abs(np.array(whole[-1]) * unit - column).max() <= unit / 2
    for k in range(CLASSES):
        expected = [sum(w for w, y in zip(row, labels, strict=True) if y == k) for row in whole]
        assert state["total"][k].tolist() == expected
    last = [[sum(map(int.__mul__, whole[i], whole[j])) for j in range(1, i + 1)]
            for i in range(1, 4)]  # fmt: skip
    assert state["products"].tolist()[1:] == [v for row in last for v in row]


@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 1.0])
def test_gauss_follows_its_formula(shrinkage: float) -> None:
    neurons, labels = trusted_neurons(4)
    method = make_method(f"gauss?shrinkage={shrinkage}")
    scorer = method.prepare(complete(method, neurons, labels))
    x, y = neurons.double().numpy(), labels.numpy()
    tested = 3 * x[::-1].copy()
    expected = []
    for columns in ([0], [2, 3, 4]):  # the first point's other neuron is a maximum
        values = x[:, columns]
        means = np.stack([values[y == k].mean(0) for k in range(CLASSES)])
        covariance = np.cov((values - means[y]).T, bias=True).reshape(len(columns), -1)
        shrunk = (1 - shrinkage) * covariance + shrinkage * np.diag(covariance.diagonal())
        away = tested[:, columns] - means[y]
        expected.append(np.log(np.sum(away @ np.linalg.inv(shrunk) * away, 1) / len(columns)))
    evidence = scorer(torch.from_numpy(tested).float(), labels)
    np.testing.assert_allclose(evidence.numpy(), np.stack(expected, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec", ["src", "mrc", "mrc?sections=3&cost=share", "nrc", "nrc?direction=input", "nac"]
)
@given(data=samples())
@settings(max_examples=40, deadline=None)
def test_evidence_read_one_by_one_in_pieces_and_all_at_once_is_the_same(
    spec: str, data: tuple[np.ndarray, np.ndarray]
) -> None:
    neurons, labels = (torch.from_numpy(part) for part in data)
    method = make_method(spec)
    scorer = method.prepare(folded(spec, *data, [np.arange(len(labels))]))
    tested = 1.5 * neurons.flip(0)
    at_once = scorer(tested, labels)
    alone = [scorer(tested[i, None], labels[i, None]) for i in range(len(labels))]
    assert torch.equal(torch.cat(alone), at_once)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "PIECE", 1)
        assert torch.equal(scorer(tested, labels), at_once)


@pytest.mark.parametrize("spec", ["src", "mrc", "mrc?sections=3&cost=share"])
def test_evidence_of_wide_points_is_the_log_of_their_mean_cost(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read all at once and in pieces; in both precisions, and of no image."""
    sizes = (1300, 5, 512, 513, 1)
    layout, generator = Layout(CLASSES, sizes, sizes), torch.Generator().manual_seed(0)
    neurons = torch.randn(40, sum(sizes), generator=generator).relu()
    labels = torch.randint(CLASSES, (40,), generator=generator)
    method = make_method(spec)
    scorer = method.prepare(fold(method, layout, lambda: [(neurons, labels)]))
    tested, classes = 1.2 * neurons.flip(0), labels
    costs = scorer.costs(tested, classes).double().numpy()
    parts = np.split(costs, np.cumsum(sizes)[:-1], 1)
    expected = np.log(np.stack([(part.sum(1) + 1) / part.shape[1] for part in parts], 1))
    for piece in (1 << 16, 600, 1):
        monkeypatch.setattr(base, "PIECE", piece)
        for each in (tested, tested.double()):
            evidence = scorer(each, classes)
            np.testing.assert_allclose(evidence.numpy(), expected, rtol=1e-5, atol=1e-5)
        assert scorer(tested[:0], classes[:0]).shape == (0, len(sizes))


def test_points_of_any_widths_are_summed_and_measured_apart() -> None:
    """Neighbours of equal width go through one operation: the others must not be disturbed."""
    sizes, values = (3, 3, 2, 4, 4, 4, 3), (3, 3, 1, 2, 2, 4, 3)
    layout, generator = Layout(2, sizes, values), torch.Generator().manual_seed(0)
    neurons = torch.randn(60, sum(sizes), generator=generator)
    labels = torch.arange(60) % 2
    cuts = np.cumsum(sizes)[:-1]
    for x in (neurons, neurons > 0):
        expected = [part.mean(1) for part in np.split(x.numpy().astype(np.float64), cuts, 1)]
        np.testing.assert_allclose(layout.means(x).numpy(), np.stack(expected, 1), rtol=1e-12)
    for name in ("src", "mrc", "gauss"):
        method = make_method(name)
        scorer = method.prepare(fold(method, layout, lambda: [(neurons, labels)]))
        evidence = scorer(2 * neurons, labels)
        for i, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
            mine = neurons[:, end - size : end]
            alone = Layout(2, (size,), values[i : i + 1])
            state = fold(method, alone, lambda mine=mine: [(mine, labels)])
            part = method.prepare(state)(2 * mine, labels)
            np.testing.assert_allclose(evidence[:, [i]].numpy(), part.numpy(), rtol=1e-5, atol=1e-5)


def test_the_ensemble_measures_along_the_direction_of_noise() -> None:
    neurons, labels = trusted_neurons(5)
    method = make_method("ensemble")
    state = complete(method, neurons, labels)
    scorer = method.prepare(state)
    x, y = neurons.double().numpy()[:, 2:], labels.numpy()
    means = np.stack([x[y == k].mean(0) for k in range(CLASSES)])
    covariance = np.cov((x - means[y]).T, bias=True)
    inverse = np.linalg.inv(0.95 * covariance + 0.05 * np.diag(covariance.diagonal()))
    shift = (x[:30] + 0.5 - means[y[:30]]).mean(0)
    along = (x - means[y]) @ inverse @ shift / np.sqrt(shift @ inverse @ shift)
    evidence = scorer(neurons, labels)
    np.testing.assert_allclose(evidence[:, 5].numpy(), along, rtol=1e-3, atol=1e-3)
    for name, columns in {"src": slice(0, 2), "gauss": slice(2, 4)}.items():
        alone = make_method(name)
        part = alone.prepare(complete(alone, neurons, labels))
        assert torch.equal(evidence[:, columns], part(neurons, labels))


@pytest.mark.parametrize("direction", ["signature", "input"])
@settings(max_examples=60, deadline=None)
@given(trusted=samples(), tested=samples(), share=st.sampled_from([0.1, 0.34, 0.5, 1.0]))
def test_rank_costs_follow_the_formula(
    direction: str,
    trusted: tuple[np.ndarray, np.ndarray],
    tested: tuple[np.ndarray, np.ndarray],
    share: float,
) -> None:
    def top(row: np.ndarray) -> list[int]:  # of equal values the first ranks higher
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        return order[: math.ceil(share * len(row))]

    method = make_method(f"nrc?share={share}&direction={direction}")
    scorer = method.prepare(folded(method.spec(), *trusted, [np.arange(len(trusted[1]))]))
    x, classes = tested
    costs = scorer.costs(torch.from_numpy(x), torch.from_numpy(classes))
    for columns in ([0], [2, 3, 4]):
        size = 2 if columns == [0] else 3
        for i, k in enumerate(classes):
            mine = trusted[0][trusted[1] == k][:, columns]
            tops = [top(row) for row in mine]
            often = [sum(j in t for t in tops) / max(1, len(tops)) for j in range(len(columns))]
            m = math.ceil(share * len(columns))
            weights = [1 - rank / m for rank in range(m)]
            own = top(x[i, columns])
            if direction == "signature":
                lacks = [j not in own for j in top(np.array(often, np.float32))]
            else:
                lacks = [1 - often[j] for j in own]
            cost = costs[i, columns].sum() / size
            assert float(cost) == pytest.approx(np.dot(weights, lacks) / sum(weights), abs=1e-5)
    assert bool((costs[:, 1] == 0).all())  # a maximum


@pytest.mark.parametrize(
    "spec",
    [
        "mcr",
        "src?sections=3",
        "mrc?sections=0",
        "mrc?cost=low",
        "mrc?sections",
        "",
        "mrc?a=b",
        "gauss?shrinkage=2",
        "nrc?share=0",
        "nrc?direction=up",
        "mrc-paper?cost=surprisal",
        "nac?classes=some",
        "nac?bins=3",
    ],
)
def test_a_bad_method_is_named(spec: str) -> None:
    with pytest.raises(CovcliError):
        make_method(spec)


@pytest.mark.parametrize("name", ["src", "mrc"])
def test_soft_costs_lead_back(name: str) -> None:
    method = METHODS.get(name)()
    neurons, labels = trusted_neurons(6)
    neurons[:, 2] = 0.25  # a constant neuron
    scorer = method.prepare(complete(method, neurons, labels))
    far = (neurons + 3).double().requires_grad_()  # outside, where the cost itself is flat
    scorer.soft_costs(far, labels).sum().backward()
    assert far.grad is not None
    assert bool((far.grad > 0).all())


@pytest.mark.parametrize("name", ["src", "mrc", "gauss", "ensemble"])
def test_soft_evidence_has_a_true_gradient(name: str) -> None:
    method = METHODS.get(name)()
    neurons, labels = trusted_neurons(7)
    scorer = method.prepare(complete(method, neurons, labels))
    scorer = scorer.double()
    x = neurons[:12].double() + 0.7 * torch.randn(12, NEURONS, dtype=torch.float64)
    classes = torch.arange(12) % CLASSES
    assert torch.autograd.gradcheck(lambda t: scorer.soft(t, classes), x.requires_grad_())


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=40, deadline=None)
@given(trusted=samples(), tested=samples())
def test_soft_costs_are_the_costs_where_those_are_sure(
    spec: str, trusted: tuple[np.ndarray, np.ndarray], tested: tuple[np.ndarray, np.ndarray]
) -> None:
    """Far outside the range they are at least the cost, and at section centres they are it."""
    method = make_method(spec)
    neurons, labels = np.clip(trusted[0], -1e3, 1e3), trusted[1]
    state = folded(spec, neurons, labels, [np.arange(len(labels))])
    x, k = np.clip(tested[0], -1e3, 1e3).astype(np.float64), tested[1]
    k = np.where(np.isin(k, labels), k, labels[0])
    low, high = state["low"].numpy().astype(np.float64)[k], state["high"].numpy()[k]
    sections = method.sections if isinstance(method, MultiRange) else 1
    place = np.random.default_rng(0).integers(0, sections, x.shape)
    centres = torch.from_numpy(low + (high - low) * (place + 0.5) / sections)
    classes = torch.from_numpy(k)
    wide = (high - low) > np.maximum(1e-3, 1e-3 * np.abs(high))  # a float32 centre in its section
    scorer = method.prepare(state)
    cost = scorer.costs(centres.float(), classes).numpy()
    soft = scorer.soft_costs(centres, classes).numpy()
    np.testing.assert_allclose(soft[wide], cost[wide], rtol=1e-4, atol=1e-4)
    outside = torch.from_numpy(high + 3 * np.maximum(high - low, 1e4))
    cost = scorer.costs(outside.float(), classes)
    assert bool((scorer.soft_costs(outside, classes) >= cost - 1e-4).all())
