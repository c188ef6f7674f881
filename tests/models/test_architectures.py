"""Models and coverage points."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import convnext_tiny, vgg19_bn

from covcli.core.errors import CovcliError
from covcli.methods.state import Granularity
from covcli.models import architectures
from covcli.models.architectures import CIFAR10, IMAGENET, MODELS, ModelSpec
from covcli.models.checkpoint import load
from covcli.models.points import CoverageLayer, Recorder
from covcli.models.pooling import pool
from covcli.models.survey import find_points

POINTS = {"vgg19": 18, "vgg11": 10, "resnet18": 17, "tiny": 3}


def spec(name: str, classes: int = 7, pretrained: bool = False, size: int = 32) -> ModelSpec:
    return ModelSpec(name, classes, (3, size, size), *CIFAR10, pretrained)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_keeps_the_contract(name: str) -> None:
    size = architectures.input_shape(name, False)[1]
    model = architectures.build(spec(name, size=size)).eval()
    images = torch.rand(3, 3, size, size)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (3, 7)
        bare = model.network((images - model.mean) / model.deviation)
        assert torch.equal(logits, bare)
    points = model.points("channel")
    assert len(points) == POINTS[name]
    with Recorder(model.network, points, "channel") as recorder, torch.no_grad():
        model(images)
        assert recorder.take(torch.empty(0)).shape == (3, sum(p.neurons for p in points))
    again = architectures.from_state(model.spec, model.state_dict(), "x")
    with torch.no_grad():
        assert torch.equal(again.eval()(images), logits)
    assert ModelSpec.from_dict(model.spec.as_dict(), "x") == model.spec


@pytest.mark.parametrize("pretrained", [False, True])
def test_vgg19_has_18_points_either_way(pretrained: bool) -> None:
    model = architectures.build(spec("vgg19", 10, pretrained, 64 if pretrained else 32))
    points = model.points("channel")
    assert len(points) == 18
    convolutions = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    hidden = [4096, 4096] if pretrained else [512, 512]
    assert [p.neurons for p in points] == [2 * c for c in convolutions] + hidden
    relus = [n for n, m in model.network.named_modules() if isinstance(m, nn.ReLU)]
    assert [p.name for p in points] == relus


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", 64), ("mobilenet_v3_small", 16), ("convnext_tiny", 384), ("vit_b_32", 3072),
     ("inception_v3", 32)],
)  # fmt: skip
def test_points_of_any_torchvision_classifier_are_found(name: str, channels: int) -> None:
    size = 224 if name.startswith("vit") else 96  # a transformer is made for one size
    model = architectures.build(spec(f"torchvision:{name}", 5, size=size))
    points = model.points("channel")
    assert points[0].neurons == 2 * channels
    assert len({p.name for p in points}) == len(points)
    with torch.no_grad(), Recorder(model.network, points, "channel") as recorder:
        assert model(torch.rand(2, 3, size, size)).shape == (2, 5)
        assert recorder.take(torch.empty(0)).shape == (2, sum(p.neurons for p in points))


def test_pooling_takes_mean_and_maximum_over_positions() -> None:
    x = torch.randn(4, 5, 3, 2)
    pooled = pool(x, 1, "channel")
    for b in range(4):
        for c in range(5):
            values = x[b, c].flatten().tolist()
            assert pooled[b, c].item() == pytest.approx(sum(values) / 6, abs=1e-6)
            assert pooled[b, 5 + c].item() == max(values)
    units = pool(x, 1, "unit")
    for b, i, j in itertools.product(range(4), range(3), range(2)):
        assert torch.equal(units[b, 5 * (2 * i + j) :][:5], x[b, :, i, j])
    assert torch.equal(pool(x.permute(0, 2, 3, 1), -1, "channel"), pooled)
    assert torch.equal(pool(x[:, :, 0, 0], 1, "channel"), x[:, :, 0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_of_other_precisions_sums_in_float32_at_least(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (100 + torch.rand(3, 7, 33, 33, generator=generator)).to(dtype, memory_format=layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for tracked in (x, x.clone().requires_grad_()):
        pooled = pool(tracked, 1, "channel").detach()
        assert pooled.dtype == pool(x, 1, "unit").dtype == wide
        exact = x.double().numpy()
        np.testing.assert_allclose(pooled[:, :7].numpy(), exact.mean((2, 3)), rtol=1e-6)
        np.testing.assert_array_equal(pooled[:, 7:].numpy(), exact.max((2, 3)))
    np.testing.assert_array_equal(
        pool(x, 1, "unit").numpy(), exact.transpose(0, 2, 3, 1).reshape(3, -1)
    )


@pytest.mark.parametrize("granularity", ["channel", "unit"])
def test_what_is_recorded_is_each_points_pool_with_gradients_or_without(
    granularity: Granularity,
) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(inplace=True)
    )
    network.to(memory_format=torch.channels_last)
    points = find_points(network, torch.zeros(2, 1, 8, 8), granularity)
    for images in (torch.randn(5, 1, 8, 8), torch.randn(2, 1, 8, 8)):
        first = network[:2](images)
        parts = [pool(x, 1, granularity) for x in (first, network[2:](first))]
        expected = torch.cat(parts, 1).detach()
        with Recorder(network, points, granularity) as recorder:
            tracked = recorder.take(network(images))
            with torch.no_grad():
                plain = recorder.take(network(images))
        # Means are summed in another order where no gradient is asked for.
        assert torch.allclose(plain, expected, atol=1e-6)
        assert torch.equal(tracked, expected)
        assert tracked.requires_grad


def test_reused_memory_shows_the_last_batch_alone() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU())
    points = find_points(network, torch.zeros(2, 1, 8, 8), "unit")
    with Recorder(network, points, "unit") as recorder, torch.inference_mode():
        kept = recorder.take(network(torch.ones(5, 1, 8, 8)))
        spare = recorder.take(network(torch.ones(5, 1, 8, 8)))
        for size in (5, 5, 2):
            images = torch.randn(size, 1, 8, 8)
            outputs = [pool(network[:n](images), 1, "unit") for n in (2, 4)]
            recorder.reuse(spare)
            neurons = recorder.take(network(images))
            assert torch.equal(neurons, torch.cat(outputs, 1))
            assert (neurons.data_ptr() == spare.data_ptr()) == (size == 5)
        assert torch.equal(kept, recorder.take(network(torch.ones(5, 1, 8, 8))))


def test_a_network_with_hooks_that_stay_can_be_pickled() -> None:
    network, images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), torch.rand(2, 1, 8, 8)
    recorder = Recorder(network, find_points(network, images, "channel"), "channel")
    recorder.stay()
    copied = pickle.loads(pickle.dumps(network))
    assert torch.equal(copied(images), network(images))
    with recorder:
        assert recorder.take(network(images)).shape == (2, 8)
    recorder.leave()
    assert not any(module._forward_hooks for module in network.modules())


class Shared(nn.Module):
    """One ReLU called twice, and an in-place change of what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.relu(self.a(x))
        return self.relu(self.b(hidden.mul_(2)))


