"""What a monitor costs once it is exported: files in ONNX Runtime against the bare network there.

    python benchmarks/export.py --networks vgg19,resnet18,torchvision:mobilenet_v3_small

Random weights and random images: ratios do not depend on them. For each network and method it
exports monitor and bare network to ONNX, and prints a Markdown table, or one JSON document with
--json:

- batch_B: the exported monitor against the exported bare network, in ONNX Runtime, on B images;
- eager_batch_B: the exported monitor against `Monitor` in eager torch, on the same images;
- again_batch_B: the bare network once more in every turn, against itself; what differs from 1 is
  noise;
- the largest differences between file and monitor on 256 images, and the sizes of the files.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import common
import torch
from common import Ratio, Work
from torch import Tensor, nn

from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data.images import ImageSet
from covcli.models.architectures import Classifier
from covcli.monitoring import onnx_format
from covcli.monitoring.export import OnnxFile
from covcli.monitoring.exported import MOST_IMAGES, MonitorGraph, Verification
from covcli.monitoring.onnx_format import OnnxProgram
from covcli.monitoring.verification import verify
from covcli.signature.monitor import Monitor

NETWORKS = (
    "vgg19,resnet18,torchvision:mobilenet_v3_small,timm:vit_tiny_patch16_224,timm:convnextv2_atto"
)
METHODS = "ensemble,src"
QUICK = {"repetitions": 1, "images": 60, "batches": "1,4", "methods": "src", "networks": "vgg11"}


@dataclass(frozen=True)
class Found:
    """What was measured of a network under a method.

    Attributes
    ----------
    network, method
        Which ones.
    ratios
        By the names in the script's first lines.
    verification
        How far the file is from the monitor.
    megabytes, bare_megabytes
        The sizes of the files.
    """

    network: str
    method: str
    ratios: dict[str, Ratio]
    verification: Verification
    megabytes: float
    bare_megabytes: float


class Bare(nn.Module):
    """A network alone, from bytes to logits."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return the logits."""
        return (self.model(images.float() / 255),)


def options() -> argparse.Namespace:
    parser = common.parser(__doc__, repetitions=9)
    parser.add_argument("--networks", default=NETWORKS, help="names, with commas between")
    parser.add_argument("--methods", default=METHODS, help="names, with commas between")
    parser.add_argument("--batches", default="1,64", help="numbers of images, with commas between")
    parser.add_argument("--images", type=int, default=120, help="trusted, and as many to calibrate")
    return common.read_options(parser, QUICK)


def bare_file(model: Classifier) -> bytes:
    example = torch.zeros(2, *model.spec.shape, dtype=torch.uint8)
    batch = {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)}
    with onnx_format.plain_layout(model):
        program = torch.export.export(Bare(model), (example,), dynamic_shapes=(batch,))
        return onnx_format.packed(onnx_format.convert(program, ["logits"], model.spec.name))


def measured(name: str, method: str, args: argparse.Namespace) -> Found:
    common.note(f"{name}, {method}")
    model = common.random_network(name)
    sets = random_sets(model, args.images)
    monitor = common.monitor(model, sets, method)
    model.requires_grad_(False)
    bare_content = bare_file(model)
    file = OnnxFile(MonitorGraph(monitor.judge, "uint8"))
    content = file.content()
    verification = verify(monitor.judge, file.run, "uint8", common.random_images(2), Silent())
    programs = [OnnxProgram(each, max(1, args.threads)) for each in (bare_content, content)]
    ratios: dict[str, Ratio] = {}
    for batch in map(int, args.batches.split(",")):
        pixels = common.cycled(sets[1], batch).batch(torch.arange(batch), model.spec.shape)
        ratios |= timed(programs, monitor, pixels, args.repetitions)
    return Found(name, method, ratios, verification, len(content) / 1e6, len(bare_content) / 1e6)


def random_sets(model: Classifier, count: int) -> tuple[ImageSet, ImageSet]:
    """Return random images under the classes that the network predicts."""
    sets = [common.random_images(seed) for seed in (0, 1)]
    one, two = (common.predicted(model, common.cycled(each, count)) for each in sets)
    return one, two


def timed(
    programs: Sequence[OnnxProgram], monitor: Monitor, pixels: Tensor, repetitions: int
) -> dict[str, Ratio]:
    """Time the files in turn; a turn runs single images several times."""
    floats, batch = pixels.float() / 255, len(pixels)
    times = 10 if batch == 1 else 1
    bare, ours = (partial(repeated, partial(p, pixels), times) for p in programs)
    variants = {"bare": bare, "ours": ours, "again": bare,
                "eager": partial(repeated, partial(monitor, floats), times)}  # fmt: skip
    # With one thread, processor time: what other programs do meanwhile is not in it.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = common.interleaved(variants, repetitions, clock=clock)
    return {
        f"batch_{batch}": common.ratio(seconds["ours"], seconds["bare"]),
        f"eager_batch_{batch}": common.ratio(seconds["ours"], seconds["eager"]),
        f"again_batch_{batch}": common.ratio(seconds["again"], seconds["bare"]),
    }


def repeated(work: Work, times: int) -> None:
    for _ in range(times):
        work()


def table(results: Sequence[Found]) -> str:
    """Word the results as a Markdown table."""
    names = list(results[0].ratios)
    head = ["network", "method", *names, "logits", "score", "beyond", "file, MB", "bare, MB"]
    lines = [head, ["---"] * len(head)]
    for result in results:
        v = result.verification
        lines.append(
            [result.network, result.method, *(f"{result.ratios[name].value:.2f}" for name in names),
             f"{v.logits:.1e}", f"{v.score:.1e}", f"{v.beyond} of {v.images}",
             f"{result.megabytes:.1f}", f"{result.bare_megabytes:.1f}"]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    args = options()
    results = []
    for name in args.networks.split(","):
        for method in args.methods.split(","):
            try:
                results.append(measured(name, method, args))
            except CovcliError as error:
                common.note(f"{name}, {method}: {error}")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        provenance = runtime.provenance(common.CPU, 0)
        document = {
            "settings": settings,
            "provenance": provenance,
            "found": list(map(asdict, results)),
        }
        print(json.dumps(document, indent=2))
    elif results:
        print(table(results))


if __name__ == "__main__":
    main()
