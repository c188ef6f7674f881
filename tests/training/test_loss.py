"""ConfidenceLoss: its ranges, its gradient, and its value against the formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covcli.methods import Layout, State
from covcli.models.pooling import pool
from covcli.signature.fit import fold
from covcli.training.loss import LEAST_WIDTH, MOST, RUNNING, TAIL, ConfidenceLoss, central_range
from covcli.training.session import first_penalised

CLASSES, SIZES = 3, [3, 4, 2, 5]
EARLY = [3, 4]  # the points that are penalised
KNOWN = 2


def trusted() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    neurons = torch.randn(200, sum(SIZES), generator=generator).relu()  # half of them are silent
    neurons[:, 2] = 0.25  # a constant neuron
    return neurons, torch.arange(200) % KNOWN  # the third class has no image


def state(neurons: torch.Tensor, labels: torch.Tensor, classes: int = CLASSES) -> State:
    layout = Layout(classes, (neurons.shape[1],), (neurons.shape[1],))
    folded = fold(RUNNING, layout, lambda: [(neurons, labels)])
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in folded.tensors.items()}
    return folded.holding(tensors)


def random_neurons(n: int = 6) -> torch.Tensor:
    return torch.randn(
        n, sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60),
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=60),
)
def test_the_central_range_leaves_out_a_tenth_at_each_end_and_no_more(
    spread: list[float], repeated: list[float]
) -> None:
    values = torch.tensor([*spread, *repeated])
    n = len(values)
    complete = state(values[:, None], torch.zeros(n, dtype=torch.int64), 1)
    low, high = (end.item() for end in central_range(complete))
    x = np.sort(values.double().numpy())
    section = (x[-1] - x[0]) / RUNNING.sections
    slack = 1e-9 * (1 + abs(x).max())
    assert (x < low - slack).sum() <= TAIL * n
    assert (x > high + slack).sum() <= TAIL * n + 1e-9
    # and one section less at either end would leave out more
    assert (x < low + section + slack).sum() > TAIL * n
    assert (x > high - section - slack).sum() >= TAIL * n - 1e-9


def test_the_gradient_is_real() -> None:
    loss = ConfidenceLoss(state(*trusted()), SIZES).double()
    neurons = random_neurons().requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), neurons)
    loss(neurons, labels).backward()
    assert neurons.grad is not None
    assert bool((neurons.grad[0] != 0).any())
    assert bool((neurons.grad[:, sum(EARLY) :] == 0).all())
    assert bool((neurons.grad[4] == 0).all())  # an unknown class is not penalised


def test_the_penalty_is_the_distance_in_widths_and_zero_inside() -> None:
    complete = state(*trusted())
    low, high = (end[:KNOWN].numpy() for end in central_range(complete))
    neurons, labels = random_neurons(), np.array([0, 1, 0, 1, 1, 0])
    x = neurons.numpy()
    distance = np.maximum(low[labels] - x, 0) + np.maximum(x - high[labels], 0)
    points = []
    for columns in np.split(np.arange(sum(EARLY)), [EARLY[0]]):
        width = (high - low)[:, columns]
        width = np.maximum(width, LEAST_WIDTH * width.mean())
        points.append(np.minimum(distance[:, columns] / width[labels], MOST).mean())
    loss = ConfidenceLoss(complete, SIZES)
    assert loss(neurons, torch.from_numpy(labels)).item() == pytest.approx(np.mean(points))
    inside = np.where(distance > 0, (low + high)[labels] / 2, x)
    assert loss(torch.from_numpy(inside), torch.from_numpy(labels)).item() == 0


def test_what_was_thrown_far_away_is_not_thrown_further() -> None:
    loss = ConfidenceLoss(state(*trusted()), SIZES)
    neurons = (1e6 * random_neurons().abs() + 1e6).requires_grad_()
    penalty = loss(neurons, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert penalty.item() == pytest.approx(MOST)
    penalty.backward()
    assert neurons.grad is not None
    assert bool((neurons.grad == 0).all())


def test_trusted_images_themselves_have_a_gradient() -> None:
    """Not so with the extremes of the class: those leave no trusted image outside."""
    neurons, labels = trusted()
    neurons = neurons.double().requires_grad_()
    ConfidenceLoss(state(neurons.detach().float(), labels), SIZES).double()(
        neurons, labels
    ).backward()
    assert neurons.grad is not None
    varying = [0, 1, 3, 4, 5, 6]
    moved = (neurons.grad[:, varying] != 0).double().mean().item()
    assert TAIL / 2 < moved <= 2 * TAIL  # of silent neurons none lies below the range


@pytest.mark.parametrize(
    ("shape", "channels"), [((3, 4, 5, 6), 1), ((3, 7, 4), -1), ((2, 3, 5), 1)]
)
def test_neurons_are_the_same_with_a_gradient_as_without(
    shape: tuple[int, ...], channels: int
) -> None:
    output = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    rest = tuple(d for d in range(1, len(shape)) if d != channels % len(shape))
    expected = np.concatenate([output.numpy().mean(rest), output.numpy().max(rest)], 1)
    plain, tracked = (
        pool(x, channels, "channel") for x in (output, output.clone().requires_grad_())
    )
    assert torch.equal(plain, tracked)
    assert plain.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("epochs", "first"), [(1, 2), (2, 2), (3, 2), (4, 3), (7, 4), (10, 6)])
def test_the_penalty_starts_in_the_second_half(epochs: int, first: int) -> None:
    assert first_penalised(epochs) == first
