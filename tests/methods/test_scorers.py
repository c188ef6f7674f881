"""Scorers are plain tensor operations: they compile in one graph, trace, and run without values."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from covcli.methods import Layout, Scorer, base, make_method
from covcli.methods.base import CostScorer
from covcli.methods.ranges import RangeScorer
from covcli.signature.fit import fold

# Neighbours of equal and of other widths, wide ones, and points with maxima.
LAYOUT = Layout(4, (6, 6, 1300, 3, 8), (3, 3, 1300, 3, 4))
SPECS = ["src", "mrc", "mrc?sections=3&cost=share", "gauss", "nrc", "nac", "ensemble"]


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
    """On the meta device, and on the fake tensors of a tracer, anything that reads one fails."""
    moved = copy.deepcopy(scorer).to("meta")
    neurons, classes = (part.to("meta") for part in inputs(9))
    shape = (9, scorer.columns)
    assert moved(neurons, classes).shape == moved.soft(neurons, classes).shape == shape
    assert moved.costs(neurons, classes).shape == moved.inside(neurons, classes).shape
    assert moved.coverage(neurons, classes).shape == (9, len(LAYOUT.sizes))
    assert [end.shape for end in moved.span(classes)] == [neurons.shape] * 2
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        evidence = scorer(*(fake.from_tensor(part) for part in inputs(9)))
    assert evidence.shape == shape
    assert evidence.dtype == torch.float64


@pytest.mark.parametrize("spec", ["src", "mrc", "mrc?sections=3&cost=share"])
@pytest.mark.parametrize("piece", [1, 700, 1 << 16])
def test_a_cpu_reads_the_same_class_by_class(
    spec: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(spec)
    assert isinstance(scorer, RangeScorer)
    monkeypatch.setattr(base, "PIECE", piece)
    for images in (0, 1, 30):
        plain = CostScorer.forward(scorer, *inputs(images))
        faster = scorer(*inputs(images))
        assert plain.shape == faster.shape == (images, scorer.columns)
        np.testing.assert_allclose(faster.numpy(), plain.numpy(), rtol=1e-6, atol=1e-5)


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
