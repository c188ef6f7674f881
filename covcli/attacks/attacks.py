"""ATTACKS: attacks on the network, by the library foolbox, and on the monitor, by covcli.

foolbox is an optional package; only what runs one of its attacks imports it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from covcli.attacks.adaptive import Monitored, Search, adaptive_pgd, rounded
from covcli.attacks.library import by_foolbox, for_foolbox, library
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
# Factors by which a perturbation is stretched, so that rounding to 8 bits does not undo it.
STRETCHES = (5.0, 3.0, 2.0, 1.5, 1.2, 1.1, 1.05, 1.02, 1.01, 1.0)


@dataclass(frozen=True)
class Target:
    """The model under attack.

    Attributes
    ----------
    model
        The network, in evaluation mode; takes images with pixels in [0, 1].
    monitored
        The network with its coverage score; None without a signature.
    """

    model: Classifier
    monitored: Monitored | None


# Takes the target, images (floats in [0, 1] of shape (B, C, H, W)) and their true classes (B,).
Perturb: TypeAlias = Callable[[Target, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """One attack with its parameters.

    A plugin registers a function that takes the parsed specification and returns an Attack, by
    `@ATTACKS.add(NAME)`. `run_attack` applies `offset`, `limit` and `seed`.

    Attributes
    ----------
    perturb
        Takes a `Target`, images (floats in [0, 1] of shape (B, C, H, W)) and their true classes
        (B,). Returns the attacked images, floats in [0, 1].
    images
        The number of images to attack if the specification has no `limit`; fewer for an expensive
        attack.
    needs_signature
        Whether it attacks the signature too.
    needs_foolbox
        Whether it runs an attack of foolbox.

    Examples
    --------
    >>> @ATTACKS.add("darken")
    ... def darken(spec):
    ...     spec.only([*PARTS, "seed", "by"])
    ...     by = spec.take("by", fraction, 0.1)
    ...     return Attack(lambda target, images, labels: (images - by).clamp(0, 1))
    >>> attack = make_attack(parse("attack:darken?by=0.25"))
    >>> attack.perturb(None, torch.ones(1, 1, 1, 1), None).item()
    0.75
    """

    perturb: Perturb
    images: int = ATTACKED_IMAGES
    needs_signature: bool = False
    needs_foolbox: bool = False


AttackMaker: TypeAlias = Callable[[Spec], Attack]
ATTACKS: Registry[AttackMaker] = Registry("attack")


def is_attack(spec: Spec) -> bool:
    """Return whether a specification names an attack rather than data."""
    return spec.name == "attack"


def make_attack(spec: Spec) -> Attack:
    """Create the attack of `attack:NAME?…`.

    Raises
    ------
    CovcliError
        If the name or a parameter is unknown, or a value is invalid.
    """
    return ATTACKS.get(spec.argument)(spec)


def check_attack(spec: Spec) -> Attack:
    """Create the attack of `attack:NAME?…`, and check that it can run here.

    Raises
    ------
    CovcliError
        As `make_attack`, or if the attack needs foolbox, which cannot be imported.
    """
    attack = make_attack(spec)
    if attack.needs_foolbox:
        library(spec.text)
    return attack


def check_without_signature(text: str) -> None:
    """Check that the attack that `text` names can run here and needs no signature.

    Raises
    ------
    CovcliError
        As `check_attack`, or if it needs a signature.
    """
    if check_attack(parse(text)).needs_signature:
        raise CovcliError(
            "attacks a signature, and there is none here", where=text, fix="use it in `evaluate`"
        )


def _within(create: Callable[[], Any], epsilon: float) -> Attack:
    """Return an attack of foolbox that keeps within a distance of the image."""

    def perturb(target: Target, images: Tensor, labels: Tensor) -> Tensor:
        _, clipped, _ = create()(
            for_foolbox(target.model, images.device), images, labels, epsilons=epsilon
        )
        result: Tensor = clipped
        return result

    return Attack(perturb, needs_foolbox=True)


def _nearest(create: Callable[[], Any], images: int) -> Attack:
    """Return an attack of foolbox that searches for the nearest image that deceives."""

    def perturb(target: Target, images: Tensor, labels: Tensor) -> Tensor:
        _, nearest, _ = create()(
            for_foolbox(target.model, images.device), images, labels, epsilons=None
        )
        missing = (nearest == 0).flatten(1).all(1)  # foolbox's mark of failure, a black image
        nearest = torch.where(_per_image(missing), images, nearest)
        return _as_stored(target.model, images, nearest, labels)

    return Attack(perturb, images, needs_foolbox=True)


def _as_stored(model: Classifier, images: Tensor, attacked: Tensor, labels: Tensor) -> Tensor:
    """Stretch each perturbation just enough that the image deceives after rounding to 8 bits.

    An image that does not deceive with any factor is returned without a perturbation.
    """
    result = images
    for factor in STRETCHES:  # descending, so that the smallest factor that deceives is kept
        stored = rounded((images + factor * (attacked - images)).clamp(0, 1))
        result = torch.where(_per_image(model(stored).argmax(1) != labels), stored, result)
    return result


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@ATTACKS.add("fgsm")
def fgsm(spec: Spec) -> Attack:
    """FGSM (Goodfellow et al., 2015): one signed gradient step; `eps` (8/255), in L∞.

    Examples
    --------
    >>> make_attack(parse("attack:fgsm?eps=4/255")).images
    1000
    """
    spec.only([*PARTS, "seed", "eps"])
    epsilon = spec.take("eps", fraction, 8 / 255)
    return _within(by_foolbox("LinfFastGradientAttack"), epsilon)


@ATTACKS.add("pgd")
def pgd(spec: Spec) -> Attack:
    """PGD (Madry et al., 2018) in L∞ from a random start: `eps` (8/255), `steps` (10), `step`.

    The default step is eps/4.

    Examples
    --------
    >>> make_attack(parse("attack:pgd?steps=40")).images
    1000
    """
    spec.only([*PARTS, "seed", "eps", "steps", "step"])
    epsilon = spec.take("eps", fraction, 8 / 255)
    attack = by_foolbox(
        "LinfPGD",
        abs_stepsize=spec.take("step", fraction, epsilon / 4),
        steps=spec.take("steps", STEPS, 10),
    )
    return _within(attack, epsilon)


@ATTACKS.add("pgd-l2")
def pgd_l2(spec: Spec) -> Attack:
    """PGD (Madry et al., 2018) in L2 from a random start: `eps` (0.5), `steps` (20), `step`.

    eps is the L2 norm of the whole perturbation, for pixels in [0, 1]. 0.5 is the value of
    RobustBench for 32×32 images (Croce et al., 2021); larger images need more. The default step is
    2.5·eps/steps. Rounding to 8 bits adds at most √(C·H·W)/510 to the norm.

    Examples
    --------
    >>> make_attack(parse("attack:pgd-l2?eps=1")).images
    1000
    """
    spec.only([*PARTS, "seed", "eps", "steps", "step"])
    epsilon = spec.take("eps", fraction, 0.5)
    steps = spec.take("steps", STEPS, 20)
    step = spec.take("step", fraction, 2.5 * epsilon / steps)
    return _within(by_foolbox("L2PGD", abs_stepsize=step, steps=steps), epsilon)


@ATTACKS.add("deepfool")
def deepfool(spec: Spec) -> Attack:
    """DeepFool (Moosavi-Dezfooli et al., 2016) in L2: `steps` (50), `overshoot` (0.02).

    It has no eps: it searches for the nearest image that deceives. The default is 200 images.

    Examples
    --------
    >>> make_attack(parse("attack:deepfool?overshoot=0.05")).images
    200
    """
    spec.only([*PARTS, "seed", "steps", "overshoot"])
    attack = by_foolbox(
        "L2DeepFoolAttack",
        steps=spec.take("steps", STEPS, 50),
        overshoot=spec.take("overshoot", amount, 0.02),
    )
    return _nearest(attack, images=200)


@ATTACKS.add("cw")
def carlini_wagner(spec: Spec) -> Attack:
    """L2 attack of Carlini and Wagner (2017), with fewer steps than foolbox's default of 90,000.

    `steps` (40) of Adam with `stepsize` (0.05) in each of `binary_search_steps` (5) for the
    constant, starting at `initial_const` (1). `confidence` (0) is the lead of the wrong class in
    logits. It has no eps. The default is 100 images.

    Examples
    --------
    >>> make_attack(parse("attack:cw?confidence=1")).images
    100
    """
    names = ["steps", "confidence", "stepsize", "initial_const", "binary_search_steps"]
    spec.only([*PARTS, "seed", *names])
    attack = by_foolbox(
        "L2CarliniWagnerAttack",
        steps=spec.take("steps", STEPS, 40),
        confidence=spec.take("confidence", amount, 0.0),
        stepsize=spec.take("stepsize", fraction, 0.05),
        initial_const=spec.take("initial_const", fraction, 1.0),
        binary_search_steps=spec.take("binary_search_steps", STEPS, 5),
        abort_early=False,  # else one rise of the summed loss, usual at first, ends a search
    )
    return _nearest(attack, images=100)


@ATTACKS.add("boundary")
def boundary(spec: Spec) -> Attack:
    """Boundary attack (Brendel et al., 2018) in L2, a black-box attack with `steps` (500).

    It uses only the predicted class. It starts from the nearest image, in the batch or of uniform
    noise, with another predicted class; an image without such a start is not changed. The steps are
    larger and adapted more often than foolbox's, which are designed for 25,000 steps. It has no
    eps. It runs the network about 2·steps times per image, so the default is 50 images.

    Examples
    --------
    >>> make_attack(parse("attack:boundary?steps=100")).images
    50
    """
    spec.only([*PARTS, "seed", "steps"])
    create = by_foolbox(
        "BoundaryAttack",
        steps=spec.take("steps", STEPS, 500),
        spherical_step=0.1,
        source_step=0.02,
        update_stats_every_k=1,
    )

    def perturb(target: Target, images: Tensor, labels: Tensor) -> Tensor:
        starts, usable = boundary_starts(target.model, images, labels)
        attacked = images.clone()
        if len(usable):
            attacked[usable] = create().run(
                for_foolbox(target.model, images.device), images[usable], labels[usable],
                starting_points=starts[usable],
            )  # fmt: skip
        return _as_stored(target.model, images, attacked, labels)

    return Attack(perturb, images=50, needs_foolbox=True)


def boundary_starts(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a start for each image, and the rows of correct images that have a start.

    The start is at the decision boundary, on the line to the nearest image of another class.
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
    """Adaptive PGD in L∞ against the monitor: `eps` (8/255), `steps` (20), `step`, `weight` (5).

    See `covcli.attacks.adaptive.adaptive_pgd`. The default step is 2.5·eps/steps. The default is
    200 images. It needs a signature, so it works only in `evaluate`.

    Examples
    --------
    >>> make_attack(parse("attack:adaptive-pgd?weight=1")).images
    200
    """
    spec.only([*PARTS, "seed", "eps", "steps", "step", "weight"])
    epsilon = spec.take("eps", fraction, 8 / 255)
    steps = spec.take("steps", STEPS, 20)
    step = spec.take("step", fraction, 2.5 * epsilon / steps)
    search = Search(epsilon, step, steps, spec.take("weight", amount, 5.0))

    def perturb(target: Target, images: Tensor, labels: Tensor) -> Tensor:
        assert target.monitored is not None
        return adaptive_pgd(target.monitored, images, labels, search)

    return Attack(perturb, images=200, needs_signature=True)


def attacked_rows(spec: Spec, trusted: ImageSet) -> Tensor:
    """Return the positions of the trusted images that an attack's specification selects.

    The default limit is the attack's own: 1,000, or fewer for an expensive attack.
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

    The result is rounded to 8 bits, as in a stored image. An L∞ attack still keeps within ±eps if
    eps is a multiple of 1/255. Random numbers depend only on `seed` (0) and the position of the
    batch, so a specification always gives the same images. Each rank attacks its share.

    Parameters
    ----------
    spec
        The parsed `attack:NAME?…`.
    model
        The network to deceive.
    trusted
        The images to start from.
    labels
        Their true classes, int64 of shape (N,).
    progress
        Receives the progress.
    monitored
        The network with its coverage score, for an attack that needs it.

    Returns
    -------
    ImageSet
        The attacked images with their true labels, in the order of `trusted`.

    Raises
    ------
    CovcliError
        If the attack or a parameter is unknown, or the attack needs a signature and has none, or
        foolbox, which cannot be imported.

    Examples
    --------
    >>> from pathlib import Path
    >>> from covcli.core.progress import Silent
    >>> from covcli.data import datasets
    >>> from covcli.models import checkpoint
    >>> model = checkpoint.load(Path("runs/latest/checkpoint.pt")).model
    >>> digits = datasets.load("digits?limit=8", "test")
    >>> attacked = run_attack(parse("attack:fgsm"), model, digits, digits.labels, Silent())
    >>> len(attacked), attacked.name
    (8, 'attack:fgsm')
    """
    attack = make_attack(spec)
    if monitored is None:
        check_without_signature(spec.text)
    seed = spec.take("seed", count, 0)
    device = model.mean.device
    target = Target(model.eval(), monitored)
    attacked = []
    parts = distributed.share(torch.arange(len(trusted)).split(sweep_batch(model.spec.shape)))
    progress.start(f"making {spec.text}", sum(map(len, parts)))
    with _frozen(model):
        for rows in parts:
            pixels = to_network(trusted.batch(rows, model.spec.shape), device)
            with runtime.seeded((seed * 1_000_003 + int(rows[0])) % 2**63):
                result = attack.perturb(target, pixels, labels[rows].to(device))
            attacked.append((rows, (result * 255).round().to(torch.uint8)))
            progress.advance(len(rows))
    pixels = distributed.collect(attacked)[0]
    return in_memory(spec.text, pixels, labels, trusted.classes, ready=True)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Switch off the gradients of the weights during the block, which attacks do not need."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
