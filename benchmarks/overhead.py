"""What watching a network costs: a monitored pass, a ConfidenceLoss step and a build.

    python benchmarks/overhead.py --data DIR --weights FILE

Prints a Markdown table of ratios to the bare network, or one JSON document with --json. Without
--data and --weights it takes random images and a VGG19 with random weights, under the classes that
this network predicts: then every image is trusted, which is the most work that a build can have.
The threshold is 0 for the same reason.

- monitor_batch_B: `Monitor` on B uint8 images, from pixels to verdicts, against
  `model(to_network(images))` in inference mode. The method is the default one, on channels, or the
  one that is named, on channels or units.
- bare_again_batch_B: the bare network once more in every turn, against itself; what differs from 1
  is noise.
- predict_batch_B_PEER: `predict` of a detector of pytorch-ood on the same images, against the same;
  on all coverage points, KNN on 10,000 features before the last layer. `multimahalanobis` runs the
  network anew for each point, `multimahalanobis_one_pass` once. peers_over_ours_batch_B_PEER is
  its time in units of the default monitor's.
- confidence_loss_step: a step of `engine.epoch` on 64 images with the penalty, against one without.
- build_trusted_only: `fit_signature` of the default method over --images images against reading
  them and running the network on them once. Counted are that run, the passes over the neurons that
  it wrote to disk, and up to 128 noisy copies that are made and run.
- build: that and `fit_judge` over --calibration images, against a bare pass over both sets.
  Counted in addition are the run over those, their scoring, five distorted copies each of up to
  48 of them that are made, run and scored, and the fit of the combination. Neither counts
  loading weights and images, nor writing the signature to a file.
"""

import argparse
from collections.abc import Callable
from functools import partial

import common
import torch
from common import Ratio, Work
from peers import NEIGHBOURS, one_pass, peers
from torch import Tensor

from covcli.core.progress import Silent
from covcli.data.images import ImageSet
from covcli.methods.state import Granularity
from covcli.models.architectures import Classifier
from covcli.models.sweep import to_network
from covcli.signature.build import DEFAULT_METHOD
from covcli.signature.fit import fit_judge
from covcli.signature.monitor import Monitor
from covcli.training.epoch import epoch
from covcli.training.loss import RUNNING, ConfidenceLoss

BATCHES = (64, 1)
STEP = 64
# A timed call on single images runs so many of them.
SINGLES = 8
WATCHED: dict[str, tuple[str, Granularity]] = {
    "": (DEFAULT_METHOD, "channel"), "_src": ("src", "channel"), "_mrc": ("mrc", "channel"),
    "_src_unit": ("src", "unit"), "_mrc_unit": ("mrc", "unit"),
}  # fmt: skip
QUICK = {"repetitions": 1, "peer_repetitions": 1, "build_repetitions": 1, "images": 40,
         "calibration": 32, "fitted": 40, "features": 60}  # fmt: skip
Sets = tuple[ImageSet, ImageSet]


def options() -> argparse.Namespace:
    parser = common.parser(__doc__, repetitions=9)
    parser.add_argument("--peer-repetitions", type=int, default=3)
    parser.add_argument("--build-repetitions", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000, help="of a build")
    parser.add_argument("--calibration", type=int, default=1000, help="images of a build")
    parser.add_argument("--fitted", type=int, default=200, help="images of what only has to score")
    parser.add_argument("--features", type=int, default=10_000, help="that KNN searches")
    parser.add_argument("--no-peers", action="store_true", help="for networks but VGGs")
    return common.read_options(parser, QUICK)


def calls(score: Callable[[Tensor], object], pixels: Tensor, batch: int) -> Work:
    """Return work that scores a batch, or a few single images one by one."""
    parts = pixels[:batch].split(batch) if batch > 1 else pixels[:SINGLES].split(1)

    def work() -> None:
        for part in parts:
            score(part)

    return work


