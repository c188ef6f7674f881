"""Forms of data: paths and how they are found again, tables, labels from another number."""

import os
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import reload_own
from PIL import Image

from covcli.core.errors import CovcliError
from covcli.core.specs import escaped
from covcli.data import reading
from covcli.data.datasets import load, whole
from covcli.data.images import DataRecord, ImageSet
from covcli.data.labels import taught
from covcli.data.tables import read_table


def put(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


def values(images: ImageSet) -> list[int]:
    return images.batch(torch.arange(len(images)), (1, 4, 4))[:, 0, 0, 0].tolist()  # type: ignore[no-any-return],


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("what is it?", "what is it%3F"), ("R&D", "R&D"), ("date=2024-01-01", "date=2024-01-01"),
        ("10:30", "10:30"), ("a%20b", "a%20b"), ("50% off", "50% off"), ("a?b=c", "a%3Fb=c"),
        ("käfer", "k%C3%A4fer"),
    ],
)  # fmt: skip
def test_every_path_can_be_named(tmp_path: Path, name: str, written: str) -> None:
    put(tmp_path / name / "odd" / "1.png", 7)
    images = load(f"folder:{tmp_path}/{written}/odd?limit=1", "test")
    assert values(images) == [7]
    assert reload_own(DataRecord.of(images), "test").fingerprint == images.fingerprint


def test_a_path_that_is_written_so_comes_before_an_escaped_one(tmp_path: Path) -> None:
    put(tmp_path / "a%20b" / "1.png", 1)
    put(tmp_path / "a b" / "1.png", 2)
    assert values(load(f"folder:{tmp_path}/a%20b", "test")) == [1]
    with pytest.raises(CovcliError, match=r"\? within a path as %3F"):
        load(f"folder:{tmp_path}/what is it?/odd", "test")


@pytest.mark.skipif(os.name != "posix", reason="names are text here")
def test_a_path_that_is_not_utf8_is_written_in_ascii(tmp_path: Path) -> None:
    put(tmp_path / "x" / "1.png", 3)
    (tmp_path / "x").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    text = escaped(f"folder:{tmp_path}/caf\udce9")
    text.encode()
    images = load(text, "test")
    assert values(images) == [3]
    assert images.name.endswith("/caf%E9")


def test_a_recorded_relative_path_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "then" / "d" / "1.png", 1)
    (tmp_path / "now").mkdir()
    monkeypatch.chdir(tmp_path / "then")
    record = DataRecord.of(load("folder:d", "test"))
    absolute = DataRecord.of(load(f"folder:{tmp_path}/then/d", "test"))
    assert (record.ran_in, absolute.ran_in) == (str(tmp_path / "then"), "")
    monkeypatch.chdir(tmp_path / "now")
    with pytest.raises(CovcliError, match="d: no such file or folder"):
        load("folder:d", "test")
    reloaded = reload_own(record, "test")
    assert reloaded.fingerprint == record.images
    assert DataRecord.of(reloaded) == record
    put(tmp_path / "now" / "d" / "1.png", 2)  # what is here comes first
    assert values(reload_own(record, "test")) == [2]
    gone = replace(record, ran_in=str(tmp_path / "gone"), spec="folder:e")
    with pytest.raises(CovcliError, match=r"no such file or folder, nor from .*gone, where it was"):
        reload_own(gone, "test")


def test_a_table_lists_images_with_their_classes(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "images" / f"{i}.png", i)
    put(tmp_path / "elsewhere.png", 9)
    outside = tmp_path / "elsewhere.png"
    (tmp_path / "t.csv").write_text(
        "label,note,path\n"
        "cat,x,images/2.png\n"
        'ant,"a ""quoted"", note",images/0.png\n'
        f"cat,,{outside}\n"
        "bee,,images/1.png\n"
    )
    images = load(f"csv:{tmp_path}/t.csv", "train")
    assert images.classes == ("ant", "bee", "cat")
    assert images.known_labels().tolist() == [2, 0, 2, 1]
    assert values(images) == [2, 0, 9, 1]
    (tmp_path / "w.csv").write_text(" Label,PATH\n cat ,images/2.png\n\nant,images/0.png\n\n")
    spaced = load(f"csv:{tmp_path}/w.csv", "train")
    assert (spaced.classes, spaced.known_labels().tolist()) == (("ant", "cat"), [1, 0])
    (tmp_path / "u.csv").write_text("\ufeffpath\r\nimages/3.png\r\n", newline="")
    unlabelled = load(f"csv:{tmp_path}/u.csv", "test")
    assert (values(unlabelled), unlabelled.labels) == ([3], None)


