"""Folders of images: what is a class, what is a split, what is neither."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from covcli.core.errors import CovcliError
from covcli.data import registry
from covcli.data.datasets import load
from covcli.data.images import ImageSet
from covcli.data.labels import matched


def put(root: Path, *names: str) -> Path:
    """Write an image under each name; its pixels tell its place in the list."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), i).save(path, format="PNG")
    return root


def names_of(images: ImageSet) -> list[tuple[str, str | None]]:
    labels = [None] * len(images) if images.labels is None else images.labels.tolist()
    classes = [None if label is None else images.classes[label] for label in labels]
    return list(zip(images.source.files, classes, strict=True))  # type: ignore[attr-defined]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    registry.say_once.cache_clear()
    caplog.set_level(logging.WARNING, "covcli")
    return caplog


def test_classes_and_files_are_those_of_torchvision(tmp_path: Path) -> None:
    put(tmp_path, "b/10.png", "b/9.png", "b/deep/er/1.JPG", "a b/x.jpeg", "a/1.png", "B/y.tiff")
    ours, theirs = load(f"folder:{tmp_path}", "train"), ImageFolder(str(tmp_path))
    assert list(ours.classes) == theirs.classes
    expected = {os.path.relpath(path, tmp_path): theirs.classes[k] for path, k in theirs.samples}
    assert dict(names_of(ours)) == expected
    assert [name for name, _ in names_of(ours)] == [
        p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*")) if p.is_file()
    ]


def test_hidden_entries_and_leavings_are_no_images(tmp_path: Path) -> None:
    kept = ["ant/1.png", "bee/2.png"]
    put(
        tmp_path, *kept, ".ipynb_checkpoints/1-checkpoint.png", "ant/.ipynb_checkpoints/1.png",
        "__MACOSX/ant/._1.png", "ant/._1.png", "@eaDir/x.png", "bee/@eaDir/2.png/thumb.jpg",
        "$RECYCLE.BIN/x.png", "lost+found/x.png", ".hidden/x.png", "bee/~$2.png",
        "System Volume Information/x.png", "#recycle/x.png", "$Recycle.Bin/x.png",
        "Network Trash Folder/x.png", "@Recently-Snapshot/x.png", ".vscode/x.png", "ant/.1.png.swp",
        ".Trash-1000/files/x.png", "ant/_vti_cnf/1.png",
    )  # fmt: skip
    for name in (
        "Thumbs.db",
        ".DS_Store",
        "ant/desktop.ini",
        "bee/1.png~",
        "ant/#1.png#",
        "bee/2.png.part",
    ):
        (tmp_path / name).write_bytes(b"no image")
    assert names_of(load(f"folder:{tmp_path}", "train")) == [(n, n.split("/")[0]) for n in kept]


