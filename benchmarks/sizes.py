"""What a signature takes on disk, and how long reading it takes, for networks of every family.

    python benchmarks/sizes.py
    python benchmarks/sizes.py --networks torchvision:vit_b_16 --classes 3 10 100

Prints a Markdown table, a row a network and number of classes, or one JSON document with --json. No
image is read: the neurons are made up, of a thousand images that follow eighty common factors, so
that every coverage point keeps as many directions as it may. A signature of real images is of that
size or smaller.

- weights: the bytes of the network's weights and buffers, with random weights.
- signature: the bytes of the default method's file, on channels, with --calibration images.
- rank: the largest number of directions that a coverage point keeps, and whether numbers are stored
  exactly (float32) or compactly (bytes and half precision).
- read: seconds from the file to a scorer that is ready, on one thread; the best of three.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common
import models
import torch
from torch import Tensor

from covcli.core import runtime
from covcli.data.images import DataRecord
from covcli.methods import Layout, Method, State, make_method
from covcli.models.architectures import Classifier
from covcli.signature import signature as signatures
from covcli.signature.build import DEFAULT_METHOD
from covcli.signature.calibration import Calibration, Observed, calibrate, fits
from covcli.signature.fit import fold
from covcli.signature.record import Record
from covcli.signature.signature import Signature, condensed, layout_of, weights_bytes
from covcli.signature.surrogates import EXPERTS

IMAGES, FACTORS, GROUP = 1000, 80, 100
QUICK = {"calibration": 100}
REPETITIONS = 3


@dataclass(frozen=True)
class Size:
    """What is known of one network's signature: names and numbers as in the first lines."""

    network: str
    classes: int
    points: int
    neurons: int
    weights: int
    signature: int
    rank: int
    exact: bool
    seconds: float


def options() -> argparse.Namespace:
    parser = common.parser(__doc__, repetitions=REPETITIONS)
    parser.add_argument("--networks", nargs="+", help="default: those of models.py")
    parser.add_argument("--classes", type=int, nargs="+", default=[10])
    parser.add_argument("--calibration", type=int, default=1000, help="images")
    return common.read_options(parser, QUICK)


def made_up(layout: Layout, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield neurons (B, N) that follow common factors, and labels."""
    generator = torch.Generator().manual_seed(0)
    loadings = torch.randn(FACTORS, layout.neurons, generator=generator)
    generator.manual_seed(1 + seed)
    for begin in range(0, IMAGES, GROUP):
        common_part = torch.randn(GROUP, FACTORS, generator=generator) @ loadings
        own = torch.randn(GROUP, layout.neurons, generator=generator)
        yield common_part + own, torch.arange(begin, begin + GROUP) % layout.classes


def folded(method: Method, layout: Layout) -> State:
    """Return a method's complete state over made-up neurons."""
    sums = fold(method, layout, lambda: made_up(layout, 0))
    noisy = method.begin_noisy(sums)
    if noisy is not None:
        neurons, labels = next(made_up(layout, 1))
        method.observe_noisy(noisy, neurons, labels)
        sums.include(noisy)
    return sums


def signed(model: Classifier) -> Signature:
    """Return the signature of a network from made-up neurons."""
    method, points = make_method(DEFAULT_METHOD), tuple(model.points("channel"))
    classes = tuple(str(k) for k in range(model.spec.classes))
    sums = folded(method, layout_of(points, len(classes)))
    empty = Signature(method, "channel", points, sums, model.spec, "0" * 64, classes)
    return condensed(empty, sums, model, keep=False)


def calibrated(signature: Signature, images: int) -> Calibration:
    """Return a calibration on so many made-up images."""
    layout, parts = signature.layout, []
    for seed in range(2, 2 + -(-images // IMAGES)):
        for neurons, labels in made_up(layout, seed):
            logits = torch.zeros(len(labels), layout.classes)
            parts.append((signature.evidence(logits, neurons, labels), labels))
    evidence, predicted = (torch.cat(column)[:images] for column in zip(*parts, strict=True))
    softmax = torch.rand(images, dtype=torch.float64)
    outliers = [evidence[: len(evidence) // 10] for _ in EXPERTS]
    observed = Observed(evidence, softmax, predicted, torch.zeros(images, dtype=torch.bool))
    return calibrate(observed, fits(images, 0), outliers, arrangement=signature.arrangement)


def record(signature: Signature, images: int) -> Record:
    """Return a record of as many images as are calibrated on."""
    data = DataRecord("made up", "0" * 64, "0" * 64)
    counts = [IMAGES // signature.layout.classes] * signature.layout.classes
    provenance = runtime.provenance(common.CPU, 0)
    rows = tuple(range(images))
    return Record(data, IMAGES, tuple(counts), (), 0.9, 1.0, data, images, rows, provenance)


def measured(name: str, classes: int, args: argparse.Namespace) -> Size:
    common.note(f"{name}, {classes} classes")
    model = common.random_network(name, classes)
    signature = signed(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "signature.safetensors"
        calibration = calibrated(signature, args.calibration)
        signatures.save(path, signature, calibration, record(signature, args.calibration))
        seconds = min(read(path) for _ in range(args.repetitions))
        size = path.stat().st_size
    return Size(
        network=name,
        classes=classes,
        points=len(signature.points),
        neurons=sum(signature.sizes),
        weights=weights_bytes(model),
        signature=size,
        rank=int(signature.state["ranks"].max()),
        exact=signature.state["mean"].is_floating_point(),
        seconds=seconds,
    )


def read(path: Path) -> float:
    """Return the seconds of reading a signature and preparing its scorer."""
    began = time.perf_counter()
    with runtime.one_thread():
        signature, _, _ = signatures.load(path)
        replace(signature).scorer.eval()
    return time.perf_counter() - began


def main() -> None:
    args = options()
    names = args.networks or models.networks()
    sizes = [measured(name, count, args) for name in names for count in args.classes]
    if args.json:
        print(json.dumps({"provenance": runtime.provenance(common.CPU, 0),
                          "networks": [asdict(size) for size in sizes]}, indent=2))  # fmt: skip
        return
    print("| network | classes | neurons | weights, MB | signature, MB | share | rank | read, s |")
    print(f"|{' --- |' * 8}")
    for s in sizes:
        form = "exact" if s.exact else "compact"
        print(f"| `{s.network}` | {s.classes} | {s.neurons:,} | {s.weights / 1e6:.1f} | "
              f"{s.signature / 1e6:.2f} | {s.signature / s.weights:.1%} | {s.rank}, {form} | "
              f"{s.seconds:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
