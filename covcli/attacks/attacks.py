"""ATTACKS: adversarial images made from trusted ones, by the library foolbox and by covcli."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import foolbox
import torch
from torch import Tensor

from covcli.attacks.adaptive import Monitored, adaptive_pgd, rounded
from covcli.core import distributed, runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress
from covcli.core.specs import Registry, Spec, amount, count, fraction, parse, up_to
from covcli.data import selection
from covcli.data.images import ImageSet, in_memory
from covcli.data.registry import PARTS
from covcli.models.architectures import Classifier
from covcli.models.sweep import sweep_batch, to_network

ATTACKED_IMAGES = 1000
NOISE_STARTS = 20
BISECTIONS = 10
STEPS = up_to(1_000_000)
# How far beyond the boundary an image is taken at most, so that 8 bits do not undo the attack.
STRETCHES = (5.0, 3.0, 2.0, 1.5, 1.2, 1.1, 1.05, 1.02, 1.01, 1.0)


@dataclass(frozen=True)
class Target:
    """What an attack may look at.

    Attributes
    ----------
    model
        The network, as foolbox takes it.
    monitored
        The network with its coverage score; None where there is no signature.
    """

    model: foolbox.PyTorchModel
    monitored: Monitored | None


# From the target, images (floats in [0, 1] of shape (B, C, H, W)) and their true classes (B,).
Perturb: TypeAlias = Callable[[Target, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """One attack with its parameters.

    Attributes
    ----------
    perturb
        Returns the attacked images, floats in [0, 1].
    images
        How many images to attack unless the specification has a `limit`: fewer for a dear attack.
    needs_signature
        Whether it attacks the signature too.
    """

    perturb: Perturb
    images: int = ATTACKED_IMAGES
    needs_signature: bool = False


AttackMaker: TypeAlias = Callable[[Spec], Attack]
ATTACKS: Registry[AttackMaker] = Registry("attack")


def is_attack(spec: Spec) -> bool:
    """Return whether a specification names an attack rather than data."""
    return spec.name == "attack"


def make_attack(spec: Spec) -> Attack:
    """Make the attack of `attack:NAME?…`; an unknown name or parameter is a CovcliError."""
    return ATTACKS.get(spec.argument)(spec)


def check_without_signature(text: str) -> None:
    """Raise a CovcliError unless `text` names an attack that needs no signature."""
    if make_attack(parse(text)).needs_signature:
        raise CovcliError(
            "attacks a signature, and there is none here", where=text, fix="use it in `evaluate`"
        )


def _within(attack: Any, epsilon: float) -> Perturb:
    """Run a foolbox attack that stays within a distance of the image."""

    def perturb(target: Target, images: Tensor, labels: Tensor) -> Tensor:
        _, clipped, _ = attack(target.model, images, labels, epsilons=epsilon)
        result: Tensor = clipped
        return result

    return perturb


def _nearest(attack: Any) -> Perturb:
    """Run a foolbox attack that looks for the nearest image that deceives."""

    def perturb(target: Target, images: Tensor, labels: Tensor) -> Tensor:
        _, nearest, _ = attack(target.model, images, labels, epsilons=None)
        missing = (nearest == 0).flatten(1).all(1)  # foolbox's mark of failure, a black image
        nearest = torch.where(_per_image(missing), images, nearest)
        return _as_stored(target.model, images, nearest, labels)

    return perturb


def _as_stored(
    model: foolbox.PyTorchModel, images: Tensor, attacked: Tensor, labels: Tensor
) -> Tensor:
    """Stretch perturbations as little as makes the images deceive when they are stored in 8 bits.

    An image that no stretch makes deceive is returned as it was.
    """
    result = images
    for factor in STRETCHES:  # from the largest on: the smallest that deceives has the last word
        stored = rounded((images + factor * (attacked - images)).clamp(0, 1))
        result = torch.where(_per_image(model(stored).argmax(1) != labels), stored, result)
    return result


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@ATTACKS.add("fgsm")
def fgsm(spec: Spec) -> Attack:
    """FGSM (Goodfellow et al., 2015): one signed gradient step; `eps` (8/255), in L∞."""
    spec.only([*PARTS, "seed", "eps"])
    epsilon = spec.take("eps", fraction, 8 / 255)
    return Attack(_within(foolbox.attacks.LinfFastGradientAttack(), epsilon))


@ATTACKS.add("pgd")
def pgd(spec: Spec) -> Attack:
    """PGD (Madry et al., 2018) in L∞ from a random start: `eps` (8/255), `steps` (10), `step`.

    A step is a quarter of eps unless said otherwise.
    """
    spec.only([*PARTS, "seed", "eps", "steps", "step"])
    epsilon = spec.take("eps", fraction, 8 / 255)
    attack = foolbox.attacks.LinfPGD(
        abs_stepsize=spec.take("step", fraction, epsilon / 4),
        steps=spec.take("steps", STEPS, 10),
    )
    return Attack(_within(attack, epsilon))


@ATTACKS.add("pgd-l2")
def pgd_l2(spec: Spec) -> Attack:
    """PGD (Madry et al., 2018) in L2 from a random start: `eps` (0.5), `steps` (20), `step`.

    eps is the length of the whole perturbation of pixels in [0, 1]; 0.5 is RobustBench's for
    images of 32×32 (Croce et al., 2021), and larger images ask for more. A step is 2.5·eps/steps
    unless said otherwise. Rounding to 8 bits adds at most √(C·H·W)/510 to the length.
    """
    spec.only([*PARTS, "seed", "eps", "steps", "step"])
    epsilon = spec.take("eps", fraction, 0.5)
    steps = spec.take("steps", STEPS, 20)
    step = spec.take("step", fraction, 2.5 * epsilon / steps)
    return Attack(_within(foolbox.attacks.L2PGD(abs_stepsize=step, steps=steps), epsilon))


@ATTACKS.add("deepfool")
def deepfool(spec: Spec) -> Attack:
    """DeepFool (Moosavi-Dezfooli et al., 2016) in L2: `steps` (50), `overshoot` (0.02).

    Has no eps: it looks for the nearest image that deceives. 200 images unless `limit` says
    otherwise.
    """
    spec.only([*PARTS, "seed", "steps", "overshoot"])
    attack = foolbox.attacks.L2DeepFoolAttack(
        steps=spec.take("steps", STEPS, 50),
        overshoot=spec.take("overshoot", amount, 0.02),
    )
    return Attack(_nearest(attack), images=200)


@ATTACKS.add("cw")
def carlini_wagner(spec: Spec) -> Attack:
    """Attack as Carlini and Wagner (2017) do in L2, with fewer steps than foolbox's 90,000.

    `steps` (40) of Adam with `stepsize` (0.05) in each of `binary_search_steps` (5) for the
    constant, from `initial_const` (1) on; `confidence` (0) is the lead in logits of the wrong
    class. Has no eps. 100 images unless `limit` says otherwise.
    """
    names = ["steps", "confidence", "stepsize", "initial_const", "binary_search_steps"]
    spec.only([*PARTS, "seed", *names])
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        steps=spec.take("steps", STEPS, 40),
        confidence=spec.take("confidence", amount, 0.0),
        stepsize=spec.take("stepsize", fraction, 0.05),
        initial_const=spec.take("initial_const", fraction, 1.0),
        binary_search_steps=spec.take("binary_search_steps", STEPS, 5),
    )
    return Attack(_nearest(attack), images=100)


@ATTACKS.add("boundary")
def boundary(spec: Spec) -> Attack:
    """Boundary attack (Brendel et al., 2018) in L2: sees the predicted class alone; `steps` (500).

    Starts from the nearest image, of the batch or of uniform noise, that the network puts in
    another class; an image without such a start is returned as it was. Its steps are larger, and
    adapted more often, than foolbox's, which are meant for 25,000. Has no eps. About 2·steps looks
    at the network an image: 50 images unless `limit` says otherwise.
    """
    spec.only([*PARTS, "seed", "steps"])
    attack = foolbox.attacks.BoundaryAttack(
        steps=spec.take("steps", STEPS, 500),
        spherical_step=0.1,
        source_step=0.02,
        update_stats_every_k=1,
    )

    def perturb(target: Target, images: Tensor, labels: Tensor) -> Tensor:
        starts, usable = _starts(target.model, images, labels)
        attacked = images.clone()
        if len(usable):
            attacked[usable] = attack.run(
                target.model, images[usable], labels[usable], starting_points=starts[usable]
            )
        return _as_stored(target.model, images, attacked, labels)

    return Attack(perturb, images=50)


def _starts(model: foolbox.PyTorchModel, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a start for each image, and the rows of those that have one and are right so far.

    The start lies at the boundary, on the way to the nearest image that is put in another class.
    """
    noise = torch.rand(NOISE_STARTS, *images.shape[1:]).to(images)
    pool = torch.cat([images, noise])
    predicted = model(pool).argmax(1)
    distances = torch.cdist(images.flatten(1), pool.flatten(1))
    distances[predicted[None] == labels[:, None]] = torch.inf
    nearest, which = distances.min(1)
    low, high = torch.zeros_like(nearest), torch.ones_like(nearest)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        between = torch.lerp(images, pool[which], _per_image(middle))
        wrong = model(between).argmax(1) != labels
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    starts = torch.lerp(images, pool[which], _per_image(high)).clamp(0, 1)
    usable = (predicted[: len(images)] == labels) & (model(starts).argmax(1) != labels)
    return starts, torch.nonzero(usable)[:, 0]


