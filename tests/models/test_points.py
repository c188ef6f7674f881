"""Where a network is watched: activations called as functions, attention, windows, patterns.

The truth is always what the network computes by hand, or a tensor that it kept for the test.
"""

import copy
import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import tiny_config
from torch import Tensor, nn
from torch.nn import functional as F

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.models import MODELS, architectures, checkpoint, model
from covcli.models.architectures import ModelSpec
from covcli.models.listing import as_table, list_points
from covcli.models.points import CoverageLayer, Outputs, Recorder
from covcli.models.pooling import pool
from covcli.models.survey import find_points, look
from covcli.models.weights import Foreign
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.monitor import Monitor
from covcli.training.train import train

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu, in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": lambda x: F.relu_(x.clone()),
    "torch.relu": torch.relu,
    "torch.relu_": lambda x: torch.relu_(x.clone()),
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.clone().relu_(),
    "nn.functional.silu": nn.functional.silu,
    "F.silu, in place": lambda x: F.silu(x.clone(), inplace=True),
    "F.gelu": F.gelu,
    "F.elu": F.elu,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "F.relu6": F.relu6,
    "F.hardswish": F.hardswish,
    "F.mish": F.mish,
    "F.selu": F.selu,
    "torch.celu": torch.celu,
    "F.softplus": F.softplus,
    "torch.tanh": torch.tanh,
    "F.tanh": F.tanh,
    "x.tanh": lambda x: x.tanh(),
    "x.clamp(min=0)": lambda x: x.clamp(min=0),
    "x.clamp_min(0)": lambda x: x.clamp_min(0),
    "x.clamp(0, 6)": lambda x: x.clamp(0, 6),
    "torch.sigmoid": torch.sigmoid,
    "F.sigmoid": F.sigmoid,
    "x.sigmoid": lambda x: x.sigmoid(),
    "torch.special.expit": torch.special.expit,
    "F.hardsigmoid": F.hardsigmoid,
    "F.logsigmoid": F.logsigmoid,
    "F.softsign": F.softsign,
    "F.tanhshrink": F.tanhshrink,
    "F.softshrink": F.softshrink,
    "F.hardshrink": F.hardshrink,
    "F.threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "F.hardtanh": F.hardtanh,
    "F.rrelu": F.rrelu,
}


