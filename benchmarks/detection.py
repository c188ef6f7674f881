"""Every method and every baseline on the same network, the same images: one table.

    python benchmarks/detection.py --checkpoint FILE --data DIR
    python benchmarks/detection.py --suite DIR --vgg19 FILE --data DIR

DIR holds cifar10/train.npz and cifar10/test.npz (or name any --trusted, --calibration and --test)
and torchvision's MNIST and Fashion-MNIST. Prints two Markdown tables, AUROC and FPR95 by untrusted
set and on average, in per cent with 95% intervals; --json prints one document instead,
and --csv writes one row a score and set.

--suite asks the same of several networks, most of them trained here for few epochs, over many
calibrations: far sets, near ones (held-out classes, turned images), corruptions, attacks, and the
networks' own errors. What its folder holds already is not computed again. --vgg19 names a VGG19's
weights on CIFAR-10, in which no test image was seen.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import suite

from covcli.core import runtime
from covcli.core.progress import Lines, Progress, Silent
from covcli.evaluation.baselines import compare
from covcli.evaluation.evaluate import EvaluationConfig, EvaluationResult, evaluate
from covcli.methods import METHODS
from covcli.reporting.documents import Estimate
from covcli.signature.build import DEFAULT_METHOD, build_signature
from covcli.signature.config import SignatureConfig

UNTRUSTED = [
    "mnist", "fashion-mnist", "photos", "noise:gaussian", "noise:uniform", "attack:fgsm",
    "attack:pgd",
]  # fmt: skip
MEAN = "mean"


@dataclass(frozen=True)
class Row:
    """One score on one untrusted set, or on average over all of them."""

    score: str
    untrusted: str
    auroc: Estimate
    fpr95: Estimate


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--checkpoint", type=Path)
    chosen.add_argument("--suite", type=Path, metavar="DIR", help="where the suite keeps its files")
    parser.add_argument("--vgg19", type=Path, help="of the suite: a VGG19's weights on CIFAR-10")
    parser.add_argument("--networks", nargs="+", choices=suite.NETWORKS, default=suite.NETWORKS)
    parser.add_argument("--draws", type=int, default=10, help="of the suite: calibrations")
    parser.add_argument("--model", default="vgg19", help="of a bare state dict")
    parser.add_argument("--data", type=Path, default=os.environ.get("COVCLI_DATA_DIR", "data"))
    parser.add_argument("--trusted", help="default: npz:DATA/cifar10?limit=10000")
    parser.add_argument("--calibration", help="default: npz:DATA/cifar10?split=test&limit=5000")
    parser.add_argument("--test", help="default: npz:DATA/cifar10?split=test&offset=5000")
    parser.add_argument("--untrusted", action="append", help="may repeat")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--baselines", nargs="*", default=["all"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args()


def evaluated(
    args: argparse.Namespace, folder: Path, method: str, baselines: tuple[str, ...]
) -> EvaluationResult:
    progress: Progress = Silent() if args.quiet else Lines()
    progress.note(f"method {method}, baselines {' '.join(baselines) or 'none'}")
    signature = build_signature(
        SignatureConfig(
            args.checkpoint, method, trusted=args.trusted, calibration=args.calibration,
            model=args.model, output=folder / f"{len(list(folder.iterdir()))}.safetensors",
            data_dir=args.data, device=args.device,
        ),
        progress,
    )  # fmt: skip
    config = EvaluationConfig(
        tuple(args.untrusted), args.checkpoint, signature.path, trusted=args.test,
        baselines=baselines, data_dir=args.data, force=True, device=args.device,
    )  # fmt: skip
    return evaluate(config, progress)


def rows(result: EvaluationResult, score: str, name: str) -> list[Row]:
    """Return one score's rows, under the name that the tables have for it."""
    by_set = [(entry.name, entry.scores[score]) for entry in result.untrusted]
    (mean,) = [entry for entry in result.mean_over_sets if entry.score == score]
    lines = [Row(name, untrusted, d.auroc, d.fpr95) for untrusted, d in by_set]
    return [*lines, Row(name, MEAN, mean.auroc, mean.fpr95)]


def measured(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Run every method, and the baselines once, beside the first."""
    baselines = compare.expand(args.baselines)
    results = [
        evaluated(args, folder, method, baselines if i == 0 else ())
        for i, method in enumerate(args.methods)
    ]
    ours = [
        row
        for method, result in zip(args.methods, results, strict=True)
        for row in rows(result, "coverage", method)
    ]
    names = [mean.score for mean in results[0].mean_over_sets if mean.score != "coverage"]
    return ours + [row for name in names for row in rows(results[0], name, name)]


def cell(estimate: Estimate) -> str:
    value, low, high = (100 * v for v in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def print_table(title: str, results: list[Row], figure: str) -> None:
    sets = list(dict.fromkeys(row.untrusted for row in results))
    print(f"| {title}, % | {' | '.join(sets)} |")
    print(f"| --- |{' --- |' * len(sets)}")
    for score in dict.fromkeys(row.score for row in results):
        cells = [cell(getattr(row, figure)) for row in results if row.score == score]
        print(f"| {score} | {' | '.join(cells)} |")
    print()


def write_csv(path: Path, results: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [
            f"{figure}{part}" for figure in ("auroc", "fpr95") for part in ("", "_low", "_high")
        ]
        writer.writerow(["score", "untrusted", *names])
        for row in results:
            figures = [v for e in (row.auroc, row.fpr95) for v in (e.value, e.low, e.high)]
            writer.writerow([row.score, row.untrusted, *figures])


def run_suite(args: argparse.Namespace) -> None:
    """Print the suite's tables, or one document."""
    progress: Progress = Silent() if args.quiet else Lines()
    wanted = [name for name in compare.expand(args.baselines) if name not in suite.LEFT_OUT]
    choice = suite.Choice(tuple(args.methods), tuple(wanted), args.draws)
    results = suite.run(
        args.suite, suite.Data(args.data), args.vgg19, args.networks, choice, progress
    )
    if args.json:
        json.dump([asdict(row) for row in results], sys.stdout, indent=2)
        print()
    else:
        suite.print_tables(results)


def main() -> None:
    args = options()
    args.methods = args.methods or [DEFAULT_METHOD, *(m for m in METHODS if m != DEFAULT_METHOD)]
    runtime.configure(0, args.threads)
    if args.suite:
        run_suite(args)
        return
    args.trusted = args.trusted or f"npz:{args.data}/cifar10?limit=10000"
    args.calibration = args.calibration or f"npz:{args.data}/cifar10?split=test&limit=5000"
    args.test = args.test or f"npz:{args.data}/cifar10?split=test&offset=5000"
    args.untrusted = args.untrusted or UNTRUSTED
    with tempfile.TemporaryDirectory() as folder:
        results = measured(args, Path(folder))
    if args.csv:
        write_csv(args.csv, results)
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        document = {"settings": settings, "rows": [asdict(row) for row in results]}
        json.dump(document, sys.stdout, indent=2)
        print()
        return
    print_table("AUROC", results, "auroc")
    print_table("FPR95", results, "fpr95")


if __name__ == "__main__":
    main()
