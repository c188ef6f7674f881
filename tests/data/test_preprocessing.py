"""How images become inputs, against torchvision's and timm's own transforms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from covcli.core.errors import CovcliError
from covcli.data import datasets
from covcli.data.images import adapt, in_memory
from covcli.data.preprocessing import InputShape, Preprocess

SIDES = [(40, 30), (30, 40), (64, 64), (48, 48), (19, 77), (200, 131)]


def picture(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (255 * smooth).clamp(0, 255).to(torch.uint8)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Pillow rounds between its two passes: a pixel may differ by 1, a rare one by 2."""
    apart = (ours.double() - 255 * theirs.double()).abs()
    assert apart.max() < 2.01
    assert (apart > 1.01).double().mean() < 0.01


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_prepared_as_torchvision_prepares_them(
    sides: tuple[int, int], interpolation: str
) -> None:
    image = picture(*sides)
    shape = InputShape((3, 48, 48)).changed(f"resize=56,crop=48,interpolation={interpolation}")
    theirs = ImageClassification(
        crop_size=48, resize_size=56, mean=(0, 0, 0), std=(1, 1, 1),
        interpolation=InterpolationMode(interpolation),
    )  # fmt: skip
    photo = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    assert_near(adapt(image, shape)[0], theirs(photo))


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("sides", SIDES)
def test_images_are_prepared_as_timm_prepares_them(sides: tuple[int, int], mode: str) -> None:
    data = pytest.importorskip("timm.data")
    image = picture(*sides)
    theirs = data.create_transform(
        (3, 48, 48), interpolation="bicubic", crop_pct=0.875, crop_mode=mode, mean=(0, 0, 0),
        std=(1, 1, 1),
    )  # fmt: skip
    resize = "54" if mode == "center" else "54x54"
    shape = InputShape((3, 48, 48)).changed(f"resize={resize},interpolation=bicubic")
    assert_near(adapt(image, shape)[0], theirs(Image.fromarray(image[0].permute(1, 2, 0).numpy())))


def test_by_default_images_are_covered_and_those_of_the_size_stay() -> None:
    image = picture(48, 48)
    assert torch.equal(adapt(image, (3, 48, 48)), image)
    assert torch.equal(adapt(image, InputShape((3, 48, 48))), image)
    other = adapt(image, InputShape((3, 48, 48)).changed("resize=56"))
    assert not torch.equal(other, image)
    for sides in SIDES:
        size = Preprocess().size(sides, (48, 48))
        assert min(size) == 48
        assert size[0] / size[1] == pytest.approx(sides[0] / sides[1], rel=0.03)


def test_a_shape_stays_a_shape() -> None:
    shape = InputShape((3, 48, 32), Preprocess((64, 50), "bicubic"))
    assert shape == (3, 48, 32)
    assert torch.zeros(2, *shape).shape == (2, 3, 48, 32)
    noise = datasets.load("noise:uniform?limit=2", "test")
    assert noise.batch(torch.arange(2), shape).shape == (2, 3, 48, 32)


@pytest.mark.parametrize(
    ("text", "shape", "how"),
    [
        ("resize=256", (3, 224, 224), Preprocess(256)),
        ("crop=96", (3, 96, 96), Preprocess()),
        ("resize=160x128,crop=96x64,interpolation=nearest", (3, 96, 64),
         Preprocess((160, 128), "nearest")),
        ("interpolation=bicubic", (3, 224, 224), Preprocess(None, "bicubic")),
    ],
)  # fmt: skip
def test_the_option_is_read_and_worded_alike(
    text: str, shape: tuple[int, int, int], how: Preprocess
) -> None:
    changed = InputShape((3, 224, 224)).changed(text)
    assert (tuple(changed), changed.preprocess) == (shape, how)
    again = InputShape((3, 8, 8)).changed(how.describe(shape))
    assert (tuple(again), again.preprocess) == (shape, how)
    assert Preprocess.from_dict(how.as_dict()) == how


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("size=3", "did you mean 'resize'|known: resize, crop, interpolation"),
        ("crop", "cannot read 'crop'"),
        ("crop=8,crop=9", "cannot read 'crop=9'"),
        ("crop=0", "crop=0: expected pixels from 1 to 4096"),
        ("crop=-3", "expected pixels"),
        ("resize=4097", "expected pixels"),
        ("resize=8x", "resize=8x"),
        ("interpolation=bicubc", "did you mean 'bicubic'"),
        ("resize=200", "less than the crop of 224×224"),
        ("resize=256x200", "less than the crop of 224×224"),
    ],
)
def test_what_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(CovcliError, match=said):
        InputShape((3, 224, 224)).changed(text)


def test_images_made_for_a_network_are_not_resized_again() -> None:
    shape = InputShape((3, 48, 48)).changed("resize=56")
    pixels = picture(48, 48)
    assert torch.equal(
        in_memory("x", pixels, None, ready=True).batch(torch.arange(1), shape), pixels
    )
    other = in_memory("x", pixels, None).batch(torch.arange(1), shape)
    assert torch.equal(other, adapt(pixels, shape))


def test_files_are_prepared_in_the_networks_way(tmp_path: Path) -> None:
    image = picture(60, 90)
    Image.fromarray(np.ascontiguousarray(image[0].permute(1, 2, 0))).save(tmp_path / "a.png")
    images = datasets.load(f"folder:{tmp_path}", "test")
    shape = InputShape((3, 48, 48)).changed("resize=56,interpolation=bicubic")
    assert torch.equal(images.batch(torch.arange(1), shape), adapt(image, shape))
