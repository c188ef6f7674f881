"""Networks of torchvision, timm and covcli held against one another: built, scored, explained.

    python benchmarks/models.py
    python benchmarks/models.py --networks torchvision:resnet18 timm:resnet18 --batch 32

Prints a Markdown table, a row a network, or one JSON document with --json. Each has seeded random
weights, ten classes and its own input size; the images are noise of that size under the classes
that the network predicts. The default method, on channels.

- points, neurons: what is watched by default.
- signature: the bytes of its tensors as a share of the weights' bytes. Those of a signature file
  besides do not grow with the network.
- monitored: `Monitor` on --batch uint8 images, from pixels to verdicts, as a multiple of
  `model(to_network(images))` in inference mode; the two take turns, the median of --repetitions.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import common
import torch
from common import Work

from covcli.core import runtime
from covcli.data.images import ImageSet, in_memory
from covcli.evaluation.explain import explain
from covcli.models.architectures import MODELS, Classifier
from covcli.signature.build import DEFAULT_METHOD
from covcli.signature.monitor import Monitor

OTHERS = (
    "torchvision:resnet18", "torchvision:vit_b_16", "torchvision:swin_t",
    "torchvision:convnext_tiny", "torchvision:efficientnet_b0", "torchvision:mobilenet_v3_small",
    "torchvision:densenet121", "torchvision:squeezenet1_1", "torchvision:googlenet",
    "torchvision:inception_v3", "torchvision:regnet_y_400mf",
    "timm:resnet18", "timm:vit_tiny_patch16_224", "timm:convnextv2_atto",
    "timm:mobilenetv4_conv_small",
)  # fmt: skip
QUICK = {"repetitions": 1, "images": 12, "calibration": 32, "batch": 4}


@dataclass(frozen=True)
class Row:
    """What is known of one network.

    Attributes
    ----------
    network, side
        Its name, and the height and width of its input.
    points, neurons
        What is watched.
    weights, signature
        Bytes of both.
    monitored
        How much longer a monitored pass takes than a bare one.
    explained
        How many coverage points the explanation of an image ranks, and how many of them hold
        neurons that have left their range.
    """

    network: str
    side: int
    points: int
    neurons: int
    weights: int
    signature: int
    monitored: float
    explained: tuple[int, int]


def options() -> argparse.Namespace:
    parser = common.parser(__doc__, repetitions=5)
    parser.add_argument("--networks", nargs="+", help="default: all registered ones, and the list")
    parser.add_argument("--images", type=int, default=32, help="of a build")
    parser.add_argument("--calibration", type=int, default=32, help="images of a build")
    parser.add_argument("--batch", type=int, default=8, help="of a monitored pass")
    return common.read_options(parser, QUICK)


def networks() -> list[str]:
    """Return the names of the networks that covcli is held against."""
    return [*MODELS, *OTHERS]


def noise(model: Classifier, count: int, seed: int) -> ImageSet:
    """Return noise of the network's own size, some images brighter than others, as it is."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *model.spec.shape)
    light = torch.randint(64, 256, (count, model.spec.shape[0], 1, 1), generator=generator)
    pixels = torch.randint(0, 256, shape, generator=generator) * light // 255
    images = in_memory(f"noise {seed}", pixels.to(torch.uint8), None, ready=True)
    return common.predicted(model, images)


def built(name: str, images: int, calibration: int) -> tuple[Monitor, ImageSet]:
    """Build the monitor of a network of random weights; return it, and what calibrated it."""
    model = common.random_network(name)
    settle(model)
    held_out = noise(model, calibration, 1)
    sets = noise(model, images, 0), held_out
    return common.monitor(model, sets, DEFAULT_METHOD), held_out


def settle(model: Classifier) -> None:
    """Let a network of random weights normalise by statistics of images, as a trained one does."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(8, *model.spec.shape))
    model.eval()


def measured(name: str, args: argparse.Namespace) -> Row:
    common.note(name)
    monitor, images = built(name, args.images, args.calibration)
    model, signature = monitor.model, monitor.judge.signature
    pixels = images.batch(torch.arange(args.batch), model.spec.shape)
    variants: dict[str, Work] = {
        "bare": partial(common.bare_logits, model, pixels),
        "ours": partial(monitor, pixels),
    }
    seconds = common.interleaved(variants, args.repetitions)
    first = explain(monitor.judge, images, [0])[0]
    return Row(
        network=name,
        side=model.spec.shape[1],
        points=len(signature.points),
        neurons=sum(signature.sizes),
        weights=size(list(model.network.state_dict().values())),
        signature=size(list(signature.state.tensors.values())),
        monitored=common.ratio(seconds["ours"], seconds["bare"]).value,
        explained=(len(first.points), sum(point.left > 0 for point in first.points)),
    )


def size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    args = options()
    rows = [measured(name, args) for name in args.networks or networks()]
    if args.json:
        print(json.dumps({"provenance": runtime.provenance(common.CPU, 0),
                          "networks": [asdict(row) for row in rows]}, indent=2))  # fmt: skip
        return
    print("| network | input | points | neurons | weights, MB | signature | monitored pass |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(f"| `{r.network}` | {r.side} | {r.points} | {r.neurons:,} | {r.weights / 1e6:.1f} | "
              f"{r.signature / r.weights:.1%} | {r.monitored:.2f}× |")  # fmt: skip


if __name__ == "__main__":
    main()