def test_each_call_is_a_point_and_later_changes_are_not_seen() -> None:
    network, x = Shared(), torch.randn(5, 4)
    points = find_points(network, x, "channel")
    assert [p.name for p in points] == ["relu", "relu#2"]
    with torch.no_grad(), Recorder(network, points, "channel") as recorder:
        for _ in range(2):  # the calls are counted anew in each pass
            out = network(x)
            neurons = recorder.take(torch.empty(0))
            assert torch.equal(neurons[:, :6], torch.relu(network.a(x)))
            assert torch.equal(neurons[:, 6:], out)


def test_hooks_are_removed_even_after_an_error() -> None:
    network = Shared()
    points = find_points(network, torch.randn(1, 4), "channel")
    with pytest.raises(RuntimeError), Recorder(network, points, "channel"):
        network(torch.randn(5, 3))
    assert not any(module._forward_hooks for module in network.modules())
    with Recorder(network, points, "channel") as recorder, pytest.raises(CovcliError):
        recorder.take(torch.empty(0))


def test_coverage_layers_come_before_activations_and_a_network_without_either_is_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), CoverageLayer())
    assert [p.name for p in find_points(network, torch.zeros(2, 4), "channel")] == ["3"]
    plain = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    assert [p.neurons for p in find_points(plain, torch.zeros(2, 4), "channel")] == [5]
    with pytest.raises(CovcliError, match="no layer"):
        find_points(nn.Identity(), torch.zeros(2, 4), "channel")


def test_a_bare_half_precision_state_dict_finds_its_layout(tmp_path) -> None:  # type: ignore[no-untyped-def]
    original = architectures.build(spec("vgg11", 10))
    path = tmp_path / "w.pt"
    torch.save({k: v.half() if v.is_floating_point() else v
                for k, v in original.network.state_dict().items()}, path)  # fmt: skip
    loaded = load(path, "vgg11")
    assert loaded.model.spec == original.spec
    assert loaded.bare
    weight = original.network.state_dict()["classifier.0.weight"]
    assert torch.equal(
        loaded.model.network.state_dict()["classifier.0.weight"], weight.half().float()
    )
    whole = tmp_path / "imagenet.pt"
    torch.save(vgg19_bn(num_classes=3).state_dict(), whole)
    spec_found = load(whole, "vgg19").model.spec
    assert (spec_found.pretrained, spec_found.shape) == (True, (3, 224, 224))
    assert (spec_found.mean, spec_found.deviation) == IMAGENET
    with pytest.raises(CovcliError, match="name its --model"):
        load(path)
    with pytest.raises(CovcliError, match="do not fit model 'resnet18'"):
        load(path, "resnet18")


def test_pretrained_weights_fill_all_but_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    source = resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: source)
    model = architectures.build(spec("resnet18", 4, True, 224))
    head = model.network.state_dict()["fc.weight"].clone()
    architectures.load_pretrained(model)
    loaded = model.network.state_dict()
    assert torch.equal(loaded["fc.weight"], head)
    assert all(torch.equal(loaded[k], v) for k, v in source.items() if not k.startswith("fc."))

    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", fail)
    with pytest.raises(CovcliError, match=r"resnet18 could not be downloaded \(no network\)"):
        architectures.load_pretrained(model)


def test_channels_of_convnext_are_its_last_dimension() -> None:
    network = convnext_tiny(num_classes=2).eval()
    points = find_points(network, torch.zeros(1, 3, 64, 64), "channel")
    assert {p.channel_dim for p in points} == {-1}


@pytest.mark.parametrize("name", ["vgg91", "torchvision:resnet81"])
def test_unknown_models_name_the_nearest(name: str) -> None:
    with pytest.raises(CovcliError, match="did you mean"):
        architectures.architecture(name)
