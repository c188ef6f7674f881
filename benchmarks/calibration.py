"""What calibration guarantees, held against a thousand calibrations of a real network's scores.

    python benchmarks/calibration.py --scores runs/NAME/scores.csv.gz
    python benchmarks/calibration.py --checkpoint C --signature S --trusted DATA

The first takes the trusted rows of an evaluation and runs no network; the second makes them.
The scores are cut at random into a calibration half and a test half, again and again. Prints two
Markdown tables, of false alarms and of wrong answers among those that pass, and what their columns
mean, or one JSON document with --json.

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
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.reporting import per_image
from covcli.signature.calibration import Calibration
from covcli.signature.combination import fit_combination
from covcli.signature.guarantee import MODES, Guarantee, make_rule

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Draw = tuple[Tensor, Tensor]
HEAD = ["guarantee", "α, %", "images", "rate, %", "5 to 95%", "above α (law), %", "inside, %",
        "distance", "true rate above α, %"]  # fmt: skip
ERROR_HEAD = ["max error, %", "guarantee", "error rate of what passes, %", "passes, %",
              "true error rate above, %", "refused, %"]  # fmt: skip
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
    parser.add_argument("--max-errors", type=float, nargs="*", default=[0.02, 0.05])
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def read_scores(args: argparse.Namespace, folder: Path) -> per_image.ImageScores:
    """Return what is known of the trusted images."""
    path = args.scores
    if path is None:
        runtime.configure(args.seed, 0)
        config = EvaluationConfig(
            ("noise:uniform?limit=20",), args.checkpoint, args.signature, trusted=args.trusted,
            data_dir=args.data_dir, output=folder,
        )  # fmt: skip
        path = evaluate(config, Silent()).files[per_image.SCORES]
    return per_image.read_scores(Path(path))["trusted"]


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
    rates = []
    for calibrating, testing in draws:
        known, kinds = scores[calibrating], predicted[calibrating]
        rule = make_rule(known, kinds, classes, guarantee)
        own = [make_rule(known[kinds == k], kinds[kinds == k], classes, guarantee).overall
               for k in range(classes)]  # fmt: skip
        new, sorts = scores[testing], predicted[testing]
        flagged, alone = rule.untrusted(new, sorts), new > torch.tensor(own)[sorts]
        rates.append([
            [len(known), *rule.counts.tolist()],
            [len(new), *by_class(sorts, classes)],
            [int(flagged.sum()), *by_class(sorts[flagged], classes)],
            [int((new > rule.overall).sum()), *by_class(sorts[alone], classes)],
        ])  # fmt: skip
    return Counts(*np.array(rates).transpose(1, 0, 2))


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
            if guarantee.each_class and fewest < guarantee.minimum():
                print(f"{guarantee}, group {g}: too few scores, left out", file=sys.stderr)
                continue
            yield row(cut, redrawn, guarantee, g, args.seed)


def row(cut: Counts, redrawn: Counts, guarantee: Guarantee, g: int, seed: int) -> Row:
    alarms, tested = cut.alarms[:, g], cut.tested[:, g]
    rates, allowed = alarms / tested, np.floor(guarantee.alpha * tested + 1e-9).astype(np.int64)
    known = guarantee.each_class if g else guarantee.mode != "by-class"
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
    lowest, highest = (0.0, 0.95) if guarantee.certain else (0.025, 0.975)
    alarms, alone = cut.alarms[:, g], cut.alone[:, g]
    inside = (law(alarms, ranks, n, m) >= lowest) & (law(alarms - 1, ranks, n, m) < highest)
    below, upto = law(alone - 1, ranks, n, m), law(alone, ranks, n, m)
    places = below + np.random.default_rng(seed).random(len(n)) * (upto - below)
    return float(above.mean()), float(inside.mean()), float(kstest(places, "uniform").statistic)


def line(row: Row) -> str:
    by_law = "" if row.above_by_law is None else f" ({100 * row.above_by_law:.1f})"
    inside = "–" if row.inside is None else f"{100 * row.inside:.1f}"
    distance = "–" if row.distance is None else f"{row.distance:.3f}"
    cells = [
        row.guarantee, f"{100 * row.alpha:g}", row.images, f"{100 * row.mean:.2f}",
        f"{100 * row.low:.2f} to {100 * row.high:.2f}", f"{100 * row.above:.1f}{by_law}",
        inside, distance, f"{100 * row.true_above:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Errors:
    """What calibrations with an error bound did; shares of 1.

    Attributes
    ----------
    mean, above
        The error rate among the answers of the test halves that passed, in the mean; and the
        share of other calibrations, drawn from all images with replacement, whose error rate over
        all of them, from which they were drawn, exceeded the bound: at most 5% is promised.
    coverage
        The share of the answers that passed, in the mean.
    refused
        The share of calibrations that were refused.
    """

    max_error: float
    guarantee: str
    mean: float
    coverage: float
    above: float
    refused: float


def wrong_answers(
    trusted: per_image.ImageScores, guarantee: Guarantee, draws: list[Draw]
) -> tuple[Floats, Floats]:
    """Return, for calibrations that were not refused, the error rate and the share that passes."""
    parts = (trusted.scores["coverage"], trusted.scores["softmax"], trusted.predicted,
             trusted.predicted != trusted.label)  # fmt: skip
    columns = [torch.from_numpy(np.array(part)) for part in parts]
    classes = tuple(map(str, range(int(trusted.predicted.max()) + 1)))
    combination = fit_combination(torch.eye(2, dtype=torch.float64), [])  # not used: scores exist
    pairs = []
    for calibrating, testing in draws:
        ordered = calibrating[columns[0][calibrating].argsort()]
        known = [column[ordered] for column in columns]
        try:
            fitting = torch.zeros(len(ordered), dtype=torch.bool)
            rule = Calibration(combination, fitting, known[0], known[1], known[2], known[3]).rule(
                guarantee, classes
            )
        except CovcliError:
            continue
        scores, doubt, predicted, wrong = (column[testing] for column in columns)
        passing = ~(rule.untrusted(scores, predicted) | rule.unsure(scores, predicted, doubt))
        rate = float(wrong[passing].double().mean()) if bool(passing.any()) else 0.0
        pairs.append((rate, float(passing.double().mean())))
    rates, shares = np.array(pairs).reshape(-1, 2).T
    return rates, shares


def error_rows(trusted: per_image.ImageScores, args: argparse.Namespace) -> Iterator[Errors]:
    generator = torch.Generator().manual_seed(args.seed)
    size, half = len(trusted.predicted), len(trusted.predicted) // 2
    orders = [torch.randperm(size, generator=generator) for _ in range(args.splits)]
    splits = [(order[:half], order[half:]) for order in orders]
    whole = torch.arange(size)
    again = [(torch.randint(size, (half,), generator=generator), whole) for _ in orders]
    for max_error in args.max_errors:
        for mode in MODES:
            guarantee = Guarantee(max(args.alphas), mode, max_error)
            rates, shares = wrong_answers(trusted, guarantee, splits)
            redrawn, _ = wrong_answers(trusted, guarantee, again)
            refused = 1 - len(redrawn) / len(again)
            if not len(rates) or not len(redrawn):
                yield Errors(max_error, mode, float("nan"), 0.0, 0.0, refused)
                continue
            above = float((redrawn > max_error + 1e-12).sum() / len(again))
            yield Errors(max_error, mode, float(rates.mean()), float(shares.mean()), above, refused)


def error_line(errors: Errors) -> str:
    shares = (errors.mean, errors.coverage, errors.above, errors.refused)
    cells = [f"{100 * errors.max_error:g}", errors.guarantee, *(f"{100 * s:.2f}" for s in shares)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    args = options()
    with tempfile.TemporaryDirectory() as folder:
        trusted = read_scores(args, Path(folder))
    scores, predicted = (
        torch.tensor(trusted.scores["coverage"]), torch.tensor(trusted.predicted)
    )  # fmt: skip
    ties = len(scores) - len(scores.unique())
    critical = float(kstwo.ppf(0.95, args.splits))
    results = rows(scores, predicted, args)
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items()}
        document = {"settings": settings, "scores": len(scores), "ties": ties,
                    "critical_distance": critical, "rows": [asdict(r) for r in results],
                    "errors": [asdict(r) for r in error_rows(trusted, args)]}  # fmt: skip
        print(json.dumps(document, indent=2))
        return
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    for r in results:
        print(line(r), flush=True)
    print(f"\n| {' | '.join(ERROR_HEAD)} |\n|{' --- |' * len(ERROR_HEAD)}")
    for e in error_rows(trusted, args):
        print(error_line(e), flush=True)
    print(f"\n{len(scores)} scores, {ties} ties, {args.splits} splits, seed {args.seed}; the "
          f"distance's critical value at 5% is {critical:.3f}.\n{LEGEND}")  # fmt: skip


if __name__ == "__main__":
    main()
