"""What the ConfidenceLoss does to accuracy and to detection: same seeds, with and without.

    python benchmarks/confidence_loss.py --data DIR

DIR holds cifar10/train.npz and cifar10/test.npz (or name any --trusted and --untrusted) and
torchvision's MNIST. Prints a Markdown table, or one JSON document with --json. A weight of 0 is
the network without the penalty; its signatures are built by both methods.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from covcli import runtime
from covcli.evaluation import EvaluationConfig, EvaluationResult, evaluate
from covcli.progress import Silent
from covcli.signing import SignatureConfig, build_signature
from covcli.training import TrainConfig, TrainResult, train

UNTRUSTED = ["mnist?limit=2000", "photos", "noise:gaussian", "attack:pgd?limit=500"]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("COVCLI_DATA_DIR", "data"))
    parser.add_argument("--trusted", help="default: npz:DATA/cifar10")
    parser.add_argument("--untrusted", action="append")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--model", default="vgg11")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1])
    parser.add_argument("--methods", nargs="+", default=["src", "mrc"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--amp", choices=["off", "bf16", "auto"], default="off")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def trained(
    args: argparse.Namespace, runs: Path, method: str, weight: float, seed: int
) -> TrainResult:
    runtime.configure(seed, 0)
    config = TrainConfig(
        method=method, trusted=f"{args.trusted}?limit={args.images}", model=args.model,
        epochs=args.epochs, confidence_weight=weight, seed=seed, amp=args.amp, runs=runs,
        data_dir=args.data, signature_every=1,
    )  # fmt: skip
    return train(config, Silent())


def evaluated(args: argparse.Namespace, result: TrainResult, method: str) -> EvaluationResult:
    made = build_signature(SignatureConfig(result.checkpoint, method, data_dir=args.data), Silent())
    config = EvaluationConfig(
        tuple(args.untrusted), result.checkpoint, made.path, data_dir=args.data, force=True
    )
    return evaluate(config, Silent())


def rows(args: argparse.Namespace, runs: Path) -> Iterator[dict[str, object]]:
    for seed in args.seeds:
        without = trained(args, runs, args.methods[0], 0.0, seed)
        for method in args.methods:
            yield row(seed, method, 0.0, evaluated(args, without, method))
            for weight in args.weights:
                result = trained(args, runs, method, weight, seed)
                yield row(seed, method, weight, evaluated(args, result, method))


def row(seed: int, method: str, weight: float, found: EvaluationResult) -> dict[str, object]:
    scores = [entry.scores["coverage"] for entry in found.untrusted]
    entry = {
        "seed": seed, "method": method, "weight": weight, "accuracy": found.trusted.accuracy,
        "mean_auroc": mean(s.auroc.value for s in scores),
        "mean_fpr95": mean(s.fpr95.value for s in scores),
        "auroc": {e.name: s.auroc.value for e, s in zip(found.untrusted, scores, strict=True)},
    }  # fmt: skip
    print(entry, file=sys.stderr, flush=True)
    return entry


def main() -> None:
    args = options()
    args.trusted = args.trusted or f"npz:{args.data}/cifar10"
    args.untrusted = args.untrusted or UNTRUSTED
    with tempfile.TemporaryDirectory() as folder:
        found = list(rows(args, Path(folder)))
    if args.json:
        print(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "rows": found}))
        return
    print("| seed | method | weight | accuracy, % | mean AUROC, % | mean FPR95, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for r in found:
        figures = [
            f"{100 * float(str(r[k])):.1f}" for k in ("accuracy", "mean_auroc", "mean_fpr95")
        ]
        print(f"| {r['seed']} | {r['method']} | {r['weight']} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
