"""The methods' arithmetic, against naive NumPy, on random inputs with ties and constants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from covcli.errors import CovcliError
from covcli.fitting import fold
from covcli.methods import METHODS, MultiRange, SingleRange, State, make_method

CLASSES, NEURONS = 3, 5
SPECS = ["src", "mrc", "mrc?sections=1", "mrc?sections=7&cost=share", "mrc?sections=3"]
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

    return fold(make_method(spec), CLASSES, NEURONS, passes)


def naive_section(value: float, low: float, high: float, sections: int) -> int:
    if high == low:
        return 0
    place = (np.float64(value) - np.float64(low)) / (np.float64(high) - np.float64(low)) * sections
    return int(min(max(math.floor(place), 0), sections - 1))


def naive_cost(spec: str, neurons: np.ndarray, labels: np.ndarray, x: np.ndarray, k: int) -> list:
    """Follow the formulas word by word, one neuron at a time."""
    method = make_method(spec)
    mine = neurons[labels == k]
    costs = []
    for j in range(NEURONS):
        column = mine[:, j]
        outside = len(column) == 0 or x[j] < column.min() or x[j] > column.max()
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
    costs = make_method(spec).costs(state, torch.from_numpy(x), torch.from_numpy(classes))
    expected = [naive_cost(spec, neurons, labels, x[i], classes[i]) for i in range(len(x))]
    np.testing.assert_allclose(costs.numpy(), expected, rtol=1e-5, atol=1e-6)
    inside = make_method(spec).inside(state, torch.from_numpy(x), torch.from_numpy(classes))
    outside = [naive_cost("src", neurons, labels, x[i], classes[i]) for i in range(len(x))]
    np.testing.assert_array_equal(~inside.numpy(), np.array(outside, bool))


@pytest.mark.parametrize("spec", SPECS)
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


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None)
@given(data=samples(), cut=st.integers(0, 24))
def test_merged_parts_give_the_same_bits(
    spec: str, data: tuple[np.ndarray, np.ndarray], cut: int
) -> None:
    neurons, labels = torch.from_numpy(data[0]), torch.from_numpy(data[1])
    method = make_method(spec)
    state: State | None = method.begin(CLASSES, NEURONS)
    while state is not None:  # each pass folded in two places, then merged
        parts = [State({k: v.clone() for k, v in state.tensors.items()}, state.reductions)
                 for _ in range(2)]  # fmt: skip
        method.observe(parts[0], neurons[:cut], labels[:cut])
        method.observe(parts[1], neurons[cut:], labels[cut:])
        parts[1].merge(parts[0])
        complete, state = parts[1], method.proceed(parts[1])
    whole = folded(spec, data[0], data[1], [np.arange(len(labels))])
    assert complete.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, complete[name]), name


def test_parts_that_do_not_belong_together_are_refused() -> None:
    src, mrc = SingleRange(), MultiRange()
    one = src.begin(2, 3)
    with pytest.raises(ValueError, match="shape"):
        one.merge(src.begin(2, 4))
    counting = mrc.proceed(mrc.begin(2, 3))
    assert counting is not None
    with pytest.raises(ValueError, match="different methods"):
        one.merge(counting)
    other = mrc.proceed(mrc.begin(2, 3))
    assert other is not None
    other.tensors["low"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="'low'"):
        counting.merge(other)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_keeps_the_contract(name: str) -> None:
    method = METHODS.get(name)()
    assert make_method(method.spec()) == method
    assert method.name == name
    generator = torch.Generator().manual_seed(1)
    neurons = torch.randn(40, NEURONS, generator=generator)
    labels = torch.arange(40) % CLASSES
    state = fold(method, CLASSES, NEURONS, lambda: [(neurons, labels)])
    found = {k: (v.dtype, tuple(v.shape)) for k, v in state.tensors.items()}
    assert found == dict(method.expected(CLASSES, NEURONS))
    costs = method.costs(state, neurons, labels)
    assert costs.shape == neurons.shape
    assert bool((costs >= 0).all())
    far = method.costs(state, neurons + 100, labels)
    assert float(far.mean()) > float(costs.mean())
    assert bool(method.inside(state, neurons, labels).all())
    assert not bool(method.inside(state, neurons + 100, labels).any())


@pytest.mark.parametrize(
    "spec",
    ["mcr", "src?sections=3", "mrc?sections=0", "mrc?cost=low", "mrc?sections", "", "mrc?a=b"],
)
def test_a_bad_method_is_named(spec: str) -> None:
    with pytest.raises(CovcliError):
        make_method(spec)


@pytest.mark.parametrize("name", list(METHODS))
def test_soft_costs_have_a_true_gradient_that_leads_back(name: str) -> None:
    method = METHODS.get(name)()
    generator = torch.Generator().manual_seed(2)
    neurons = torch.rand(60, NEURONS, generator=generator)
    neurons[:, 2] = 0.25  # a constant neuron
    labels = torch.arange(60) % CLASSES
    state = fold(method, CLASSES, NEURONS, lambda: [(neurons, labels)])
    x = torch.randn(12, NEURONS, dtype=torch.float64, generator=generator).requires_grad_()
    classes = torch.arange(12) % CLASSES
    assert torch.autograd.gradcheck(lambda t: method.soft_costs(state, t, classes), x)
    far = (neurons[:12].double() + 3).requires_grad_()  # outside, where the cost itself is flat
    method.soft_costs(state, far, classes).sum().backward()
    assert far.grad is not None
    assert bool((far.grad > 0).all())


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
    cost = method.costs(state, centres.float(), classes).numpy()
    soft = method.soft_costs(state, centres, classes).numpy()
    np.testing.assert_allclose(soft[wide], cost[wide], rtol=1e-4, atol=1e-4)
    outside = torch.from_numpy(high + 3 * np.maximum(high - low, 1e4))
    cost = method.costs(state, outside.float(), classes)
    assert bool((method.soft_costs(state, outside, classes) >= cost - 1e-4).all())
