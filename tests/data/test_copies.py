"""Copies of images: found by their content in folders, archives and memory."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covcli.data.copies import doubts, shared
from covcli.data.datasets import load


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_copies_are_found_whatever_their_files_are_called(form: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 4, 4), np.uint8)
    sets = {"trusted": range(40), "fresh": range(40, 60), "mixed": [3, 3, *range(40, 58), 9],
            "twice": [*range(40, 50)] * 2}  # fmt: skip

    def of(name: str, first: str = "") -> str:
        for k, row in enumerate(sets[name]):
            path = tmp_path / name / "a" / f"{first}{k:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(path)
        np.savez(tmp_path / f"{name}.npz", images=pixels[list(sets[name])])
        return f"folder:{tmp_path}/{name}" if form == "folder" else f"npz:{tmp_path}/{name}.npz"

    trusted = load(of("trusted"), "train")
    said = {
        name: doubts(trusted, load(of(name, "" if name == "trusted" else "x"), "test"))
        for name in sets
    }
    assert said["fresh"] == []
    assert [line[:45] for line in said["trusted"]] == [
        "40 of 40 calibration images are trusted image"
    ]
    assert [line[:8] for line in said["mixed"]] == ["3 of 21 ", "1 of 21 "]
    assert [line[:45] for line in said["twice"]] == [
        "10 of 20 calibration images are copies of oth"
    ]
    counts = [shared(load(of(name, "x"), "test"), trusted) for name in ("fresh", "mixed", "twice")]
    assert counts == [0, 3, 0]
    half = load(f"{of('trusted')}?limit=20&first", "train")
    assert shared(half, trusted) == 20
    assert doubts(half, load(f"{of('trusted')}?offset=20&first", "test")) == []
