"""How the costs grow with images, neurons, classes and sections.

    python benchmarks/scale.py --data DIR --weights FILE

Prints a Markdown table for each, or one JSON document with --json. Weights and data are read for
the growth with images; the other tables take random weights, and images under the classes that
the network predicts, so that all of them are trusted: the most work that a build can have.

build: `fit_signature` over a bare pass over the same images. scoring: `Monitor` on 64 images over
the bare network on them. growth: a row's figure over that of the first row; TABLE_growth_WHAT is
that of the last row. In the table of images, every row is a process of its own, and the bare pass
is one over at most 2,000 of its images, half of it before the build and half after it. The method
is the default one for images and classes (which makes and runs up to 128 noisy copies, however few
the images are), src for neurons, mrc for sections.
"""

import argparse
import json
from dataclasses import dataclass, replace
from functools import partial

import common
import torch
from common import Ratio, Work

from covcli.data.images import ImageSet
from covcli.methods.state import Granularity
from covcli.models.architectures import Classifier
from covcli.signature.build import DEFAULT_METHOD
from covcli.signature.signature import Signature

BATCH = 64
BARE_IMAGES = 2000
HELD_OUT = 32
NETWORKS = ["vgg11", "vgg19", "resnet18", "vgg11/unit", "vgg19/unit"]
QUICK = {"repetitions": 1, "images": [20, 40], "few": 20, "networks": ["vgg11", "vgg11/unit"],
         "classes": [10, 20], "sections": [5, 10], "model": "vgg11"}  # fmt: skip


def options() -> argparse.Namespace:
    parser = common.parser(__doc__, repetitions=3)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 3000, 10_000, 50_000])
    parser.add_argument("--few", type=int, default=500, help="images in the other tables")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="MODEL or MODEL/unit")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--sections", type=int, nargs="+", default=[5, 10, 20, 50, 100, 200])
    return common.read_options(parser, QUICK)


@dataclass(frozen=True)
class Case:
    """One row: a network with images, and how it is watched."""

    model: Classifier
    sets: tuple[ImageSet, ImageSet]
    method: str
    granularity: Granularity = "channel"


@dataclass(frozen=True)
class Row:
    """What one case costs."""

    table: str
    case: str
    neurons: int
    megabytes: float  # of the signature's tensors, or of the process at its peak
    build: Ratio
    scoring: Ratio | None


def job(args: argparse.Namespace) -> None:
    """Build from so many images in this process; print its ratio to a bare pass, and its peak."""
    model = common.network(args)
    images, _ = common.load_images(args, model, int(args.job), 1)
    common.signature(model, common.cycled(images, min(100, len(images))), DEFAULT_METHOD)
    some = common.cycled(images, min(BARE_IMAGES, len(images)))
    variants = common.split_pass(
        model, some, {"build": lambda: common.signature(model, images, DEFAULT_METHOD)}
    )
    common.forget_peak()
    seconds = common.interleaved(variants, 1, warm_up=False)
    scale = len(some) / len(images)
    ratio = common.ratio(seconds["build"], common.total(seconds, "bare"), scale)
    neurons = sum(point.neurons for point in model.points("channel"))
    print(json.dumps({"build": ratio.value, "peak": common.peak_memory(), "neurons": neurons}))


def by_images(args: argparse.Namespace) -> list[Row]:
    rows = []
    for count in args.images:
        result = common.subprocess_job(str(count))
        build = common.plain(result["build"])
        rows.append(
            Row("images", str(count), int(result["neurons"]), result["peak"] / 1e6, build, None)
        )
    return rows


def random_case(
    args: argparse.Namespace, name: str, classes: int, method: str,
    granularity: Granularity = "channel",
) -> Case:  # fmt: skip
    """Return a network with random weights, and images under the classes that it predicts."""
    model = common.random_network(name, classes)
    untrained = argparse.Namespace(**{**vars(args), "weights": None})
    sets = common.load_images(untrained, model, args.few, max(BATCH, HELD_OUT))
    return Case(model, sets, method, granularity)


def by_neurons(args: argparse.Namespace) -> dict[str, Case]:
    cases = {}
    for text in args.networks:
        name, _, unit = text.partition("/")
        granularity: Granularity = "unit" if unit else "channel"
        cases[text] = random_case(args, name, common.CLASSES, "src", granularity)
    return cases