@ATTACKS.add("adaptive-pgd")
def adaptive(spec: Spec) -> Attack:
    """PGD in L∞ that knows the signature: `eps` (8/255), `steps` (20), `step`, `weight` (5).

    See `covcli.adaptive.adaptive_pgd`. A step is 2.5·eps/steps unless said otherwise. 200 images
    unless `limit` says otherwise. Only where there is a signature: in `evaluate`.
    """
    spec.only([*PARTS, "seed", "eps", "steps", "step", "weight"])
    epsilon = spec.take("eps", fraction, 8 / 255)
    steps = spec.take("steps", STEPS, 20)
    step = spec.take("step", fraction, 2.5 * epsilon / steps)
    weight = spec.take("weight", amount, 5.0)

    def perturb(target: Target, images: Tensor, labels: Tensor) -> Tensor:
        assert target.monitored is not None
        return adaptive_pgd(target.monitored, images, labels, epsilon, steps, step, weight)

    return Attack(perturb, images=200, needs_signature=True)


def attacked_rows(spec: Spec, trusted: ImageSet) -> Tensor:
    """Return which trusted images an attack's `offset` and `limit` choose, as of any set.

    The limit is the attack's own unless the specification has one: 1,000, or fewer if it is dear.
    """
    return selection.selected_rows(trusted, spec, make_attack(spec).images)


