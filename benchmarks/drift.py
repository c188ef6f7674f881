"""How often the drift watch alarms without a change, and how soon after one.

    python benchmarks/drift.py --scores DIR --checkpoint FILE --signature FILE --data DIR

Scores are made once, by `covcli evaluate` into the folder of --scores, and read from there after
that; --data holds cifar10/test.npz, of which the first half calibrated the signature, and
torchvision's MNIST. Streams are drawn from the scores with replacement, so that a stream without a
change is exchangeable with its calibration scores by construction: each stream has its own.

Beside the watch stands what is mostly used: a two-sample Kolmogorov-Smirnov test of the last 100
images against the calibration scores, every 100 images; at the level delta, and at delta divided
by the number of tests, which needs the length of the stream beforehand.

Prints Markdown tables, or one JSON document with --json. Delays are images from the change to the
alarm, over the streams without an alarm before it: the median and the 90% quantile.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, kstwo

from covcli.core import runtime
from covcli.core.progress import Lines
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.monitoring.drift import RUN_LENGTH
from covcli.monitoring.martingale import Bag, Martingale, lots
from covcli.reporting.per_image import SCORES, ImageScores, read_scores

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
EVERY = 100
NEVER = np.iinfo(np.int64).max
KINDS = {
    "brightness": "corrupt:brightness?severity=3&of={test}&limit=2000",
    "blur": "corrupt:gaussian-blur?severity=2&of={test}&limit=2000",
    "noise": "corrupt:gaussian-noise?severity=2&of={test}&limit=2000",
    "MNIST": "mnist?limit=2000",
}
MIXTURE = "half of the classes"
WAYS = ("watch", "quick", "KS", "KS/tests")


@dataclass(frozen=True)
class FalseAlarms:
    """Which share of the streams without a change ever alarmed, with a 95% interval."""

    way: str
    promised: str
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Delay:
    """How many images pass from a change to the alarm; None where too few streams alarmed."""

    change: str
    share: float
    way: str
    median: float | None
    late: float | None
    early: float  # share of the streams that alarmed before the change, which are left out


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--scores", type=Path, required=True, help="folder of scores.csv.gz")
    parser.add_argument("--checkpoint", type=Path, help="to make the scores")
    parser.add_argument("--signature", type=Path, help="to make the scores")
    parser.add_argument("--data", type=Path, default=os.environ.get("COVCLI_DATA_DIR", "data"))
    parser.add_argument("--streams", type=int, default=1000, help="without a change")
    parser.add_argument("--changed", type=int, default=200, help="streams of each change")
    parser.add_argument("--images", type=int, default=10_000, help="in a stream")
    parser.add_argument("--change", type=int, default=2000, help="after so many images")
    parser.add_argument("--calibration", type=int, default=3750, help="scores")
    parser.add_argument("--delta", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def scored(args: argparse.Namespace) -> dict[str, ImageScores]:
    """Return the scores of each set, made if they are not there yet."""
    if not (args.scores / SCORES).is_file():
        test = f"npz:{args.data}/cifar10/test.npz?offset=5000"
        wanted = tuple(text.format(test=test) for text in KINDS.values())
        config = EvaluationConfig(
            wanted, args.checkpoint, args.signature, trusted=test, data_dir=args.data,
            output=args.scores, device="cpu",
        )  # fmt: skip
        evaluate(config, Lines())
    return read_scores(args.scores / SCORES)


def pools(sets: dict[str, ImageScores]) -> tuple[Floats, dict[str, Floats]]:
    """Return the scores of trusted images, and those that each change brings."""
    trusted = sets["trusted"]
    assert trusted.label is not None
    scores = trusted.scores["coverage"]
    changed = {MIXTURE: scores[trusted.label < (trusted.label.max() + 1) / 2]}
    for kind, text in KINDS.items():
        start = text.partition("{")[0]
        name = next(name for name in sets if name.startswith(start))
        changed[kind] = sets[name].scores["coverage"]
    return scores, changed


@dataclass(frozen=True)
class Streams:
    """Streams side by side, (streams, images), and the calibration scores of each, (streams, n)."""

    scores: Floats
    calibration: Floats

    @classmethod
    def draw(
        cls, args: argparse.Namespace, count: int, seed: Sequence[int], trusted: Floats,
        other: Floats | None = None, share: float = 0.0,
    ) -> "Streams":  # fmt: skip
        """Draw streams of trusted scores, of which a share is of others after the change."""
        generator = np.random.default_rng([args.seed, *seed])
        calibration = generator.choice(trusted, (count, args.calibration))
        scores = generator.choice(trusted, (count, args.images))
        if other is not None:
            after = scores[:, args.change :]
            foreign = generator.random(after.shape) < share
            after[foreign] = generator.choice(other, int(foreign.sum()))
        return cls(scores, np.sort(calibration, 1))


def watched(streams: Streams) -> tuple[Floats, Integers]:
    """Return the running log10 martingale, (images, streams), and where quick alarms come first.

    The bags are those of `DriftWatch`, the martingales run side by side.
    """
    count, images = streams.scores.shape
    p_values = np.empty((images, count))
    for i in range(count):
        bag = Bag.of(streams.calibration[i])
        p_values[:, i] = bag.rank(streams.scores[i], lots(i, 0, images))
    martingale, values = Martingale.begin((count,)), np.empty((images, count))
    quick = np.full((images, count), False)
    for t, p in enumerate(p_values):
        martingale.step(p)
        values[t] = martingale.log / math.log(10)
        quick[t] = martingale.quick >= math.log(RUN_LENGTH)
        martingale.quick[quick[t]] = -np.inf
    return values, quick


def tested(streams: Streams) -> Floats:
    """Return the KS statistic of each block of 100 images, (blocks, streams)."""
    distances = []
    step = np.arange(EVERY + 1) / EVERY
    n = streams.calibration.shape[1]
    for scores, calibration in zip(streams.scores, streams.calibration, strict=True):
        blocks = np.sort(scores.reshape(-1, EVERY), 1)
        upto = np.searchsorted(calibration, blocks, "right") / n
        below = np.searchsorted(calibration, blocks, "left") / n
        distances.append(np.maximum(step[1:] - upto, below - step[:-1]).max(1))
    return np.stack(distances, 1)


def first(alarms: NDArray[np.bool_], after: int = 0, every: int = 1) -> Integers:
    """Return the image that the first alarm behind `after` images comes with, for each stream."""
    later = alarms[after // every :]
    return np.where(later.any(0), (later.argmax(0) + 1) * every + after, NEVER)


def alarms(args: argparse.Namespace, streams: Streams) -> dict[str, tuple[NDArray[np.bool_], int]]:
    """Return for each way where it alarms, (steps, streams), and how many images a step is."""
    values, quick = watched(streams)
    statistics = tested(streams)
    sizes = args.calibration, EVERY
    effective = round(sizes[0] * sizes[1] / sum(sizes))
    bounds = [kstwo.isf(level, effective) for level in (args.delta, args.delta / len(statistics))]
    return {
        "watch": (values >= -math.log10(args.delta), 1),
        "quick": (quick, 1),
        "KS": (statistics >= bounds[0], EVERY),
        "KS/tests": (statistics >= bounds[1], EVERY),
    }


def false_alarms(args: argparse.Namespace, trusted: Floats) -> Iterator[FalseAlarms]:
    note(f"{args.streams} streams without a change")
    alarmed = alarms(args, Streams.draw(args, args.streams, [0], trusted))
    runs = args.images / RUN_LENGTH
    promises = {
        "watch": f"at most {args.delta:g}", "KS": f"{args.delta:g} a test",
        "quick": f"at most {runs:g} a stream, in the mean",
        "KS/tests": f"at most {args.delta:g}",
    }  # fmt: skip
    for way, (where, _) in alarmed.items():
        times = int(where.any(0).sum())
        interval = binomtest(times, args.streams).proportion_ci()
        yield FalseAlarms(way, promises[way], times / args.streams, interval.low, interval.high)


def delays(
    args: argparse.Namespace, trusted: Floats, changed: dict[str, Floats]
) -> Iterator[Delay]:
    for number, (kind, other) in enumerate(changed.items(), 1):
        note(f"{kind}: {args.changed} streams of each share")
        drawn = [
            Streams.draw(args, args.changed, [number, i], trusted, other, share)
            for i, share in enumerate(SHARES)
        ]
        together = Streams(
            np.concatenate([streams.scores for streams in drawn]),
            np.concatenate([streams.calibration for streams in drawn]),
        )
        for way, (where, every) in alarms(args, together).items():
            for share, part in zip(SHARES, np.split(where, len(SHARES), 1), strict=True):
                yield delay(args, part, every, (kind, share, way))


def delay(
    args: argparse.Namespace, where: NDArray[np.bool_], every: int, what: tuple[str, float, str]
) -> Delay:
    """Sum up when streams alarm, (steps, streams), of which a step is so many images."""
    early = first(where, every=every) <= args.change
    late = first(where, args.change, every)[~early]
    waits = np.where(late == NEVER, np.inf, late.astype(np.float64) - args.change)
    return Delay(*what, quantile(waits, 0.5), quantile(waits, 0.9), float(early.mean()))


def quantile(waits: Floats, share: float) -> float | None:
    if len(waits) == 0:
        return None
    value = float(np.quantile(waits, share, method="inverted_cdf"))
    return value if math.isfinite(value) else None


def table(rows: list[Delay]) -> Iterator[str]:
    yield f"| change | share | {' | '.join(WAYS)} |"
    yield f"| --- | --- |{' --- |' * len(WAYS)}"
    by_cell = {(row.change, row.share, row.way): row for row in rows}
    for change, share in dict.fromkeys((row.change, row.share) for row in rows):
        cells = []
        for way in WAYS:
            row = by_cell[change, share, way]
            words = ("–" if wait is None else f"{wait:.0f}" for wait in (row.median, row.late))
            cells.append(" / ".join(words))
        yield f"| {change} | {share:.0%} | {' | '.join(cells)} |"


def show(rows: list[FalseAlarms]) -> None:
    print("| without a change | promised | streams that ever alarm | 95% interval |")
    print("| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row.way} | {row.promised} | {row.share:.3f} | {row.low:.3f} to {row.high:.3f} |")
    sys.stdout.flush()


def main() -> None:
    args = options()
    runtime.configure(args.seed, 1)
    trusted, changed = pools(scored(args))
    began = time.perf_counter()
    alone = list(false_alarms(args, trusted))
    if not args.json:
        show(alone)
    waits = list(delays(args, trusted, changed))
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        rows = {"false_alarms": [asdict(r) for r in alone], "delays": [asdict(r) for r in waits]}
        print(json.dumps({"settings": settings, **rows}, indent=2))
        return
    print("\nImages from the change to the alarm, median / 90% quantile:\n")
    for line in table(waits):
        print(line)
    note(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
