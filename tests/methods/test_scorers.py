"""Scorers are plain tensor operations: they compile in one graph, trace, and run without values.

The methods are those of the registry, so a new one is tested too.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda, on_cuda
from torch import Tensor

from covcli.methods import METHODS, Layout, Scorer, State, base, make_method
from covcli.methods.base import CostScorer
from covcli.methods.ranges import RangeScorer
from covcli.signature.fit import fold

# Neighbours of equal and of other widths, wide ones, and points with maxima.
LAYOUT = Layout(4, (6, 6, 1300, 3, 8), (3, 3, 1300, 3, 4))
SPECS = [*METHODS, "mrc?sections=3&cost=share", "nrc?direction=input", "nac?classes=own"]


def samples(seed: int, images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(LAYOUT.classes - 1, (images,), generator=generator)  # the last is empty
    noise = torch.randn(images, LAYOUT.neurons, generator=generator)
    return (noise + classes[:, None]).relu(), classes


def scorer_of(spec: str) -> Scorer:
    method = make_method(spec)
    neurons, labels = samples(0, 120)
    state = fold(method, LAYOUT, lambda: [(neurons, labels)])
    noisy = method.begin_noisy(state)
    if noisy is not None:
        method.observe_noisy(noisy, neurons[:30] + 0.5, labels[:30])
        state.include(noisy)
    return method.prepare(state)


@pytest.fixture(scope="module", params=SPECS)
def scorer(request: pytest.FixtureRequest) -> Scorer:
    return scorer_of(request.param)


def inputs(images: int) -> tuple[Tensor, Tensor]:
    neurons, _ = samples(1, images)
    return 1.3 * neurons, torch.arange(images) % LAYOUT.classes


def test_a_scorer_compiles_in_one_graph(scorer: Scorer) -> None:
    torch.compiler.reset()
    compiled = torch.compile(scorer, fullgraph=True, backend="eager", dynamic=True)
    for images in (7, 2, 12):
        evidence = compiled(*inputs(images))
        expected = scorer(*inputs(images))
        np.testing.assert_allclose(evidence.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_scorer_exports_with_any_number_of_images(scorer: Scorer) -> None:
    images = {0: torch.export.Dim("images", min=1, max=1024)}
    program = torch.export.export(scorer, inputs(5), dynamic_shapes=(images, images))
    for count in (1, 5, 64):
        evidence = program.module()(*inputs(count))
        expected = scorer(*inputs(count))
        np.testing.assert_allclose(evidence.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_scorer_needs_no_values(scorer: Scorer) -> None:
    """On a device without values anything that reads one fails, and nothing leaves it."""
    with fake_cuda() as device:
        moved, (neurons, classes) = device.moved((scorer, inputs(9)))
        evidence, soft = moved(neurons, classes), moved.soft(neurons, classes)
        costs, inside = moved.costs(neurons, classes), moved.inside(neurons, classes)
        shares, span = moved.coverage(neurons, classes), moved.span(classes)
        assert on_cuda([evidence, soft, costs, inside, shares, span])
        assert device.copies.back == device.copies.there == 0
    assert evidence.shape == soft.shape == (9, scorer.columns)
    assert evidence.dtype == torch.float64
    assert costs.shape == inside.shape == span[0].shape == span[1].shape == neurons.shape
    assert shares.shape == (9, len(LAYOUT.sizes))


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_waits_for_a_device_while_trusted_images_are_observed(spec: str) -> None:
    method, (neurons, labels) = make_method(spec), samples(0, 120)

    def observed(state: State, noisy: bool = False) -> None:
        observe = method.observe_noisy if noisy else method.observe
        with fake_cuda() as device:
            moved, *batch = device.moved((state, neurons, labels))
            observe(moved, *batch)
            assert on_cuda(moved.tensors)
            assert device.copies.back == 0
        observe(state, neurons, labels)

    state: State | None = method.begin(LAYOUT)
    while state is not None:
        observed(state)
        complete, state = state, method.proceed(state)
    extra = method.begin_noisy(complete)
    if extra is not None:
        observed(extra, noisy=True)


@pytest.mark.parametrize(
    "read",
    [Tensor.tolist, Tensor.item, Tensor.nonzero, bool, float, torch.bincount, lambda x: x[x > 0],
     lambda x: x.cpu().numpy()],
)  # fmt: skip
def test_the_fake_device_refuses_what_reads_a_value(read: Callable[[Tensor], object]) -> None:
    with fake_cuda() as device, pytest.raises((RuntimeError, NotImplementedError)):
        read(device.moved(torch.ones(1, dtype=torch.int64)))


@pytest.mark.parametrize("spec", ["src", "mrc", "mrc?sections=3&cost=share"])
@pytest.mark.parametrize("piece", [1, 700, 1 << 16])
def test_a_cpu_reads_the_same_class_by_class(
    spec: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PIECE", piece)
    monkeypatch.setattr(base, "MEMBERS", piece)  # the smallest: no product sums the costs
    scorer = scorer_of(spec)
    assert isinstance(scorer, RangeScorer)
    for images in (0, 1, 30):
        plain = CostScorer.forward(scorer, *inputs(images))
        faster = scorer(*inputs(images))
        assert plain.shape == faster.shape == (images, scorer.columns)
        np.testing.assert_allclose(faster.numpy(), plain.numpy(), rtol=1e-6, atol=1e-5)


def test_a_value_that_is_no_number_is_scored(scorer: Scorer) -> None:
    """A sweep on a device may find it out some batches later."""
    neurons, classes = inputs(4)
    whole = scorer(neurons, classes)
    neurons[1, ::2] = torch.nan
    assert torch.equal(scorer(neurons, classes)[[0, 2, 3]], whole[[0, 2, 3]])


@pytest.mark.parametrize("spec", ["src", "mrc"])
def test_a_value_that_is_no_number_lies_outside(spec: str) -> None:
    scorer = scorer_of(spec)
    neurons, classes = inputs(4)
    broken = neurons.clone()
    broken[:, :6] = torch.nan
    for read in (type(scorer).forward, CostScorer.forward):
        partial, whole = read(scorer, broken, classes), read(scorer, neurons, classes)
        assert bool(partial.isfinite().all())
        assert bool((partial[:, 0] >= whole[:, 0]).all())
        assert torch.equal(partial[:, 1:], whole[:, 1:])
