"""ConfidenceLoss: a differentiable penalty on activations outside their class's pattern.

Rossolini, Biondi and Buttazzo (arXiv 2101.12100) score activations by comparisons and counts, which
have no gradient. The distance from a range has one. The range is narrower than that of the score:
hardly any training image is outside the extremes of the trusted images, so there would be no
gradient.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data.batches import class_numbers
from covcli.methods import MultiRange, State
from covcli.models.points import Recorder
from covcli.signature.fit import How, fit_signature
from covcli.signature.own_network import OwnNetwork, labelled

log = logging.getLogger(__name__)
# The running signature, with enough sections to find the outermost tenths of a class.
RUNNING = MultiRange(sections=32)
# The share of a class's trusted images that its central range may exclude at each end.
TAIL = 0.1
# The smallest width of a range, as a share of its point's mean width. Without it, a neuron that
# hardly ever fires on trusted images would outweigh all others.
LEAST_WIDTH = 0.05
# The largest distance, in widths of the range. If one step throws the activations far away, the
# next step is not driven by them.
MOST = 1.0
# Classes with fewer trusted images are not penalised.
LEAST_IMAGES = 10
# The largest number of training images for a running signature, to limit its cost.
SIGNATURE_IMAGES = 10_000
FEW = 8  # images by which it is seen whether the penalty has a gradient


def central_range(state: State) -> tuple[Tensor, Tensor]:
    """Return the bounds of each class's central range, both of shape (classes, N).

    It is the narrowest run of whole sections that excludes at most a tenth of the class's trusted
    images at each end.
    """
    sections = state["sections"].shape[2]
    below = state["sections"].cumsum(2)
    n = state["count"][:, None, None]
    first = (below <= TAIL * n).sum(2)
    last = (below < (1 - TAIL) * n).sum(2)
    width = (state["high"] - state["low"]) / sections
    return state["low"] + width * first, state["low"] + width * (last + 1)


class ConfidenceLoss(nn.Module):
    """Mean distance of neurons from the central range of their class, in widths, at most 1.

    `attach` creates it for a network in your own training loop.

    The mean is over images, over the neurons of a coverage point, and over the points, which have
    equal weight, as in the score. Only the first half of the points is penalised: with a VGG11,
    penalising later points too made detection worse.

    Parameters
    ----------
    state
        A complete state of `mrc`; a class with fewer than 10 images is not penalised.
    sizes
        The number of neurons of each coverage point.

    Examples
    --------
    >>> import torch
    >>> from covcli import ConfidenceLoss
    >>> from covcli.methods import Layout, MultiRange
    >>> from covcli.signature.fit import fold
    >>> neurons, labels = torch.rand(200, 6), torch.arange(200) % 2
    >>> layout = Layout(classes=2, sizes=(4, 2), values=(2, 2))  # two coverage points
    >>> state = fold(MultiRange(), layout, lambda: [(neurons, labels)])
    >>> loss = ConfidenceLoss(state, [4, 2])
    >>> inside = torch.full((1, 6), 0.5)
    >>> float(loss(inside, labels[:1])), float(loss(inside + 9, labels[:1]))
    (0.0, 1.0)
    """

    low: Tensor
    high: Tensor
    inverse: Tensor
    share: Tensor

    def __init__(self, state: State, sizes: list[int]) -> None:
        super().__init__()
        early = sizes[: max(1, len(sizes) // 2)]
        known = (state["count"] >= LEAST_IMAGES)[:, None]
        low, high = (torch.where(known, end[:, : sum(early)], 0.0) for end in central_range(state))
        inverse = []
        for width in (high - low).split(early, 1):
            typical = width[known[:, 0]].mean() if bool((width > 0).any()) else 1.0
            inverse.append(1 / width.clamp_min(LEAST_WIDTH * typical))
        share = torch.cat([low.new_full((n,), 1 / n / len(early)) for n in early])
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("inverse", torch.cat(inverse, 1) * known)
        self.register_buffer("share", share)

    def forward(self, neurons: Tensor, labels: Tensor) -> Tensor:
        """Return the penalty, a scalar.

        Parameters
        ----------
        neurons
            The neurons of the images, shape (B, N).
        labels
            The classes of the images, int64 of shape (B,).
        """
        early = neurons[:, : self.low.shape[1]]
        nearest = early.clamp(self.low[labels], self.high[labels])
        distance = (early - nearest).abs() * self.inverse[labels]
        return (distance.clamp_max(MOST) @ self.share).mean()

    @staticmethod
    def attach(
        network: nn.Module,
        *,
        weight: float = 0.1,
        confidence_threshold: float = 0.9,
        points: Sequence[str] = (),
        logits: str = "",
    ) -> "AttachedLoss":
        """Return the loss of a network in your own training loop.

        Parameters
        ----------
        network
            The network that is trained; it is not copied.
        weight
            The penalty's weight.
        confidence_threshold
            The smallest softmax confidence of a trusted, correctly classified image, in [0, 1].
        points, logits
            As for `covcli train`: patterns that choose coverage points, and the name of the logits
            among the network's outputs.

        Examples
        --------
        >>> images, labels = torch.rand(40, 3, 8, 8), torch.arange(40) % 2
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> with ConfidenceLoss.attach(network, confidence_threshold=0.0) as loss:
        ...     loss.refresh((images, labels))  # once per epoch
        ...     logits = network(images[:8])  # for each batch
        ...     total = nn.functional.cross_entropy(logits, labels[:8]) + loss.step(labels[:8])
        ...     total.backward()
        >>> bool(network[0].weight.grad.isfinite().all())
        True
        """
        return AttachedLoss(network, weight, confidence_threshold, tuple(points), logits)


class AttachedLoss:
    """The ConfidenceLoss of a network, with hooks that record the network's neurons.

    `refresh` computes the pattern of trusted images, and `step` returns the penalty of the last
    forward pass with respect to it. Before the first `refresh`, the penalty is 0. `detach`, or the
    end of a `with` block, removes the hooks.

    Parameters
    ----------
    network, weight, confidence_threshold, points, logits
        See `ConfidenceLoss.attach`.
    """

    def __init__(
        self,
        network: nn.Module,
        weight: float,
        confidence_threshold: float,
        points: tuple[str, ...],
        logits: str,
    ) -> None:
        if not 0 <= weight < math.inf:
            raise CovcliError("must be 0 or more", where=f"weight {weight}")
        self._own = OwnNetwork(network, logits=logits, points=points)
        self.network, self.weight = self._own.network, weight
        self._how = How(RUNNING, threshold=confidence_threshold)
        self._recorder: Recorder | None = None
        self._loss: ConfidenceLoss | None = None
        self._pass: RemovableHandle | None = None
        self._had_gradient: bool | None = (
            None  # the last pass; None if it was used or there is none
        )
        self._frozen = False

    def refresh(self, trusted: Any) -> None:
        """Recompute the pattern of trusted images; the network's mode and weights are unchanged.

        Parameters
        ----------
        trusted
            Training images with labels, prepared for the network: a torch Dataset, a DataLoader,
            or tensors (images, labels). At most 10,000 of them are read, evenly spaced.

        Raises
        ------
        CovcliError
            If the data or the network is of another kind, or an activation is not finite.
        """
        self.detach()
        training = [module for module in self.network.modules() if module.training]
        try:
            self._fit(trusted)
        finally:
            for module in training:
                module.training = True

    def _fit(self, trusted: Any) -> None:
        runtime.check_defaults()
        images = labelled(trusted, "trusted").spread(SIGNATURE_IMAGES)
        model, _ = self._own.classifier(images)
        signature, _, _ = fit_signature(model, images, self._how, Silent())
        self._loss = ConfidenceLoss(signature.state, signature.sizes).to(model.mean.device)
        self._recorder = Recorder(self.network, signature.points, "channel")
        self._recorder.begin()
        few = images.batch(torch.arange(min(FEW, len(images))), model.spec.shape)
        self._say_if_frozen(few.to(model.mean.device))
        self._pass = self.network.register_forward_hook(self._passed)

    def _passed(self, *_: Any) -> None:
        self._had_gradient = torch.is_grad_enabled()

    def _say_if_frozen(self, images: Tensor) -> None:
        """Warn if no weight that is trained can change a penalised neuron."""
        assert self._loss is not None
        assert self._recorder is not None
        weights = [p for p in self.network.parameters() if p.requires_grad]
        with torch.enable_grad():
            self.network(images)
            early = self._recorder.take(images)[:, : self._loss.low.shape[1]]
            gradients = (
                torch.autograd.grad(early.sum(), weights, allow_unused=True)
                if early.requires_grad and weights
                else ()
            )
        frozen = not any(gradient is not None and gradient.any() for gradient in gradients)
        if frozen and not self._frozen:
            log.warning("ConfidenceLoss: the penalised layers are frozen: it changes no weight")
        self._frozen = frozen

    def step(self, labels: Tensor) -> Tensor:
        """Return the weighted penalty of the network's last pass, a scalar with a gradient.

        Parameters
        ----------
        labels
            The classes of that pass's images: class numbers of shape (B,), or one-hot rows.

        Raises
        ------
        CovcliError
            If the labels are no classes of the network, or there was no forward pass with gradients
            of B images since the last step.
        """
        if self._loss is None or self._recorder is None:
            return torch.zeros((), device=labels.device)
        classes = self._classes(labels, len(self._loss.low))
        if self._had_gradient is None:
            raise _misplaced("there was no pass of the network since the last step")
        neurons, had_gradient = self._recorder.take(labels), self._had_gradient
        self._had_gradient = None
        if len(neurons) != len(classes) or (torch.is_grad_enabled() and not had_gradient):
            raise _misplaced(
                f"the network's last pass had {len(neurons)} images and "
                f"{'a' if had_gradient else 'no'} gradient, for {len(classes)} labels"
            )
        if torch.is_grad_enabled() and not neurons.requires_grad and not self._frozen:
            raise _misplaced(
                "the activations have no gradient: they were detached, or are computed again by "
                "checkpoint(use_reentrant=True)"
            )
        penalty: Tensor = self._loss(neurons, classes.to(neurons.device))
        return self.weight * penalty

    @staticmethod
    def _classes(labels: Tensor, count: int) -> Tensor:
        """Return labels as class numbers of shape (B,); raise a CovcliError if they are none."""
        labels = torch.as_tensor(labels)
        plain = labels.ndim == 1 and not labels.is_floating_point()
        classes = labels.long() if plain else class_numbers(labels, len(labels))
        # A look at labels on another device would wait for it.
        if classes is None or (
            classes.is_cpu
            and len(classes)
            and not 0 <= int(classes.min()) <= int(classes.max()) < count
        ):
            raise CovcliError(
                f"got {labels.dtype} of shape {tuple(labels.shape)}, not classes 0 to {count - 1}",
                where="ConfidenceLoss.step",
                fix="pass class numbers; of mixed images, those of either part",
            )
        return classes

    def detach(self) -> None:
        """Remove the hooks from the network; `refresh` adds them again."""
        if self._recorder is not None:
            self._recorder.end()
            self._recorder = None
        if self._pass is not None:
            self._pass.remove()
            self._pass = None
        self._had_gradient = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()


def _misplaced(reason: str) -> CovcliError:
    return CovcliError(
        reason,
        where="ConfidenceLoss.step",
        fix="call it right after the pass of the same images",
    )
