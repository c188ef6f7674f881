"""Every command killed, or sent two signals, at random moments: what is lost, and what lies.

`benchmarks/faults.py` runs it. A small network is trained and every stage is run once; each trial
copies that folder, runs one command in it, disturbs it, and looks at what is left. Then the command
is run again, as its own last line asks or else as it was, and must end with what an undisturbed run
ends with. Processes are forked from one that has loaded torch already, so that a trial takes about
a second. POSIX only.
"""

import contextlib
import gzip
import hashlib
import os
import pickle
import random
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covcli import __main__ as boundary
from covcli.core import file_checks, files
from covcli.core.errors import CovcliError
from covcli.models import checkpoint as checkpoints
from covcli.monitoring.drift import STATE as DRIFT
from covcli.monitoring.export import read_exported
from covcli.reporting import report as reports
from covcli.signature import signature as signatures

PLUGIN = Path(__file__).parent.parent / "tests" / "tiny_model.py"
SOON = 10.0  # seconds from the first signal to the end
CALM = 120.0  # seconds after which an undisturbed command hangs
PAIR = 0.5  # seconds from one signal of a pair to the other, at most
RUN = Path("runs/base")
TRAIN = ["train", "--trusted", "digits?limit=700", "--model", "tiny", "--epochs", "4", "--method",
         "mrc", "--batch-size", "32", "--learning-rate", "0.1", "--calibration-split", "0.4",
         "--save-every", "0m", "--device", "cpu", "--name"]  # fmt: skip
BUILD = ["build-signature", str(RUN / "checkpoint.pt"), "--method", "mrc", "--device", "cpu"]
EVALUATE = ["evaluate", "--untrusted", "noise:uniform?limit=200", "--untrusted",
            "attack:fgsm?limit=100&eps=0.3", "--checkpoint", str(RUN / "checkpoint.pt"),
            "--signature", str(RUN / "signature-mrc.safetensors"), "--device", "cpu"]  # fmt: skip
OF_BASE = ["--checkpoint", str(RUN / "checkpoint.pt"), "--signature",
           str(RUN / "signature-mrc.safetensors")]  # fmt: skip
CHECK = ["check", "digits?split=test", *OF_BASE, "--format", "csv", "--device", "cpu"]
EXPORT = ["export", "--format", "torch", *OF_BASE, "--force", "--output"]
MERGE = ["merge-signatures", "a.safetensors", "b.safetensors", "--checkpoint",
         str(RUN / "checkpoint.pt"), "--device", "cpu", "--output"]  # fmt: skip
# What differs from one run to the next.
PASSING = {"time", "seconds", "command", "files", "provenance", "digests"}


@dataclass(frozen=True)
class Command:
    """A command, and the files that it makes or replaces.

    Attributes
    ----------
    arguments
        As on the command line.
    makes
        The file that it ends with.
    resumes
        What goes on with it once it has saved something, and the file that it goes on from.
    partial
        Whether what an interrupted run has written is right, given its folder; None for a command
        that ends with the same result as an undisturbed run.
    """

    arguments: Sequence[str]
    makes: Path
    resumes: tuple[Sequence[str], Path] | None = None
    partial: Callable[[Path], bool] | None = None


def counted(folder: Path) -> bool:
    """Return whether a drift state counts exactly the images whose rows were printed."""
    rows = (folder.parent / "out").read_text().splitlines()[1:]
    return bool(DRIFT.load(folder / "camera.drift")["told"]["images"] == len(rows))


COMMANDS = {
    "train": Command([*TRAIN, "new"], Path("runs/new/checkpoint.pt"),
                     (["train", "--resume", "new"], Path("runs/new/last.pt"))),
    "train --resume": Command(["train", "--resume", "paused"], Path("runs/paused/checkpoint.pt"),
                              (["train", "--resume", "paused"], Path("runs/paused/last.pt"))),
    "build-signature": Command([*BUILD, "--force"], RUN / "signature-mrc.safetensors"),
    "merge-signatures": Command([*MERGE, "merged.safetensors", "--force"],
                                Path("merged.safetensors")),
    "evaluate": Command([*EVALUATE, "--seed", "1", "--explain", "1", "--force"],
                        RUN / "evaluation.json"),
    "report": Command(["report", str(RUN), "--force"], RUN / "report.html"),
    "check": Command([*CHECK, "--metrics", "check.prom"], Path("check.prom")),
    "check --drift": Command([*CHECK, "--drift", "0.01", "--drift-state", "camera.drift"],
                             Path("camera.drift"), partial=counted),
    "export": Command([*EXPORT, "monitor.pt2"], Path("monitor.pt2")),
    "compare": Command(["compare", "a.safetensors", "b.safetensors", "--force", "--output",
                        "changes"], Path("changes/comparison.html")),
    "points": Command(["points", str(RUN / "checkpoint.pt")], RUN / "checkpoint.pt"),
}  # fmt: skip


