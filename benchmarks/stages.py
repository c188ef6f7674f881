"""What each stage costs, from the build to the report, for many classes, images and large images.

    python benchmarks/stages.py vgg11/10/1000 vgg11/1000/1000 torchvision:resnet50/1000/200

A case is MODEL/CLASSES/IMAGES, and a process of its own. Its network has random weights, and a last
layer that predicts every class for one of the first images; its images are noise from a generator,
under the classes that the network predicts. So nothing is downloaded or stored, every class occurs,
and every image is trusted: the most work that a build can have. Images repeat after POOL.

- bare: the network over the trusted images, half of it before and half after the build.
- build: `fit_signature` over the trusted images, over the bare pass. stored: the signature's file.
With fewer images than classes, it ends here, since a build refuses a class without an image.
- command: `build_signature`, which also reads the checkpoint, calibrates on HELD_OUT other images
  and writes the file, over a bare pass over both sets.
- evaluate: `evaluate` on HELD_OUT trusted and as many untrusted images, over a bare pass over both.
- report: seconds of `report`, and the size of the page.
- at 1.28 M: build over bare, from the slopes between the two largest cases of a network with equal
  classes. Neurons beyond SPILL_BYTES are not stored, and the network runs once more.

Times are of the processor, not of the clock: other programs on the machine change them little. The
peak is the process's resident memory in that stage; `over bare` is its part above that of the bare
pass.
"""

import argparse
import json
import resource
import runpy
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import common
import torch
from torch import Tensor, nn

from covcli import EvaluationConfig, SignatureConfig, build_signature, evaluate, report
from covcli.core import runtime
from covcli.core.specs import parse
from covcli.data.images import ImageSet, NoiseSource
from covcli.data.registry import DATASETS, Request
from covcli.models import architectures
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier, ModelSpec
from covcli.models.checkpoint import Checkpoint
from covcli.signature.fit import SPILL_BYTES

HELD_OUT = 200
POOL = 1000
IMAGENET = 1_281_167
TRAINING, CALIBRATION, TEST = range(3)  # seeds


@dataclass(frozen=True)
class Stage:
    """What one stage took: seconds of the processor, and the peak of resident memory in MB."""

    seconds: float
    peak: float


@dataclass(frozen=True)
class Costs:
    """What a case took."""

    case: str
    classes: int
    images: int
    neurons: int
    points: int
    megabytes: float
    page: float
    stages: dict[str, Stage]

    def ratio(self, stage: str, images: int) -> float:
        """Return a stage's time over that of a bare pass over so many images."""
        bare = self.stages["bare"].seconds * images / self.images
        return self.stages[stage].seconds / bare


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("cases", nargs="*", help="MODEL/CLASSES/IMAGES", default=["vgg11/10/1000"])
    parser.add_argument("--method", default="ensemble")
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--plugin", type=Path, help="Python file that registers a model; it is run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


# The network and its images


def spread_network(name: str, classes: int) -> Classifier:
    """Return a network that predicts class k for the k-th training image.

    The last layer compares its input with that of those images: the product with a vector of length
    1 is largest for the vector's own direction.
    """
    mean, deviation = architectures.architecture(name).statistics
    spec = ModelSpec(name, classes, architectures.input_shape(name, False), mean, deviation)
    with runtime.seeded(0):
        model = architectures.build(spec).on(common.CPU).eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    source = NoiseSource("uniform", TRAINING)
    with last.register_forward_hook(lambda _layer, given, _out: seen.append(given[0].clone())):
        for rows in torch.arange(max(classes, 32)).split(32):
            common.bare_logits(model, source.read(rows, spec.shape))
    features = torch.cat(seen)
    away = features - features.mean(0)
    unit = away / away.norm(dim=1, keepdim=True)
    with torch.no_grad():
        last.weight.copy_(40 * unit[:classes] / away.norm(dim=1).mean())
        last.bias.copy_(-last.weight @ features.mean(0))
    return model


def register(model: Classifier) -> None:
    """Register the images, as `generated?seed=S&images=N`."""

    @cache
    def predicted(seed: int, count: int) -> Tensor:
        images = ImageSet("", NoiseSource("uniform", seed), torch.arange(count), None)
        labels = common.predicted(model, images).labels
        assert labels is not None
        return labels

    @DATASETS.add("generated")
    def generated(request: Request) -> ImageSet:
        seed, count = (request.spec.take(key, int, 0) for key in ("seed", "images"))
        rows = torch.arange(count) % POOL
        labels = predicted(seed, min(count, POOL))[rows]
        names = tuple(f"class {k}" for k in range(model.spec.classes))
        return ImageSet(request.spec.text, NoiseSource("uniform", seed), rows, labels, names)


def generated(seed: int, count: int) -> str:
    return f"generated?seed={seed}&images={count}"


# One case


def processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(work: Callable[[], object]) -> Stage:
    common.forget_peak()
    began = processor()
    work()
    return Stage(processor() - began, common.peak_memory() / 1e6)


