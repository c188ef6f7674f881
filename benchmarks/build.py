"""What building a signature costs, against the bare network and against the peers' fit.

    python benchmarks/build.py --data DIR --weights FILE

Prints two Markdown tables, ratios and peak memory, or one JSON document with --json. Without
--data and --weights it takes random images and a VGG19 with random weights, under the classes that
this network predicts: then every image is trusted, which is the most work that a build can have.
The threshold is 0 for the same reason. Nothing here counts calibration; overhead.py does.

- build_METHOD_N: `fit_signature` over N images, against reading them and running the network on
  them once. Parts of that one bare pass run before, between and after the methods' builds. The
  default method also makes and runs up to 128 noisy copies, whatever N.
- fit_PEER: a detector's own `fit(loader)` over --peer-images images, against a bare pass over the
  same images; so it is a ratio per image. Gram gets --gram-images only: it has been seen to take
  36 MB of memory for each. On all coverage points, KNN on the features before the last layer. The
  network must be a VGG; others take --no-peers.
- fit_PEER_over_ours: that, over the same ratio of a build of the default method over --peer-images
  images in the same repetition.
- memory_WHAT_N: peak resident memory of a process that has loaded network and images and does
  this, over that of one that makes a bare pass over the same images. Both hold some 700 MB of
  libraries, so the second table tells in MB what is taken in addition.
- memory_LARGE_over_SMALL: peak memory of the default method over so many images, over that over
  so few.
"""

import argparse
import json

import common
from common import Ratio, Work
from peers import PEERS, peers

from covcli.data.images import ImageSet
from covcli.models.architectures import Classifier
from covcli.signature.build import DEFAULT_METHOD

WARM_UP = 100
QUICK = {"repetitions": 1, "large_repetitions": 1, "images": [20, 40], "memory_images": [20, 40],
         "peer_images": 60, "gram_images": 20, "methods": ["src", DEFAULT_METHOD]}  # fmt: skip
# From so many images on, a build is repeated --large-repetitions times.
LARGE = 5000
MEGABYTE = 1e6


def options() -> argparse.Namespace:
    parser = common.parser(__doc__, repetitions=3)
    parser.add_argument("--large-repetitions", type=int, default=1)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--methods", nargs="+", default=["src", "mrc", DEFAULT_METHOD])
    parser.add_argument("--peer-images", type=int, default=1000)
    parser.add_argument("--gram-images", type=int, default=100)
    parser.add_argument("--memory-images", type=int, nargs="+", default=[1000, 10_000, 50_000])
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    return common.read_options(parser, QUICK)


def fits(model: Classifier, images: ImageSet, what: str) -> Work:
    """Return the work of a bare pass, of a method's build or of a peer's fit."""
    if what == "bare":
        return common.bare_work(model, images)
    if what in PEERS:
        peer = peers(model)[what]
        return lambda: peer.fit(model, images)
    return lambda: common.signature(model, images, what)


def job(args: argparse.Namespace) -> None:
    """Do one thing in this process, and print its peak memory."""
    what, count = args.job.split(":")
    model = common.network(args)
    images, _ = common.load_images(args, model, int(count), 1)
    work = fits(model, images, what)
    common.forget_peak()
    work()
    print(json.dumps({"peak": common.peak_memory()}))


def peak_memory(args: argparse.Namespace, names: list[str], report: common.Report) -> None:
    """Measure peaks: of everything over as many images as peers get, and of ours over more."""
    wanted = [(what, args.peer_images) for what in ("bare", *args.methods)]
    wanted += [(name, peer_images(args, name)) for name in names]
    wanted += [("bare", args.gram_images)] if "gram" in names else []
    wanted += [(DEFAULT_METHOD, count) for count in args.memory_images]
    peaks = {
        (what, count): common.subprocess_job(f"{what}:{count}")["peak"] / MEGABYTE
        for what, count in dict.fromkeys(wanted)
    }
    for (what, count), peak in peaks.items():
        entry = report.memory[f"{what}_{count}"] = {"peak": peak}
        under = peaks.get(("bare", count))
        if what != "bare" and under is not None:
            entry["growth"] = peak - under
            report.ratios[f"memory_{what}_{count}"] = common.plain(peak / under)
    small, large = min(args.memory_images), max(args.memory_images)
    both = peaks[DEFAULT_METHOD, large] / peaks[DEFAULT_METHOD, small]
    report.ratios[f"memory_{large}_over_{small}"] = common.plain(both)


def peer_images(args: argparse.Namespace, name: str) -> int:
    return int(args.gram_images if name == "gram" else args.peer_images)


def builds(model: Classifier, images: ImageSet, args: argparse.Namespace) -> dict[str, Ratio]:
    common.note(f"builds from {len(images)} images")
    variants = common.split_pass(
        model, images, {method: fits(model, images, method) for method in args.methods}
    )
    times = args.large_repetitions if len(images) >= LARGE else args.repetitions
    seconds = common.interleaved(variants, times, warm_up=False)
    under = common.total(seconds, "bare")
    return {
        f"build_{method}_{len(images)}": common.ratio(seconds[method], under)
        for method in args.methods
    }


def peer_fits(
    model: Classifier, images: ImageSet, names: list[str], args: argparse.Namespace
) -> dict[str, Ratio]:
    common.note("the peers")
    few = common.cycled(images, args.gram_images)
    variants = {"bare": fits(model, images, "bare"), "bare, few": fits(model, few, "bare"),
                "ours": fits(model, images, DEFAULT_METHOD)}  # fmt: skip
    for name in names:
        variants[name] = fits(model, few if name == "gram" else images, name)
    seconds = common.interleaved(variants, args.large_repetitions, warm_up=False)
    ours = [a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
    ratios = {}
    for name in names:
        under = seconds["bare, few" if name == "gram" else "bare"]
        ratios[f"fit_{name}"] = common.ratio(seconds[name], under)
        theirs = [a / b for a, b in zip(seconds[name], under, strict=True)]
        ratios[f"fit_{name}_over_ours"] = common.ratio(theirs, ours)
    return ratios


def main() -> None:
    args = options()
    if args.job:
        job(args)
        return
    report = common.Report()
    names = [] if args.no_peers else list(PEERS)
    if not args.no_memory:
        peak_memory(args, names, report)  # first: see common.subprocess_job
    model = common.network(args)
    counts = sorted({*args.images, args.peer_images})
    most, _ = common.load_images(args, model, counts[-1], 1)
    sets = {count: common.cycled(most, count) for count in counts}
    few = common.cycled(sets[args.peer_images], min(WARM_UP, args.peer_images))
    for what in ("bare", *args.methods):
        fits(model, few, what)()
    for count in args.images:
        report.ratios |= builds(model, sets[count], args)
    if names:
        report.ratios |= peer_fits(model, sets[args.peer_images], names, args)
    common.note("done")
    legend = (
        f"Gram was fitted on {args.gram_images} images, the other peers on "
        f"{args.peer_images}. Each figure: the script's first lines."
    )
    report.show(args, legend, {f"{count}": images for count, images in sets.items()})


if __name__ == "__main__":
    main()
