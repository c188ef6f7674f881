"""ConfidenceLoss: its gradient, and its value against the formulas."""

import numpy as np
import pytest
import torch

from covcli.fitting import fold
from covcli.losses import LEAST_WIDTH, ConfidenceLoss
from covcli.methods import State, make_method

CLASSES, SIZES = 3, [3, 4]


def state(spec: str, dtype: torch.dtype = torch.float64) -> State:
    generator = torch.Generator().manual_seed(0)
    neurons = torch.rand(60, sum(SIZES), generator=generator)
    neurons[:, 2] = 0.25  # a constant neuron
    labels = torch.arange(60) % 2  # the third class has no image
    made = fold(make_method(spec), CLASSES, sum(SIZES), lambda: [(neurons, labels)])
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.tensors.items()}
    return State(tensors, made.reductions)


def random_neurons(n: int = 6) -> torch.Tensor:
    return torch.randn(
        n, sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("spec", ["src", "mrc", "mrc?sections=1", "mrc?sections=2"])
def test_the_gradient_is_real(spec: str) -> None:
    loss = ConfidenceLoss(state(spec), SIZES).double()
    neurons = random_neurons().requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), neurons)
    loss(neurons, labels).backward()
    assert neurons.grad is not None
    assert bool((neurons.grad[0] != 0).any())
    assert bool((neurons.grad[4] == 0).all())  # an unknown class is not penalised


def widths(made: State) -> np.ndarray:
    """The range's width, at least LEAST_WIDTH of the mean width of the point's known classes."""
    width = (made["high"] - made["low"])[:2].numpy()
    least = np.concatenate([np.full(n, LEAST_WIDTH * part.mean()) for n, part in
                            zip(SIZES, np.split(width, [SIZES[0]], 1), strict=True)])  # fmt: skip
    return np.maximum(width, least)


def test_the_single_range_penalty_is_the_distance_in_widths() -> None:
    made = state("src")
    neurons, labels = random_neurons(), np.array([0, 1, 0, 1, 1, 0])
    low, high = made["low"].numpy()[labels], made["high"].numpy()[labels]
    x = neurons.numpy()
    distance = np.maximum(low - x, 0) + np.maximum(x - high, 0)
    expected = (distance / widths(made)[labels]).mean()
    found = ConfidenceLoss(made, SIZES)(neurons, torch.from_numpy(labels))
    assert found.item() == pytest.approx(expected)
    inside = torch.from_numpy(np.where(distance > 0, (low + high) / 2, x))
    assert ConfidenceLoss(made, SIZES)(inside, torch.from_numpy(labels)).item() == 0


def test_the_multi_range_penalty_is_the_papers_cost_at_section_centres() -> None:
    made = state("mrc?sections=4")
    loss = ConfidenceLoss(made, SIZES)
    method = make_method("mrc?sections=4&cost=share")
    for q in range(4):
        for k in (0, 1):
            centre = made["low"][k] + (made["high"] - made["low"])[k] * (q + 0.5) / 4
            label = torch.tensor([k])
            cost = method.costs(made, centre[None], label).double()
            cost[:, 2] = 0  # a constant neuron has one section, and nowhere to go
            assert loss(centre[None], label).item() == pytest.approx(cost.mean().item(), abs=1e-6)


def test_the_multi_range_penalty_pulls_towards_frequent_sections() -> None:
    values = torch.cat([torch.zeros(1), torch.full((20,), 0.9), torch.ones(1)])[:, None]
    labels = torch.zeros(22, dtype=torch.int64)
    made = fold(make_method("mrc?sections=2"), 1, 1, lambda: [(values, labels)])
    neuron = torch.tensor([[0.5]], requires_grad=True)
    ConfidenceLoss(made, [1])(neuron, labels[:1]).backward()
    assert neuron.grad is not None
    assert neuron.grad.item() < 0  # a descent step moves it up, to where the others are
