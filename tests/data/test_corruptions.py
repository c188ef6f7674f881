"""Corruptions: their pixels have the statistics of the published implementations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import reload_own
from sklearn.datasets import load_sample_images

from covcli.core.errors import CovcliError
from covcli.data import corruptions
from covcli.data.corruptions import CORRUPTIONS, SEVERITIES
from covcli.data.datasets import load
from covcli.data.images import DataRecord
from covcli.data.preprocessing import InputShape, Preprocess

# Of imagecorruptions 1.1.5 and, for elastic_transform, of the program that made ImageNet-C (which
# the package does not follow there), on four patches of scikit-learn's photographs, by severity:
# mean, deviation, distance to the patch, and step between neighbours, of 255; each the mean over
# eight draws, with the deviation of one draw. benchmarks/corruptions.py compares all severities.
REFERENCE = json.loads((Path(__file__).parent / "corruption_statistics.json").read_text())
ELSEWHERE = set(CORRUPTIONS) - set(REFERENCE)


def patches() -> list[np.ndarray]:
    sheets = load_sample_images().images
    return [sheet[top : top + 224, :224] for sheet in sheets for top in (0, sheet.shape[0] - 224)]


def figures(before: list[np.ndarray], after: list[np.ndarray]) -> np.ndarray:
    rows = []
    for a, b in zip(before, after, strict=True):
        steps = np.abs(np.diff(b, axis=0)).mean() + np.abs(np.diff(b, axis=1)).mean()
        rows.append((b.mean(), b.std(), np.abs(a - b).mean(), steps / 2))
    return np.mean(rows, 0)


@pytest.mark.parametrize("name", list(REFERENCE))
def test_a_corruption_has_the_statistics_of_the_published_one(name: str) -> None:
    images = [patch.astype(float) for patch in patches()]
    for severity, reference in REFERENCE[name].items():
        generator = np.random.default_rng(0)
        corrupt = CORRUPTIONS.get(name)
        corrupted = [np.floor(corrupt(x / 255, int(severity), generator) * 255) for x in images]
        expected, spread = np.array(reference["figures"]), np.array(reference["deviation"])
        allowed = 0.5 + 0.06 * expected[2] * np.array([1, 1, 1, 0.2]) + 4 * spread
        assert (np.abs(figures(images, corrupted) - expected) <= allowed).all(), severity


def test_only_frost_is_without_a_reference() -> None:
    assert {"frost"} == ELSEWHERE  # its photographs come with another package


def test_frost_names_the_package_that_brings_its_photographs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from PIL import Image

    corruptions._frost_photographs.cache_clear()
    monkeypatch.setattr(corruptions.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(CovcliError, match="pip install imagecorruptions"):
        load("corrupt:frost?of=digits?limit=2", "test").batch(torch.arange(2), (3, 32, 32))
    (tmp_path / "frost").mkdir()
    for i in range(1, 7):
        Image.new("RGB", (300, 250), (200, 210, 220)).save(tmp_path / "frost" / f"frost{i}.png")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(corruptions.importlib.util, "find_spec", lambda _name: Spec)
    black = np.zeros((32, 32, 3))
    frosted = CORRUPTIONS.get("frost")(black, 5, np.random.default_rng(0))
    np.testing.assert_allclose(frosted, 0.45 * np.array([200, 210, 220]) / 255 + black)
    corruptions._frost_photographs.cache_clear()


@pytest.mark.parametrize("name", sorted(REFERENCE))
@pytest.mark.parametrize("side", [32, 64])
def test_small_images_keep_their_shape_and_grow_less_like_themselves(name: str, side: int) -> None:
    patch = patches()[1][100 : 100 + side, 100 : 100 + side] / 255
    distances = []
    for severity in range(1, SEVERITIES + 1):
        corrupted = CORRUPTIONS.get(name)(patch, severity, np.random.default_rng(1))
        assert corrupted.shape == patch.shape
        assert 0 <= corrupted.min() <= corrupted.max() <= 1
        distances.append(np.abs(corrupted - patch).mean())
    assert distances[0] > 0
    if name not in ("spatter", "elastic_transform", "snow"):  # there chance has its say
        assert distances[-1] > distances[0]


def test_settings_are_those_of_the_nearest_published_size() -> None:
    for side, deviation in ((28, 0.10), (32, 0.10), (64, 0.18), (96, 0.18), (224, 0.38)):
        picture = np.full((side, side, 3), 0.5)
        noisy = CORRUPTIONS.get("gaussian_noise").apply(
            picture, CORRUPTIONS.get("gaussian_noise").setting(side, 5), np.random.default_rng(0)
        )
        assert noisy.std() == pytest.approx(deviation, rel=0.1)


def test_an_image_is_corrupted_alike_in_any_batch() -> None:
    images = load("corrupt:glass_blur?severity=5&seed=3&of=digits?limit=9", "test")
    whole = images.batch(torch.arange(9), (3, 32, 32))
    assert torch.equal(images.batch(torch.tensor([7, 2]), (3, 32, 32)), whole[[7, 2]])
    clean = load("digits?limit=9", "test")
    assert not torch.equal(clean.batch(torch.arange(9), (3, 32, 32)), whole)
    assert torch.equal(images.known_labels(), clean.known_labels())
    assert images.classes == clean.classes
    other = load("corrupt:glass_blur?severity=4&seed=3&of=digits?limit=9", "test")
    assert other.fingerprint != images.fingerprint
    assert reload_own(DataRecord.of(images), "test").fingerprint == images.fingerprint
    part = load("corrupt:glass-blur?severity=5&seed=3&limit=2&offset=3&of=digits?limit=9", "test")
    assert torch.equal(part.batch(torch.arange(2), (3, 32, 32)), whole[3:5])


def test_corruption_follows_the_networks_preprocessing_and_channels() -> None:
    shape = InputShape((1, 20, 20), Preprocess(resize=24))
    images = load("corrupt:contrast?severity=1&of=photos?limit=3", "test")
    clean = load("photos?limit=3", "test").batch(torch.arange(3), shape).double()
    corrupted = images.batch(torch.arange(3), shape).double()
    means = clean.mean((2, 3), keepdim=True)
    assert float((corrupted - ((clean - means) * 0.75 + means)).abs().max()) <= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corrupt:fgo?of=digits", "unknown corruption 'fgo'; did you mean 'fog'"),
        ("corrupt:fog", "corrupts no images; end it with &of=SPEC"),
        ("corrupt:fog?severity=6&of=digits", "expected a number from 1 to 5"),
        ("corrupt:fog?severity=0&of=digits", "expected a number from 1 to 5"),
        ("corrupt:fog?of=digist", "unknown dataset 'digist'"),
        ("corrupt:fog?strength=2&of=digits", "unknown parameter 'strength'"),
    ],
)
def test_bad_corruptions_are_refused(text: str, message: str) -> None:
    with pytest.raises(CovcliError, match=message):
        load(text, "test")
