"""Identification of the architecture of weights, by the shapes of their tensors."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from covcli.models import zoo
from covcli.models.registry import MODELS

# The number of torchvision's classifiers, nearest in number of parameters, that are compared.
TRIED = 12
LEAST = 0.5
CLASSES = 10


def nearest_architecture(states: Sequence[Mapping[str, Tensor]]) -> str:
    """Return advice naming the architecture with the most tensors of the same shapes, or "".

    The registered models and torchvision's classifiers are compared (timm has too many).

    Parameters
    ----------
    states
        The state dicts of a file; the one with the most tensors is used.
    """
    largest = max(states, key=len)
    wanted = Counter(tuple(tensor.shape) for tensor in largest.values())
    parameters = sum(tensor.numel() for tensor in largest.values())
    best, share = "", 0.0
    for name, shapes in _known(parameters):
        shared = (wanted & Counter(shapes)).total() / max(1, wanted.total(), len(shapes))
        if shared > share:
            best, share = name, shared
    if share < LEAST:
        return ""
    return f"; the nearest architecture is {best}, with {share:.0%} of the shapes"


def _known(parameters: int) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Yield names of architectures, with the shapes of their weights and buffers."""

    def distance(name: str) -> float:
        return abs(math.log(zoo.torchvision_parameters(name) / max(1, parameters)))

    near = sorted(zoo.torchvision_names(), key=distance)[:TRIED]
    entries = [(name, MODELS.get(name)) for name in MODELS]
    entries += [(f"torchvision:{n}", zoo.torchvision_architecture(n)) for n in near]
    for name, entry in entries:
        for pretrained in entry.layouts:
            yield name, list(entry.shapes(CLASSES, pretrained).values())
