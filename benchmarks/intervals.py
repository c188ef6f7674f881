"""What the printed 95% intervals cover, by simulation.

    python benchmarks/intervals.py

Scores are drawn again and again from distributions whose figures are known, and the intervals that
covcli prints are asked whether they hold the true figure. Prints a Markdown table, or one JSON
document with --json. No data and no network are needed; it takes about four minutes on one core.

Trusted scores are standard normal. Untrusted ones are normal too, with the same deviation, with
twice or with half of it, or some of them are just like the trusted ("mixed"); their shift gives the
figure in the second column. Means are over four sets that share their trusted images: of the
difference to a perfect figure one set has half, two have the whole and one has one and a half. The
network's own errors score as untrusted images do, the others as trusted ones.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from covcli.evaluation import metrics
from covcli.evaluation.own_errors import own_errors
from covcli.reporting.documents import Estimate

Floats = npt.NDArray[np.float64]
SIZES = (50, 300)
AREAS = (0.9, 0.95, 0.99, 0.995, 0.999)
RATES = (0.003, 0.01, 0.05, 0.2, 0.5)
SHARES = (0.001, 0.003, 0.01, 0.05, 0.2, 0.5)
WRONG = (0.1, 0.3)
SETS = (0.5, 1.0, 1.0, 1.5)
MIXED = "mixed"
DEVIATIONS = {"equal": 1.0, "wide": 2.0, "narrow": 0.5, MIXED: 1.0}
FAR = 12.0
LEGEND = """\
coverage: share of the intervals that hold the true figure, in per cent, of nominally 95: the lowest
of the distributions tried, which one that was, and the mean width of its intervals, in per cent.
trusted, untrusted: images of each kind; for own errors and shares there is one kind."""


@dataclass(frozen=True)
class Shape:
    """Untrusted scores: normal, but a share that is like the trusted scores."""

    name: str
    shift: float
    alike: float

    @classmethod
    def of_area(cls, name: str, area: float) -> "Shape":
        """Return the shape with that area under the ROC curve."""
        if name == MIXED:
            return cls(name, FAR, 2 * (1 - area))
        scale = np.hypot(1.0, DEVIATIONS[name])
        return cls(name, float(scale * norm.ppf(area)), 0.0)

    @classmethod
    def of_rate(cls, name: str, rate: float) -> "Shape":
        """Return the shape with that FPR95."""
        threshold, alike = norm.isf(rate), 0.02 if name == MIXED else 0.0
        rest = (0.05 - alike * norm.cdf(threshold)) / (1 - alike)
        return cls(name, float(threshold - DEVIATIONS[name] * norm.ppf(rest)), alike)

    def draw(self, generator: np.random.Generator, size: int) -> Floats:
        """Draw untrusted scores, shape (size,)."""
        scores = self.shift + DEVIATIONS[self.name] * generator.normal(size=size)
        return np.where(generator.random(size) < self.alike, generator.normal(size=size), scores)

    def curve(self) -> tuple[Floats, Floats]:
        """Return the shares of trusted and of untrusted scores above ascending thresholds."""
        deviation = DEVIATIONS[self.name]
        low, high = min(-9.0, self.shift - 9 * deviation), max(9.0, self.shift + 9 * deviation)
        thresholds = np.linspace(low, high, 400_000)
        own = norm.sf(thresholds, self.shift, deviation)
        false: Floats = norm.sf(thresholds)
        true: Floats = self.alike * false + (1 - self.alike) * own
        return false, true


def precision(hits: Floats, others: Floats, share: float) -> float:
    """Return the average precision of a curve; hits and others fall or rise together."""
    steps = np.abs(np.diff(hits))
    hit, other = (hits[1:] + hits[:-1]) / 2, (others[1:] + others[:-1]) / 2
    listed = share * hit + (1 - share) * other
    return float(steps @ np.divide(share * hit, listed, out=np.ones_like(hit), where=listed > 0))


def true_errors(shape: Shape, area: float, wrong: float) -> dict[str, float]:
    """Return the figures of a network's own errors."""
    false, true = shape.curve()
    kept = wrong * (1 - true) + (1 - wrong) * (1 - false)
    middle = np.maximum((kept[1:] + kept[:-1]) / 2, 1e-300)
    aurc = float(wrong * np.abs(np.diff(true)) @ -np.log(middle))
    least = wrong + (1 - wrong) * np.log1p(-wrong)
    augrc = wrong**2 / 2 + (1 - area) * wrong * (1 - wrong)
    return {"AUROC of errors": area, "AURC": aurc, "E-AURC": aurc - least, "AUGRC": augrc}


# One simulated figure: its name, what it is in truth, and the estimate of one draw.
Drawn = Iterator[tuple[str, float, Estimate]]


def of_sets(area: float, name: str, sizes: tuple[int, int], generator: np.random.Generator,
            draws: int) -> Drawn:  # fmt: skip
    shape, (n, m) = Shape.of_area(name, area), sizes
    false, true = shape.curve()
    share = m / (n + m)
    out, inside = precision(true, false, share), precision(1 - false, 1 - true, 1 - share)
    several = [Shape.of_area(name, 1 - part * (1 - area)) for part in SETS]
    for _ in range(draws):
        trusted = generator.normal(size=n)
        figures = metrics.detection(trusted, shape.draw(generator, m), None)
        yield "AUROC", area, figures.auroc
        yield "AUPR-out", out, figures.aupr_out
        yield "AUPR-in", inside, figures.aupr_in
        untrusted = [one.draw(generator, m) for one in several]
        yield "mean AUROC", area, metrics.mean_detection("", trusted, untrusted).auroc


