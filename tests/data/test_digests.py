"""Digests of files: equal for equal content, read once, and never believed of a changed file."""

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covcli.data import digests
from covcli.data.datasets import load
from covcli.data.digests import Files, content_digests


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files that are read from here on, with a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: list[str] = []
    opened = digests.open_regular

    def seen(path: Path):  # type: ignore[no-untyped-def]
        names.append(path.name)
        return opened(path)

    monkeypatch.setattr(digests, "open_regular", seen)
    return names


def write(folder: Path, **contents: bytes) -> None:
    """Write files that are old enough to be known again."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        past = time.time_ns() - 10**10
        os.utime(folder / name, ns=(past, past))
    time.sleep(0.06)


def of(folder: Path, names: list[str], pool: ThreadPoolExecutor) -> list[str]:
    return [row.tobytes().hex() for row in content_digests(Files(folder, names, "", pool))]


def test_a_file_is_read_once(tmp_path: Path, reads: list[str], pool: ThreadPoolExecutor) -> None:
    contents = {"a": b"1" * 100, "b": b"", "c": b"3"}
    write(tmp_path / "d", **contents)
    expected = [hashlib.sha256(content).hexdigest() for content in contents.values()]
    assert of(tmp_path / "d", ["a", "b", "c"], pool) == expected
    assert sorted(reads) == ["a", "c"]  # of an empty one all is known
    reads.clear()
    assert of(tmp_path / "d", ["a", "b", "c"], pool) == expected
    write(tmp_path / "d", e=b"5")
    assert of(tmp_path / "d", ["c", "a", "e"], pool) == [
        expected[2], expected[0], hashlib.sha256(b"5").hexdigest()
    ]  # fmt: skip
    assert reads == ["e"]


def test_a_changed_file_is_read_again(
    tmp_path: Path, reads: list[str], pool: ThreadPoolExecutor
) -> None:
    write(tmp_path / "d", a=b"one", b=b"two")
    first = of(tmp_path / "d", ["a", "b"], pool)
    before = (tmp_path / "d" / "a").stat()
    (tmp_path / "d" / "a").write_bytes(b"six")  # as long, and as old by its time of modification
    os.utime(tmp_path / "d" / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    second = of(tmp_path / "d", ["a", "b"], pool)
    assert second == [hashlib.sha256(b"six").hexdigest(), first[1]]


def test_a_file_written_just_now_is_not_believed_to_stay(
    tmp_path: Path, reads: list[str], pool: ThreadPoolExecutor
) -> None:
    (tmp_path / "d").mkdir()
    for content in (b"one", b"two"):
        (tmp_path / "d" / "a").write_bytes(content)
        assert of(tmp_path / "d", ["a"], pool) == [hashlib.sha256(content).hexdigest()]


@pytest.mark.parametrize("damage", ["cut", "text", "shape", "folder", "home"])
def test_a_cache_that_is_of_no_use_is_done_without(
    tmp_path: Path, reads: list[str], pool: ThreadPoolExecutor, damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write(tmp_path / "d", a=b"one", b=b"two")
    expected = of(tmp_path / "d", ["a", "b"], pool)
    (file,) = (tmp_path / "cache" / "covcli" / "digests").iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    elif damage == "text":
        file.write_text("no archive")
    elif damage == "shape":
        np.savez(file, names=np.zeros(3, np.uint8), stamps=np.zeros(3), digests=np.zeros((1, 32)))
    elif damage == "folder":  # nothing can be written here, not even as root
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "d" / "a"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    reads.clear()
    assert of(tmp_path / "d", ["a", "b"], pool) == expected
    assert sorted(reads) == ["a", "b"]


def test_what_cannot_be_read_has_a_digest_too(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    write(tmp_path / "d", a=b"one")
    (tmp_path / "d" / "b").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "d" / "c")
    one, gone, pipe = of(tmp_path / "d", ["a", "b", "c"], pool)
    assert gone == pipe != one


def test_folders_of_the_same_names_and_sizes_differ_by_their_pixels(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 2), ("c", 1)):
        generator = np.random.default_rng(seed)
        (tmp_path / folder).mkdir()
        for i in range(3):
            pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.bmp")
    a, b, c = (load(f"folder:{tmp_path}/{name}", "test") for name in "abc")
    assert a.source.fingerprint != b.source.fingerprint
    assert a.source.fingerprint == c.source.fingerprint
    assert a.fingerprint == c.fingerprint
    sizes = [[f.stat().st_size for f in sorted((tmp_path / d).iterdir())] for d in "ab"]
    assert sizes[0] == sizes[1]