class Mixed(nn.Module):
    """One activation that is a module, among some that are functions."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.a(x))
        x = self.activation(self.norm(self.b(x)))
        return self.head(x.mean((2, 3)))

    def by_hand(self, x: Tensor) -> list[Tensor]:
        first = self.activation(self.a(x).clone())
        second = self.activation(self.norm(self.b(first)).clone())
        return [first, second, torch.relu(self.head[0](second.mean((2, 3))))]


def pooled(outputs: list[Tensor]) -> Tensor:
    return torch.cat([pool(output, 1, "channel") for output in outputs], 1)


def recorded(network: nn.Module, images: Tensor) -> Tensor:
    points = find_points(network, images, "channel")
    with torch.no_grad(), Recorder(network, points, "channel") as recorder:
        logits = network(images)
        return recorder.take(logits)


@pytest.mark.parametrize("call", CALLS)
def test_activations_called_as_functions_are_watched(call: str) -> None:
    torch.manual_seed(0)
    network, images = Mixed(CALLS[call]).eval(), torch.randn(4, 3, 9, 9)
    points = find_points(network, images, "channel")
    assert [p.module for p in points] == ["", "", "head.1"]
    assert points[0].name == f"forward:{points[0].function}"
    assert points[1].name == f"forward:{points[0].function}#2"
    with torch.no_grad():
        assert torch.equal(recorded(network, images), pooled(network.by_hand(images)))


def test_clamps_that_are_no_relu_are_no_points() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x).clamp(0, 1).clamp(min=1e-6).clamp(max=0.5))
            return self.head(x.mean((2, 3)))

    points = find_points(Clamped(), torch.zeros(1, 3, 8, 8), "channel")
    assert [p.name for p in points] == ["forward:relu"]


# How a channel's weight, in (0, 1), is laid on the map that it weighs.
GATED: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "function": lambda x, _: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "module": lambda x, gate: gate(x.mean((2, 3), keepdim=True)) * x,
    "viewed": lambda x, _: x * x.mean((2, 3)).sigmoid().view(len(x), -1, 1, 1).expand_as(x),
    "indexed": lambda x, gate: x * gate(x.amax((2, 3)))[:, :, None, None],
    "in place": lambda x, _: x.mul_(F.hardsigmoid(x.mean(1, keepdim=True))),
    "scaled": lambda x, _: x * (2 * torch.sigmoid(x.mean((2, 3), keepdim=True))),
    "other map": lambda x, _: torch.mul(x, torch.sigmoid(x.flip(2))),
}
SWISH: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "function": lambda x, _: x * torch.sigmoid(x),
    "module": lambda x, gate: gate(x) * x,
    "scaled": lambda x, _: x * torch.sigmoid(1.702 * x),
    "learnt": lambda x, gate: x.mul(torch.sigmoid(gate.slope * x)),
}


class Gating(nn.Module):
    def __init__(self, weigh: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.weigh, self.gate = weigh, nn.Sigmoid()
        self.gate.slope = nn.Parameter(torch.ones(1))
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.weigh(F.relu(self.conv(x)) + 0.1, self.gate)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("how", GATED)
def test_gates_are_no_points(how: str) -> None:
    seen = look(Gating(GATED[how]), torch.zeros(1, 3, 8, 8), "channel")
    assert [c.point.name for c in seen.choose()] == ["forward:relu"]
    assert sum(c.kind == "gate" for c in seen.candidates) == 1


@pytest.mark.parametrize("how", SWISH)
def test_what_weighs_its_own_input_is_an_activation(how: str) -> None:
    chosen = look(Gating(SWISH[how]), torch.zeros(1, 3, 8, 8), "channel").choose()
    assert [c.what for c in chosen] == ["relu", "Sigmoid" if how == "module" else "sigmoid"]


def test_functions_are_told_apart_by_the_module_that_calls_them() -> None:
    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(channels, channels, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + F.gelu(self.conv(self.act(x))))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
            self.blocks = nn.Sequential(Block(4), Block(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(torch.tanh(self.stem(x))).mean((2, 3)))

    torch.manual_seed(0)
    network, images = Whole().eval(), torch.randn(3, 3, 5, 5)
    points = find_points(network, images, "channel")
    assert [p.name for p in points] == [
        "forward:tanh", "blocks.0.act", "blocks.0:gelu", "blocks.0:relu", "blocks.1.act",
        "blocks.1:gelu", "blocks.1:relu",
    ]  # fmt: skip
    with torch.no_grad():
        x = torch.tanh(network.stem(images))
        expected = [x]
        for block in network.blocks:
            inner = torch.relu(x)
            gelu = F.gelu(block.conv(inner))
            expected += [inner, gelu, x := torch.relu(x + gelu)]
        assert torch.equal(recorded(network, images), pooled(expected))
    some = [points[3], points[5]]  # of some points alone, each keeps its place
    with torch.no_grad(), Recorder(network, some, "channel") as recorder:
        neurons = recorder.take(network(images))
    assert torch.equal(neurons, pooled([expected[3], expected[5]]))


def test_gradients_contributions_and_copies_of_functions() -> None:
    torch.manual_seed(0)
    network, images = Mixed().eval(), torch.randn(4, 3, 9, 9)
    points = find_points(network, images, "contribution")
    with Recorder(network, points, "contribution") as recorder:
        logits = network(images.requires_grad_())
        neurons = recorder.take(logits)
    outputs = network.by_hand(images)
    outputs[2] = network.head[1](network.head[0](outputs[1].mean((2, 3))))
    logits = network.head[2](outputs[2])
    certainty = -(logits.softmax(1) + 1e-12).log().mean(1).sum()
    gradients = torch.autograd.grad(certainty, outputs)
    sums = [[pool(t, 1, "contribution") for t in ts] for ts in (outputs, gradients)]
    expected = [o * g for o, g in zip(*sums, strict=True)]
    torch.testing.assert_close(neurons, torch.cat(expected, 1).detach())
    units = find_points(network, images, "unit")
    with Recorder(network, units, "unit") as recorder:
        assert recorder.take(network(images)).requires_grad
        recorder.take(network(images)).sum().backward()
        assert network.a.weight.grad is not None
    recorder.stay()
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(copied(images), network(images))
    recorder.leave()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_an_error_within_a_pass_leaves_nothing_behind() -> None:
    network, images = Mixed().eval(), torch.randn(2, 3, 9, 9)
    points = find_points(network, images, "channel")
    with Recorder(network, points, "channel") as recorder:
        with pytest.raises(RuntimeError):
            network(torch.randn(2, 4, 9, 9))
        seen: list[Tensor] = []
        assert torch.overrides._len_torch_function_stack() == 0
        assert torch.equal(recorder.take(network(images)), pooled(network.by_hand(images)))
    assert seen == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_threads_record_functions_each_for_itself() -> None:
    torch.manual_seed(0)
    network = Mixed().eval()
    batches = [torch.randn(n % 5 + 1, 3, 9, 9) for n in range(40)]
    points = find_points(network, batches[0], "channel")
    recorder = Recorder(network, points, "channel")
    recorder.stay()

    def record(images: Tensor) -> Tensor:
        with torch.inference_mode(), recorder:
            return recorder.take(network(images))

    def plain(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(images)

    with ThreadPoolExecutor(6) as pool_of_threads:
        others = [pool_of_threads.submit(plain, images) for images in batches]
        recordings = list(pool_of_threads.map(record, batches))
        [other.result() for other in others]
    recorder.leave()
    for images, neurons in zip(batches, recordings, strict=True):
        torch.testing.assert_close(neurons, pooled(network.by_hand(images)).detach())


class Block(nn.Module):
    """Attention and a multilayer perceptron, as in a transformer; batch second if told so."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        self.kept = x + self.mlp(x)
        return self.kept


