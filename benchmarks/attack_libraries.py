"""Compare libraries of attacks: success, size of the perturbation, work and time.

    python benchmarks/attack_libraries.py --data DIR --weights FILE

Prints a Markdown table. Every library attacks the same images of CIFAR-10's test set, which the
network classifies correctly, with the same parameters as far as the libraries agree on them:

- fgsm, pgd: L∞ within 2/255, where not every image is deceived; pgd takes 10 steps of ε/4;
- pgd-l2: L2 within 0.25, 20 steps of 2.5·ε/20;
- deepfool: 50 steps, overshoot 0.02;
- cw: 5 searches for the constant from 1 with 40 steps of Adam at 0.05; torchattacks has no such
  search and takes 200 steps with the constant 1; ART replaces Adam by a line search, 10 a search;
- boundary: about 400 queries an image from the same start;
- autoattack: the standard version, L∞ within 2/255.

The last four take a quarter of the images. "size" is the median norm (L2, or L∞ in units of 1/255)
over the deceived images, "farthest" the largest over all images. "passes" counts how many images
the network read for each attacked image, and "time" is the ratio to foolbox, or to the first
library that has the attack. A library that is not installed is left out with a word, and so are
secml-torch's attacks that call foolbox. The libraries are no dependencies of covcli:

    pip install adversarial-robustness-toolbox multiprocess secml-torch
    pip install --no-deps torchattacks adv-lib

torchattacks requires an old release of requests, and adv-lib imports visdom, which builds only with
`--no-build-isolation` and an older setuptools (65 here).
"""

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

import common
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from covcli.attacks import attacks
from covcli.attacks.library import for_foolbox, library
from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.models.architectures import Classifier
from covcli.models.sweep import to_network