def on_floats(predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda pixels: predict(to_network(pixels, common.CPU))


def monitors(model: Classifier, sets: Sets, args: argparse.Namespace) -> dict[str, Monitor]:
    few = common.cycled(sets[0], args.fitted), common.cycled(sets[1], max(32, args.fitted // 2))
    return {
        name: common.monitor(model, few, method, granularity)
        for name, (method, granularity) in WATCHED.items()
    }


def monitored(
    model: Classifier, watched: dict[str, Monitor], pixels: Tensor, args: argparse.Namespace
) -> dict[str, Ratio]:
    networks = {}
    for batch in BATCHES:
        common.note(f"monitors, batches of {batch}")
        variants = {"bare": calls(partial(common.bare_logits, model), pixels, batch)}
        variants |= {f"ours{name}": calls(m, pixels, batch) for name, m in watched.items()}
        variants["again"] = variants["bare"]
        seconds = common.interleaved(variants, args.repetitions)
        networks[f"bare_again_batch_{batch}"] = common.ratio(seconds["again"], seconds["bare"])
        for name in watched:
            key = f"monitor_batch_{batch}{name}"
            networks[key] = common.ratio(seconds[f"ours{name}"], seconds["bare"])
    return networks


def fitted_peers(
    model: Classifier, images: ImageSet, args: argparse.Namespace
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Fit the peers on few images, since only what KNN searches grows with them.

    It searches random features: how long a search by brute force takes does not depend on them.
    """
    fitted = peers(model)
    few = common.cycled(images, max(args.fitted, NEIGHBOURS))
    for name, peer in fitted.items():
        common.note(f"fitting {name}")
        peer.fit(model, few)
    width = fitted["knn"].detector.knn.n_features_in_
    features = torch.rand(max(args.features, NEIGHBOURS), width)
    fitted["knn"].detector.fit_features(features, torch.zeros(len(features)))
    predict = {name: on_floats(peer.predict) for name, peer in fitted.items()}
    again = one_pass(model, fitted["multimahalanobis"])
    return {**predict, "multimahalanobis_one_pass": on_floats(again)}


def compared(
    model: Classifier, ours: Monitor, predict: dict[str, Callable[[Tensor], Tensor]],
    pixels: Tensor, args: argparse.Namespace,
) -> dict[str, Ratio]:  # fmt: skip
    ratios = {}
    for batch in BATCHES:
        common.note(f"peers, batches of {batch}")
        variants = {
            "bare": calls(partial(common.bare_logits, model), pixels, batch),
            "ours": calls(ours, pixels, batch),
        }
        variants |= {name: calls(score, pixels, batch) for name, score in predict.items()}
        seconds = common.interleaved(variants, args.peer_repetitions)
        for name in predict:
            key = f"batch_{batch}_{name}"
            ratios[f"predict_{key}"] = common.ratio(seconds[name], seconds["bare"])
            ratios[f"peers_over_ours_{key}"] = common.ratio(seconds[name], seconds["ours"])
    return ratios


def confidence_loss(
    model: Classifier, images: ImageSet, args: argparse.Namespace
) -> dict[str, Ratio]:
    """Drive two epochs step by step in turn, one with the penalty and one without."""
    common.note("ConfidenceLoss")
    few = common.cycled(images, args.fitted)
    running = common.signature(model, few, RUNNING.spec())
    learners = {
        "with": common.trainer(model, lambda: ConfidenceLoss(running.state, running.sizes)),
        "without": common.trainer(model),
    }
    order = torch.arange(STEP * (args.repetitions + 1)) % len(few)
    epochs = {
        name: epoch(learner, few, few.known_labels(), order.split(STEP), "none", torch.Generator())
        for name, learner in learners.items()
    }
    steps = {name: partial(next, epoch) for name, epoch in epochs.items()}
    seconds = common.interleaved(steps, args.repetitions)
    return {"confidence_loss_step": common.ratio(seconds["with"], seconds["without"])}


def build(model: Classifier, sets: Sets, args: argparse.Namespace) -> dict[str, Ratio]:
    """Time the halves of a bare pass before and after each build."""
    common.note("builds")
    warm_up = common.signature(
        model, common.cycled(sets[0], args.fitted), DEFAULT_METHOD
    )  # warm-up
    trusted = common.split_pass(
        model, sets[0], {"signature": lambda: common.signature(model, sets[0], DEFAULT_METHOD)}
    )
    held_out = common.split_pass(
        model, sets[1], {"calibration": lambda: fit_judge(model, warm_up, sets[1], Silent())}
    )
    variants = trusted | {f"held out, {name}": work for name, work in held_out.items()}
    seconds = common.interleaved(variants, args.build_repetitions, warm_up=False)
    signature, calibration = seconds["signature"], seconds["held out, calibration"]
    once, twice = common.total(seconds, "bare"), common.total(seconds, "held out, bare")
    both = [a + b for a, b in zip(signature, calibration, strict=True)]
    under = [a + b for a, b in zip(once, twice, strict=True)]
    return {"build": common.ratio(both, under),
            "build_trusted_only": common.ratio(signature, once)}  # fmt: skip


def main() -> None:
    args = options()
    model = common.network(args)
    sets = common.load_images(args, model, args.images, args.calibration)
    pixels = common.cycled(sets[1], max(BATCHES)).batch(torch.arange(64), model.spec.shape)
    report = common.Report()
    watched = monitors(model, sets, args)
    report.ratios |= monitored(model, watched, pixels, args)
    if not args.no_peers:
        predict = fitted_peers(model, sets[0], args)
        report.ratios |= compared(model, watched[""], predict, pixels, args)
    report.ratios |= confidence_loss(model, sets[0], args)
    report.ratios |= build(model, sets, args)
    common.note("done")
    legend = "Each figure: the script's first lines."
    report.show(args, legend, {"trusted": sets[0], "calibration": sets[1]})


if __name__ == "__main__":
    main()