def test_a_table_of_numbers_is_numbered(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / f"{i}.png", i)
    (tmp_path / "train.csv").write_text("path,label\n0.png,1\n1.png,3\n2.png,1\n")
    (tmp_path / "valid.csv").write_text("path,label\n1.png,3\n")
    images = load(f"csv:{tmp_path}", "train")
    assert images.classes == ()
    assert taught(images).images.classes == ("1", "3")
    assert load(f"csv:{tmp_path}", "test").known_labels().tolist() == [3]
    (tmp_path / "names.csv").write_text("path,label\n0.png,007\n1.png,7\n2.png,007\n")
    assert load(f"csv:{tmp_path}/names.csv", "train").classes == ("007", "7")
    shifted = load(f"csv:{tmp_path}?labels-from=1", "train")
    assert shifted.known_labels().tolist() == [0, 2, 0]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_is_read_as_every_program_writes_it(
    tmp_path: Path, separator: str, encoding: str, end: str
) -> None:
    lines = [["path", "label", "by"], ["a.png", "é", ""], ["b.png", "z", ""], ["c.png", "é", ""]]
    text = end.join(separator.join(line) for line in lines)
    (tmp_path / "t.csv").write_text(text, encoding, newline="")
    table = read_table(tmp_path / "t.csv")
    assert (table.paths, table.labels) == (["a.png", "b.png", "c.png"], ["é", "z", "é"])


def test_labels_and_paths_of_other_systems_mean_the_same(tmp_path: Path) -> None:
    for name in ("sub/1.png", "2.png"):
        put(tmp_path / name, 1)
    decomposed = unicodedata.normalize("NFD", "é")
    file = tmp_path / "t.csv"
    file.write_text(f"path,label\nsub\\1.png,é\n2.png,{decomposed}\n")
    images = load(f"csv:{file}", "train")
    assert (images.classes, values(images)) == (("é",), [1, 1])
    file.write_text("path,label\nsub/1.png,11.0\n2.png,2.0\n")
    images = load(f"csv:{file}", "train")  # as pandas writes numbers beside gaps
    assert (images.classes, images.known_labels().tolist()) == ((), [11, 2])
    file.write_text("path,label\nsub/1.png,1.5\n2.png,2.0\n")
    assert load(f"csv:{file}", "train").classes == ("1.5", "2.0")


