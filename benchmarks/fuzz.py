"""Every reader of covcli against hostile input: refused in one line, or accepted; nothing else.

    python benchmarks/fuzz.py                    # 20,000 inputs a reader, some hours
    python benchmarks/fuzz.py --inputs 500 --only npz image --seed 3

Each input is made from a seed of its own, `--seed` and the numbers after it. Prints a Markdown
table: of each reader how many inputs it refused in one line and accepted, and what else came of
them, with the first seed that did; `--only READER --inputs 1 --seed SEED` makes that input again.
`benchmarks/faults.py` runs it too.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import runpy
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import torch
import typer

from covcli.attacks import attacks
from covcli.cli import app
from covcli.commands import boundary
from covcli.core import files, output, runtime, specs
from covcli.core.errors import CovcliError, ExitCode
from covcli.core.progress import Silent
from covcli.data import datasets, recorded
from covcli.data.decoding import decode
from covcli.data.images import DataRecord, ImageSet
from covcli.data.preprocessing import InputShape
from covcli.evaluation import gates
from covcli.evaluation.config import EvaluationConfig
from covcli.evaluation.evaluate import evaluate
from covcli.methods import make_method
from covcli.models import architectures
from covcli.models import checkpoint as checkpoints
from covcli.models.checkpoint import CHECKPOINT
from covcli.monitoring.compare import compare
from covcli.monitoring.drift import STATE, DriftWatch
from covcli.monitoring.export import EXTRA, read_exported
from covcli.monitoring.exported import ExportedMonitor, Verification
from covcli.monitoring.inspect import inspect_file
from covcli.monitoring.inspection import as_table
from covcli.reporting import per_image, pipelines, terminal
from covcli.reporting import report as reports
from covcli.reporting.documents import EvaluationResult
from covcli.reporting.headline import headline
from covcli.signature import judge as judges
from covcli.signature import signature as signatures
from covcli.signature.build import build_signature
from covcli.signature.config import MergeConfig, SignatureConfig, read_statistics
from covcli.training import paused
from covcli.training.config import TrainConfig
from covcli.training.session import Session
from covcli.training.train import resume, train

PLUGIN = Path(__file__).parent.parent / "tests" / "tiny_model.py"
SLOWEST = 20.0  # seconds that one input may take
DRAWN = 0.01  # of the results that are accepted so many are drawn, which takes seconds
UNTRUSTED = ("noise:uniform?limit=20", "attack:fgsm?limit=20&eps=0.3")
PAIR = torch.arange(2)
Reader = Callable[[random.Random], None]
# The readers by the name that they are shown under, and the methods of `Target` that they are.
READERS = {
    "npz": "npz", "image": "image", "table of images": "csv", "specification": "specification",
    "option": "option", "command line": "command_line", "name": "name", "evaluation": "evaluation",
    "training log": "training_log", "scores": "scores", "samples": "samples",
    "earlier evaluation": "earlier", "signature": "signature_file", "checkpoint": "checkpoint",
    "bare weights": "bare", "paused training": "paused_training", "inspected file": "inspected",
    "configuration": "configuration", "drift state": "drift",
    "exported program": "exported", "comparison": "comparison",
}  # fmt: skip


EXPORTED = ExportedMonitor(
    1, "torch", "uint8", (3, 8, 8), "resize=cover,crop=8", (0.5,) * 3, (0.2,) * 3, ("logits",), (),
    ("a", "b"), "tiny", "src", "channel", 0.05, "marginal", None, "All is well.", "1", "2",
    Verification(2, 0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0.1, 0), {"seed": 0},
)  # fmt: skip


@dataclass
class Tally:
    """What became of the inputs of one reader.

    Attributes
    ----------
    inputs, refused, accepted
        How many there were, and how many were refused in one line, and accepted.
    else_count, else_seed
        What else came of them: how often, and the first seed.
    """

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    else_count: dict[str, int] = field(default_factory=dict)
    else_seed: dict[str, int] = field(default_factory=dict)

    def note(self, kind: str, seed: int) -> None:
        """Count what must not come of an input."""
        self.else_count[kind] = self.else_count.get(kind, 0) + 1
        self.else_seed.setdefault(kind, seed)


class Target:
    """A small run of every stage, whose files are mutated; each reader is a method."""

    def __init__(self, folder: Path, drawn: float = DRAWN) -> None:
        self.folder, self.drawn = folder, drawn
        runpy.run_path(str(PLUGIN))
        config = TrainConfig(
            trusted="digits?limit=700", model="tiny", epochs=4, batch_size=32, name="run",
            runs=folder / "runs", learning_rate=0.1, calibration_split=0.4, device="cpu",
        )  # fmt: skip
        trained = train(config, Silent())
        self.run, self.checkpoint_file = trained.run, trained.checkpoint
        wanted = SignatureConfig(trained.checkpoint, method="mrc", device="cpu")
        self.signature = build_signature(wanted, Silent()).path
        asked = (gates.parse_gate("auroc=0.5"),)
        self.result = evaluate(
            EvaluationConfig(UNTRUSTED, trained.checkpoint, explain=1, device="cpu", gates=asked),
            Silent(),
        )
        self.originals = {p.name: p.read_bytes() for p in self.run.iterdir() if p.is_file()}
        self.evaluated = json.loads(self.originals["evaluation.json"])
        self.log = next(n for n in self.originals if n.startswith("training") and "json" in n)
        self.tensors, self.metadata = signatures.load_signature(self.signature)
        self.content = checkpoints.load_checkpoint(trained.checkpoint)
        self.config = config
        self.session = Session(config, datasets.load(config.trusted, "train"))
        self.session.save(folder / "last.pt")
        self.paused = paused.PAUSED.load(folder / "last.pt")
        self.judge, _ = judges.load(self.checkpoint_file, self.signature)
        watch = DriftWatch(self.judge)
        watch.update(np.linspace(-1, 3, 50))
        watch.save(folder / "drift.pt")
        self.drifted = STATE.load(folder / "drift.pt")
        self.images = mutations.image_samples()
        self.shown = datasets.load("noise:uniform?limit=2", "test")

    def readers(self) -> dict[str, Reader]:
        """Return the readers by name."""
        return {name: getattr(self, method) for name, method in READERS.items()}

    def npz(self, chance: random.Random) -> None:
        """Read an archive of images."""
        (self.folder / "x.npz").write_bytes(mutations.npz_file(chance))
        _look(datasets.load(f"npz:{self.folder}/x.npz", "test"))

    def image(self, chance: random.Random) -> None:
        """Read an image file, whatever its name says."""
        (self.folder / "x.png").write_bytes(mutations.mutated_image(self.images, chance))
        decode(self.folder / "x.png", 10**7)

    def csv(self, chance: random.Random) -> None:
        """Read a table that names image files."""
        (self.folder / "good.png").write_bytes(self.images[0])
        (self.folder / "x.csv").write_bytes(mutations.table_of_images(chance))
        _look(datasets.load(f"csv:{self.folder}/x.csv", "test"))

    def specification(self, chance: random.Random) -> None:
        """Read what names data, a corruption, an attack, a method, a model or a preparation."""
        text = mutations.specification(self.folder, chance)
        how = chance.randrange(6)
        if how == 0:
            make_method(mutations.method(chance))
        elif how == 1:
            InputShape((3, 8, 8)).changed(mutations.preparation(chance))
        elif how == 2:
            architectures.architecture(mutations.model(chance))
        else:
            recorded.reads_path(text)
            if attacks.is_attack(specs.parse(text)):
                attacks.make_attack(specs.parse(text))
                attacks.attacked_rows(specs.parse(text), self.shown)
            else:
                _look(datasets.load(text, "test", self.folder))

    def option(self, chance: random.Random) -> None:
        """Read the value of an option, as text and as a program may pass it."""
        if chance.random() < 0.5:
            _configured(chance)
            return
        text = mutations.hostile_text(chance)
        parsers: list[Callable[[str], object]] = [
            gates.parse_gate, lambda t: gates.parse_gate(f"auroc={t}"),
            lambda t: read_statistics(t, t), lambda t: read_statistics(f"{t},1,1", f"1,{t},2"),
            runtime.choose_device,
        ]  # fmt: skip
        chance.choice(parsers)(text)

    def command_line(self, chance: random.Random) -> None:
        """Run a command with an option or argument that is hard to take."""
        runs = self.folder / "cli"
        shutil.rmtree(runs, ignore_errors=True)
        digits = ["--trusted", "digits?limit=64", "--device", "cpu"]
        network, known = str(self.checkpoint_file), ["--signature", str(self.signature)]
        good = {
            "train": [*digits, "--model", "tiny", "--epochs", "1", "--runs", str(runs)],
            "build-signature": [network, *digits, "--method", "src", "--output", str(runs / "s")],
            "evaluate": ["--untrusted", "noise:uniform?limit=3", "--checkpoint", network, *known,
                         "--trusted", "digits?limit=64", "--device", "cpu", "--output", str(runs)],
            "merge-signatures": [str(self.signature), "--output", str(runs / "m")],
            "report": [str(self.run), "--output", str(runs)],
            "points": [network], "inspect": [network],
            "check": ["noise:uniform?limit=3", "--checkpoint", network, *known, "--device", "cpu"],
        }  # fmt: skip
        group: Any = typer.main.get_command(app)
        name = chance.choice(list(good))
        options = [o for p in group.commands[name].params for o in p.opts if o != "--epochs"]
        arguments = [*good[name], chance.choice(options), mutations.argument(chance)]
        if chance.random() < 0.8:  # most are refused before any work, which takes a while
            arguments = [a for a in arguments if not a.startswith(str(self.folder))]
        runs.mkdir()
        _run([name, *arguments], runs)

    def configuration(self, chance: random.Random) -> None:
        """Follow a covcli.toml."""
        folder = self.folder / "configured"
        folder.mkdir(exist_ok=True)
        (folder / "covcli.toml").write_bytes(mutations.configuration(chance))
        _run(chance.choice([["config"], ["report"], ["points", "none.pt"]]), folder)

    def name(self, chance: random.Random) -> None:
        """Show the names of sets, classes, points and files, in everything that is shown."""
        names = [chance.choice(mutations.NAMES) for _ in range(4)]
        hostile = _renamed(self.result, names)
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            terminal.show_evaluation(hostile, verbose=chance.random() < 0.2)
        texts = [shown.getvalue(), pipelines.summary(hostile), pipelines.annotations(hostile.gates)]
        if chance.random() < self.drawn:
            texts += self._drawn(hostile)
        for text in texts:
            _only_printable(text)
        ET.fromstring(pipelines.junit(hostile.gates))
        json.dumps(files.plain(names)).encode()

    def _drawn(self, hostile: EvaluationResult) -> list[str]:
        """Return a report of an evaluation beside the run's other files, as HTML and Markdown."""
        target = self.folder / "named"
        shutil.copytree(self.run, target, dirs_exist_ok=True)
        names = ["trusted", *(entry.name for entry in hostile.untrusted)]
        scores = per_image.read_scores(self.run / per_image.SCORES)
        if len(set(names)) < len(names):  # which no evaluation has
            return []
        packed = per_image.pack_scores(dict(zip(names, scores.values(), strict=True)))
        (target / per_image.SCORES).write_bytes(packed)
        document = files.plain(asdict(hostile))
        document["digests"][per_image.SCORES] = files.digest_bytes(packed)
        (target / "evaluation.json").write_bytes(files.pack_json(document))
        report = reports.report(target, force=True)
        return [report.html.read_text(), report.markdown.read_text()]

    def _report(self, changed: dict[str, bytes], chance: random.Random) -> None:
        target = self.folder / "changed"
        target.mkdir(exist_ok=True)
        for old in target.iterdir():
            if old.is_file():
                old.unlink()
        for name, content in {**self.originals, **changed}.items():
            if name.endswith((".json", ".gz", ".npz")):
                (target / name).write_bytes(content)
        data = reports.read(target)
        with reports.holding_together(target):
            headline(data)
        if chance.random() < self.drawn:
            reports.report(target, force=True)

    def evaluation(self, chance: random.Random) -> None:
        """Draw an evaluation.json."""
        document = mutations.mutated_document(self.evaluated, chance)
        self._report({"evaluation.json": mutations.json_text(document, chance)}, chance)

    def training_log(self, chance: random.Random) -> None:
        """Draw a training log."""
        document = mutations.mutated_document(json.loads(self.originals[self.log]), chance)
        self._report({self.log: mutations.json_text(document, chance)}, chance)

    def earlier(self, chance: random.Random) -> None:
        """Hold an evaluation against an earlier evaluation.json."""
        document = mutations.mutated_document(self.evaluated, chance)
        path = self.folder / "earlier.json"
        path.write_bytes(mutations.json_text(document, chance))
        gates.read_baseline(path, 0.01, UNTRUSTED)

    def _with_digest(self, name: str, content: bytes, chance: random.Random) -> None:
        document = json.loads(self.originals["evaluation.json"])
        document["digests"][name] = files.digest_bytes(content)
        changed = {name: content, "evaluation.json": json.dumps(document).encode()}
        self._report(changed, chance)

    def scores(self, chance: random.Random) -> None:
        """Draw a table of scores."""
        original = self.originals[per_image.SCORES]
        self._with_digest(per_image.SCORES, mutations.scores_file(original, chance), chance)

    def samples(self, chance: random.Random) -> None:
        """Draw the pixels that a report shows."""
        original = self.originals[per_image.SAMPLES]
        self._with_digest(per_image.SAMPLES, mutations.samples_file(original, chance), chance)

    def signature_file(self, chance: random.Random) -> None:
        """Judge by a signature whose checksum is right."""
        path = self.folder / "x.safetensors"
        how = chance.random()
        if how < 0.15:
            path.write_bytes(mutations.mutated_bytes(self.signature.read_bytes(), chance))
        elif how < 0.3:
            path.write_bytes(mutations.safetensors_file(self.signature.read_bytes(), chance))
        else:
            tensors, metadata = self.tensors, self.metadata
            if how < 0.6:
                tensors = mutations.mutated_tree(tensors, chance)
            else:
                metadata = mutations.mutated_document(metadata, chance)
            if not _can_write(lambda: signatures.save_signature(path, tensors, metadata)):
                return
        judge, record = judges.load(self.checkpoint_file, path)
        for swept in judge.sweep(self.shown, Silent(), ""):
            judge(swept.logits, swept.neurons)
        record.calibration_set(self.folder, "do without")
        record.trusted_set(judge.signature.classes, self.folder, "do without")

    def checkpoint(self, chance: random.Random) -> None:
        """Build from a checkpoint whose digest is right."""
        path = self.folder / "x.pt"
        if chance.random() < 0.3:
            original = self.checkpoint_file.read_bytes()
            path.write_bytes(mutations.mutated_bytes(original, chance))
        else:
            changed = mutations.mutated_tree(self.content, chance)
            if not _can_write(lambda: CHECKPOINT.save(path, changed)):
                return
        loaded = checkpoints.load(path)
        loaded.model.points("channel")
        if loaded.trusted is not None:
            datasets.reload(loaded.trusted, "train", self.folder, "name it")
        if chance.random() < 0.02:
            config = SignatureConfig(path, output=self.folder / "s", force=True, device="cpu")
            build_signature(config, Silent())

    def bare(self, chance: random.Random) -> None:
        """Load weights without a checkpoint."""
        path = self.folder / "bare.pt"
        nested = {"state_dict": self.content["state"], "epoch": 3, "optimizer": {"lr": 0.1}}
        changed = mutations.mutated_tree(nested, chance)
        if _can_write(lambda: torch.save(changed, path)):
            checkpoints.load(path, "tiny")

    def paused_training(self, chance: random.Random) -> None:
        """Resume a paused training whose digest is right."""
        run = self.folder / "paused"
        run.mkdir(exist_ok=True)
        path, changed = run / paused.PAUSED_FILE, mutations.mutated_tree(self.paused, chance)
        if not _can_write(lambda: paused.PAUSED.save(path, changed)):
            return
        content, own = paused.read(run)
        config = paused.restored_config(content, own, run, None)
        recorded.allow_spec(config.trusted, own, "")
        self.session.restore(content, path)
        if chance.random() < self.drawn:
            resume(run)
        self.session = Session(self.config, self.session.images)

    def drift(self, chance: random.Random) -> None:
        """Go on with a drift state whose digest is right."""
        path, changed = self.folder / "drift.pt", mutations.mutated_tree(self.drifted, chance)
        if not _can_write(lambda: STATE.save(path, changed)):
            return
        watch = DriftWatch.load(path, self.judge)
        watch.update(np.linspace(-3, 9, 30), [mutations.hostile_text(chance)] * 30)
        watch.save(path)

    def exported(self, chance: random.Random) -> None:
        """Read what an exported program says of itself."""
        path = self.folder / "x.pt2"
        document = mutations.mutated_document(json.loads(EXPORTED.packed()), chance)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"x/extra/{EXTRA}", mutations.json_text(document, chance))
        if chance.random() < 0.1:
            path.write_bytes(mutations.mutated_bytes(path.read_bytes(), chance))
        read_exported(path)

    def comparison(self, chance: random.Random) -> None:
        """Compare an evaluation, or a signature, with another one."""
        if chance.random() < 0.7:
            with contextlib.suppress(CovcliError):
                self.evaluation(chance)
            compare(self.run / "evaluation.json", self.folder / "changed" / "evaluation.json")
            return
        with contextlib.suppress(CovcliError):
            self.signature_file(chance)
        compare(self.signature, self.folder / "x.safetensors")

    def inspected(self, chance: random.Random) -> None:
        """Inspect a file that another reader has been given."""
        written = {
            "evaluation": "changed/evaluation.json", "training log": f"changed/{self.log}",
            "scores": f"changed/{per_image.SCORES}", "signature": "x.safetensors",
            "checkpoint": "x.pt", "bare weights": "bare.pt",
            "paused training": f"paused/{paused.PAUSED_FILE}",
        }  # fmt: skip
        name = chance.choice(list(written))
        with contextlib.suppress(CovcliError):
            getattr(self, READERS[name])(chance)
        table = as_table(inspect_file(self.folder / written[name]))
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            terminal.show_table(table)
        _only_printable(shown.getvalue())


