"""Identification of the architecture of weights, by the shapes of their tensors."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.models import zoo
from covcli.models.registry import MODELS, Architecture, Sides

# The number of torchvision's classifiers, nearest in number of parameters, that are compared.
TRIED = 12
# And how many of timm's under each pattern, those of the shortest names.
TRIED_OF_TIMM = 30
# With so many of the shapes an architecture is near enough not to look at timm's, which takes time.
ENOUGH = 0.97
LEAST = 0.5
# A number that is no other dimension, so that it shows which shapes are those of the classes.
CLASSES = 1013
# How timm names the weights of its families, and the families' names: it has too many to try all.
TIMM_FAMILIES: Sequence[tuple[str, str]] = (
    (r"blocks\.0\.attn\.qkv\.weight$", "vit_* deit*"),
    (r"blocks\.0\.mlp_tokens\.", "mixer* gmixer*"),
    (r"layers\.0\.blocks\.0\.attn\.", "swin*"),
    (r"stages\.0\.blocks\.0\.conv_dw\.", "convnext*"),
    (r"conv_stem\.", "mobilenet* efficientnet* tf_efficientnet*"),
    (r"layer1\.0\.conv1\.", "resnet* resnext* seresnet*"),
    (r"s1\.b1\.conv1\.", "regnet*"),
    (r"features\.denseblock1\.", "densenet*"),
    (r"pre_logits\.", "vgg*"),
)


@dataclass(frozen=True)
class Nearest:
    """The architecture whose shapes are nearest to those of some weights.

    Attributes
    ----------
    name
        Its name.
    share
        The share of the shapes that both have, from 0 to 1.
    """

    name: str
    share: float

    def __str__(self) -> str:
        return f"{self.name}, with {self.share:.0%} of the shapes"


def nearest_architecture(states: Sequence[Mapping[str, Tensor]]) -> Nearest | None:
    """Return the architecture with the most tensors of the same shapes; None if none is near.

    The registered models are compared, torchvision's classifiers of a similar number of parameters,
    and, if timm is installed, its families whose weights have such names.

    Parameters
    ----------
    states
        The state dicts of a file; the one with the most tensors is used.
    """
    largest = max(states, key=len)
    wanted = Counter(tuple(tensor.shape) for tensor in largest.values())
    parameters = sum(tensor.numel() for tensor in largest.values())
    best, share = "", 0.0
    for name, architecture in _known(parameters, largest):
        if share >= ENOUGH and name.startswith("timm:"):
            break
        for pretrained in architecture.layouts:
            shapes = list(architecture.shapes(CLASSES, pretrained).values())
            shared = _shared(wanted, shapes) / max(1, wanted.total(), len(shapes))
            if shared > share:
                best, share = name, shared
        if share == 1:
            break
    return Nearest(best, share) if share >= LEAST else None


def _shared(wanted: Counter[Sides], shapes: Sequence[Sides]) -> int:
    """Return how many tensors have shapes of an architecture, whatever the number of classes."""
    fixed = Counter(shape for shape in shapes if CLASSES not in shape)
    left = list((wanted - fixed).elements())
    for shape in shapes:
        if CLASSES in shape:
            fitting = [other for other in left if _fits(other, shape)]
            if fitting:
                left.remove(fitting[0])
    return wanted.total() - len(left)


def _fits(shape: Sides, pattern: Sides) -> bool:
    alike = len(shape) == len(pattern)
    return alike and all(b in (a, CLASSES) for a, b in zip(shape, pattern, strict=True))


def _known(parameters: int, names: Collection[str]) -> Iterator[tuple[str, Architecture]]:
    """Yield architectures by name, those first that are likelier or cheaper to try."""

    def distance(name: str) -> float:
        return abs(math.log(zoo.torchvision_parameters(name) / max(1, parameters)))

    yield from ((name, MODELS.get(name)) for name in MODELS)
    for name in sorted(zoo.torchvision_names(), key=distance)[:TRIED]:
        yield f"torchvision:{name}", zoo.torchvision_architecture(name)
    for pattern in _timm_patterns(names):
        for name in zoo.timm_names(pattern)[:TRIED_OF_TIMM]:
            with contextlib.suppress(CovcliError):  # it prepares images as covcli cannot
                yield f"timm:{name}", zoo.timm_architecture(name)


def _timm_patterns(names: Collection[str]) -> list[str]:
    """Return how the names of timm's models begin that name their weights so, at any prefix."""
    return [
        pattern
        for key, patterns in TIMM_FAMILIES
        if any(re.search(rf"(^|\.){key}", name) for name in names)
        for pattern in patterns.split()
    ]
