"""What the ConfidenceLoss does to accuracy and to detection: same seeds, with and without.

    python benchmarks/confidence_loss.py --data DIR --trusted fashion-mnist

DIR holds torchvision's MNIST and FashionMNIST; any --trusted and --untrusted may be named. A
network with the penalty and one without start from the same weights and see the same batches; the
signatures of both methods are built from each. Prints the mean difference over the seeds with its
95% interval (Student's t over the pairs) as a Markdown table, or one JSON document with --json.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student
from torch import nn

from covcli.core import runtime
from covcli.core.progress import Silent
from covcli.evaluation.evaluate import EvaluationConfig, EvaluationResult, evaluate
from covcli.models import architectures
from covcli.signature.build import build_signature
from covcli.signature.config import SignatureConfig
from covcli.training.train import TrainConfig, TrainResult, train

UNTRUSTED = ["mnist?limit=1000", "photos?limit=1000", "noise:gaussian?limit=500",
             "attack:fgsm?limit=300", "attack:pgd?limit=300"]  # fmt: skip
FIGURES = ("accuracy", "mean_auroc", "mean_fpr95")


@architectures.model("small")
def small(classes: int, _pretrained: bool) -> nn.Module:
    """Six convolutions and a hidden layer: trains in a minute or two on one core."""

    def block(channels: int, kernels: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, kernels, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(kernels), nn.ReLU()]

    return nn.Sequential(
        *block(3, 16, 2), *block(16, 32, 1), *block(32, 64, 2), *block(64, 64, 1),
        *block(64, 128, 2), *block(128, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes),
    )  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("COVCLI_DATA_DIR", "data"))
    parser.add_argument("--trusted", default="fashion-mnist")
    parser.add_argument("--untrusted", action="append")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--model", default="small", help="`small`, or one that covcli knows")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0])
    parser.add_argument("--methods", nargs="+", default=["src", "mrc"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--signature-every", type=int, default=1)
    parser.add_argument("--amp", choices=["off", "bf16", "auto"], default="off")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def trained(args: argparse.Namespace, runs: Path, weight: float, seed: int) -> TrainResult:
    runtime.configure(seed, args.threads)
    config = TrainConfig(
        trusted=f"{args.trusted}?limit={args.images}", model=args.model, epochs=args.epochs,
        confidence_weight=weight, seed=seed, amp=args.amp, runs=runs, data_dir=args.data,
        signature_every=args.signature_every, calibration_split=0.15,
    )  # fmt: skip
    return train(config, Silent())


def evaluated(args: argparse.Namespace, result: TrainResult, method: str) -> EvaluationResult:
    signature = build_signature(
        SignatureConfig(result.checkpoint, method, data_dir=args.data), Silent()
    )
    config = EvaluationConfig(
        tuple(args.untrusted), result.checkpoint, signature.path, data_dir=args.data, force=True
    )
    return evaluate(config, Silent())


def rows(args: argparse.Namespace, runs: Path) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        for weight in [0.0, *args.weights]:
            result = trained(args, runs, weight, seed)
            for method in args.methods:
                yield row(seed, method, weight, evaluated(args, result, method))


def row(seed: int, method: str, weight: float, result: EvaluationResult) -> dict[str, Any]:
    scores = {entry.name: entry.scores["coverage"] for entry in result.untrusted}
    entry = {
        "seed": seed, "method": method, "weight": weight, "accuracy": result.trusted.accuracy,
        "mean_auroc": fmean(s.auroc.value for s in scores.values()),
        "mean_fpr95": fmean(s.fpr95.value for s in scores.values()),
        "auroc": {name: s.auroc.value for name, s in scores.items()},
        "fpr95": {name: s.fpr95.value for name, s in scores.items()},
    }  # fmt: skip
    print(json.dumps(entry), file=sys.stderr, flush=True)
    return entry


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Return the mean difference and the ends of its 95% interval."""
    mean, n = fmean(differences), len(differences)
    half = student.ppf(0.975, n - 1) * stdev(differences) / n**0.5 if n > 1 else float("inf")
    return mean, mean - half, mean + half


def paired(
    results: list[dict[str, Any]], method: str, weight: float, figure: str
) -> tuple[list[float], list[float]]:
    """Return a figure without and with the penalty, seed by seed."""

    def at(wanted: float) -> list[float]:
        return [r[figure] for r in results if (r["method"], r["weight"]) == (method, wanted)]

    return at(0.0), at(weight)


def main() -> None:
    args = options()
    args.untrusted = args.untrusted or UNTRUSTED
    with tempfile.TemporaryDirectory() as folder:
        results = list(rows(args, Path(folder)))
    if args.json:
        print(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "rows": results}))
        return
    print(table(args, results))


def table(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """Word the paired differences as a Markdown table."""
    lines = [
        "| method | weight | figure, % | without | with | difference | 95% interval |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in args.methods:
        for weight in args.weights:
            for figure in FIGURES:
                before, after = paired(results, method, weight, figure)
                both = [100 * fmean(before), 100 * fmean(after)]
                mean, low, high = interval(
                    [100 * (b - a) for a, b in zip(before, after, strict=True)]
                )
                lines.append(
                    f"| {method} | {weight:g} | {figure} | {both[0]:.1f} | {both[1]:.1f} | "
                    f"{mean:+.1f} | {low:+.1f} to {high:+.1f} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
