"""The check of the documents: it runs what is to be run, and a block that fails is said to."""

import argparse
from pathlib import Path

import docs_check
import pages
import pytest
from PIL import Image

PAGE = """
```text file=words.txt
some words
```
```sh
grep -q words words.txt
```
```sh slow
cat DATA/nothing
```
```sh no-run (it would fail)
false
```
```sh
false
echo after
```
```python
import pathlib
here = pathlib.Path("words.txt").read_text()
```
```python
assert here == "some words\\n"
```
"""


def test_each_block_is_run_skipped_or_said_to_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    base = tmp_path / "base"
    base.mkdir()
    given = argparse.Namespace(data=None, weights=None)
    assert docs_check.run_page(page, base, given) == 1
    lines = capsys.readouterr().out.splitlines()
    told = [line.split(": ", 1)[1].split(",")[0] for line in lines if ": " in line]
    assert told == [
        "ok",
        "skipped: needs --data and --weights",
        "no-run (it would fail)",
        "FAILED (1)",
        "2 cells ok",
    ]


def test_images_of_a_user_lie_in_a_folder_a_class(tmp_path: Path) -> None:
    docs_check.write_images("digits?limit=20", tmp_path / "photos", True, 4)
    docs_check.write_images("photos?limit=3", tmp_path / "strange", False, 4)
    files = list((tmp_path / "photos").glob("*/*.png"))
    assert len(files) == 20
    assert len(list((tmp_path / "strange").glob("*.png"))) == 3
    assert Image.open(files[0]).size == (32, 32)
