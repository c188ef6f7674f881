"""What calibration guarantees, held against a thousand calibrations of a real network's scores.

    python benchmarks/calibration.py --scores runs/NAME/scores.csv.gz
    python benchmarks/calibration.py --checkpoint C --signature S --trusted DATA

The first takes the trusted rows of an evaluation and runs no network; the second makes them.
The scores are cut at random into a calibration half and a test half, again and again. Prints a
Markdown table and what its columns mean, or one JSON document with --json.

Of n + m scores without ties, cut at random, the number of test scores above the k-th largest
calibration score is beta-binomial (negative hypergeometric) exactly, whatever the scores are. So
given the pool the splits are independent draws of one known law, although all cut the same pool:
the benchmark checks ranks, code and how little ties matter. It cannot check that other images are
exchangeable with the pool.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import hypergeom, kstest, kstwo
from torch import Tensor

from covcli.core import runtime
from covcli.core.progress import Silent
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.reporting import per_image
from covcli.signature.guarantee import MODES, Guarantee, make_rule

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Draw = tuple[Tensor, Tensor]
HEAD = ["guarantee", "α, %", "images", "rate, %", "5 to 95%", "above α (law), %", "inside, %",
        "distance", "true rate above α, %"]  # fmt: skip
LEGEND = """\
rate: share of the test half flagged, mean and quantiles over the splits. above α: share of splits
where it exceeds α, and what the law says; certified too this may be more than 5%, because the test
half is a sample itself. inside: share of splits whose rate lies where it is promised with 95%
probability. distance: Kolmogorov's between the counts and their law, each count put at a random
place within its step. true rate above α: share of other calibrations, drawn from all scores with
replacement, whose rate over all scores, from which they were drawn, exceeds α: at most 5% if
certified. A certified verdict uses the larger of two thresholds, so its rates may only lie below
the law; the distance is that of each threshold by itself. Marginal calibration has no law for a
class."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--scores", type=Path, help="scores.csv.gz of an evaluation")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--signature", type=Path)
    parser.add_argument("--trusted", help="default: the trained set's test split")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.01, 0.05, 0.1])
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def read_scores(args: argparse.Namespace, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the trusted images' scores and predicted classes."""
    path = args.scores
    if path is None:
        runtime.configure(args.seed, 0)
        config = EvaluationConfig(
            ("noise:uniform?limit=20",), args.checkpoint, args.signature, trusted=args.trusted,
            data_dir=args.data_dir, output=folder,
        )  # fmt: skip
        path = evaluate(config, Silent()).files[per_image.SCORES]
    trusted = per_image.read_scores(Path(path))["trusted"]
    return torch.tensor(trusted.scores["coverage"]), torch.tensor(trusted.predicted)


@dataclass(frozen=True)
class Counts:
    """What N calibrations did to all images, column 0, and to each class; shapes (N, 1 + C)."""

    calibrating: Ints  # calibration scores
    tested: Ints  # test images
    alarms: Ints  # test images flagged
    alone: Ints  # test images above the threshold of the group's own scores


def count(scores: Tensor, predicted: Tensor, guarantee: Guarantee, draws: list[Draw]) -> Counts:
    """Calibrate on the first rows of each draw, and count alarms among the second."""
    classes = int(predicted.max()) + 1
    found = []
    for calibrating, testing in draws:
        known, kinds = scores[calibrating], predicted[calibrating]
        rule = make_rule(known, kinds, classes, guarantee)
        own = [make_rule(known[kinds == k], kinds[kinds == k], classes, guarantee).overall
               for k in range(classes)]  # fmt: skip
        new, sorts = scores[testing], predicted[testing]
        flagged, alone = rule.untrusted(new, sorts), new > torch.tensor(own)[sorts]
        found.append([
            [len(known), *rule.counts.tolist()],
            [len(new), *by_class(sorts, classes)],
            [int(flagged.sum()), *by_class(sorts[flagged], classes)],
            [int((new > rule.overall).sum()), *by_class(sorts[alone], classes)],
        ])  # fmt: skip
    return Counts(*np.array(found).transpose(1, 0, 2))


def by_class(predicted: Tensor, classes: int) -> list[int]:
    return [int(n) for n in torch.bincount(predicted, minlength=classes)]


def law(alarms: Ints, rank: Ints, calibrating: Ints, tested: Ints) -> Floats:
    """Return the chance of at most so many test scores above the k-th largest calibration score.

    There are at most x of them exactly if k of the pool's k + x largest scores calibrate.
    """
    pool = calibrating + tested
    drawn = np.clip(rank + alarms, 0, pool)
    return np.where(alarms < 0, 0.0, hypergeom.sf(rank - 1, pool, calibrating, drawn))


@dataclass(frozen=True)
class Row:
    """The figures of one guarantee for all images, or for one class; see LEGEND."""

    guarantee: str
    alpha: float
    images: str
    mean: float
    low: float
    high: float
    above: float
    above_by_law: float | None
    inside: float | None
    distance: float | None
    true_above: float


def rows(scores: Tensor, predicted: Tensor, args: argparse.Namespace) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(args.seed)
    size, half = len(scores), len(scores) // 2
    orders = [torch.randperm(size, generator=generator) for _ in range(args.splits)]
    splits = [(order[:half], order[half:]) for order in orders]
    whole = torch.arange(size)
    again = [(torch.randint(size, (half,), generator=generator), whole) for _ in orders]
    for guarantee in [Guarantee(alpha, mode) for mode in MODES for alpha in args.alphas]:
        cut = count(scores, predicted, guarantee, splits)
        redrawn = count(scores, predicted, guarantee, again)
        for g in range(cut.alarms.shape[1]):
            fewest = min(cut.calibrating[:, g].min(), redrawn.calibrating[:, g].min())
            if guarantee.mode == "certified" and fewest < guarantee.minimum():
                print(f"{guarantee}, group {g}: too few scores, left out", file=sys.stderr)
                continue
            yield row(cut, redrawn, guarantee, g, args.seed)


def row(cut: Counts, redrawn: Counts, guarantee: Guarantee, g: int, seed: int) -> Row:
    alarms, tested = cut.alarms[:, g], cut.tested[:, g]
    rates, allowed = alarms / tested, np.floor(guarantee.alpha * tested + 1e-9).astype(np.int64)
    known = g == 0 or guarantee.mode == "certified"
    by_law, inside, distance = lawful(cut, guarantee, g, seed) if known else (None, None, None)
    true_rates = redrawn.alarms[:, g] / redrawn.tested[:, g]
    low, high = np.quantile(rates, [0.05, 0.95])
    return Row(
        guarantee.mode, guarantee.alpha, f"class {g - 1}" if g else "all", float(rates.mean()),
        float(low), float(high), float((alarms > allowed).mean()),
        by_law, inside, distance, float((true_rates > guarantee.alpha + 1e-9).mean()),
    )  # fmt: skip


def lawful(cut: Counts, guarantee: Guarantee, g: int, seed: int) -> tuple[float, float, float]:
    """Return the share of splits above α by the law, the share inside, and the distance."""
    n, m = cut.calibrating[:, g], cut.tested[:, g]
    ranks = np.array([guarantee.rank(int(scores)) for scores in n])
    allowed = np.floor(guarantee.alpha * m + 1e-9).astype(np.int64)
    above = 1 - law(allowed, ranks, n, m)
    lowest, highest = (0.025, 0.975) if guarantee.mode == "marginal" else (0.0, 0.95)
    alarms, alone = cut.alarms[:, g], cut.alone[:, g]
    inside = (law(alarms, ranks, n, m) >= lowest) & (law(alarms - 1, ranks, n, m) < highest)
    below, upto = law(alone - 1, ranks, n, m), law(alone, ranks, n, m)
    places = below + np.random.default_rng(seed).random(len(n)) * (upto - below)
    return float(above.mean()), float(inside.mean()), float(kstest(places, "uniform").statistic)


def line(found: Row) -> str:
    by_law = "" if found.above_by_law is None else f" ({100 * found.above_by_law:.1f})"
    inside = "–" if found.inside is None else f"{100 * found.inside:.1f}"
    distance = "–" if found.distance is None else f"{found.distance:.3f}"
    cells = [
        found.guarantee, f"{100 * found.alpha:g}", found.images, f"{100 * found.mean:.2f}",
        f"{100 * found.low:.2f} to {100 * found.high:.2f}", f"{100 * found.above:.1f}{by_law}",
        inside, distance, f"{100 * found.true_above:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    args = options()
    with tempfile.TemporaryDirectory() as folder:
        scores, predicted = read_scores(args, Path(folder))
    ties = len(scores) - len(scores.unique())
    critical = float(kstwo.ppf(0.95, args.splits))
    found = rows(scores, predicted, args)
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items()}
        document = {"settings": settings, "scores": len(scores), "ties": ties,
                    "critical_distance": critical, "rows": [asdict(r) for r in found]}  # fmt: skip
        print(json.dumps(document, indent=2))
        return
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    for r in found:
        print(line(r), flush=True)
    print(f"\n{len(scores)} scores, {ties} ties, {args.splits} splits, seed {args.seed}; the "
          f"distance's critical value at 5% is {critical:.3f}.\n{LEGEND}")  # fmt: skip


if __name__ == "__main__":
    main()