def test_what_is_no_image_by_its_name_is_said(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a/1.png", "a/2.heic", "a/3.heic", "4.png")
    load(f"folder:{tmp_path}", "train")
    assert "ignored files without an image's extension: 2 .heic" in said.text
    assert "1 images beside the class folders are ignored" in said.text


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev", "eval", "Val"])
def test_validation_images_serve_where_there_is_no_test_and_it_is_said(
    tmp_path: Path, validation: str, said: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "train/ant/1.png", "train/bee/2.png", f"{validation}/bee/3.png")
    assert names_of(load(f"folder:{tmp_path}", "train")) == [("ant/1.png", "ant"),
                                                             ("bee/2.png", "bee")]  # fmt: skip
    assert not said.records
    loaded = load(f"folder:{tmp_path}", "test")
    assert names_of(loaded) == [("bee/3.png", "bee")]
    assert f"{validation} serves as the test split" in said.text
    said.clear()
    put(tmp_path, "test/ant/4.png")
    assert names_of(load(f"folder:{tmp_path}", "test")) == [("ant/4.png", "ant")]
    assert not said.records


@pytest.mark.parametrize("parts", [("train",), ("val",), ("train", "val"), ("Train", "dev")])
def test_splits_alone_are_never_classes(tmp_path: Path, parts: tuple[str, ...]) -> None:
    put(tmp_path, *(f"{part}/{i}.png" for part in parts for i in range(2)))
    for split in ("train", "test"):
        try:
            loaded = load(f"folder:{tmp_path}?split={split}", "test")
        except CovcliError as error:
            assert f"but no {split}" in str(error)
        else:
            assert loaded.classes == ()
            assert loaded.labels is None
            assert len(loaded) == 2


@pytest.mark.parametrize(
    "parts",
    [("training_set", "test_set"), ("seg_train", "seg_test"), ("train", "test-images"),
     ("TrainSet", "ValSet"), ("x_train", "x_val")],
)  # fmt: skip
def test_splits_with_longer_names_are_never_classes(
    tmp_path: Path, parts: tuple[str, str], said: pytest.LogCaptureFixture
) -> None:
    train, test = parts
    put(tmp_path, f"{train}/cat/1.png", f"{train}/dog/2.png", f"{test}/dog/3.png", "seg_pred/4.png")
    for split, names in (("train", ["cat/1.png", "dog/2.png"]), ("test", ["dog/3.png"])):
        images = load(f"folder:{tmp_path}", split)  # type: ignore[arg-type]
        assert names_of(images) == [(name, name[:3]) for name in names]
    assert f"{', '.join(sorted(parts))} are read as splits" in said.text


def test_classes_that_sound_like_splits_are_classes(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "flat", "test tube/1.png", "train station/2.png", "bus/3.png")
    put(tmp_path / "deep", "test tube/a/1.png", "train station/b/2.png", "training/3.png")
    for name, classes in (("flat", ("bus", "test tube", "train station")),
                          ("deep", ("test tube", "train station", "training"))):  # fmt: skip
        assert load(f"folder:{tmp_path}/{name}", "test").classes == classes
    assert "read as splits" not in said.text


def test_letters_of_either_form_name_the_same_class(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    one, two = "caf\u00e9", "cafe\u0301"  # as Linux and Windows write it, and as macOS does
    put(tmp_path, f"train/{one}/1.png", "train/zoo/2.png", f"test/{two}/3.png", "test/zoo/4.png")
    train, test = (load(f"folder:{tmp_path}", split) for split in ("train", "test"))  # type: ignore[arg-type]
    assert matched(test, train.classes).images.known_labels().tolist() == [0, 1]
    assert matched(test, (two, "zoo")).images.known_labels().tolist() == [0, 1]
    put(tmp_path, f"train/{two}/5.png")
    with pytest.raises(CovcliError, match="2 class folders are named 'café', in different forms"):
        load(f"folder:{tmp_path}", "train")


def test_a_folder_named_one_level_too_high_is_said(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "images/cat/1.png", "images/dog/2.png", "images/Thumbs.db", "images/desktop.ini")
    assert load(f"folder:{tmp_path}", "test").classes == ("images",)
    assert f"(cat, dog) are the classes, name folder:{tmp_path}/images" in said.text
    assert "extension" not in said.text


def test_a_split_and_a_class_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    vehicles = put(tmp_path / "vehicles", "bus/1.png", "car/2.png", "train/3.png")
    assert load(f"folder:{vehicles}", "train").classes == ("bus", "car", "train")
    mixed = put(tmp_path / "mixed", "extra/1.png", "train/ant/2.png", "train/bee/3.png")
    with pytest.raises(CovcliError, match="train may be a split or a class beside extra"):
        load(f"folder:{mixed}", "train")
    beside = put(tmp_path / "beside", "train/a/1.png", "test/a/2.png")
    put(beside, "extra/1.png")
    (beside / "annotations").mkdir()
    assert names_of(load(f"folder:{beside}", "test")) == [("a/2.png", "a")]
    twice = put(tmp_path / "twice", "train/a/1.png", "val/a/2.png", "valid/a/3.png")
    with pytest.raises(CovcliError, match="val, valid are both for val"):
        load(f"folder:{twice}", "test")


def test_links_are_followed_everywhere_alike(tmp_path: Path) -> None:
    store = put(tmp_path / "store", "ant/1.png", "bee/2.png")
    shapes = {
        "files": lambda c, n: ((c,), f"{c}/{n}", store / c / n),
        "classes": lambda c, _: ((), c, store / c),
        "nested": lambda c, _: ((c,), f"{c}/more", store / c),
    }
    for shape, link in shapes.items():
        for name in ("ant/1.png", "bee/2.png"):
            folders, place, target = link(*name.split("/"))
            (tmp_path / shape).joinpath(*folders).mkdir(parents=True, exist_ok=True)
            (tmp_path / shape / place).symlink_to(target)
        loaded = load(f"folder:{tmp_path}/{shape}", "train")
        theirs = ImageFolder(str(tmp_path / shape))
        assert list(loaded.classes) == theirs.classes == ["ant", "bee"]
        assert len(loaded) == len(theirs) == 2
        pixels = loaded.batch(torch.arange(2), (3, 4, 4))
        assert pixels[:, 0, 0, 0].tolist() == [0, 1]
    (tmp_path / "root").symlink_to(store)
    assert len(load(f"folder:{tmp_path}/root", "train")) == 2


def test_links_that_go_round_in_a_circle_are_passed_over(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "ant/1.png", "bee/2.png")
    (tmp_path / "ant" / "up").symlink_to(tmp_path)
    (tmp_path / "bee" / "self").symlink_to(tmp_path / "bee")
    loaded = load(f"folder:{tmp_path}", "train")
    # as far as no folder lies within itself
    assert ("bee/2.png", "bee") in names_of(loaded)
    assert not any("self" in name.split("/")[2:] for name, _ in names_of(loaded))
    assert "a link to a folder above itself is ignored" in said.text


def test_a_link_to_nowhere_is_no_silent_loss(tmp_path: Path) -> None:
    put(tmp_path, "ant/1.png")
    (tmp_path / "ant" / "2.png").symlink_to(tmp_path / "gone.png")
    loaded = load(f"folder:{tmp_path}", "train")
    with pytest.raises(CovcliError, match=r"2\.png: cannot be read as an image"):
        loaded.batch(torch.arange(2), (3, 4, 4))


@pytest.mark.skipif(os.name != "posix", reason="names are text here")
def test_names_that_are_not_utf8_are_read_and_shown_escaped(tmp_path: Path) -> None:
    put(tmp_path, "ant/1.png", "bee/2.png")
    top = os.fsencode(tmp_path)
    os.rename(top + b"/ant/1.png", top + b"/ant/caf\xe9.png")  # noqa: PTH104
    os.rename(top + b"/bee", top + b"/b\xe9\xe9")  # noqa: PTH104
    loaded = load(f"folder:{tmp_path}", "train")
    assert loaded.classes == ("ant", "b\\xe9\\xe9")
    assert loaded.batch(torch.arange(2), (3, 4, 4))[:, 0, 0, 0].tolist() == [0, 1]
    assert len(loaded.fingerprint) == 64
    loaded.fingerprint.encode()
    os.truncate(top + b"/ant/caf\xe9.png", 9)
    with pytest.raises(CovcliError) as caught:
        loaded.batch(torch.arange(2), (3, 4, 4))
    str(caught.value).encode("ascii")
    assert "caf\\udce9.png" in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    with pytest.raises(CovcliError, match="is a file, not a folder"):
        load(f"folder:{put(tmp_path, 'x.png')}/x.png", "train")
    with pytest.raises(CovcliError, match=r"holds no image; known endings: \.png"):
        load(f"folder:{put(tmp_path / 'new', 'x.heic')}", "train")


def test_listing_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(20)))

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(os, "open", forbidden)
    monkeypatch.setattr("builtins.open", forbidden)
    loaded = load(f"folder:{tmp_path}", "train")
    assert np.bincount(loaded.known_labels()).tolist() == [20, 20]