def run_attack(
    spec: Spec,
    model: Classifier,
    trusted: ImageSet,
    labels: Tensor,
    progress: Progress,
    monitored: Monitored | None = None,
) -> ImageSet:
    """Attack trusted images.

    The result is rounded to 8 bits, as a stored image is; in L∞ within ±eps when eps is a multiple
    of 1/255. Every draw is from `seed` (0) and the place of the batch in the set, so that a
    specification names the same images every time. Each rank attacks its share.

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
    monitored
        The network with its coverage score, for an attack that needs it.

    Returns
    -------
    ImageSet
        The attacked images with their true labels, in the order of `trusted`.

    Raises
    ------
    CovcliError
        If the attack or a parameter is unknown, or the attack needs a signature and has none.
    """
    attack = make_attack(spec)
    if monitored is None:
        check_without_signature(spec.text)
    seed = spec.take("seed", count, 0)
    device = model.mean.device
    target = Target(foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=device), monitored)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    attacked = []
    parts = distributed.share(torch.arange(len(trusted)).split(sweep_batch(model.spec.shape)))
    progress.start(f"making {spec.text}", sum(map(len, parts)))
    model.requires_grad_(False)  # gradients of the weights would be computed for nothing
    try:
        for rows in parts:
            pixels = to_network(trusted.batch(rows, model.spec.shape), device)
            with runtime.seeded((seed * 1_000_003 + int(rows[0])) % 2**63):
                result = attack.perturb(target, pixels, labels[rows].to(device))
            attacked.append((rows, (result * 255).round().to(torch.uint8)))
            progress.advance(len(rows))
    finally:
        for parameter, needs in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(needs)
    pixels = distributed.collect(attacked)[0]
    return in_memory(spec.text, pixels, labels, trusted.classes, ready=True)
