"""Architectures of torchvision and timm, and what their configurations say of images."""

import sys

import pytest
import torch
import torchvision

from covcli.core.errors import CovcliError
from covcli.models import architectures, zoo
from covcli.models.architectures import ModelSpec, architecture


@pytest.mark.parametrize("name", zoo.torchvision_names())
def test_torchvision_gives_size_and_normalisation(name: str) -> None:
    shape, (mean, deviation) = architecture(f"torchvision:{name}").expects(True)
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert tuple(shape[1:]) == tuple(2 * theirs.crop_size)
    assert shape.preprocess.resize == theirs.resize_size[0]
    assert shape.preprocess.interpolation == theirs.interpolation.value
    if name not in ("googlenet", "inception_v3"):  # these normalise a second time, inside
        assert (list(mean), list(deviation)) == (theirs.mean, theirs.std)


@pytest.mark.parametrize(
    ("name", "size", "resize", "interpolation", "mean"),
    [
        ("resnet18", 224, 235, "bicubic", 0.485),
        ("vit_tiny_patch16_224", 224, 248, "bicubic", 0.5),
        ("convnextv2_atto", 224, 256, "bicubic", 0.485),
        ("mobilenetv4_conv_small", 224, 256, "bicubic", 0.485),
        ("eva02_base_patch14_448", 448, (448, 448), "bicubic", 0.48145466),
        ("resnet18.tv_in1k", 224, 256, "bilinear", 0.485),
    ],
)
def test_timm_gives_size_and_normalisation(
    name: str, size: int, resize: int, interpolation: str, mean: float
) -> None:
    pytest.importorskip("timm")
    entry = architecture(f"timm:{name}")
    assert entry.shape == (3, size, size)
    assert entry.shape.preprocess.resize == resize
    assert entry.shape.preprocess.interpolation == interpolation
    assert entry.statistics[0][0] == mean


def test_a_timm_network_is_built_and_found_again() -> None:
    timm = pytest.importorskip("timm")
    entry = architecture("timm:test_resnet")
    spec = ModelSpec("timm:test_resnet", 5, entry.shape, *entry.statistics, False,
                     entry.shape.preprocess)  # fmt: skip
    model = architectures.build(spec)
    again = architectures.from_state(spec, model.state_dict(), "x")
    theirs = timm.create_model("test_resnet", num_classes=5).eval()
    theirs.load_state_dict(model.network.state_dict())
    images = torch.rand(2, *entry.shape)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), theirs((images - model.mean) / model.deviation))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:resnet81", "did you mean 'resnet18'"),
        ("timm:resnet81", "did you mean resnet18"),
        ("timm:resnet18.none", "known: resnet18.a1_in1k"),
        ("timm:deepseek_vit_412m", "crop mode 'border'"),
        ("tim:resnet18", "unknown model 'tim:resnet18'"),
    ],
)
def test_names_that_cannot_be_are_refused(name: str, said: str) -> None:
    if name.startswith("timm"):
        timm = pytest.importorskip("timm")
        if "border" in said and not timm.is_model(name.removeprefix("timm:")):
            pytest.skip("an older timm has no such network")
    with pytest.raises(CovcliError, match=said):
        architecture(name)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CovcliError, match=r"needs the package timm; pip install 'covcli\[timm\]'"):
        architecture("timm:resnet18")


def test_published_weights_of_timm_fill_all_but_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create, source = timm.create_model, timm.create_model("test_resnet", num_classes=1000)

    def without_download(name: str, pretrained: bool, **more: int) -> torch.nn.Module:
        assert name == "test_resnet"
        return source if pretrained else create(name, pretrained=False, **more)

    monkeypatch.setattr(timm, "create_model", without_download)
    entry = architecture("timm:test_resnet")
    model = architectures.build(
        ModelSpec("timm:test_resnet", 4, entry.shape, *entry.statistics, True)
    )
    head = model.network.state_dict()["fc.weight"].clone()
    architectures.load_pretrained(model)
    loaded, theirs = model.network.state_dict(), source.state_dict()
    assert torch.equal(loaded["fc.weight"], head)
    assert all(torch.equal(loaded[k], v) for k, v in theirs.items() if not k.startswith("fc."))


def test_a_size_that_the_network_refuses_is_said() -> None:
    entry = architecture("torchvision:vit_b_32")
    shape = entry.shape.changed("resize=200,crop=192")
    model = architectures.build(
        ModelSpec("torchvision:vit_b_32", 3, shape, *entry.statistics, False, shape.preprocess)
    )
    with pytest.raises(CovcliError, match=r"refuses images of shape \(3, 192, 192\).*--preprocess"):
        model.points("channel")
