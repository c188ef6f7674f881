"""Adapters from covcli's networks and image sets to the detectors of pytorch-ood."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from covcli.core.progress import Progress
from covcli.data.images import ImageSet, batches
from covcli.models.architectures import Classifier
from covcli.models.points import Outputs, Point
from covcli.models.sweep import sweep, sweep_batch, to_network


@dataclass(frozen=True)
class Batch:
    """The results of one forward pass on a batch of images.

    Attributes
    ----------
    rows
        Positions of the images in the set, int64 of shape (B,).
    inputs
        Pixels in [0, 1], shape (B, C, H, W).
    logits
        Shape (B, classes).
    features
        The input of the last linear layer, shape (B, D); None if the logits do not come from a
        linear layer.
    means
        Each coverage point's output, averaged over its positions, shape (B, channels).
    """

    rows: Tensor
    inputs: Tensor
    logits: Tensor
    features: Tensor | None
    means: list[Tensor]


@dataclass(frozen=True)
class Layer:
    """A coverage point with a module's method for hooks, for a library that hooks modules."""

    network: nn.Module
    point: Point

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels in the output."""
        return self.point.channel_dim

    def register_forward_hook(self, hook: Callable[[Any, Any, Tensor], None]) -> Any:
        """Register `hook`, which is called with the point's output in every forward pass."""
        outputs = Outputs(self.network, [self.point], partial(_pass_on, hook), raw=True)
        outputs.attach()
        return Handle(outputs)


@dataclass(frozen=True)
class Handle:
    """Removes a hook, as torch's own handles do."""

    outputs: Outputs

    def remove(self) -> None:
        """Remove the hook."""
        self.outputs.detach()


def _pass_on(hook: Callable[[Any, Any, Tensor], None], _point: Point, output: Tensor) -> None:
    hook(None, None, output)


class Network:
    """A classifier with its coverage points and its last linear layer.

    Attributes
    ----------
    model
        The classifier.
    points
        Its coverage points.
    layers
        The same points for a library that hooks modules; without those whose output does not have
        one image per row.
    last
        The linear layer whose output are the logits, or None.
    """

    def __init__(self, model: Classifier) -> None:
        self.model = model.eval()
        self.points = model.points("channel")
        self.layers = [Layer(model.network, p) for p in self.points if p.batch == "first"]
        self.last = _last_linear(model)

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.model.mean.device

    def read(self, images: ImageSet, progress: Progress, title: str) -> Iterator[Batch]:
        """Run the network over a set in order, and yield batch by batch."""
        means: dict[str, Tensor] = {}
        features: list[Tensor] = []

        def see(point: Point, output: Tensor) -> None:
            means[point.name] = channels_first(output, point.channel_dim).flatten(2).mean(2)

        with contextlib.ExitStack() as hooks:
            hooks.enter_context(Outputs(self.model.network, self.points, see))
            if self.last is not None:
                handle = self.last.register_forward_pre_hook(lambda _m, x: features.append(x[0]))
                hooks.callback(handle.remove)
            for swept in sweep(self.model, images, [], "channel", progress, title):
                last = features[-1] if features else None
                features.clear()  # detectors run the network too, between two batches
                seen = [means[p.name] for p in self.points]
                yield Batch(swept.rows, swept.inputs, swept.logits, last, seen)


def channels_first(output: Tensor, channel_dim: int) -> Tensor:
    """Convert a layer's output to (B, C, positions…); a fully connected layer has one position."""
    return output[..., None] if output.ndim == 2 else output.movedim(channel_dim, 1)


def _last_linear(model: Classifier) -> nn.Linear | None:
    """Return the linear layer whose output are the logits, by observing a forward pass, or None."""
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in linear:
            handle = module.register_forward_hook(lambda m, x, y: seen.append((m, x[0], y)))
            hooks.callback(handle.remove)
        logits = model(torch.zeros(2, *model.spec.shape, device=model.mean.device))
    if not seen:
        return None
    last, inputs, output = seen[-1]
    return last if inputs.ndim == 2 and output is logits else None


class FittingImages:
    """The trusted images that the baselines are fitted on.

    Parameters
    ----------
    network
        The network.
    images
        Trusted training images.
    labels
        Their classes, int64 of shape (N,); every class of the network occurs.
    progress
        Receives the progress of every pass.
    held_out
        The calibration images that fit the signature's combination, for detectors that fit scales;
        images that rank scores are excluded. None if no detector needs them.
    """

    def __init__(
        self,
        network: Network,
        images: ImageSet,
        labels: Tensor,
        progress: Progress,
        held_out: ImageSet | None = None,
    ) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.progress, self.held_out = progress, held_out

    @cached_property
    def features(self) -> Tensor:
        """The input of the last linear layer on every image, shape (N, D), on the CPU."""
        title = "reading trusted images for the baselines"
        parts = [b.features for b in self.network.read(self.images, self.progress, title)]
        return torch.cat([part.cpu() for part in parts if part is not None])

    def balanced(self, limit: int) -> "FittingImages":
        """Return at most `limit` images, with equal numbers of all classes as far as possible."""
        order = torch.argsort(self.labels, stable=True)
        counts = torch.bincount(self.labels)
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - starts[self.labels[order]]
        rows = torch.argsort(rank, stable=True)[:limit].sort().values
        chosen, labels = self.images.select(rows), self.labels[rows]
        return FittingImages(self.network, chosen, labels, self.progress, self.held_out)


class FittingLoader:
    """Batches of images and labels for pytorch-ood's detectors."""

    def __init__(self, trusted: FittingImages, size: int, title: str) -> None:
        self._trusted, self._title = trusted, title
        self._parts = torch.arange(len(trusted.images)).split(size)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        t = self._trusted
        t.progress.start(self._title, len(t.images))
        for rows, pixels in batches(t.images, self._parts, t.network.model.spec.shape):
            yield to_network(pixels, t.network.device), t.labels[rows]
            t.progress.advance(len(rows))


def small_batch(network: Network) -> int:
    """Return the batch size for passes that keep full activations."""
    return max(1, sweep_batch(network.model.spec.shape) // 8)