@dataclass
class Ledger:
    """What became of one command's trials."""

    trials: int = 0
    wrong: Counter[str] = field(default_factory=Counter)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder during the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def begin(arguments: Sequence[str], folder: Path) -> int:
    """Fork a process that runs a command in a folder; its output goes to `out` and `err` there."""
    child = os.fork()
    if child:
        return child
    code = 97
    try:
        os.chdir(folder)
        os.environ["XDG_STATE_HOME"] = str(folder.parent / "state")
        for descriptor, name in ((1, "out"), (2, "err")):
            opened = os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, descriptor)
        boundary.main([*arguments, "--quiet"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(code)


def ended(child: int, patience: float) -> int | None:
    """Return how a process ended, a signal's number negated; None, and kill it, if it does not."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run(arguments: Sequence[str], folder: Path) -> None:
    """Run a command undisturbed; that it fails is an error of this benchmark."""
    if ended(begin(arguments, folder), CALM) != 0:
        said = (folder.parent / "err").read_text()
        raise RuntimeError(f"covcli {' '.join(arguments)}: {said}")


def prepare(folder: Path) -> None:
    """Run every stage in a folder, and leave a training that waits to go on."""
    folder.mkdir(parents=True)
    run([*TRAIN, "base"], folder)
    run(BUILD, folder)
    for name, part in (("a", "limit=500"), ("b", "offset=500&limit=500")):
        run([*BUILD, "--trusted", f"digits?split=train&{part}", "--calibration",
             "digits?split=test", "--output", f"{name}.safetensors"], folder)  # fmt: skip
    run([*MERGE, "merged.safetensors"], folder)
    run(EVALUATE, folder)
    run(["report", str(RUN)], folder)
    child = begin([*TRAIN, "paused"], folder)
    while not (folder / "runs/paused/last.pt").exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def leftovers(folder: Path) -> set[Path]:
    """Return the files that only a running command has."""
    return {path.relative_to(folder) for path in folder.rglob(".*")
            if path.name.endswith((".tmp", ".lock"))}  # fmt: skip


def meaning(path: Path) -> object:
    """Return what a file says, less what differs from one run to the next."""
    if path.name == "checkpoint.pt":
        checkpoint = checkpoints.load(path)
        return files.digest([dict(checkpoint.model.state_dict()), list(checkpoint.classes)])
    if path.suffix == ".safetensors":
        signature, calibration, record = signatures.load(path)
        parts = [signature.state.tensors, calibration.scores, calibration.combination.scale]
        return files.digest([*parts, record.trusted.images, record.calibration.images])
    if path.suffix == ".json":
        return _lasting(files.read_json(path))
    if path.suffix == ".drift":
        return files.digest([value for key, value in DRIFT.load(path).items() if key != "format"])
    if path.suffix == ".prom":
        return [line for line in path.read_text().splitlines() if "_seconds" not in line]
    if path.suffix == ".pt2":
        described = read_exported(path)
        return files.digest([described.outputs, str(described.verification), described.classes])
    if path.suffix == ".gz":
        return hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    if path.suffix == ".npz":
        return {name: array.tobytes() for name, array in file_checks.read_npz(path).items()}
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in PASSING}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


class Trials:
    """Disturbs commands in copies of a prepared folder, and judges what is left."""

    def __init__(self, top: Path, chance: random.Random) -> None:
        self.top, self.chance = top, chance
        runpy.run_path(str(PLUGIN))
        self.base = top / "base" / "work"
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[Path, object]] = {}
        remembered = top / "expected.pickle"
        if remembered.exists():
            self.seconds, self.expected = pickle.loads(remembered.read_bytes())
            return
        prepare(self.base)
        for name, command in COMMANDS.items():
            folder = self.copy()
            began = time.monotonic()
            run(command.arguments, folder)
            self.seconds[name] = time.monotonic() - began
            self.expected[name] = self.results(command, folder)
            print(f"{name}: {self.seconds[name]:.1f} s", file=sys.stderr, flush=True)
        remembered.write_bytes(pickle.dumps((self.seconds, self.expected)))

    def copy(self) -> Path:
        """Return a fresh copy of the prepared folder."""
        top = self.top / "trial"
        shutil.rmtree(top, ignore_errors=True)
        shutil.copytree(self.base.parent, top, symlinks=True)
        return top / "work"

    def results(self, command: Command, folder: Path) -> dict[Path, object]:
        """Return what a command's files say: those beside the one that it ends with too."""
        result = folder / command.makes
        beside = [result]
        if result.name == "evaluation.json":
            beside += [result.with_name("scores.csv.gz"), result.with_name("samples.npz")]
        if result.name in ("report.html", "comparison.html"):
            beside += [result.with_suffix(".md")]
        return {path.relative_to(folder): meaning(path) for path in beside}

    def trial(self, name: str, disturb: Callable[[int, float], str | None], tally: Ledger) -> None:
        """Run a command, disturb it, and judge what is left."""
        command, folder = COMMANDS[name], self.copy()
        before = {path: path.read_bytes() for path in self.finished(folder)}
        child = begin(command.arguments, folder)
        complaint = disturb(child, self.seconds[name])
        tally.trials += 1
        said = (folder.parent / "err").read_text()
        wrong = [complaint] if complaint else []
        wrong += ["a traceback"] if "Traceback" in said or "internal error" in said else []
        wrong += self.broken(folder, before)
        try:
            again = not (folder / command.makes).exists()
            if command.resumes is not None and (folder / command.resumes[1]).exists():
                run(command.resumes[0], folder)
            elif again or (command.resumes is None and command.partial is None):
                run(command.arguments, folder)
            whole = self.results(command, folder) == self.expected[name]
            partial = command.partial is not None and not again and command.partial(folder)
            if not whole and not partial:
                wrong.append("another result")
        except (RuntimeError, CovcliError, OSError) as error:
            wrong.append("cannot be run again")
            said += f"\n{error}"
        left = leftovers(folder) - leftovers(self.base)
        wrong += ["files left behind"] if left else []
        if wrong:
            told = f"{name}: {', '.join(wrong)}: {said} {left}"
            print(told, file=sys.stderr, flush=True)
        tally.wrong.update(wrong)

    def finished(self, folder: Path) -> list[Path]:
        """Return the files that a command has finished before: not those that it goes on from."""
        return [path for path in folder.rglob("*")
                if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
                and path.name != "last.pt"]  # fmt: skip

    def broken(self, folder: Path, before: dict[Path, bytes]) -> Iterator[str]:
        """Yield what is wrong with the files that are there after a command was disturbed."""
        if any(not path.exists() for path in before):
            yield "a finished file is gone"
        for path in self.finished(folder):
            if before.get(path) == path.read_bytes():
                continue
            try:
                meaning(path)
            except (CovcliError, ValueError, OSError, EOFError):
                yield "half a file"
        run = folder / RUN
        with contextlib.suppress(CovcliError):  # a mixture that is refused
            evaluation = reports.read(run).evaluation
            for name, digest in evaluation.digests.items():
                if files.digest_file(run / name) != digest:
                    yield "a mixture is drawn"

    def kill(self, child: int, seconds: float) -> None:
        """Kill a process at a random moment."""
        time.sleep(self.chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def signal_twice(self, child: int, seconds: float) -> str | None:
        """Send two signals at random moments; return what is wrong with how the process ends."""
        time.sleep(self.chance.uniform(0, seconds))
        allowed = {0}
        began = time.monotonic()
        for pause in (0.0, self.chance.uniform(0, PAIR)):
            time.sleep(pause)
            number = self.chance.choice([signal.SIGINT, signal.SIGTERM])
            allowed |= {128 + number, -number}
            os.kill(child, number)
        code = ended(child, SOON - (time.monotonic() - began))
        if code is None:
            return f"does not end within {SOON:g} s"
        return None if code in allowed else f"ends with {code}"


def disturbances(top: Path, number: int, chance: random.Random) -> dict[str, dict[str, Ledger]]:
    """Return what became of so many kills and so many pairs of signals, by command."""
    trials = Trials(top, chance)
    ledgers: dict[str, dict[str, Ledger]] = {}
    for kind, disturb in (("killed", trials.kill), ("two signals", trials.signal_twice)):
        ledgers[kind] = {name: Ledger() for name in COMMANDS}
        for i in range(number):
            name = list(COMMANDS)[i % len(COMMANDS)]
            trials.trial(name, disturb, ledgers[kind][name])
            if i % 10 == 9:
                print(f"{kind}: {i + 1} of {number}", file=sys.stderr, flush=True)
    return ledgers


def table(kind: str, ledgers: dict[str, Ledger]) -> str:
    """Return one kind's trials as Markdown."""
    lines = [f"| {kind} | trials | what went wrong |", "| --- | --- | --- |"]
    for name, ledger in ledgers.items():
        wrong = ", ".join(f"{what} ({n})" for what, n in ledger.wrong.items()) or "nothing"
        lines.append(f"| {name} | {ledger.trials} | {wrong} |")
    total = sum(ledger.trials for ledger in ledgers.values())
    failed = sum(ledger.wrong.total() for ledger in ledgers.values())
    return "\n".join([*lines, f"| all | {total} | {failed or 'nothing'} |"])


def main() -> None:
    import argparse
    import tempfile

    import torch

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prepared", type=Path, help="folder that is prepared once, and kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        top = args.prepared or Path(name)
        kinds = disturbances(top.resolve(), args.number, random.Random(args.seed))
    for kind, ledgers in kinds.items():
        print(table(kind, ledgers), end="\n\n")


if __name__ == "__main__":
    main()
