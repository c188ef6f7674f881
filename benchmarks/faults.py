r"""Kill it, starve it, feed it poison: what is lost, and what gets in.

    python benchmarks/faults.py            # all of it, some hours on 2 cores
    python benchmarks/faults.py --json --kills 30 --limits 5 --mutations 500 --resumes 2 \
        --interruptions 14 --inputs 50

Trains a small network on scikit-learn's digits in a temporary folder, and then: kills a process
that saves, at random moments; saves under a file-size limit; loads mutated and cut signatures and
checkpoints and a corpus of hostile pickles; kills trainings and resumes them; kills every command
or sends it two signals (`interruptions.py`); gives every reader hostile input (`fuzz.py`).
POSIX only.
"""

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import interruptions
import torch

from covcli.core import files
from covcli.core.errors import CovcliError
from covcli.models import checkpoint as checkpoints
from covcli.models.checkpoint import load_checkpoint, save_checkpoint
from covcli.signature import signature as signatures
from covcli.signature.signature import load_signature

PLUGIN = Path(__file__).parent.parent / "tests" / "tiny_model.py"
TRAIN = [sys.executable, "-m", "covcli", "train", "--plugin", str(PLUGIN), "--quiet"]
TINY = [*TRAIN, "--trusted", "digits", "--model", "tiny", "--epochs", "8", "--learning-rate", "0.1"]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in (("kills", 300), ("limits", 20), ("mutations", 10_000), ("resumes", 10),
                         ("interruptions", 200), ("inputs", 20_000)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def content(version: int) -> dict[str, Any]:
    return {
        "model": {}, "state": {"w": torch.full((250_000,), float(version))}, "classes": [],
        "trusted": None, "calibration_rows": torch.arange(3), "training": {"version": version},
    }  # fmt: skip


def kills(folder: Path, number: int, chance: random.Random) -> dict[str, int]:
    """SIGKILL a process that saves one version after the other over the same file."""
    path = folder / "kills" / "checkpoint.pt"
    save_checkpoint(path, content(0))
    whole, newest, leftovers = 0, 0, 0
    for _ in range(number):
        child = os.fork()
        if child == 0:
            version = newest
            while True:
                version += 1
                save_checkpoint(path, content(version))
        time.sleep(chance.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        leftovers += any(path.parent.glob(".*.tmp"))
        loaded = load_checkpoint(path)
        version = loaded["training"]["version"]
        whole += version >= newest and bool((loaded["state"]["w"] == version).all())
        newest = version
    save_checkpoint(path, content(0))
    left = len(list(path.parent.iterdir())) - 1
    return {"kills": number, "whole": whole, "in_the_middle": leftovers, "files_left": left}


def limits(folder: Path, number: int, chance: random.Random) -> dict[str, int]:
    """Save under RLIMIT_FSIZE: one line, exit 2, the old file, no temporary file."""
    path = folder / "limits" / "checkpoint.pt"
    save_checkpoint(path, content(0))
    before, size, held = path.read_bytes(), path.stat().st_size, 0
    for _ in range(number):
        limit = chance.randrange(1, size)
        code = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import faults
from covcli.core.errors import CovcliError
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    faults.save_checkpoint(Path({str(path)!r}), faults.content(1))
except CovcliError as error:
    sys.stderr.write(f"{{error}}\\n")
    sys.exit(2)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        alone = list(path.parent.iterdir()) == [path]
        one_line = done.stderr.count("\n") == 1 and "cannot be written" in done.stderr
        held += done.returncode == 2 and one_line and alone and path.read_bytes() == before
    return {"limits": number, "held": held}


def meaning_of_signature(path: Path) -> str:
    signature, calibration, record = signatures.load(path)
    tensors = {
        **signature.state.tensors,
        "scores": calibration.scores,
        "scale": calibration.combination.scale,
    }
    return files.digest(
        [tensors, record.as_dict(), signature.points and [vars(p) for p in signature.points]]
    )


def meaning_of_checkpoint(path: Path) -> str:
    loaded = checkpoints.load(path)
    return files.digest(
        [dict(loaded.model.state_dict()), list(loaded.classes), dict(loaded.training)]
    )


def mutate(original: bytes, chance: random.Random) -> bytes:
    changed = bytearray(original)
    near = len(changed) if chance.random() < 0.5 else min(len(changed), 4096)
    where = chance.randrange(near)
    if chance.random() < 0.3:  # the end of a ZIP archive is its table of contents
        where = len(changed) - 1 - where % min(len(changed), 4096)
    how = chance.randrange(4)
    if how == 0:
        changed[where] ^= 1 << chance.randrange(8)
    elif how == 1:
        changed[where : where + 8] = chance.randbytes(8)
    elif how == 2:
        del changed[where : where + chance.randrange(1, 9)]
    else:
        changed[where:where] = chance.randbytes(chance.randrange(1, 9))
    return bytes(changed)


def mutations(
    original: Path, meaning: Callable[[Path], str], number: int, chance: random.Random
) -> dict[str, int]:
    """Load mutated files, and the file cut at every byte."""
    content = original.read_bytes()
    path = original.with_name(f"mutated{original.suffix}")
    was = meaning(original)
    trials = [mutate(content, chance) for _ in range(number)]
    trials += [content[:cut] for cut in range(len(content))]
    counts = {"trials": len(trials), "refused": 0, "unchanged": 0, "wrong": 0, "tracebacks": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in trials:
        path.write_bytes(trial)
        try:
            counts["unchanged" if meaning(path) == was else "wrong"] += 1
        except CovcliError as error:
            counts["refused" if "\n" not in str(error) else "wrong"] += 1
        except Exception as error:
            counts["tracebacks"] += 1
            print(f"{original.name}: {error!r}", file=sys.stderr)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**counts, "file_kb": len(content) >> 10, "memory_growth_kb": grown}


class Canary:
    """Pickles to a call that makes a folder."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def pickles(folder: Path) -> dict[str, int]:
    """Hand hostile pickles to every reader; count those that ran."""
    cage, refused = folder / "cage", 0
    cage.mkdir()
    calls = [
        Canary(os.mkdir, str(cage / "a")), Canary(os.system, f"touch {cage}/b"),
        Canary(exec, f"open({str(cage / 'c')!r}, 'w')"),
        Canary(eval, f"open({str(cage / 'd')!r}, 'w')"),
        Canary(subprocess.call, ["touch", str(cage / "e")]),
    ]  # fmt: skip
    broken: list[Path] = []
    for i, call in enumerate(calls):
        for j, wrap in enumerate((call, {"state": call}, {"w": torch.ones(1), "x": [call]})):
            torch.save(wrap, folder / f"p{i}{j}.pt")
            (folder / f"q{i}{j}.pt").write_bytes(pickle.dumps(wrap))
            (folder / f"r{i}{j}.safetensors").write_bytes(pickle.dumps(wrap))
            broken += [folder / f"{letter}{i}{j}{end}" for letter, end in
                      (("p", ".pt"), ("q", ".pt"), ("r", ".safetensors"))]  # fmt: skip
    for path in broken:
        for reader in (load_checkpoint, load_signature, files.read_json):
            try:
                reader(path)
            except CovcliError:
                refused += 1
    return {"pickles": len(broken), "refused": refused // 3, "ran": len(list(cage.iterdir()))}


def resumes(folder: Path, number: int, chance: random.Random) -> dict[str, int]:
    """SIGKILL trainings at random moments, resume them, and compare the final weights."""
    runs = folder / "runs"
    command = [*TINY, "--save-every", "0m", "--signature-every", "2", "--runs", str(runs), "--name"]

    def begun(name: str) -> subprocess.Popen[bytes]:
        """Start a training, and return once it has saved its first step."""
        running = subprocess.Popen([*command, name], stdout=subprocess.DEVNULL)
        while not (runs / name / "last.pt").exists():
            time.sleep(0.005)
        return running

    running = begun("whole")
    start = time.monotonic()
    while not (runs / "whole" / "checkpoint.pt").exists():
        time.sleep(0.005)
    length = time.monotonic() - start
    running.wait()
    whole = checkpoints.load(runs / "whole" / "checkpoint.pt").model.state_dict()
    same, killed = 0, 0
    while killed < number:
        name = f"cut{killed}"
        running = begun(name)
        time.sleep(chance.uniform(0, 0.8 * length))
        running.kill()
        running.wait()
        if not (runs / name / "last.pt").exists():  # it was done already: try again
            shutil.rmtree(runs / name)
            continue
        killed += 1
        again = [*TRAIN, "--runs", str(runs), "--resume", name]
        subprocess.run(again, stdout=subprocess.DEVNULL, check=True)
        weights = checkpoints.load(runs / name / "checkpoint.pt").model.state_dict()
        same += all(torch.equal(whole[key], weights[key]) for key in whole)
    return {"killed": killed, "same_bits": same}


def main() -> None:
    args = options()
    torch.set_num_threads(1)  # processes fork below
    chance = random.Random(args.seed)
    results: dict[str, Any] = {}

    def note(name: str, figures: dict[str, int]) -> None:
        results[name] = figures
        print(f"{name}: {figures}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        note("kills while saving", kills(folder, args.kills, chance))
        note("size limits", limits(folder, args.limits, chance))
        subprocess.run([*TINY, "--runs", name, "--name", "made"], check=True, capture_output=True)
        path = folder / "made" / "checkpoint.pt"
        sign = [sys.executable, "-m", "covcli", "build-signature", str(path), "--quiet"]
        printed = subprocess.check_output([*sign, "--plugin", str(PLUGIN)], text=True)
        import runpy

        runpy.run_path(str(PLUGIN))
        signature = Path(printed.strip())
        note("signature", mutations(signature, meaning_of_signature, args.mutations, chance))
        note("checkpoint", mutations(path, meaning_of_checkpoint, args.mutations, chance))
        note("hostile pickles", pickles(folder))
        note("kills and resumes", resumes(folder, args.resumes, chance))
    with tempfile.TemporaryDirectory() as name:
        disturbed = interruptions.disturbances(Path(name), args.interruptions, chance)
    readers = fuzz.run(args.inputs, args.seed, [])
    if args.json:
        for kind, of_kind in disturbed.items():
            results[kind] = {name: vars(ledger) for name, ledger in of_kind.items()}
        results["readers"] = {name: vars(tally) for name, tally in readers.items()}
        print(json.dumps(results))
        return
    print("| fault | figures |\n| --- | --- |")
    for name, figures in results.items():
        print(f"| {name} | {', '.join(f'{k} {v}' for k, v in figures.items())} |")
    for kind, of_kind in disturbed.items():
        print(f"\n{interruptions.table(kind, of_kind)}")
    print(f"\n{fuzz.table(readers)}")


if __name__ == "__main__":
    main()
