"""What the ConfidenceLoss does to accuracy and to detection: same seeds, with and without.

    python benchmarks/confidence_loss.py DIR --data DATA

DATA holds cifar10/*.npz and torchvision's MNIST and FashionMNIST. A small network without batch
normalisation learns six classes of Fashion-MNIST; the same network with it, and a VGG11 with it,
learn six of CIFAR-10. Networks of one seed share the epochs before the penalty begins, and see the
same batches in those after. Each is tried on the groups of the suite, by the default method and by
`src`. Prints Markdown tables of the mean differences to weight 0 over the seeds; their intervals
are Student's t over the pairs, corrected for the number of comparisons (Bonferroni). What lies in
DIR is not computed again.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import torch
from scipy.stats import t as student
from suite import Choice, measured
from suite_evidence import GROUPS, Sizes, Subject
from suite_networks import Data, six_classes
from torch import Tensor

from covcli.core import runtime
from covcli.core.progress import Progress, Silent
from covcli.core.signals import Interrupts
from covcli.data import datasets
from covcli.methods import State
from covcli.models.architectures import Classifier
from covcli.models.sweep import sweep
from covcli.training import session as sessions
from covcli.training.config import TrainConfig
from covcli.training.loss import ConfidenceLoss
from covcli.training.paused import PAUSED, PAUSED_FILE
from covcli.training.session import Session

CONFIDENCE = 0.95
CALIBRATED = 600
SIZES = Sizes(fitted=1500, pool=800, trusted=1000, untrusted=200, corrupted=60, attacked=60)


class Centre(ConfidenceLoss):
    """The distance from the middle of the central range, in its widths, at most 1.

    The centre loss (Wen et al., "A Discriminative Feature Learning Approach for Deep Face
    Recognition", ECCV 2016) on the same neurons: it draws the images inside the range in as well.
    """

    def __init__(self, state: State, sizes: list[int]) -> None:
        super().__init__(state, sizes)
        middle = (self.low + self.high) / 2
        self.low, self.high = middle, middle


class Square(ConfidenceLoss):
    """The square of the distance from the central range, in its widths, at most 1.

    A squared hinge: what lies just outside is hardly drawn, what lies far outside is drawn most.
    """

    def forward(self, neurons: Tensor, labels: Tensor) -> Tensor:
        """Return the penalty of neurons (B, N) of images of those classes (B,), a scalar."""
        early = neurons[:, : self.low.shape[1]]
        nearest = early.clamp(self.low[labels], self.high[labels])
        distance = ((early - nearest) * self.inverse[labels]).square()
        return (distance.clamp_max(1) @ self.share).mean()


FORMS: Mapping[str, type[ConfidenceLoss]] = {
    "range": ConfidenceLoss, "centre": Centre, "square": Square,
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """How a network of this benchmark is trained, and with how many seeds."""

    model: str
    data: str
    images: int
    epochs: int
    learning_rate: float
    seeds: int


NETWORKS = {
    "small": Network("small-plain", "fashion-mnist", 4000, 6, 0.02, 6),
    "small-bn": Network("small", "cifar10", 5000, 4, 0.05, 3),
    "vgg11": Network("vgg11", "cifar10", 10_000, 4, 0.05, 3),
}


class Keeper(Silent):
    """Keeps the training as it stands before the first epoch that is penalised.

    A session saves after it has told of an epoch: what lies there when the first penalised epoch
    is told of is what was before it.
    """

    def __init__(self, run: Path, epochs: int) -> None:
        self.run, self.wanted, self.told = run, sessions.first_penalised(epochs), 0

    def note(self, line: str) -> None:
        """Count an epoch."""
        self.told += 1
        if self.told == self.wanted:
            shutil.copy(self.run / PAUSED_FILE, self.run / "shared.pt")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, metavar="DIR", help="where everything is kept")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=["ensemble", "src"])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["range"])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the first 6, 3 and 3")
    parser.add_argument("--draws", type=int, default=2, help="calibrations of each network")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def config(args: argparse.Namespace, network: Network, weight: float, seed: int) -> TrainConfig:
    home = six_classes(Data(args.data), network.data, args.suite)
    return TrainConfig(
        trusted=f"npz:{home}?limit={network.images}&shuffle=0", model=network.model,
        epochs=network.epochs, learning_rate=network.learning_rate, confidence_weight=weight,
        calibration_split=0, seed=seed, device="cpu",
    )  # fmt: skip


def trained(args: argparse.Namespace, name: str, form: str, weight: float, seed: int) -> Classifier:
    """Train a network, or read what was trained before."""
    network = NETWORKS[name]
    folder = args.suite / "loss" / f"{name} {seed}"
    folder.mkdir(parents=True, exist_ok=True)
    runtime.configure(seed, args.threads)
    told = config(args, network, weight, seed)
    session = Session(told, datasets.load(told.trusted, "train"))
    done = folder / f"{form} {weight:g}.pt"
    if done.is_file():
        session.trainer.model.load_state_dict(torch.load(done, weights_only=True))
        return session.trainer.model
    shared = folder / "shared.pt"
    progress = Keeper(folder, network.epochs)
    if shared.is_file():
        session.restore(PAUSED.load(shared), shared)
    with mock.patch.object(sessions, "ConfidenceLoss", FORMS[form]):
        session.run(folder, progress, Interrupts())
    torch.save(session.trainer.model.state_dict(), done)
    return session.trainer.model


def tried(args: argparse.Namespace, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield a row for each network, seed, form, weight and method."""
    choice = Choice(tuple(args.methods), (), args.draws, CALIBRATED)
    for name in args.networks:
        network = NETWORKS[name]
        for seed in args.seeds or range(network.seeds):
            for form, weight in variants(args):
                model = trained(args, name, form, weight, seed)
                title = f"{name} {seed} {form} {weight:g}"
                subject = Subject(
                    title, model, network.data, True, Data(args.data),
                    args.suite / "evidence" / title, SIZES,
                )  # fmt: skip
                accuracy = share_right(model, subject)
                for row in measured(subject, choice, progress):
                    groups = {group: fmean(row.groups(group)) for group in GROUPS}
                    yield {
                        "network": name, "seed": seed, "form": form, "weight": weight,
                        "method": row.score.removeprefix("covcli "), "accuracy": accuracy, **groups,
                        "mean": fmean(groups.values()),
                    }  # fmt: skip


def variants(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Return the forms and weights to train with; without a weight all forms are one."""
    return [("range", 0.0), *((form, w) for form in args.forms for w in args.weights)]


def share_right(model: Classifier, subject: Subject) -> float:
    """Return the accuracy on all the test images that the subject has."""
    images = subject.test
    predicted = [
        batch.logits.argmax(1) for batch in sweep(model, images, [], "channel", Silent(), "")
    ]
    return float((torch.cat(predicted) == images.known_labels()).double().mean())


@dataclass(frozen=True)
class Difference:
    """The mean difference to weight 0 over the seeds, with its interval, in points."""

    mean: float
    half: float

    @classmethod
    def of(cls, pairs: list[tuple[float, float]], comparisons: int) -> "Difference":
        """Take it of pairs without and with the penalty, corrected for so many comparisons."""
        differences = [100 * (after - before) for before, after in pairs]
        n = len(differences)
        if n < 2:
            return cls(fmean(differences), float("inf"))
        quantile = student.ppf(1 - (1 - CONFIDENCE) / 2 / comparisons, n - 1)
        return cls(fmean(differences), float(quantile) * stdev(differences) / n**0.5)

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}"


def print_table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print the differences: accuracy and the mean of the groups with intervals, and each group."""
    forms = variants(args)[1:]
    comparisons = len(args.networks) * len(forms) * len(args.methods)
    print(f"| network, method | penalty | accuracy | mean AUROC | {' | '.join(GROUPS)} |")
    print(f"| --- |{' --- |' * (len(GROUPS) + 3)}")
    for name in args.networks:
        for method in args.methods:
            mine = [r for r in rows if (r["network"], r["method"]) == (name, method)]
            plain = [r for r in mine if r["weight"] == 0]
            cells = [f"{100 * fmean(r[figure] for r in plain):.1f}"
                     for figure in ("accuracy", "mean", *GROUPS)]  # fmt: skip
            print(f"| {name}, {method} | none | {' | '.join(cells)} |")
            for form, weight in forms:
                with_it = [r for r in mine if (r["form"], r["weight"]) == (form, weight)]

                def difference(figure: str, others: list[dict[str, Any]] = with_it,
                               before: list[dict[str, Any]] = plain) -> Difference:  # fmt: skip
                    pairs = zip(before, others, strict=True)
                    return Difference.of([(b[figure], a[figure]) for b, a in pairs], comparisons)

                each = [f"{difference(group).mean:+.1f}" for group in GROUPS]
                both = f"{difference('accuracy')} | {difference('mean')}"
                print(f"| {name}, {method} | {form} {weight:g} | {both} | {' | '.join(each)} |")


def main() -> None:
    args = options()
    rows = []
    for row in tried(args, Silent()):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        print(json.dumps({"settings": settings, "rows": rows}))
        return
    print_table(args, rows)


if __name__ == "__main__":
    main()
