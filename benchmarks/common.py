"""What the benchmarks of time and memory share: network, images, timing, memory and output.

Results are ratios within one run. The variants of a measurement take turns, A B C A B C, after a
warm-up; the ratio of each repetition is taken against the bare network in that same repetition,
and the median of the ratios is the result, with the middle half of them beside it. Everything runs
on the CPU, with the repeatable kernels that covcli's commands ask for on both sides of a ratio.
"""

import argparse
import contextlib
import copy
import json
import os
import resource
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from covcli.core import runtime
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.data.images import ImageSet, in_memory
from covcli.methods import make_method
from covcli.methods.state import Granularity
from covcli.models import architectures
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier, ModelSpec
from covcli.models.sweep import sweep, sweep_batch, to_network
from covcli.signature.fit import How, fit_judge, fit_signature
from covcli.signature.monitor import Monitor
from covcli.signature.signature import Signature
from covcli.training.epoch import Trainer

CPU = torch.device("cpu")
CLASSES = 10
# So many different images stand for any number of them where their classes must be predicted.
POOL = 1000
Work: TypeAlias = Callable[[], object]
Seconds: TypeAlias = Mapping[str, list[float]]


def parser(doc: str | None, repetitions: int) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    options = argparse.ArgumentParser(description=str(doc).splitlines()[0])
    options.add_argument("--data", type=Path, help="holds cifar10/train.npz and test.npz; default: "
                      "COVCLI_DATA_DIR where it does, else random images")  # fmt: skip
    options.add_argument("--weights", type=Path, help="a state dict, or a checkpoint of covcli; "
                      "default: seeded random weights")  # fmt: skip
    options.add_argument("--model", default="vgg19", help="of a bare state dict or random weights")
    options.add_argument(
        "--plugin", type=Path, help="Python file that registers a model; it is run"
    )
    options.add_argument("--repetitions", type=int, default=repetitions)
    options.add_argument("--threads", type=int, default=0, help="0: torch's default")
    options.add_argument(
        "--quick", action="store_true", help="few images, one repetition: to try it"
    )
    options.add_argument("--json", action="store_true")
    options.add_argument("--job", help=argparse.SUPPRESS)  # what a subprocess is to do
    return options


