"""ATTACKS: adversarial images made from trusted ones, by the library foolbox."""

from collections.abc import Callable
from typing import Any, TypeAlias

import foolbox
import torch
from torch import Tensor

from covcli import runtime
from covcli.data import SELECTION
from covcli.engine import sweep_batch, to_network
from covcli.errors import CovcliError
from covcli.images import ImageSet, in_memory
from covcli.models import Classifier
from covcli.progress import Progress
from covcli.registry import Registry
from covcli.specs import Spec, count, fraction, positive_count

ATTACKED_IMAGES = 1000

Attack: TypeAlias = Callable[[foolbox.PyTorchModel, Tensor, Tensor], Tensor]
Maker: TypeAlias = Callable[[Spec], Attack]
ATTACKS: Registry[Maker] = Registry("attack")


def is_attack(spec: Spec) -> bool:
    """Return whether a specification names an attack rather than data."""
    return spec.name == "attack"


def make_attack(spec: Spec) -> Attack:
    """Make the attack of `attack:NAME?…`; an unknown name or parameter is a CovcliError."""
    return ATTACKS.get(spec.argument)(spec)


def _run(attack: Any, epsilon: float) -> Attack:
    def perturb(model: foolbox.PyTorchModel, images: Tensor, labels: Tensor) -> Tensor:
        _, clipped, _ = attack(model, images, labels, epsilons=epsilon)
        result: Tensor = clipped
        return result

    return perturb


@ATTACKS.add("fgsm")
def fgsm(spec: Spec) -> Attack:
    """FGSM (Goodfellow et al., 2015): one signed gradient step; `eps` (8/255), in L∞."""
    spec.only([*SELECTION, "seed", "eps"])
    return _run(foolbox.attacks.LinfFastGradientAttack(), spec.take("eps", fraction, 8 / 255))


@ATTACKS.add("pgd")
def pgd(spec: Spec) -> Attack:
    """PGD (Madry et al., 2018) in L∞ from a random start: `eps` (8/255), `steps` (10), `step`.

    A step is a quarter of eps unless said otherwise.
    """
    spec.only([*SELECTION, "seed", "eps", "steps", "step"])
    epsilon = spec.take("eps", fraction, 8 / 255)
    attack = foolbox.attacks.LinfPGD(
        abs_stepsize=spec.take("step", fraction, epsilon / 4),
        steps=spec.take("steps", positive_count, 10),
    )
    return _run(attack, epsilon)


def attacked_rows(spec: Spec, trusted: ImageSet) -> Tensor:
    """Return which trusted images an attack's `offset` and `limit` (1,000) choose."""
    offset = spec.take("offset", count, 0)
    limit = spec.take("limit", positive_count, ATTACKED_IMAGES)
    rows = torch.arange(min(offset, len(trusted)), min(offset + limit, len(trusted)))
    if len(rows) == 0:
        raise CovcliError(f"no image left of {len(trusted)}", where=spec.text)
    return rows


def run_attack(
    spec: Spec, model: Classifier, trusted: ImageSet, labels: Tensor, progress: Progress
) -> ImageSet:
    """Attack trusted images.

    The result is rounded to 8 bits, as a stored image is; within ±eps when eps is a multiple of
    1/255. The random start is drawn from `seed` (0), so that a specification names the same
    images every time.

    Parameters
    ----------
    spec
        `attack:NAME?…`.
    model
        The network to deceive.
    trusted
        The images to start from.
    labels
        Their true classes, shape (N,).

    Returns
    -------
    ImageSet
        The attacked images with their true labels, in the order of `trusted`.
    """
    attack = make_attack(spec)
    seed = spec.take("seed", count, 0)
    device = model.mean.device
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=device)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    made = []
    progress.start(f"making {spec.text}", len(trusted))
    model.requires_grad_(False)  # gradients of the weights would be computed for nothing
    try:
        size = max(1, sweep_batch(model.spec.shape) // 2)  # gradients take room too
        with runtime.seeded(seed):
            for rows in torch.arange(len(trusted)).split(size):
                pixels = to_network(trusted.batch(rows, model.spec.shape), device)
                result = attack(wrapped, pixels, labels[rows].to(device))
                made.append((result * 255).round().to(torch.uint8).cpu())
                progress.advance(len(rows))
    finally:
        for parameter, needs in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(needs)
    return in_memory(spec.text, torch.cat(made), labels, trusted.classes)