def job(args: argparse.Namespace) -> Costs:
    """Run all stages of one case in this process."""
    name, classes, images = args.job.rsplit("/", 2)
    count = int(images)
    network = spread_network if count >= int(classes) else common.random_network
    model = network(name, int(classes))
    register(model)
    trusted = DATASETS.get("generated")(Request(parse(generated(TRAINING, count)), "train"))
    common.signature(model, common.cycled(trusted, 64), args.method)  # a warm-up
    halves = torch.arange(count).tensor_split(2)
    before = timed(common.bare_work(model, trusted.select(halves[0])))
    fitted = []
    build = timed(lambda: fitted.append(common.signature(model, trusted, args.method)))
    after = timed(common.bare_work(model, trusted.select(halves[1])))
    stages = {"bare": Stage(before.seconds + after.seconds, max(before.peak, after.peak)),
              "build": build}  # fmt: skip
    sizes = fitted.pop().sizes
    costs = Costs(args.job, int(classes), count, sum(sizes), len(sizes), 0.0, 0.0, stages)
    if count < int(classes):
        return costs
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = Checkpoint(
            folder / "checkpoint.pt", model, trusted.classes, None, torch.empty(0).long(), {}
        )
        checkpoints.save(checkpoint.path, checkpoint)
        signature = folder / "signature.safetensors"
        held_out, test = (generated(seed, args.held_out) for seed in (CALIBRATION, TEST))
        building = SignatureConfig(
            checkpoint.path, method=args.method, trusted=generated(TRAINING, count),
            calibration=held_out, confidence_threshold=0.0, output=signature, device="cpu",
        )  # fmt: skip
        evaluating = EvaluationConfig(
            (f"noise:gaussian?limit={args.held_out}",), checkpoint=checkpoint.path,
            signature=signature, trusted=test, device="cpu",
        )  # fmt: skip
        for spec in (held_out, test):  # draw and label them now
            DATASETS.get("generated")(Request(parse(spec), "test"))
        stages["command"] = timed(lambda: build_signature(building))
        stages["evaluate"] = timed(lambda: evaluate(evaluating))
        stages["report"] = timed(lambda: report(folder))
        megabytes = signature.stat().st_size / 1e6
        page = (folder / "report.html").stat().st_size / 1e6
    return replace(costs, megabytes=megabytes, page=page)


# Output


def table(every: list[Costs], held_out: int) -> list[str]:
    head = ["case", "points", "neurons", "stored, MB", "bare, s", "build", "command", "evaluate",
            "report, s", "page, MB", "peak of bare, MB", "build over bare, MB",
            "evaluate over bare, MB", "report over bare, MB"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for each in every:
        bare, last = each.stages["bare"], "report" in each.stages
        cells = [each.case, str(each.points), str(each.neurons), f"{each.megabytes:.1f}",
                 f"{bare.seconds:.1f}", f"{each.ratio('build', each.images):.3g}"]  # fmt: skip
        cells += [
            f"{each.ratio('command', each.images + held_out):.3g}",
            f"{each.ratio('evaluate', 2 * held_out):.3g}",
            f"{each.stages['report'].seconds:.1f}", f"{each.page:.1f}",
        ] if last else ["–"] * 4  # fmt: skip
        cells.append(f"{bare.peak:.0f}")
        for name in ("build", "evaluate", "report"):
            stage = each.stages.get(name)
            cells.append("–" if stage is None else f"{stage.peak - bare.peak:+.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def extrapolated(every: list[Costs]) -> dict[str, float]:
    """Return build over bare at ImageNet's size, by network and classes, of two sizes or more."""
    groups: dict[str, list[Costs]] = {}
    for each in every:
        groups.setdefault(each.case.rsplit("/", 1)[0], []).append(each)
    results = {}
    for name, group in groups.items():
        if len(group) < 2:
            continue
        few, many = sorted(group, key=lambda each: each.images)[-2:]
        apart = many.images - few.images
        build, bare = (
            many.stages[stage].seconds
            + (many.stages[stage].seconds - few.stages[stage].seconds)
            / apart
            * (IMAGENET - many.images)
            for stage in ("build", "bare")
        )
        again = 4 * many.neurons * IMAGENET > SPILL_BYTES
        results[name] = build / bare + again
    return results


def main() -> None:
    args = options()
    if args.plugin:
        runpy.run_path(str(args.plugin))
    runtime.configure(0, args.threads)
    if args.job:
        print(json.dumps(asdict(job(args))))
        return
    every = []
    for case in args.cases:
        values = common.subprocess_job(case)
        stages = {name: Stage(**stage) for name, stage in values["stages"].items()}
        every.append(replace(Costs(**values), stages=stages))
    slopes = extrapolated(every)
    if args.json:
        print(json.dumps({"cases": [asdict(each) for each in every], "at_imagenet": slopes}))
        return
    print("\n".join(table(every, args.held_out)))
    for name, ratio in slopes.items():
        print(f"\n{name}: at {IMAGENET} images the build would take {ratio:.3g} of a bare pass.")


if __name__ == "__main__":
    main()
