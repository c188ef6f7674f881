"""`--skip-unreadable` from outside: what is left out is counted in each result, and listed."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import PLUGIN
from PIL import Image
from test_cli import call

TINY = ["--plugin", str(PLUGIN), "--quiet"]


def pictures(root: Path, images: int, broken: tuple[int, ...], seed: int) -> None:
    """Write noisy images whose strongest colour is their class; some of them cut off or empty."""
    generator = np.random.default_rng(seed)
    for i in range(images):
        path = root / "abc"[i % 3] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.normal(70, 25, (32, 32, 3))
        pixels[:, :, i % 3] += 90
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[: 200 if i % 2 else 0])


def test_unreadable_files_are_counted_and_listed_by_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(Path("data/train"), 300, (3, 10, 77), 1)
    pictures(Path("data/test"), 60, (5,), 2)
    pictures(Path("odd"), 90, (0, 89), 3)
    trained = ["train", "--model", "tiny", "--trusted", "folder:data", "--epochs", "4", "--name",
               "a", "--learning-rate", "0.1", "--batch-size", "16", *TINY]  # fmt: skip

    code, out, err = call(capsys, *trained)
    assert (code, out) == (2, "")
    assert "3 of 300 files cannot be read as images" in err
    assert all(name in err for name in ("a/003.png", "b/010.png", "c/077.png"))

    def listed(stage: str) -> list[str]:
        lines = Path(f"runs/a/unreadable-{stage}.txt").read_text().splitlines()
        return sorted(line.partition(": ")[0][-9:] for line in lines)

    code, out, err = call(capsys, *trained, "--skip-unreadable", "--json")
    assert (code, json.loads(out)["unreadable_images"]) == (0, 3), err
    assert listed("train") == ["a/003.png", "b/010.png", "c/077.png"]
    # What was read so is read so again; the option is for data that is named anew.
    code, out, err = call(
        capsys, "build-signature", "runs/a/checkpoint.pt", "--method", "src", "--json", *TINY
    )
    assert code == 0, err
    assert json.loads(out)["unreadable_images"] == 3
    assert listed("build-signature") == listed("train")
    evaluated = ["evaluate", "--untrusted", "folder:odd", *TINY]
    code, out, err = call(capsys, *evaluated)
    assert (code, out) == (2, "")
    assert "2 of 90 files" in err
    code, out, err = call(capsys, *evaluated, "--skip-unreadable", "--json")
    document = json.loads(out)
    assert code == 0, err
    assert (document["trusted"]["images"], document["trusted"]["unreadable"]) == (59, 1)
    (odd,) = document["untrusted"]
    assert (odd["images"], odd["unreadable"]) == (88, 2)
    assert listed("evaluate") == ["a/000.png", "c/005.png", "c/089.png"]
    pictures(Path("odd"), 90, (0, 1, 2, 3, 4), 3)
    code, out, err = call(capsys, *evaluated, "--skip-unreadable", "--force")
    assert (code, out) == (2, "")
    assert "5 of 90 files cannot be read as images, more than 5%" in err