EPSILON, RADIUS = 2 / 255, 0.25
Perturb: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# The norm of each attack, and the share of the images that it takes.
NORMS: Mapping[str, tuple[float, float]] = {
    "fgsm": (math.inf, 1), "pgd": (math.inf, 1), "pgd-l2": (2, 1), "deepfool": (2, 1 / 4),
    "cw": (2, 1 / 4), "boundary": (2, 1 / 4), "autoattack": (math.inf, 1 / 4),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One library's result with one attack."""

    attack: str
    library: str
    success: float
    size: float
    farthest: float
    passes: float
    seconds: float


class Counted(nn.Module):
    """A network that counts the images it reads."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        self.images += len(images)
        logits: Tensor = self.model(images.float())  # ART's boundary attack passes doubles
        return logits


def _foolbox(model: Counted) -> Mapping[str, Perturb]:
    known, target = library().attacks, for_foolbox(model, common.CPU)

    def run(attack: Any, epsilon: float | None) -> Perturb:
        return lambda images, labels: attack(target, images, labels, epsilons=epsilon)[1]

    def boundary(images: Tensor, labels: Tensor) -> Tensor:
        attack = known.BoundaryAttack(
            steps=200, spherical_step=0.1, source_step=0.02, update_stats_every_k=1
        )
        starts, _ = attacks.boundary_starts(model, images, labels)
        result: Tensor = attack.run(target, images, labels, starting_points=starts)
        return result

    return {
        "fgsm": run(known.LinfFastGradientAttack(), EPSILON),
        "pgd": run(known.LinfPGD(abs_stepsize=EPSILON / 4, steps=10), EPSILON),
        "pgd-l2": run(known.L2PGD(abs_stepsize=RADIUS / 8, steps=20), RADIUS),
        "deepfool": run(known.L2DeepFoolAttack(steps=50, overshoot=0.02), None),
        "cw": run(
            known.L2CarliniWagnerAttack(
                binary_search_steps=5, steps=40, stepsize=0.05, initial_const=1, abort_early=False
            ),
            None,
        ),
        "boundary": boundary,
    }


def _art(model: Counted) -> Mapping[str, Perturb]:
    evasion = import_module("art.attacks.evasion")
    target = import_module("art.estimators.classification").PyTorchClassifier(
        model, nn.CrossEntropyLoss(), model.model.spec.shape, common.CLASSES,
        clip_values=(0, 1), device_type="cpu",
    )  # fmt: skip

    def run(attack: Any) -> Perturb:
        return lambda x, y: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    def boundary(images: Tensor, labels: Tensor) -> Tensor:
        attack = evasion.BoundaryAttack(
            target, targeted=False, delta=0.1, epsilon=0.02, max_iter=25, sample_size=8,
            num_trial=10, verbose=False,
        )  # fmt: skip
        starts, _ = attacks.boundary_starts(model, images, labels)
        return torch.from_numpy(attack.generate(images.numpy(), x_adv_init=starts.numpy()))

    pgd, size = evasion.ProjectedGradientDescentPyTorch, {"batch_size": 64, "verbose": False}
    return {
        "fgsm": run(evasion.FastGradientMethod(target, eps=EPSILON, batch_size=64)),
        "pgd": run(
            pgd(target, eps=EPSILON, eps_step=EPSILON / 4, max_iter=10, num_random_init=1, **size)
        ),
        "pgd-l2": run(
            pgd(target, norm=2, eps=RADIUS, eps_step=RADIUS / 8, max_iter=20, num_random_init=1,
                **size)
        ),
        "deepfool": run(evasion.DeepFool(target, max_iter=50, epsilon=0.02, **size)),
        "cw": run(
            evasion.CarliniL2Method(
                target, binary_search_steps=5, max_iter=10, learning_rate=0.05, initial_const=1,
                **size,
            )
        ),
        "boundary": boundary,
        "autoattack": run(
            evasion.AutoAttack(target, eps=EPSILON, eps_step=EPSILON / 4, batch_size=64)
        ),
    }  # fmt: skip


def _torchattacks(model: Counted) -> Mapping[str, Perturb]:
    known = import_module("torchattacks")
    return {
        "fgsm": known.FGSM(model, eps=EPSILON),
        "pgd": known.PGD(model, eps=EPSILON, alpha=EPSILON / 4, steps=10),
        "pgd-l2": known.PGDL2(model, eps=RADIUS, alpha=RADIUS / 8, steps=20),
        "deepfool": known.DeepFool(model, steps=50, overshoot=0.02),
        "cw": known.CW(model, c=1, steps=200, lr=0.05),
        "autoattack": known.AutoAttack(model, eps=EPSILON, n_classes=common.CLASSES),
    }


def _adv_lib(model: Counted) -> Mapping[str, Perturb]:
    known = import_module("adv_lib.attacks")
    return {
        "pgd": lambda x, y: known.pgd_linf(
            model, x, y, EPSILON, steps=10, relative_step_size=1 / 4
        ),
        "deepfool": lambda x, y: known.df(model, x, y, steps=50, overshoot=0.02),
        "cw": lambda x, y: known.carlini_wagner_l2(
            model, x, y, learning_rate=0.05, initial_const=1.0, binary_search_steps=5,
            max_iterations=40,
        ),
    }  # fmt: skip


def _secml(model: Counted) -> Mapping[str, Perturb]:
    known = import_module("secmlt.adv.evasion.pgd")
    target = import_module("secmlt.models.pytorch.base_pytorch_nn").BasePyTorchClassifier(model)

    def run(norm: str, epsilon: float, steps: int, step: float, start: bool = True) -> Perturb:
        attack = known.PGD(norm, epsilon, steps, step, random_start=start, backend="native")

        def perturb(images: Tensor, labels: Tensor) -> Tensor:
            batches = attack(target, DataLoader(TensorDataset(images, labels), len(images)))
            return torch.cat([attacked for attacked, _ in batches])

        return perturb

    return {
        "pgd": run("linf", EPSILON, 10, EPSILON / 4),
        "pgd-l2": run("l2", RADIUS, 20, RADIUS / 8),
    }


LIBRARIES: Mapping[str, Callable[[Counted], Mapping[str, Perturb]]] = {
    "foolbox": _foolbox, "ART": _art, "torchattacks": _torchattacks, "adv-lib": _adv_lib,
    "secml-torch": _secml,
}  # fmt: skip


def correct(model: Classifier, images: Any, count: int) -> tuple[Tensor, Tensor]:
    """Return the first images that a network classifies correctly, and their classes."""
    few = images.select(torch.arange(min(len(images), 2 * count)))
    pixels = to_network(few.batch(torch.arange(len(few)), model.spec.shape), common.CPU)
    with torch.no_grad():
        right = model(pixels).argmax(1) == few.known_labels()
    return pixels[right][:count].contiguous(), few.known_labels()[right][:count]


def measure(
    attack: str, library: str, perturb: Perturb, model: Counted, sample: tuple[Tensor, Tensor]
) -> Row:
    """Attack images with one library."""
    norm, share = NORMS[attack]
    images, labels = (part[: math.ceil(share * len(part))] for part in sample)
    common.note(f"{attack} by {library}")
    model.images, began = 0, time.perf_counter()
    with runtime.seeded(0):
        attacked = perturb(images.clone(), labels.clone()).detach()
    seconds, passes = time.perf_counter() - began, model.images / len(images)
    sizes = (attacked - images).flatten(1).norm(norm, dim=1) * (255 if norm == math.inf else 1)
    with torch.no_grad():
        deceived = model(attacked).argmax(1) != labels
    size = float(sizes[deceived].median()) if deceived.any() else math.nan
    return Row(
        attack, library, float(deceived.double().mean()), size, float(sizes.max()), passes, seconds
    )


def measured(
    model: Counted,
    sample: tuple[Tensor, Tensor],
    names: Collection[str],
    libraries: Collection[str],
) -> Iterator[Row]:
    """Run the attacks that are named, of the libraries that are named and installed."""
    known: dict[str, Mapping[str, Perturb]] = {}
    for name in libraries:
        try:
            known[name] = LIBRARIES[name](model)
        except (ImportError, CovcliError) as error:
            common.note(f"{name} is left out: {error}")
    for attack in names:
        for name, perturbs in known.items():
            if attack in perturbs:
                yield measure(attack, name, perturbs[attack], model, sample)


def main() -> None:
    parser = common.parser(__doc__, repetitions=1)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--attacks", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    args = common.read_options(parser, {"images": 8})
    # torchattacks' L2 PGD fails on gradients in the layout that covcli's networks have.
    model = common.network(args).to(memory_format=torch.contiguous_format)
    sample = correct(model, common.load_images(args, model, 1, 1000)[1], args.images)
    model.requires_grad_(False)
    units: dict[str, float] = {}
    print("| attack | library | deceived | size | farthest | passes | time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in measured(Counted(model).eval(), sample, args.attacks, args.libraries):
        ratio = row.seconds / units.setdefault(row.attack, row.seconds)
        print(
            f"| {row.attack} | {row.library} | {row.success:.0%} | {row.size:.3f} | "
            f"{row.farthest:.3f} | {row.passes:.0f} | {ratio:.2f} |"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
