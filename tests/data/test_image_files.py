"""Image files: what happens where some of them cannot be read."""

import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import reload_own
from PIL import Image

from covcli.core.errors import CovcliError
from covcli.data import decoding, image_files, reading
from covcli.data.datasets import load
from covcli.data.image_files import list_unreadable
from covcli.data.images import DataRecord

BROKEN = (3, 17, 40, 58)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder of 80 images in two classes, four of which are broken in different ways."""
    for i in range(80):
        path = tmp_path / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    files = [tmp_path / "ab"[i % 2] / f"{i:02}.jpg" for i in BROKEN]
    os.truncate(files[0], 0)
    os.truncate(files[1], files[1].stat().st_size // 2)
    files[2].write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    files[3].unlink()
    files[3].symlink_to(tmp_path / "gone.jpg")
    return tmp_path


def test_all_broken_files_are_named_at_once(odd: Path) -> None:
    images = load(f"folder:{odd}", "test")
    good = torch.tensor([0, 2, 3])
    assert images.batch(good, (3, 8, 8)).shape == (3, 3, 8, 8)
    with pytest.raises(CovcliError, match="4 of 80 files cannot be read as images") as caught:
        images.batch(torch.arange(80), (3, 8, 8))
    text = str(caught.value)
    assert all(f"{'ab'[i % 2]}/{i:02}.jpg" in text for i in BROKEN)
    assert "by --skip-unreadable" in text
    assert "\n" not in text


def test_the_first_ten_are_named_and_the_others_counted(odd: Path) -> None:
    for i in range(0, 40, 2):
        (odd / "a" / f"{i:02}.jpg").write_bytes(b"")
    with pytest.raises(CovcliError, match=r"24 of 80 files .* and 14 more") as caught:
        load(f"folder:{odd}", "test").batch(torch.arange(80), (3, 8, 8))
    assert str(caught.value).count(".jpg") == 10


def test_one_broken_file_is_named_with_its_reason(odd: Path) -> None:
    for i in BROKEN[1:]:
        (odd / "ab"[i % 2] / f"{i:02}.jpg").unlink()
    with pytest.raises(CovcliError, match=r"b/03\.jpg: cannot be read as an image \(.*--skip"):
        load(f"folder:{odd}", "test").batch(torch.arange(77), (3, 8, 8))


def test_unreadable_files_are_left_out_counted_and_listed(odd: Path, tmp_path: Path) -> None:
    with reading.configured(skip_unreadable=True):
        images = load(f"folder:{odd}", "test")
    assert len(images) == 76
    assert images.batch(torch.arange(76), (3, 8, 8)).shape == (76, 3, 8, 8)
    names = [images.source.files[row] for row in images.rows.tolist()]  # type: ignore[attr-defined]
    labels = images.known_labels().tolist()
    assert [images.classes[label] for label in labels] == [name[0] for name in names]
    assert len(images.origin.unreadable) == 4
    assert list_unreadable(tmp_path / "list.txt", [images, images]) == 4
    lines = (tmp_path / "list.txt").read_text().splitlines()
    assert [line.partition(": ")[0][-8:] for line in lines] == [
        "a/40.jpg", "a/58.jpg", "b/03.jpg", "b/17.jpg"
    ]  # fmt: skip
    assert list_unreadable(tmp_path / "none.txt", [load("digits", "test")]) == 0
    assert not (tmp_path / "none.txt").exists()
    # what was read so is read so again, without the option
    again = reload_own(DataRecord.of(images), "test")
    assert again.fingerprint == images.fingerprint
    assert torch.equal(load(f"folder:{odd}?skip-unreadable", "test").rows, images.rows)


def test_more_than_a_twentieth_is_refused(odd: Path) -> None:
    (odd / "a" / "00.jpg").write_bytes(b"x")
    with pytest.raises(CovcliError, match="5 of 80 files cannot be read as images, more than 5%"):
        load(f"folder:{odd}?skip-unreadable", "test")


def test_a_file_that_could_be_read_is_not_tried_again(
    odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time.sleep(0.06)  # a file written just now might change again
    text = f"folder:{odd}?skip-unreadable"
    rows = load(text, "test").rows
    tried = []
    decode = image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda p, m: (tried.append(p.name), decode(p, m))[1])
    assert torch.equal(load(text, "test").rows, rows)
    assert set(tried) <= {f"{i:02}.jpg" for i in BROKEN}
    tried.clear()
    load(f"{text}&max-pixels=500", "test")  # another limit, so another answer
    assert len(set(tried)) == 80


def test_the_limit_of_pixels_is_an_option(odd: Path) -> None:
    with pytest.raises(CovcliError, match="20×20 are more than 300 pixels"):
        load(f"folder:{odd}/a?max-pixels=300", "test").batch(torch.arange(2), (3, 8, 8))
    with (
        reading.configured(max_pixels=300),
        pytest.raises(CovcliError, match="are more than 300 pixels: raise --max-pixels"),
    ):
        load(f"folder:{odd}/a", "test").batch(torch.arange(2), (3, 8, 8))
    with reading.configured(max_pixels=10**9):
        assert Image.MAX_IMAGE_PIXELS == 10**9
    assert Image.MAX_IMAGE_PIXELS == decoding.MAX_PIXELS


def test_looking_for_broken_files_is_said(odd: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "covcli")
    with pytest.raises(CovcliError):
        load(f"folder:{odd}", "test").batch(torch.arange(80), (3, 8, 8))
    assert "looking for others among 80 files" in caplog.text
