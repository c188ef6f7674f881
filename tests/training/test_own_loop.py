"""The ConfidenceLoss in a training loop of one's own."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from covcli import ConfidenceLoss
from covcli.core.errors import CovcliError
from covcli.models.pooling import pool

CLASSES = 3


class Net(nn.Module):
    """Activations as functions, normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 8, 3, 2)
        self.norm, self.drop, self.head = nn.BatchNorm2d(6), nn.Dropout(0.2), nn.Linear(8, CLASSES)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.norm(self.a(x)))
        second = F.relu(self.b(first))
        self.seen = [first, second]
        return self.head(self.drop(second.mean((2, 3))))


def data(n: int = 240) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    images = torch.randn(n, 3, 16, 16, generator=generator) * 0.5
    images[torch.arange(n), labels] += 2
    return TensorDataset(images, labels)


def train(weight: float, epochs: int = 4, seed: int = 0) -> tuple[Net, list[float]]:
    torch.manual_seed(seed)
    network = Net()
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    loader = DataLoader(data(), batch_size=32, shuffle=True)
    penalties = []
    with ConfidenceLoss.attach(network, weight=weight) as loss:
        for epoch in range(epochs):
            if epoch == epochs // 2:
                loss.refresh(loader)
            network.train()
            for images, labels in loader:
                logits = network(images)
                penalty = loss.step(labels)
                optimizer.zero_grad()
                (F.cross_entropy(logits, labels) + penalty).backward()
                optimizer.step()
                penalties.append(float(penalty.detach()) / max(weight, 1e-9))
    return network, penalties


def test_nothing_is_penalised_before_the_first_refresh() -> None:
    network, penalties = train(weight=20.0, epochs=4)
    half = len(penalties) // 2
    assert penalties[:half] == [0.0] * half
    assert all(p > 0 for p in penalties[half:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def descend(seed: int, steps: int = 60) -> tuple[float, float]:
    """Return the penalty of a fixed batch of one class before and after learning from it alone."""
    network, _ = train(weight=0.0, epochs=2, seed=seed)
    images, labels = data().tensors
    images, labels = images[labels == 0], labels[labels == 0]
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    penalties = []
    with ConfidenceLoss.attach(network, weight=1.0) as loss:
        loss.refresh(data())
        network.eval()  # neither dropout nor running statistics: nothing but the weights changes
        for _ in range(steps):
            network(images)
            penalty = loss.step(labels)
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
            penalties.append(float(penalty.detach()))
    return penalties[0], penalties[-1]


@pytest.mark.parametrize("seed", range(3))
def test_learning_from_the_penalty_alone_brings_a_batch_into_its_ranges(seed: int) -> None:
    first, last = descend(seed)
    assert first > 0
    assert last < first / 2


def test_the_penalty_is_that_of_the_pass_just_made() -> None:
    network, _ = train(weight=1.0)
    images, labels = data(16).tensors
    loss = ConfidenceLoss.attach(network, weight=0.5)
    loss.refresh(data())
    network.train()
    torch.manual_seed(1)
    with torch.no_grad():
        network(images[:3])  # a pass in between, of something else
    logits = network(images)
    neurons = torch.cat([pool(output, 1, "channel") for output in network.seen], 1)
    penalty = loss.step(labels)
    assert loss._loss is not None
    assert torch.equal(penalty, 0.5 * loss._loss(neurons, labels))
    (F.cross_entropy(logits, labels) + penalty).backward()
    gradient = network.a.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
    loss.detach()


def test_a_refresh_leaves_the_network_as_it_was() -> None:
    network, _ = train(weight=0.1)
    network.train()
    network.norm.eval()
    before = OrderedDict((k, v.clone()) for k, v in network.state_dict().items())
    modes = [module.training for module in network.modules()]
    drawn = torch.random.get_rng_state()
    with ConfidenceLoss.attach(network) as loss:
        loss.refresh(DataLoader(data(), batch_size=7, shuffle=True))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), drawn)


@pytest.mark.parametrize("wrong", ["no pass", "no gradient", "other images"])
def test_a_step_without_its_pass_is_refused(wrong: str) -> None:
    network, _ = train(weight=0.1, epochs=2)
    images, labels = data(8).tensors
    with ConfidenceLoss.attach(network) as loss:
        loss.refresh(data())
        network.train()
        if wrong == "no gradient":
            with torch.no_grad():
                network(images)
        elif wrong == "other images":
            network(images[:3])
        said = "not reached" if wrong == "no pass" else "right after the pass"
        with pytest.raises(CovcliError, match=said):
            loss.step(labels)


def test_points_and_logits_can_be_named() -> None:
    class Pair(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), torch.ones(len(x), CLASSES)

    torch.manual_seed(0)
    network = Pair()
    loss = ConfidenceLoss.attach(network, points=["*relu#2"], logits="0")
    loss.refresh(data())
    network.train()
    network(data(6).tensors[0])
    assert loss.step(torch.arange(6) % CLASSES).requires_grad
    assert loss._recorder is not None
    assert [p.name for p in loss._recorder.points] == ["forward:relu#2"]
    loss.detach()