def by_classes(args: argparse.Namespace) -> dict[str, Case]:
    return {str(n): random_case(args, args.model, n, DEFAULT_METHOD) for n in args.classes}


def by_sections(args: argparse.Namespace) -> dict[str, Case]:
    first = random_case(args, args.model, common.CLASSES, "mrc")
    return {str(n): replace(first, method=f"mrc?sections={n}") for n in args.sections}


def measured(args: argparse.Namespace, table: str, cases: dict[str, Case]) -> list[Row]:
    """Time builds and scoring of all cases in turn, each against its own bare network."""
    common.note(table)
    builds: dict[str, Work] = {}
    scoring: dict[str, Work] = {}
    results = {}
    for name, case in cases.items():
        model, trusted = case.model, case.sets[0]
        monitor = common.monitor(model, case.sets, case.method, case.granularity)  # a warm-up too
        pixels = case.sets[1].batch(torch.arange(BATCH), model.spec.shape)
        builds[f"bare {name}"] = common.bare_work(model, trusted)
        builds[name] = partial(
            common.signature, model, trusted, case.method, case.granularity
        )  # fmt: skip
        scoring[f"bare {name}"] = partial(common.bare_logits, model, pixels)
        scoring[name] = partial(monitor, pixels)
        results[name] = monitor.judge.signature
    built = common.interleaved(builds, args.repetitions, warm_up=False)
    scored = common.interleaved(scoring, 3 * args.repetitions)
    return [
        Row(table, name, sum(signature.sizes),
            megabytes(signature),
            common.ratio(built[name], built[f"bare {name}"]),
            common.ratio(scored[name], scored[f"bare {name}"]))
        for name, signature in results.items()
    ]  # fmt: skip


def megabytes(signature: Signature) -> float:
    """Return the size of the state that is summed; of the condensed one if that is all there is."""
    state = signature.to_merge or signature.state
    return sum(tensor.nbytes for tensor in state.tensors.values()) / 1e6


def figures(rows: list[Row]) -> dict[str, Ratio]:
    """Return every row's ratios, and how much the last row's are of the first row's."""
    results = {}
    first, last, table = rows[0], rows[-1], rows[0].table
    for row in rows:
        key = f"{table}_{row.case.replace('/', '_')}"
        results[f"{key}_build"] = row.build
        if row.scoring is not None:
            results[f"{key}_scoring"] = row.scoring
    results[f"{table}_growth_build"] = common.plain(last.build.value / first.build.value)
    if first.scoring is not None and last.scoring is not None:
        results[f"{table}_growth_scoring"] = common.plain(last.scoring.value / first.scoring.value)
    results[f"{table}_growth_memory"] = common.plain(last.megabytes / first.megabytes)
    return results


def print_table(rows: list[Row]) -> None:
    first = rows[0]
    print(f"| by {first.table} | neurons | MB | build | growth | scoring | growth |")
    print(f"|{' --- |' * 7}")
    for row in rows:
        built = f"{row.build.value:.3g} | {row.build.value / first.build.value:.3g}"
        scored = "– | –"
        if row.scoring is not None and first.scoring is not None:
            scored = f"{row.scoring.value:.3g} | {row.scoring.value / first.scoring.value:.3g}"
        print(f"| {row.case} | {row.neurons} | {row.megabytes:.0f} | {built} | {scored} |")
    print()


def main() -> None:
    args = options()
    if args.job:
        job(args)
        return
    tables = [by_images(args)]  # first: see common.subprocess_job
    for name, cases in (
        ("neurons", by_neurons),
        ("classes", by_classes),
        ("sections", by_sections),
    ):
        tables.append(measured(args, name, cases(args)))
    common.note("done")
    if not args.json:
        for rows in tables:
            print_table(rows)
    report = common.Report()
    for rows in tables:
        report.ratios |= figures(rows)
    legend = (
        "MB: of the whole process in the table of images, of the signature's state in the others. "
        "Each figure: the script's first lines."
    )
    report.show(args, legend, {})


if __name__ == "__main__":
    main()
