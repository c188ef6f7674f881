"""Archives read in order: the images, selections and errors of archives read whole."""

from pathlib import Path

import numpy as np
import pytest
import torch

from covcli.core.errors import CovcliError
from covcli.data import archives, datasets
from covcli.data.archives import ArchiveSource
from covcli.data.images import MemorySource, batches

SHAPE = (3, 32, 32)


@pytest.fixture(params=["stored", "compressed"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 9, 11, 3), np.uint8)
    save = np.savez if request.param == "stored" else np.savez_compressed
    save(tmp_path / "a.npz", labels=np.arange(150) % 3, images=pixels)
    return tmp_path / "a.npz"


@pytest.mark.parametrize("part", ["", "?offset=7&limit=20", "?limit=40&shuffle=5"])
def test_images_in_order_are_those_of_the_whole(archive: Path, part: str) -> None:
    whole = datasets.load(f"npz:{archive}{part}", "test")
    streamed = datasets.load(f"npz:{archive}{part}", "test", in_order=True)
    assert isinstance(whole.source, MemorySource)
    assert isinstance(streamed.source, ArchiveSource)
    assert torch.equal(whole.rows, streamed.rows)
    assert streamed.labels is not None
    assert torch.equal(whole.known_labels(), streamed.labels)
    parts = list(torch.arange(len(whole)).split(16))
    for (rows, pixels), (same, read) in zip(
        batches(whole, parts, SHAPE), batches(streamed, parts, SHAPE), strict=True
    ):
        assert torch.equal(rows, same)
        assert torch.equal(pixels, read)
    assert whole.fingerprint == streamed.fingerprint
    assert torch.equal(whole.batch(rows, SHAPE), streamed.batch(rows, SHAPE))


def test_grey_images_without_a_channel_and_arrays_in_other_orders(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez(tmp_path / "grey.npz", images=pixels)
    np.savez(tmp_path / "turned.npz", images=np.asfortranarray(pixels))
    for name, kind in (("grey", ArchiveSource), ("turned", MemorySource)):
        images = datasets.load(f"npz:{tmp_path}/{name}.npz", "test", in_order=True)
        assert isinstance(images.source, kind)
        expected = datasets.load(f"npz:{tmp_path}/{name}.npz", "test").batch(images.rows, SHAPE)
        assert torch.equal(images.batch(images.rows, SHAPE), expected)


def test_bad_archives_are_refused_as_when_read_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "floats.npz", images=np.zeros((3, 4, 4)))
    np.savez(tmp_path / "other.npz", pictures=np.zeros((3, 4, 4), np.uint8))
    np.savez(tmp_path / "channels.npz", images=np.zeros((3, 4, 4, 5), np.uint8))
    np.savez(tmp_path / "labels.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.arange(4))
    (tmp_path / "text.npz").write_text("no archive")
    for path in sorted(tmp_path.glob("*.npz")):
        told = []
        for in_order in (False, True):
            with pytest.raises(CovcliError) as caught:
                datasets.load(f"npz:{path}", "test", in_order=in_order)
            told.append(str(caught.value))
        assert told[0] == told[1]


def test_an_archive_that_is_damaged_later_on_is_an_error(archive: Path) -> None:
    images = datasets.load(f"npz:{archive}", "test", in_order=True)
    content = bytearray(archive.read_bytes())
    place = len(content) // 2
    content[place : place + 50] = bytes(255 - byte for byte in content[place : place + 50])
    archive.write_bytes(content)
    with pytest.raises(CovcliError, match="cannot be read as a NumPy archive"):
        list(batches(images, list(torch.arange(150).split(16)), SHAPE))


def test_rows_only_go_forward(archive: Path) -> None:
    images = datasets.load(f"npz:{archive}", "test", in_order=True)
    assert isinstance(images.source, ArchiveSource)
    with archives.ArchiveReader(images.source) as reader:
        reader.read(torch.tensor([3, 5]))
        with pytest.raises(ValueError, match="ascending"):
            reader.read(torch.tensor([4]))