def read_options(
    options: argparse.ArgumentParser, quick: Mapping[str, Any], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line and set torch up; `quick` names what --quick changes."""
    options.set_defaults(**(quick if options.parse_args(argv).quick else {}))
    args = options.parse_args(argv)
    if args.plugin:
        runpy.run_path(str(args.plugin))
    runtime.configure(0, args.threads)
    return args


def note(text: str) -> None:
    """Tell on standard error how far the benchmark is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# Network and images


def network(args: argparse.Namespace) -> Classifier:
    """Return the network to watch, with the weights named or with random ones."""
    if args.weights is None:
        return random_network(args.model)
    return checkpoints.load(args.weights, args.model).model.eval().on(CPU)


def random_network(name: str, classes: int = CLASSES) -> Classifier:
    """Return a network with seeded random weights that predicts many of its classes.

    Its last bias is set so that the logits are 0 on average, or it would predict one class only.
    """
    mean, deviation = architectures.architecture(name).statistics
    spec = ModelSpec(name, classes, architectures.input_shape(name, False), mean, deviation)
    with runtime.seeded(0):
        model = architectures.build(spec).on(CPU)
    rows = torch.arange(min(64, sweep_batch(spec.shape)) if spec.shape[1] <= 64 else 8)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    logits = bare_logits(model, random_images(0).batch(rows, spec.shape))
    with torch.no_grad():
        for last in linear[-1:]:
            last.bias.sub_(logits.mean(0).clone())
    return model


def random_images(seed: int) -> ImageSet:
    """Return POOL images of uniform noise, 32×32, in memory."""
    drawn = datasets.load(f"noise:uniform?limit={POOL}&seed={seed}", "test")
    pixels = drawn.batch(torch.arange(POOL), (3, 32, 32))
    return in_memory(drawn.name, pixels, None, flips=True)


def npz_folder(args: argparse.Namespace) -> Path | None:
    """Return the folder of real images; None if there is none and none was asked for."""
    folder = Path(args.data or os.environ.get("COVCLI_DATA_DIR", "data")) / "cifar10"
    return folder if args.data or (folder / "train.npz").is_file() else None


def load_images(
    args: argparse.Namespace, model: Classifier, trusted: int, held_out: int
) -> tuple[ImageSet, ImageSet]:
    """Return so many trusted images and so many to calibrate on, in memory.

    Real images have their labels if the network has its weights. Else they get the classes that
    the network predicts, so that all of them are trusted; at most POOL are different then.
    """
    folder = npz_folder(args)
    if folder is None:
        sets = [random_images(seed) for seed in (0, 1)]
    else:
        sets = [datasets.load(f"npz:{folder}", "train"), datasets.load(f"npz:{folder}", "test")]
    if folder is None or args.weights is None:
        counts = min(POOL, trusted), min(POOL, held_out)
        sets = [predicted(model, cycled(s, n)) for s, n in zip(sets, counts, strict=True)]
    return cycled(sets[0], trusted), cycled(sets[1], held_out)


def predicted(model: Classifier, images: ImageSet) -> ImageSet:
    """Return the images under the classes that a network predicts."""
    swept = sweep(model, images, [], "channel", Silent(), "")
    return replace(images, labels=torch.cat([batch.logits.argmax(1) for batch in swept]))


def cycled(images: ImageSet, count: int) -> ImageSet:
    """Return so many images, beginning again where a set ends."""
    return images.select(torch.arange(count) % len(images))


# What is measured


def bare_logits(model: Classifier, pixels: Tensor) -> Tensor:
    """Run the network on uint8 images, and do nothing else."""
    with torch.inference_mode():
        logits: Tensor = model(to_network(pixels, CPU))
    return logits


def bare_pass(model: Classifier, images: ImageSet) -> None:
    """Read images and run the network on them, in a sweep's batches, and do nothing else."""
    shape = model.spec.shape
    for rows in torch.arange(len(images)).split(sweep_batch(shape)):
        bare_logits(model, images.batch(rows, shape))


def signature(
    model: Classifier, images: ImageSet, method: str, granularity: Granularity = "channel"
) -> Signature:
    """Build a signature in memory, from every image that the network gets right."""
    return fit_signature(model, images, How(make_method(method), granularity, 0.0), Silent())[0]


def monitor(
    model: Classifier, sets: tuple[ImageSet, ImageSet], method: str,
    granularity: Granularity = "channel",
) -> Monitor:  # fmt: skip
    """Return a network's monitor, from trusted images and some to calibrate on."""
    fitted = signature(model, sets[0], method, granularity)
    return Monitor(fit_judge(model, fitted, sets[1], Silent()))


def trainer(model: Classifier, make_penalty: Callable[[], nn.Module] | None = None) -> Trainer:
    """Return what trains a copy of a network, by steps too small to change what is measured."""
    learner = copy.deepcopy(model).on(CPU)
    optimizer = torch.optim.SGD(learner.parameters(), 1e-5, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
    return Trainer(
        learner, learner, optimizer, schedule, make_penalty and make_penalty(), 1.0,
        learner.points("channel"), "channel", 0.9,
    )  # fmt: skip


def split_pass(model: Classifier, images: ImageSet, builds: Mapping[str, Work]) -> dict[str, Work]:
    """Return the builds with the parts of one bare pass over the images before, between and after.

    So a machine that grows slower meanwhile slows both sides of the ratio alike.
    """
    parts = torch.arange(len(images)).tensor_split(len(builds) + 1)
    variants: dict[str, Work] = {"bare 0": bare_work(model, images.select(parts[0]))}
    for i, (name, build) in enumerate(builds.items(), 1):
        variants[name] = build
        variants[f"bare {i}"] = bare_work(model, images.select(parts[i]))
    return variants


def bare_work(model: Classifier, images: ImageSet) -> Work:
    return lambda: bare_pass(model, images)


# Time and memory


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over repetitions, and the ends of the middle half."""

    value: float
    low: float
    high: float
    repetitions: int


def interleaved(
    variants: Mapping[str, Work],
    repetitions: int,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run the variants in turn, again and again; return the seconds of each in each repetition."""
    if warm_up:
        for work in variants.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, work in variants.items():
            began = clock()
            work()
            seconds[name].append(clock() - began)
    return seconds


def total(seconds: Seconds, start: str) -> list[float]:
    """Return in each repetition the seconds of all variants whose names start so."""
    parts = [times for name, times in seconds.items() if name.startswith(start)]
    return [sum(times) for times in zip(*parts, strict=True)]


def ratio(over: Sequence[float], under: Sequence[float], scale: float = 1.0) -> Ratio:
    """Return the ratio of two lists of seconds, repetition by repetition."""
    each = [scale * a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = np.quantile(each, [0.25, 0.5, 0.75]).tolist()
    return Ratio(middle, low, high, len(each))


def plain(value: float) -> Ratio:
    """Return a ratio that was measured once."""
    return Ratio(value, value, value, 1)


def forget_peak() -> None:
    """Let the peak begin at what is resident now, where the system can (Linux).

    Else loading counts too: a VGG is built with a head that takes 500 MB for a moment.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the largest resident size that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def subprocess_job(job: str) -> dict[str, Any]:
    """Run this script again in a process of its own, and return the numbers that it prints.

    A process begins with its parent's peak, so memory is measured before the parent has loaded
    anything.
    """
    note(f"in a process of its own: {job}")
    command = [sys.executable, *sys.argv, "--job", job]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return dict(json.loads(output))


# Output


@dataclass
class Report:
    """What a benchmark has found."""

    ratios: dict[str, Ratio] = field(default_factory=dict)
    # By what was done: "peak" and, where there is a bare pass beside it, "growth" over that; in MB.
    memory: dict[str, dict[str, float]] = field(default_factory=dict)

    def show(self, args: argparse.Namespace, legend: str, images: Mapping[str, ImageSet]) -> None:
        """Print the tables and what they mean, or one JSON document."""
        if args.json:
            print(json.dumps(self._document(args, images), indent=2))
            return
        print("| figure | ratio | middle half | repetitions |\n| --- | --- | --- | --- |")
        for name, r in self.ratios.items():
            print(f"| {name} | {r.value:.3g} | {r.low:.3g} to {r.high:.3g} | {r.repetitions} |")
        for line in memory_table(self.memory):
            print(line)
        print(f"\n{legend}")

    def _document(self, args: argparse.Namespace, images: Mapping[str, ImageSet]) -> dict[str, Any]:
        return {
            "settings": {key: str(value) for key, value in vars(args).items()},
            "images": {name: f"{len(s)} of {s.name}" for name, s in images.items()},
            "provenance": runtime.provenance(CPU, 0),
            "ratios": {name: r.value for name, r in self.ratios.items()},
            "spread": {name: [r.low, r.high] for name, r in self.ratios.items()},
            "repetitions": {name: r.repetitions for name, r in self.ratios.items()},
            "memory": self.memory,
        }


def memory_table(memory: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Word the peaks as a Markdown table."""
    if memory:
        yield "\n| memory of | peak, MB | over the bare pass, MB |\n| --- | --- | --- |"
    for name, entry in memory.items():
        growth = f"{entry['growth']:+.0f}" if "growth" in entry else "–"
        yield f"| {name} | {entry['peak']:.0f} | {growth} |"