def _configured(chance: random.Random) -> None:
    """Make a configuration with one value that is hard to take."""
    kind = chance.choice([TrainConfig, SignatureConfig, EvaluationConfig, MergeConfig])
    name = chance.choice([f.name for f in fields(kind)])
    value: Any = chance.choice([mutations.hostile_text(chance), mutations.any_value(chance)])
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        value = chance.choice([value, float(value), int(value)])
    needed: dict[str, Any] = {
        "checkpoint": Path("x"), "untrusted": ("photos",), "parts": (Path("x"),),
        "output": Path("x"),
    }  # fmt: skip
    known = {f.name for f in fields(kind)}
    kind(**{k: v for k, v in needed.items() if k in known} | {name: value})


def _look(images: ImageSet) -> None:
    """Read two images, and what a result records of a set."""
    images.batch(PAIR[: len(images)], (3, 8, 8))
    DataRecord.of(images)


def _can_write(save: Callable[[], object]) -> bool:
    """Write a hostile file; return False where not even a stranger's program could."""
    try:
        save()
    except Exception:
        return False
    return True


def _run(arguments: list[str], folder: Path) -> None:
    """Run a command in a folder, and raise what the boundary does not word in a line."""
    try:
        with (
            contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()), output.apart(),
        ):  # fmt: skip
            app(args=arguments, prog_name="covcli", standalone_mode=False)
    except Exception as error:
        message, code = boundary._describe(error)
        if code != ExitCode.BAD_INPUT:
            raise
        if not message.isprintable():
            raise AssertionError(f"{message!r} is no line") from None
        raise CovcliError(message) from None