def of_rates(rate: float, name: str, sizes: tuple[int, int], generator: np.random.Generator,
             draws: int) -> Drawn:  # fmt: skip
    shape, (n, m) = Shape.of_rate(name, rate), sizes
    several = [Shape.of_rate(name, part * rate) for part in SETS]
    for _ in range(draws):
        trusted = generator.normal(size=n)
        yield "FPR95", rate, metrics.detection(trusted, shape.draw(generator, m), None).fpr95
        untrusted = [one.draw(generator, m) for one in several]
        yield "mean FPR95", rate, metrics.mean_detection("", trusted, untrusted).fpr95


def of_errors(area: float, wrong: float, name: str, images: int, generator: np.random.Generator,
              draws: int) -> Drawn:  # fmt: skip
    shape = Shape.of_area(name, area)
    truth = true_errors(shape, area, wrong)
    for _ in range(draws):
        correct = generator.random(images) >= wrong
        scores = np.where(correct, generator.normal(size=images), shape.draw(generator, images))
        errors = own_errors({"": scores}, correct)
        if errors is None:  # then nothing is printed
            continue
        e = errors[""]
        assert e.augrc is not None
        estimates = (e.auroc, e.aurc, e.excess_aurc, e.augrc)
        for (figure, value), estimate in zip(truth.items(), estimates, strict=True):
            yield figure, value, estimate


def of_shares(share: float, images: int, generator: np.random.Generator, draws: int) -> Drawn:
    for _ in range(draws):
        yield "a share of images", share, metrics.share(generator.random(images) < share)


@dataclass(frozen=True)
class Row:
    """What the intervals of a figure cover, of one distribution and number of images."""

    figure: str
    setting: str
    images: str
    shape: str
    draws: int
    coverage: float
    above: float
    below: float
    width: float


def rows(setting: str, images: str, shape: str, drawn: Drawn) -> Iterator[Row]:
    """Count what one simulation covered, figure by figure."""
    ends: dict[str, list[tuple[float, float, float]]] = {}
    for figure, truth, e in drawn:
        ends.setdefault(figure, []).append((truth, e.low, e.high))
    for figure, interval in ends.items():
        truth, low, high = np.array(interval).T
        above, below = float((low > truth).mean()), float((high < truth).mean())
        yield Row(figure, setting, images, shape, len(truth), 1 - above - below, above, below,
                  float((high - low).mean()))  # fmt: skip


def simulated(draws: int, seed: int, sizes: Iterable[int] = SIZES) -> Iterator[Row]:
    """Yield every row; each simulation has a seed of its own."""
    seeds = iter(np.random.SeedSequence(seed).spawn(10_000))
    both = [(n, m) for n in sizes for m in sizes]
    for name in DEVIATIONS:
        for n, m in both:
            for area in AREAS:
                drawn = of_sets(area, name, (n, m), np.random.default_rng(next(seeds)), draws)
                yield from rows(f"AUROC {100 * area:g}", f"{n}, {m}", name, drawn)
            for rate in RATES:
                drawn = of_rates(rate, name, (n, m), np.random.default_rng(next(seeds)), draws)
                yield from rows(f"FPR95 {100 * rate:g}", f"{n}, {m}", name, drawn)
        for n in sizes:
            for area in AREAS:
                for wrong in WRONG:
                    generator = np.random.default_rng(next(seeds))
                    drawn = of_errors(area, wrong, name, n, generator, draws)
                    setting = f"AUROC {100 * area:g}, {100 * wrong:g} wrong"
                    yield from rows(setting, f"{n}", name, drawn)
    for n in sizes:
        for share in SHARES:
            drawn = of_shares(share, n, np.random.default_rng(next(seeds)), draws)
            yield from rows(f"{100 * share:g}", f"{n}", "–", drawn)


def lowest(results: list[Row]) -> list[Row]:
    """Return the row of the lowest coverage for each figure, setting and number of images."""
    worst: dict[tuple[str, str, str], Row] = {}
    for row in results:
        key = (row.figure, row.setting, row.images)
        if key not in worst or row.coverage < worst[key].coverage:
            worst[key] = row
    return sorted(worst.values(), key=lambda row: row.figure)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--draws", type=int, default=400, help="of each distribution")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", action="store_true", help="a line for every distribution")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = options()
    began = time.perf_counter()
    results = list(simulated(args.draws, args.seed, args.sizes))
    if args.json:
        document = {"settings": vars(args), "rows": [asdict(row) for row in results]}
        print(json.dumps(document, indent=2))
        return
    print(
        "| figure | true figures, % | trusted, untrusted | coverage, % | distribution | width, % |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for row in results if args.every else lowest(results):
        print(f"| {row.figure} | {row.setting} | {row.images} | {100 * row.coverage:.1f} | "
              f"{row.shape} | {100 * row.width:.2f} |")  # fmt: skip
    least = min(row.coverage for row in results)
    print(f"\nLowest coverage {100 * least:.1f}%, {args.draws} draws each, "
          f"{time.perf_counter() - began:.0f} s.\n\n{LEGEND}")  # fmt: skip


if __name__ == "__main__":
    main()
