"""The ConfidenceLoss in a training loop of one's own."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
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
        for _ in range(2):  # the second time there is no pass
            with pytest.raises(CovcliError, match="right after the pass"):
                loss.step(labels)


def test_labels_of_a_step_are_those_of_the_images_in_any_form() -> None:
    network, _ = train(weight=0.1, epochs=2)
    images, labels = data(8).tensors
    one_hot = F.one_hot(labels, CLASSES)
    with ConfidenceLoss.attach(network, weight=1.0) as loss:
        loss.refresh(data())
        network.eval()
        network(images)
        penalty = loss.step(labels)
        for form in (labels.int(), labels[:, None], one_hot, one_hot.float(), labels.float()):
            network(images)
            assert torch.equal(loss.step(form), penalty)
        for wrong in (labels + CLASSES, labels - 1, one_hot * 0.9 + 0.03, labels + 0.5):
            with pytest.raises(CovcliError, match="not classes 0 to 2"):
                loss.step(wrong)


@pytest.mark.parametrize("frozen", [(), ("b",), ("a", "norm"), ("a", "norm", "b")])
def test_a_penalty_that_can_change_no_weight_is_said(
    frozen: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    network, _ = train(weight=0.1, epochs=2)
    images, labels = data(8).tensors
    for name in frozen:
        network.get_submodule(name).requires_grad_(False)
    with ConfidenceLoss.attach(network, weight=1.0) as loss:
        for _ in range(2):
            loss.refresh(data())
        network.train()
        total = F.cross_entropy(network(images), labels) + loss.step(labels)
        total.backward()
    assert caplog.text.count("the penalised layers are frozen") == ("a" in frozen)


@pytest.mark.parametrize("module", [True, False])
def test_recomputed_activations_have_the_same_gradient(module: bool) -> None:
    class Recomputed(Net):
        reentrant: bool | None = None

        def forward(self, x: Tensor) -> Tensor:
            relu = self.relu if module else F.relu

            def body(x: Tensor) -> Tensor:
                return relu(self.b(relu(self.norm(self.a(x)))))

            if self.reentrant is not None and torch.is_grad_enabled():
                return self.head(
                    checkpoint(body, x, use_reentrant=self.reentrant).mean((2, 3))  # type: ignore[no-untyped-call]
                )
            return self.head(body(x).mean((2, 3)))

    torch.manual_seed(0)
    network = Recomputed()
    network.relu = nn.ReLU()
    images, labels = data(8).tensors
    gradients = []
    with ConfidenceLoss.attach(network, weight=1.0, confidence_threshold=0.0) as loss:
        loss.refresh(data())
        for reentrant in (None, False):
            network.reentrant = reentrant
            network.zero_grad()
            (F.cross_entropy(network(images), labels) + loss.step(labels)).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))  # type: ignore[union-attr]
        network.reentrant = True
        network(images.requires_grad_())
        with pytest.raises(CovcliError, match="have no gradient: they were detached, or"):
            loss.step(labels)
    torch.testing.assert_close(*gradients)


def test_settings_that_mean_nothing_are_refused() -> None:
    for settings in ({"weight": -1.0}, {"weight": float("nan")}, {"confidence_threshold": 5.0}):
        with pytest.raises(CovcliError, match="must be"):
            ConfidenceLoss.attach(Net(), **settings)  # type: ignore[arg-type]


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
