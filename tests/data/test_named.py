"""Sets with names: their labels, their classes and their pixels are those of their files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import (
    idx,
    make_inaturalist,
    make_lsun,
    make_mnist,
    make_openood,
    make_places,
    make_textures,
    random_images,
)

from covcli.core.errors import CovcliError
from covcli.data import registry
from covcli.data.datasets import expand, load


def test_emnists_letters_stand_upright_and_begin_at_0(tmp_path: Path) -> None:
    make_mnist(tmp_path, "EMNIST", ("emnist-letters-train", "emnist-letters-test"))
    images = load("emnist-letters", "test", tmp_path)
    assert images.classes[:3] == ("a", "b", "c")
    assert images.known_labels().tolist() == [0, 1, 2, 3, 4, 5]
    pixels = images.batch(torch.arange(6), (1, 28, 28))[:, 0].numpy()
    np.testing.assert_array_equal(pixels, random_images(6, 28, 28).transpose(0, 2, 1))


def test_textures_have_their_classes_and_train_holds_the_validation_images(tmp_path: Path) -> None:
    make_textures(tmp_path)
    train, test = (load("textures", split, tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ("banded", "woven")
    assert (len(train), len(test)) == (8, 4)
    assert test.files is not None
    assert [train.classes[k] for k in test.known_labels().tolist()] == [
        file.split("/")[-2] for file in test.files
    ]
    assert torch.bincount(load("textures?limit=4", "train", tmp_path).known_labels()).tolist() == [
        2, 2
    ]  # fmt: skip


def test_places_have_the_classes_of_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_places(tmp_path, monkeypatch)
    for split in ("train", "test"):
        images = load("places365", split, tmp_path)
        assert images.classes == ("a/airfield", "z/zoo")
        assert images.files is not None
        for file, label in zip(images.files, images.known_labels().tolist(), strict=True):
            assert images.classes[label] in file
            assert (tmp_path / file).is_file()


def test_species_have_their_numbers_whatever_the_order_of_the_folder(tmp_path: Path) -> None:
    make_inaturalist(tmp_path)
    images = load("inaturalist", "test", tmp_path)
    assert images.files is not None
    assert images.files == sorted(images.files)
    assert [images.classes[k] for k in images.known_labels().tolist()] == [
        file.split("/")[1] for file in images.files
    ]


def test_lsun_reads_its_databases_and_no_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lsun(tmp_path)
    monkeypatch.chdir(tmp_path)
    # torchvision would believe such a file, and leave one behind
    for name in ("bedroomvallmdb", "".join(c for c in str(tmp_path) if c.isalpha())):
        (tmp_path / f"_cache_{name}").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    before = set(tmp_path.iterdir())
    images = load("lsun", "test", tmp_path)
    assert images.classes[:2] == ("bedroom", "bridge")
    assert images.known_labels().tolist() == list(range(10))
    pixels = images.batch(torch.tensor([9, 0]), (3, 20, 24))
    assert not torch.equal(pixels[0], pixels[1])
    assert len(images.fingerprint) == 64
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(CovcliError, match=r"lacks bedroom_train_lmdb, bridge_train_lmdb"):
        load("lsun", "train", tmp_path / "MNIST")


def test_a_broken_image_in_a_database_is_named(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    make_lsun(tmp_path)
    with (
        lmdb.open(str(tmp_path / "tower_val_lmdb"), map_size=1 << 20) as database,
        database.begin(write=True) as transaction,
    ):
        transaction.put(b"tower9", b"%!PS")
    images = load("lsun", "test", tmp_path)
    with pytest.raises(CovcliError, match=r"tower_val_lmdb/tower9: cannot be read as an image"):
        images.batch(torch.tensor([9]), (3, 8, 8))


def test_a_group_stands_for_its_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_openood(tmp_path)
    far = tuple(f"openood:cifar10/far/{name}" for name in ("mnist", "svhn", "texture", "places365"))
    near = ("openood:cifar10/near/cifar100", "openood:cifar10/near/tin")
    assert expand(["openood:cifar10"], tmp_path) == near + far
    assert expand(["openood:cifar10/far?limit=9", "digits"], tmp_path) == (
        *(f"{name}?limit=9" for name in far), "digits",
    )  # fmt: skip
    assert expand(near, tmp_path) == near
    registry.say_once.cache_clear()
    assert expand(["openood:cifar100/near"], tmp_path) == ("openood:cifar100/near/cifar10",)
    assert "left out tin: they cannot be downloaded" in caplog.text
    (tmp_path / "tin" / "test").mkdir(parents=True)
    Image.new("L", (8, 8), 9).save(tmp_path / "tin" / "test" / "1.png")
    assert "openood:cifar100/near/tin" in expand(["openood:cifar100"], tmp_path)
    with pytest.raises(CovcliError, match="nothing fetches it by name"):
        load("openood:imagenet200/near/ninco", "test", tmp_path)
    with pytest.raises(CovcliError, match="none of its sets is available"):
        expand(["openood:imagenet200/near"], tmp_path)
    with pytest.raises(CovcliError, match="unknown benchmark 'cifar11'; did you mean"):
        expand(["openood:cifar11"], tmp_path)
    with pytest.raises(CovcliError, match="unknown group 'middle'"):
        expand(["openood:cifar10/middle"], tmp_path)
    with pytest.raises(CovcliError, match="is not a single set"):
        load("openood:cifar10", "test", tmp_path)


def test_openoods_own_lists_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry.say_once.cache_clear()
    make_openood(tmp_path)
    images = load("openood:cifar10/near/tin", "test", tmp_path)
    assert images.files == [f"tin/test/{i}.png" for i in range(6)]
    assert images.labels is None
    assert not caplog.records
    for root in (tmp_path / "moved", tmp_path / "moved" / "openood"):
        make_openood(root)
        assert len(load("openood:cifar10/near/tin", "test", tmp_path / "moved")) == 6
    # the whole set stands in where there is no list, and it is said
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(random_images(5, 28, 28)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(5, dtype=np.uint8)))
    assert len(load("openood:cifar10/far/mnist?limit=3", "test", tmp_path)) == 3
    assert "the whole set, not the images that OpenOOD lists" in caplog.text
