"""Networks that people bring: each is watched rightly, or refused in one line that says why."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covcli import Monitor
from covcli.core.errors import CovcliError

LABELS = torch.arange(120) % 2
IMAGES = LABELS.view(-1, 1, 1, 1) + torch.rand(
    120, 3, 8, 8, generator=torch.Generator().manual_seed(0)
)
HELD_OUT = IMAGES.clone()


def plain(classes: int = 2) -> nn.Sequential:
    """Return a network that answers these images rightly: its weights see how bright they are."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))
    with torch.no_grad():
        for layer, weight, bias in ((network[0], 1 / 27, -0.2), (network[3], 1 / 24, 0.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
        network[0].bias += torch.tensor([0.0, 0.1, 0.2, -0.1])
        network[3].weight[0] *= -1
        network[3].bias[0] = 9.0
    return network


class Then(nn.Module):
    """A network, and what becomes of its answer."""

    def __init__(self, network: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.after = network, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(x))


class Masked(Then):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.network(x * mask)


def compiled_in_place() -> nn.Module:
    network = plain()
    network.compile(backend="eager")
    return network


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (lambda: torch.jit.script(plain()), "is TorchScript.*pass the nn.Module itself"),
    "scripted inside": (lambda: Then(torch.jit.script(plain()), F.relu), r"TorchScript.*\(network"),
    "compiled inside": (lambda: Then(torch.compile(plain()), F.relu), r"is compiled.*\(network"),
    "compiled in place": (compiled_in_place, "is compiled"),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}), r"quantised .*\(3\)",
    ),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), r"without a shape \(1\)"),
    "of two inputs": (lambda: Masked(plain(), F.relu), "refuses images of shape.*'mask'"),
    "random": (
        lambda: Then(Then(nn.Identity(), F.dropout), plain()), "differently.*self.training",
    ),
    "one logit": (lambda: plain(1), "one number an image.*a logit a class"),
    "one flat logit": (lambda: Then(plain(1), lambda x: x[:, 0]), "one number an image"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_cannot_be_watched_is_refused_in_one_line(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(CovcliError, match=reason) as caught:
        Monitor.build(make(), (IMAGES, LABELS), HELD_OUT)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_a_compiled_network_is_watched_as_it_was() -> None:
    network = plain()
    data = (IMAGES, LABELS), HELD_OUT
    own = Monitor.build(network, *data, method="src")
    compiled = Monitor.build(torch.compile(network), *data, method="src")
    assert torch.equal(compiled(IMAGES).score, own(IMAGES).score)
    network.compile(backend="eager")  # afterwards: hooks would see nothing
    with pytest.raises(CovcliError, match="compiled in place"):
        own(IMAGES)


def test_a_network_of_log_probabilities_is_judged_alike_in_any_batch() -> None:
    """Their energies are all 0 but for rounding, of which nothing must be made."""
    network = Then(plain(), lambda x: x.log_softmax(1))
    monitor = Monitor.build(network, (IMAGES, LABELS), HELD_OUT)
    whole = monitor(IMAGES).score
    alone = torch.cat([monitor(image[None]).score for image in IMAGES[:12]])
    torch.testing.assert_close(alone, whole[:12], rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(monitor(IMAGES).logits, network(IMAGES))


class Tied(nn.Module):
    """One ReLU and one set of weights, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(True)
        self.last = nn.Conv2d(4, 4, 1)
        self.last.weight = self.again.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.head(self.act(self.last(self.act(self.again(x)))).mean((2, 3)))


def test_each_call_of_a_shared_activation_is_a_point_of_its_own() -> None:
    torch.manual_seed(0)
    network = Tied()
    with torch.no_grad():
        for weights in network.parameters():
            weights.abs_()  # so that no ReLU is dead
        labels = network(IMAGES).sub(network(IMAGES).mean(0)).argmax(1)
        network.head.bias -= network(IMAGES).mean(0)
        one = network.first(IMAGES).relu()
        two = network.again(one).relu()
        three = network.last(two).relu()
    how = {"method": "src", "confidence_threshold": 0.0}
    monitor = Monitor.build(network, (IMAGES, labels), HELD_OUT, **how)  # type: ignore[arg-type]
    assert [point.name for point in monitor.judge.signature.points] == ["act", "act#2", "act#3"]
    mine = [torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)[labels == 0] for x in (one, two, three)]
    expected = torch.cat(mine, 1).amax(0)
    torch.testing.assert_close(monitor.judge.signature.state["high"][0], expected)