class Transformer(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.patches, self.batch_first = nn.Conv2d(3, 8, 4, 4), batch_first
        self.blocks = nn.Sequential(Block(batch_first), Block(batch_first))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).permute(0, 2, 1)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        tokens = self.blocks(tokens)
        return self.head(tokens.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformers_are_watched_by_token_wise_channels(batch_first: bool) -> None:
    torch.manual_seed(0)
    network, images = Transformer(batch_first).eval(), torch.randn(5, 3, 12, 8)
    points = find_points(network, images, "channel")
    assert [p.name for p in points] == ["blocks.0.mlp.1", "blocks.0", "blocks.1.mlp.1", "blocks.1"]
    assert {p.batch for p in points} == {"first" if batch_first else "second"}
    assert [p.neurons for p in points] == [24, 16, 24, 16]
    neurons = recorded(network, images)
    one = torch.cat([recorded(network, image[None]) for image in images])
    torch.testing.assert_close(neurons, one, atol=1e-5, rtol=1e-5)
    kept = network.blocks[1].kept
    assert kept is not None  # of the last image
    tokens = kept if batch_first else kept.transpose(0, 1)
    expected = torch.cat([tokens.mean(1), tokens.amax(1)], 1)
    torch.testing.assert_close(one[-1:, -16:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["scaled_dot_product", "matmul", "bmm"])
def test_attention_written_by_hand_is_found(kind: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.drop = nn.Linear(8, 24), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            if kind == "scaled_dot_product":
                return F.scaled_dot_product_attention(q, k, v)
            weights = self.drop((q @ k.transpose(1, 2)).softmax(-1))
            return torch.bmm(weights, v) if kind == "bmm" else weights @ v

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.attention = nn.Conv2d(3, 8, 4, 4), Attention()
            self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).permute(0, 2, 1)
            return self.head(self.attention(tokens).mean(1))

    chosen = look(Whole(), torch.zeros(1, 3, 8, 8), "channel").choose()
    assert [(c.point.name, c.kind) for c in chosen] == [
        ("attention", "attention"), ("head.1", "activation"),
    ]  # fmt: skip
    assert (chosen[0].shape, chosen[0].point.neurons) == ((4, 8), 16)


class Windows(nn.Module):
    """Folds an image's windows into the batch, image by image or window by window."""

    def __init__(self, interleaved: bool, channels_first: bool) -> None:
        super().__init__()
        self.interleaved, self.channels_first = interleaved, channels_first
        self.mix = nn.Conv2d(3, 6, 1) if channels_first else nn.Linear(3, 6)
        self.act, self.head = nn.ReLU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        tiles = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(1, 2)
        if self.interleaved:
            tiles = tiles.transpose(0, 1)
        folded = tiles.flatten(0, 1)  # (images·windows, 2, 2, 3)
        if self.channels_first:
            folded = folded.permute(0, 3, 1, 2)
        out = self.act(self.mix(folded)).mean((2, 3) if self.channels_first else (1, 2))
        shape = (-1, len(x), 6) if self.interleaved else (len(x), -1, 6)
        return self.head(out.view(shape).mean(0 if self.interleaved else 1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "unit"])
def test_windows_in_the_batch_belong_to_their_images(
    interleaved: bool, channels_first: bool, granularity: str
) -> None:
    torch.manual_seed(0)
    network, images = Windows(interleaved, channels_first).eval(), torch.randn(4, 3, 6, 4)
    (point,) = find_points(network, images, granularity)  # type: ignore[arg-type]
    assert point.batch == ("interleaved" if interleaved else "folded")
    with torch.no_grad(), Recorder(network, [point], granularity) as recorder:  # type: ignore[arg-type]
        neurons = recorder.take(network(images))
        ones = [recorder.take(network(image[None])) for image in images]
    torch.testing.assert_close(neurons, torch.cat(ones))
    if granularity == "channel":
        weight = network.mix.weight.view(6, 3)
        values = torch.relu(torch.einsum("bchw,oc->bohw", images, weight)
                            + network.mix.bias[:, None, None]).detach()  # fmt: skip
        torch.testing.assert_close(neurons, pooled([values]), atol=1e-5, rtol=1e-5)


def test_what_does_not_depend_on_the_image_is_not_watched() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.rand(1, 7, 4))
            self.mlp = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
            self.head = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3))) + self.mlp(self.table).mean()

    seen = look(Bias(), torch.zeros(1, 3, 4, 4), "channel")
    assert [c.point.name for c in seen.choose()] == ["head.1"]
    assert seen.unwatchable == ["mlp.1"]


