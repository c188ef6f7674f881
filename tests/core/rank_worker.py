"""One rank of several: builds, scores and trains, and writes digests of all that it ends with.

RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python tests/core/rank_worker.py FOLDER
"""

import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import PLUGIN, tiny_config

from covcli.core import distributed, files, runtime
from covcli.core.progress import Silent
from covcli.core.signals import Interrupted, Interrupts
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.evaluation.scores import measure
from covcli.methods import METHODS
from covcli.models import architectures, sweep
from covcli.models.architectures import Classifier, ModelSpec
from covcli.signature.fit import How, fit_judge, fit_signature
from covcli.training.train import resume, train

SIZES = (1, 2, 97, 101)


def network() -> Classifier:
    torch.manual_seed(1)
    spec = ModelSpec("tiny", 10, (3, 32, 32), (0.3, 0.3, 0.3), (0.4, 0.4, 0.4))
    return architectures.build(spec).on(torch.device("cpu"))


def all_right(model: Classifier, images: ImageSet) -> ImageSet:
    """Label the images as the network does, so that each of them is trusted."""
    with distributed.alone():
        parts = [
            b.logits.argmax(1) for b in sweep.sweep(model, images, [], "channel", Silent(), "")
        ]
    return replace(images, labels=torch.cat(parts))


def signatures(model: Classifier) -> dict[str, str]:
    digests = {}
    for size in SIZES:
        images = all_right(model, datasets.load(f"digits?limit={size}", "train"))
        for name in METHODS:
            how = How(METHODS.get(name)(), threshold=0.0)
            signature, trusted, accuracy = fit_signature(model, images, how, Silent())
            assert (sum(trusted.counts), accuracy) == (size, 1.0)
            digests[f"signature {name} {size}"] = files.fingerprint(signature.state.tensors)
    return digests


def scores(model: Classifier) -> dict[str, str]:
    """Return digests of the scores of sets of every size, by the default method."""
    images = all_right(model, datasets.load("digits?limit=600", "train"))
    how = How(METHODS.get("ensemble")(), threshold=0.0)
    signature, _, _ = fit_signature(model, images, how, Silent())
    judge = fit_judge(model, signature, datasets.load("digits?limit=101", "test"), Silent())
    calibration = judge.calibration
    digests = {"calibration": files.digest([vars(calibration.combination), calibration.scores])}
    for size in SIZES:
        tested = datasets.load(f"photos?limit={size}", "test")
        measured = measure(judge, tested, Silent())
        plain = {k: v.tolist() for k, v in measured.scores.items()}
        predicted = measured.predicted.tolist()
        digests[f"scores {size}"] = files.digest([plain, measured.coverage, predicted])
    return digests


class StopIn(Silent):
    """Signals one rank alone, in the middle of the second epoch."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts, self.seen = interrupts, 0

    def advance(self, images: int) -> None:
        self.seen += images
        if 400 <= self.seen - images < 432 and distributed.rank() == distributed.size() - 1:
            os.kill(os.getpid(), 15)


def trained(folder: Path) -> dict[str, object]:
    """Train, and train again with an interruption; the weights must be the same."""
    config = tiny_config(
        folder, trusted="digits?limit=400", epochs=3, name="whole", augment="crop", batch_size=31,
        untrusted=("photos?limit=40",),
    )  # fmt: skip
    runtime.configure(0, 1)
    whole = train(config, Silent())
    runtime.configure(0, 1)
    interrupts = Interrupts()
    interrupts.install()
    try:
        train(replace(config, name="cut"), StopIn(interrupts), interrupts)
        raise AssertionError("no rank was interrupted")
    except Interrupted:
        pass
    cut = resume(folder / "cut", Silent(), None)
    assert cut.checkpoint_fingerprint == whole.checkpoint_fingerprint
    return {
        "weights": whole.checkpoint_fingerprint,
        "losses": [entry.loss for entry in whole.epochs],
        "accuracy": [entry.held_out_accuracy for entry in whole.epochs],
        "coverage": [e.watched.sets[1].mean_coverage for e in whole.epochs if e.watched],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    runtime.configure(0, 1)
    runpy.run_path(str(PLUGIN))
    distributed.start("cpu")
    sweep.SWEEP_IMAGES = 16  # many batches of few images
    model = network()
    results = {**signatures(model), **scores(model), "training": trained(folder)}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(results))
    distributed.stop()


if __name__ == "__main__":
    main()
