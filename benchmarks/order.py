"""Whether false alarms stay where they are promised, whatever the order of the calibration files.

    python benchmarks/order.py [--draws 1000]

Four cameras take pictures of digits; the first one's are noisy. A small network is trained on a
fifth of the digits. Then, again and again, 100 pictures of each camera calibrate the default
method, through the very function that `build-signature` calls, the fit of the combination
included; they come interleaved (camera 1, 2, 3, 4, 1, …), camera by camera, in runs of eight, or
shuffled. All other pictures, a quarter of each camera, tell the true rate. Prints a Markdown
table, or one JSON document with --json: the mean rate, which `marginal` promises to be at most α,
and the share of calibrations whose rate exceeds α, which `certified-overall` promises to be at
most 5%.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import suite_networks  # noqa: F401 - registers the small network
import torch
from torch import Tensor

from covcli.core import runtime
from covcli.core.choices import Mode
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.data.images import ImageSet, Source
from covcli.data.preprocessing import Shape
from covcli.methods import make_method
from covcli.models import checkpoint as checkpoints
from covcli.signature.fit import How, fit_judge, fit_signature
from covcli.signature.guarantee import Guarantee
from covcli.signature.judge import Judge
from covcli.training.train import TrainConfig, train

CAMERAS, TRAINED = 4, 360
LOUD, QUIET = 110.0, 6.0  # deviation of the noise, of 255


@dataclass(frozen=True)
class Cameras:
    """Row 4·i + c is digit i as camera c sees it, the same in any batch."""

    source: Source
    fingerprint: str = "cameras"

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Read the digits and add each camera's noise."""
        images = self.source.read(rows // CAMERAS, shape)
        for image, row in zip(images, rows.tolist(), strict=True):
            generator = np.random.Generator(np.random.Philox(key=[1, row]))
            noise = generator.standard_normal(shape, np.float32)
            seen = image + (LOUD if row % CAMERAS == 0 else QUIET) * torch.from_numpy(noise)
            image.copy_(seen.round().clamp(0, 255))
        return images


def interleaved(rows: Tensor) -> Tensor:
    return torch.stack([rows[rows % CAMERAS == c] for c in range(CAMERAS)], 1).flatten()


def by_camera(rows: Tensor) -> Tensor:
    return torch.cat([rows[rows % CAMERAS == c] for c in range(CAMERAS)])


def in_runs(rows: Tensor) -> Tensor:
    every = [rows[rows % CAMERAS == c].view(-1, 2) for c in range(CAMERAS)]
    return torch.stack(every, 1).flatten()


ORDERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "interleaved": interleaved,
    "camera by camera": by_camera,
    "in runs of eight": in_runs,
    "shuffled": lambda rows: rows,
}


@dataclass(frozen=True)
class Row:
    """What calibrations on files in one order did; shares of 1."""

    order: str
    guarantee: str
    draws: int
    mean_rate: float
    above_alpha: float


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--orders", nargs="+", choices=list(ORDERS), default=list(ORDERS))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--method", default="ensemble")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def prepared(args: argparse.Namespace, folder: Path) -> tuple[Judge, ImageSet]:
    """Train a small network on some of the digits; return a judge of it, and what is left."""
    config = TrainConfig(
        trusted=f"digits?split=train&limit={TRAINED}", model="small", epochs=args.epochs,
        calibration_split=0.1, runs=folder,
    )  # fmt: skip
    model = checkpoints.load(train(config, Silent()).checkpoint).model
    digits = datasets.load("digits?split=train", "train")
    trusted = digits.select(torch.arange(TRAINED))
    every = torch.arange(TRAINED, len(digits))
    how = How(make_method(args.method), threshold=0.5)
    signature, _, _ = fit_signature(model, trusted, how, Silent())
    rows = (CAMERAS * every[:, None] + torch.arange(CAMERAS)).flatten()
    pool = ImageSet("cameras", Cameras(digits.source), rows, None, digits.classes)
    return fit_judge(model, signature, pool.select(torch.arange(200)), Silent()), pool


def evidence(judge: Judge, pool: ImageSet) -> tuple[Tensor, Tensor]:
    """Return the evidence and the predicted class of every picture."""
    parts = [judge(b.logits, b.neurons) for b in judge.sweep(pool, Silent(), "")]
    return torch.cat([v.evidence for v in parts]), torch.cat([v.predicted for v in parts])


def rates(args: argparse.Namespace, judge: Judge, pool: ImageSet, order: str) -> list[Row]:
    """Calibrate again and again on files in one order, and take the rate over all others."""
    shown, predicted = evidence(judge, pool)
    cameras = pool.rows % CAMERAS
    places = {int(row): place for place, row in enumerate(pool.rows)}
    modes: tuple[Mode, ...] = ("marginal", "certified-overall")
    rates_of: dict[str, list[float]] = {mode: [] for mode in modes}
    for seed in range(args.draws):
        generator = torch.Generator().manual_seed(seed)
        mixed = torch.randperm(len(pool), generator=generator)
        drawn = torch.cat([mixed[cameras[mixed] == c][:100] for c in range(CAMERAS)])
        drawn = drawn[torch.randperm(len(drawn), generator=generator)]
        rows = ORDERS[order](pool.rows[drawn])
        known = torch.tensor([places[int(row)] for row in rows])
        fitted = fit_judge(judge.model, judge.signature, pool.select(known), Silent(), seed=seed)
        others = torch.ones(len(pool), dtype=torch.bool)
        others[known] = False
        scores = fitted.calibration.score(shown[others])
        for mode in modes:
            rule = fitted.calibration.rule(Guarantee(args.alpha, mode), judge.signature.classes)
            flagged = rule.untrusted(scores, predicted[others])
            rates_of[mode].append(float(flagged.double().mean()))
    return [
        Row(order, mode, args.draws, float(np.mean(shares)),
            float(np.mean(np.array(shares) > args.alpha)))
        for mode, shares in rates_of.items()
    ]  # fmt: skip


def main() -> None:
    args = options()
    runtime.configure(0, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        judge, pool = prepared(args, Path(folder))
        table = [row for order in args.orders for row in rates(args, judge, pool, order)]
    if args.json:
        print(json.dumps([asdict(row) for row in table], indent=2))
        return
    print("| order | guarantee | draws | mean rate, % | above α, % |")
    print("| --- | --- | --- | --- | --- |")
    for row in table:
        shares = f"{100 * row.mean_rate:.2f} | {100 * row.above_alpha:.1f}"
        print(f"| {row.order} | {row.guarantee} | {row.draws} | {shares} |")


if __name__ == "__main__":
    main()