def test_patterns_choose_points_and_any_module() -> None:
    seen = look(Mixed(), torch.zeros(1, 3, 9, 9), "channel")

    def names(*patterns: str) -> list[str]:
        return [c.point.name for c in seen.choose(patterns)]

    assert names() == ["forward:relu", "forward:relu#2", "head.1"]
    assert names("head*") == ["head.1"]  # of the default points, where one matches
    assert names("*:relu*") == ["forward:relu", "forward:relu#2"]
    assert names("norm", "head.1") == ["norm", "head.1"]
    assert names("b", "a") == ["a", "b"]  # in the order of a pass
    with pytest.raises(CovcliError, match="matches no coverage point 'heat'"):
        names("heat")


def colours(path: Path, n: int) -> None:
    """Write noisy images whose strongest colour is their class."""
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 3
    pixels = generator.normal(70, 25, (n, 32, 32, 3))
    pixels[np.arange(n), :, :, labels] += 90
    np.savez(path, images=np.clip(pixels, 0, 255).astype(np.uint8), labels=labels)


def test_a_network_that_drops_a_batch_of_one_answers_single_images(tmp_path: Path) -> None:

    class Squeezed(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(x)).mean((2, 3)).squeeze())

    if "squeezed" not in MODELS:
        model("squeezed")(lambda classes, pretrained: Squeezed(classes))
    colours(tmp_path / "train.npz", 300)
    config = tiny_config(tmp_path, model="squeezed", trusted=f"npz:{tmp_path / 'train.npz'}")
    result = train(config, Silent())
    signed = build_signature(SignatureConfig(result.checkpoint, method="mrc"), Silent())
    monitor = Monitor.load(result.checkpoint, signed.path)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    together = monitor(images)
    alone = [monitor(image[None]) for image in images]
    assert all(v.logits.shape == (1, 3) for v in alone)
    assert torch.equal(torch.cat([v.predicted for v in alone]), together.predicted)
    torch.testing.assert_close(torch.cat([v.score for v in alone]), together.score, atol=1e-4,
                               rtol=1e-4)  # fmt: skip


