"""Run every command of the documents, those that take minutes too: `make docs-check`.

    python tests/docs_check.py [--data DATA --weights VGG19.pt] [--keep FOLDER] [PAGE …]

Each page gets a folder of its own with what the documents speak of: a run of the demo, and images
and weights as a user has them (`photos`, `held-out`, `test`, `strange`, `weights.pt`). Blocks that
name `DATA` need the image sets and the VGG19 of `docs/results.md`, and are skipped without.
`--keep` names a folder where what takes minutes to prepare is kept for another call.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pages import PAGES, ROOT, Block, blocks
from PIL import Image

from covcli.data import datasets
from covcli.models import checkpoint as checkpoints

MINUTES = 30  # of a block, at most
DEMO = """
covcli train --trusted digits --model vgg11 --epochs 4 --calibration-split 0.25 --name demo
covcli build-signature runs/demo/checkpoint.pt
covcli evaluate --untrusted photos --untrusted noise:gaussian --untrusted noise:uniform
"""
USERS = """
covcli train --trusted folder:photos --model resnet18 --epochs 3 --calibration-split 0 --runs user
"""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script where `covcli`, `python` and `benchmarks` are those of this project."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=60 * MINUTES,
    )  # fmt: skip


def write_images(spec: str, folder: Path, by_class: bool, enlarged: int) -> None:
    """Write a set as image files, in one subfolder a class where that is asked for."""
    images = datasets.load(spec, "train")
    assert images.labels is not None
    pixels = images.batch(torch.arange(len(images)), (3, 8 * enlarged, 8 * enlarged)).numpy()
    for k, (image, label) in enumerate(zip(pixels, images.labels.tolist(), strict=True)):
        parent = folder / images.classes[label] if by_class else folder
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.moveaxis(image, 0, 2)).save(parent / f"{k:04d}.png")


def prepare(base: Path) -> None:
    """Make what the documents speak of."""
    (base / "benchmarks").symlink_to(ROOT / "benchmarks")
    write_images("digits?limit=900&shuffle=0", base / "photos", True, 4)
    write_images("digits?offset=900&shuffle=0", base / "held-out", True, 4)
    write_images("digits?split=test", base / "test", True, 4)
    write_images("photos?limit=300", base / "strange", False, 4)
    for script in (DEMO, USERS):
        done = shell(script, base)
        if done.returncode:
            sys.exit(done.stderr)
    model = checkpoints.load(base / "user" / "latest" / "checkpoint.pt").model
    torch.save(model.network.state_dict(), base / "weights.pt")


def outcome(block: Block, folder: Path, given: argparse.Namespace) -> str:
    """Run a block of shell commands, and say in a word how that ended."""
    if block.told.startswith("no-run"):
        return block.told
    if "DATA" in block.text and given.data is None:
        return "skipped: needs --data and --weights"
    if "DATA" in block.text:
        shutil.copy(folder / "weights.pt", folder / "of-the-user.pt")
        shutil.copy(given.weights, folder / "weights.pt")
        if not (folder / "DATA").exists():
            (folder / "DATA").symlink_to(given.data.resolve())
    done = shell(block.text, folder)
    if (folder / "of-the-user.pt").exists():
        (folder / "of-the-user.pt").replace(folder / "weights.pt")
    return "ok" if done.returncode == 0 else f"FAILED ({done.returncode})\n{done.stderr[-2000:]}"


def run_page(page: Path, base: Path, given: argparse.Namespace) -> int:
    """Run a page's blocks in a folder of their own, and return how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "page"
        shutil.copytree(base, folder, symlinks=True)
        every = blocks(page)
        for block in every:
            if "file=" in block.told:
                (folder / block.told.removeprefix("file=")).write_text(block.text)
            elif block.language == "sh":
                began = time.perf_counter()
                word = outcome(block, folder, given)
                say(f"{block.place}: {word}, {time.perf_counter() - began:.0f} s")
                failed += word.startswith("FAILED")
        cells = [b.text for b in every if b.language == "python" and b.told == ""]
        if cells:
            (folder / "cells.py").write_text("\n".join(cells))
            done = shell("python cells.py", folder)
            say(f"{page.name}: {len(cells)} cells {'FAILED' if done.returncode else 'ok'}")
            failed += done.returncode != 0
            sys.stdout.write(done.stderr[-2000:] if done.returncode else "")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("pages", nargs="*", help="names of pages; default: all")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base = (given.keep or Path(place) / "base").resolve()
        if not (base / "weights.pt").exists():
            base.mkdir(parents=True, exist_ok=True)
            prepare(base)
        chosen = [page for page in PAGES if not given.pages or page.name in given.pages]
        failed = sum(run_page(page, base, given) for page in chosen)
    say(f"{failed} blocks failed" if failed else "all ran")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