def test_what_is_not_read_of_a_table_or_an_archive_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "a.png", 1)
    (tmp_path / "t.csv").write_text("path,class\na.png,cat\na.png,cat\n")
    assert load(f"csv:{tmp_path}/t.csv", "test").labels is None
    assert "no column `label`: the images have no labels (other columns: class)" in caplog.text
    pixels = np.zeros((2, 4, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, label=[0, 1])
    assert load(f"npz:{tmp_path}/x.npz", "test").labels is None
    assert "no array `labels`, `classes`; not read: label" in caplog.text
    assert "the last of 4 channels is read as opacity" in caplog.text
    for arrays, said in (
        ({"x_test": pixels}, "its arrays: x_test; name them images, labels"),
        (
            {"images": np.zeros((9, 8, 3), np.uint8)},
            "as a single one in colour; store it as images.None",
        ),
        ({"images": pixels, "labels": np.array([2**63, 0], np.uint64)}, "labels are uint64"),
        ({"images": pixels, "labels": np.eye(2, dtype=int)}, r"labels are int64 of shape \(2, 2\)"),
        ({"images": pixels, "labels": [0, 1], "classes": ["é", "e\u0301"]}, "each once"),
    ):
        np.savez(tmp_path / "y.npz", **arrays)
        with pytest.raises(CovcliError, match=said):
            load(f"npz:{tmp_path}/y.npz", "test")
    np.savez(tmp_path / "z.npz", images=pixels, labels=np.array([[1], [0]], np.int8))
    assert load(f"npz:{tmp_path}/z.npz", "test").known_labels().tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no row"), (b"file,label\na,b\n", "no column `path`"), (b"path\n", "no row"),
        *[(table, "line 2 is incomplete: it has no (path|label)")
          for table in (b"path,label\na.png\n", b"path,label\n,x\n", b"path,label\na.png,\n",
                        b"path\na\0.png\n", b"path,label\na, \n", b"path,label\na,NaN\n")],
        (b"path,label\n\na.png,x\na,b,c\n", "line 4 has 3 cells, and the first line 2; put"),
        (b"path,label\na,x\nb,y\na,y\n", "a has the labels 'x' and 'y'"),
        (b"path,Path\na,b\n", "has a column twice"),
        (b"file;label\na;b\n", "no column `path`; its first line names file;label"),
        (b"PK\3\4xl/workbook", "cannot be read as a table: it is a ZIP archive"),
        (b"<html>", "cannot be read as a table: it is a web page"),
        (b"path,label,label\na,b,c\n", "has a column twice"),
        (b'path\n"a.png', "cannot be read as a"),
        (b"path\n" + b"a" * 200_000, "cannot be read as a table"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(CovcliError, match=message) as caught:
        load(f"csv:{tmp_path}/t.csv", "train")
    assert "\n" not in str(caught.value)


def test_archives_have_validation_splits_too(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "train.npz", images=images)
    with pytest.raises(CovcliError, match=r"holds no test\.npz or val\.npz or valid\.npz"):
        load(f"npz:{tmp_path}", "test")
    np.savez(tmp_path / "valid.npz", images=images + 5)
    assert values(load(f"npz:{tmp_path}", "test")) == [5, 5]
    np.savez(tmp_path / "test.npz", images=images + 6)
    assert values(load(f"npz:{tmp_path}", "test")) == [6, 6]
    (tmp_path / "train.npz").unlink()
    with pytest.raises(CovcliError, match=r"holds no train\.npz$"):
        load(f"npz:{tmp_path}", "train")


def test_class_names_of_an_archive_may_be_bytes_and_are_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    arrays: dict[str, Any] = {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 1])}

    def stored(**more: Any) -> tuple[str, ...]:
        np.savez(path, **arrays, **more)
        return load(f"npz:{path}", "train").classes

    assert stored(classes=np.array([b"cat", "dög".encode()])) == ("cat", "dög")
    assert stored(classes=["cat", "dog"], notes=np.array([{}], object)) == ("cat", "dog")
    for classes, said in (
        (np.array(["cat", "dog"], object), "array 'classes': holds Python objects"),
        (np.array([b"\xff", b"a"]), "class names that are not UTF-8"),
        (np.array([1, 2]), "classes are int64"),
    ):
        with pytest.raises(CovcliError, match=said):
            stored(classes=classes)


def test_labels_can_be_counted_from_another_number(tmp_path: Path) -> None:
    path, pixels = tmp_path / "x.npz", np.zeros((3, 4, 4), np.uint8)
    np.savez(path, images=pixels, labels=[3, 1, 2])
    assert load(f"npz:{path}", "train").known_labels().tolist() == [3, 1, 2]
    by_word = load(f"npz:{path}?labels-from=1", "train")
    with reading.configured(labels_from=1):
        by_option = load(f"npz:{path}", "train")
        np.savez(tmp_path / "y.npz", images=pixels, labels=[0, 1, 2])
        with pytest.raises(CovcliError, match="label 0 is below 1; name the lowest"):
            load(f"npz:{tmp_path}/y.npz", "train")
        np.savez(tmp_path / "z.npz", images=pixels, labels=[0, 1, 2], classes=["a", "b", "c"])
        assert load(f"npz:{tmp_path}/z.npz", "train").known_labels().tolist() == [0, 1, 2]
    for images in (by_word, by_option):
        assert images.known_labels().tolist() == [2, 0, 1]
        assert reload_own(DataRecord.of(images), "train").known_labels().tolist() == [2, 0, 1]
    assert by_option.name == f"npz:{path}"
    assert whole(DataRecord.of(by_option).spec) == f"npz:{path}?labels-from=1"
    with pytest.raises(CovcliError, match="unknown parameter 'labels-from'"):
        load("digits?labels-from=1", "train")