def test_swin_is_watched_as_its_windows_are_timms(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1), embed_dim=12,
        num_heads=(1, 2), num_classes=3,
    ).eval()  # fmt: skip
    images = torch.randn(3, 3, 56, 56)
    names = ["layers.0.blocks.0.attn", "layers.0.blocks.0.mlp.act", "layers.0.blocks.0"]
    points = find_points(network, images, "channel", names)
    assert [p.name for p in points] == names
    assert {p.batch for p in points} == {"first", "folded"}
    with torch.no_grad(), Recorder(network, points, "channel") as recorder:
        whole = recorder.take(network(images))
        ones = torch.cat([recorder.take(network(image[None])) for image in images])
    torch.testing.assert_close(whole, ones, atol=1e-5, rtol=1e-4)


def test_a_watched_network_with_functions_can_be_exported() -> None:
    torch.manual_seed(0)

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Mixed().eval()
            self.points = find_points(self.network, torch.zeros(1, 3, 9, 9), "channel")

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            with Recorder(self.network, self.points, "channel") as recorder:
                logits = self.network(images)
                return logits, recorder.take(logits)

    watched, images = Watched(), torch.randn(4, 3, 9, 9)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(watched, (images,), dynamic_shapes=(batch,))
    others = torch.randn(7, 3, 9, 9)
    for ours, theirs in zip(program.module()(others), watched(others), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_points_are_listed_with_shapes(tmp_path: Path) -> None:
    listed = list_points(None, Foreign("torchvision:densenet121", preprocess="crop=64"), classes=7)
    assert (listed.watched, len(listed.points)) == (121, 121)
    assert listed.neurons == sum(point.neurons for point in listed.points)
    first, last = listed.points[0], listed.points[-1]
    assert (first.name, first.shape, first.neurons) == ("features.relu0", (64, 32, 32), 128)
    assert (last.name, last.what) == ("forward:relu", "relu")  # a function, in densenet's forward
    network = torchvision.models.densenet121(num_classes=7)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    told = Foreign("torchvision:densenet121")
    same = list_points(tmp_path / "w.pt", told, patterns=("features.relu0",), every=True)
    assert (same.classes, same.watched) == (7, 1)
    assert [p.name for p in same.points if p.watched] == ["features.relu0"]
    table = as_table(same)
    assert table.head[-1] == "watched"
    assert all(len(row) == len(table.head) for row in table.rows)
    with pytest.raises(CovcliError, match="name a checkpoint, or a --model"):
        list_points(None, Foreign())


def test_chosen_points_are_trained_recorded_signed_and_monitored(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path, points=("second*",), epochs=2), Silent())
    assert checkpoint.load(result.checkpoint).training["points"] == ["second*"]
    signed = build_signature(SignatureConfig(result.checkpoint, method="src"), Silent())
    assert (signed.points, signed.neurons) == (1, 32)
    other = build_signature(
        SignatureConfig(result.checkpoint, method="src", points=("head*", "first.0"),
                        output=tmp_path / "other.safetensors"), Silent()
    )  # fmt: skip
    assert (other.points, other.neurons) == (2, 2 * 8 + 32)
    monitor = Monitor.load(result.checkpoint, other.path)
    assert monitor(torch.zeros(2, 3, 32, 32)).score.shape == (2,)
    assert [p.name for p in monitor.judge.signature.points] == ["first.0", "head.2"]


def test_a_network_whose_answers_depend_on_the_batch_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    if "batchy" not in MODELS:
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
        model("batchy")(lambda classes, pretrained: nn.Sequential(
            *copy.deepcopy(layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
        ))  # fmt: skip
    spec = ModelSpec("batchy", 3, (3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    architectures.build(spec).points("channel")
    assert "depends on the other images of the batch" in caplog.text


def test_outputs_of_submodules_run_by_themselves_are_not_shown() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), CoverageLayer(), nn.Linear(4, 2))
    seen: list[Tensor] = []
    points = find_points(network, torch.zeros(2, 3), "channel")
    with Outputs(network, points, lambda _point, output: seen.append(output)):
        network[:3](torch.ones(2, 3))
        network[2](torch.ones(2, 4))
        assert seen == []
        for n in itertools.islice(itertools.count(1), 3):
            network(torch.ones(n, 3))
        assert [len(output) for output in seen] == [1, 2, 3]