def _renamed(result: EvaluationResult, names: list[str]) -> EvaluationResult:
    """Return an evaluation of sets, classes and points with other names."""
    untrusted = [replace(result.untrusted[0], name=names[0]), *result.untrusted[1:]]
    alarms = [replace(c, name=names[1]) for c in result.trusted.false_alarms_by_class]
    trusted = replace(result.trusted, name=names[2], false_alarms_by_class=alarms)
    other = {result.untrusted[0].name: names[0]}
    first = result.points[0].name
    points = [
        replace(p, name=names[3] if p.name == first else p.name,
                coverage={other.get(k, k): v for k, v in p.coverage.items()})
        for p in result.points
    ]  # fmt: skip
    explanations = [
        replace(
            e, set=names[0], predicted=names[1], mapped=names[3] if e.mapped == first else e.mapped,
            points=[replace(p, name=names[3]) if p.name == first else p for p in e.points],
        )
        for e in result.explanations
    ]  # fmt: skip
    return replace(
        result, untrusted=untrusted, trusted=trusted, points=points, explanations=explanations,
        gates=[replace(gate, set=names[0]) for gate in result.gates], warnings=names,
    )  # fmt: skip


def _only_printable(text: str) -> None:
    raw = {c for c in text if not c.isprintable() and c != "\n"}
    assert not raw, f"shows {raw!r}"
    text.encode()


