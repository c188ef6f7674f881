"""ConfidenceLoss: a penalty, with a gradient, on activations outside their class's pattern.

Rossolini, Biondi and Buttazzo (arXiv 2101.12100) score activations by comparisons and counts,
which have no gradient; the distance from a range has one. The range is narrower than the one that
scores: from the extremes of trusted images hardly a training image would ever learn anything.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data.prepared import prepared
from covcli.methods import MultiRange, State
from covcli.models.points import Recorder
from covcli.signature.fit import How, fit_signature
from covcli.signature.own_network import own_classifier

# The running signature: fine enough to tell where the outermost tenths of a class begin.
RUNNING = MultiRange(sections=32)
# Share of a class's trusted images that its pattern may leave out at each end.
TAIL = 0.1
# A range narrower than this share of its point's mean width counts as that wide, or a neuron that
# hardly ever fires on trusted images would outweigh all others.
LEAST_WIDTH = 0.05
# A distance of more widths counts as so many: a network whose activations were thrown far away by a
# step is not thrown further by the next.
MOST = 1.0
# A range of fewer images says nothing yet: its class is not penalised.
LEAST_IMAGES = 10
# A running signature is built from at most so many training images, to stay cheap.
SIGNATURE_IMAGES = 10_000


def central_range(state: State) -> tuple[Tensor, Tensor]:
    """Return the ends of each class's central range, both of shape (classes, N).

    The narrowest run of whole sections that leaves out at most a tenth of the class's trusted
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
    """Mean distance of neurons from the central range of their class, in its widths, at most 1.

    `attach` makes it of a network in a training loop of one's own.

    The mean is over images, over a coverage point's neurons and over the points, which thus count
    alike, as they do in the score. Only the first half of the points is penalised: in a VGG11,
    penalising the later ones too made detection worse.

    Parameters
    ----------
    state
        A complete state of `mrc`; a class with fewer than 10 images is not penalised.
    sizes
        Neurons of each coverage point.

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
        """Return the penalty of neurons (B, N) of images of those classes (B,), a scalar."""
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
        """Return the loss of a network in a training loop of one's own.

        Parameters
        ----------
        network
            The network that is trained; it is not copied.
        weight
            The penalty's weight.
        confidence_threshold
            The softmax confidence from which on a correctly classified image is trusted.
        points, logits
            As of `covcli train`: patterns that choose coverage points, and which of the network's
            outputs are the logits.
        """
        return AttachedLoss(network, weight, confidence_threshold, tuple(points), logits)


class AttachedLoss:
    """The ConfidenceLoss of a network, with the hooks that show it the network's neurons.

    `step` gives the penalty of the pass that was just made, `refresh` builds the pattern of trusted
    images that the next steps are held against; before the first one nothing is penalised.
    `detach`, or the end of a `with` block, takes the hooks off.

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
        self.network, self.weight = network, weight
        self._threshold, self._patterns, self._logits = confidence_threshold, points, logits
        self._recorder: Recorder | None = None
        self._loss: ConfidenceLoss | None = None

    def refresh(self, trusted: Any) -> None:
        """Build the pattern of trusted images anew; the network's mode and weights stay.

        Parameters
        ----------
        trusted
            Training images with labels, prepared for the network: a torch Dataset, a DataLoader,
            or tensors (images, labels). At most 10,000 of them are read, evenly spread.

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
        images = prepared(trusted, "trusted").spread(SIGNATURE_IMAGES)
        images.known_labels()
        model, _ = own_classifier(self.network, images, logits=self._logits, points=self._patterns)
        how = How(RUNNING, threshold=self._threshold)
        signature, _, _ = fit_signature(model, images, how, Silent())
        self._loss = ConfidenceLoss(signature.state, signature.sizes).to(model.mean.device)
        self._recorder = Recorder(self.network, signature.points, "channel")
        self._recorder.__enter__()

    def step(self, labels: Tensor) -> Tensor:
        """Return the weighted penalty of the network's last pass, a scalar with a gradient.

        Parameters
        ----------
        labels
            The classes of that pass's images, int64 of shape (B,).

        Raises
        ------
        CovcliError
            If there was no pass with gradients of as many images since the last step.
        """
        if self._loss is None or self._recorder is None:
            return torch.zeros((), device=labels.device)
        neurons = self._recorder.take(labels)
        if len(neurons) != len(labels) or (torch.is_grad_enabled() and not neurons.requires_grad):
            raise CovcliError(
                f"the network's last pass had {len(neurons)} images and "
                f"{'a' if neurons.requires_grad else 'no'} gradient, for {len(labels)} labels",
                where="ConfidenceLoss.step",
                fix="call it right after the pass of the same images",
            )
        penalty: Tensor = self._loss(neurons, labels.to(neurons.device))
        return self.weight * penalty

    def detach(self) -> None:
        """Take the hooks off the network; `refresh` puts them on again."""
        if self._recorder is not None:
            self._recorder.__exit__()
            self._recorder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()