def attack(reader: Reader, seeds: Iterable[int], tell: bool = True) -> Tally:
    """Hand a reader one input a seed, and count what becomes of each."""
    tally = Tally()
    for seed in seeds:
        tally.inputs += 1
        began = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader(random.Random(seed))
            tally.accepted += 1
        except CovcliError as error:
            tally.refused += 1
            if not str(error).isprintable():
                tally.note("more than one line", seed)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
            if tell and kind not in tally.else_count:
                text = "".join(traceback.format_exception(error)[-8:])
                print(f"seed {seed}: {kind}\n{text}", file=sys.stderr)
            tally.note(kind, seed)
        if time.monotonic() - began > SLOWEST:
            tally.note(f"slower than {SLOWEST:g} s", seed)
    return tally


def run(inputs: int, seed: int, only: list[str], drawn: float = DRAWN) -> dict[str, Tally]:
    """Attack the readers, and return what each did."""
    with tempfile.TemporaryDirectory() as name:
        readers = Target(Path(name), drawn).readers()
        tallies = {}
        for reader in only or readers:
            began = time.monotonic()
            tallies[reader] = attack(readers[reader], range(seed, seed + inputs))
            took = time.monotonic() - began
            print(f"{reader}: {took:.0f} s, {tallies[reader]}", file=sys.stderr, flush=True)
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """Return the tallies as Markdown."""
    head = "| reader | inputs | refused in one line | accepted | anything else |"
    lines = [head, "| --- | --- | --- | --- | --- |"]
    for name, t in tallies.items():
        other = ", ".join(
            f"{kind} ({count}; seed {t.else_seed[kind]})" for kind, count in t.else_count.items()
        )
        counts = f"{t.inputs:,} | {t.refused:,} | {t.accepted:,}"
        lines.append(f"| {name} | {counts} | {other or 'nothing'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=READERS, default=[], help="default: all")
    parser.add_argument("--drawn", type=float, default=DRAWN, help="share of reports drawn whole")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.lastResort = logging.NullHandler()
    tallies = run(args.inputs, args.seed, args.only, args.drawn)
    print(table(tallies))
    sys.exit(any(tally.else_count for tally in tallies.values()))


if __name__ == "__main__":
    main()
