"""Identification of the logits among a network's outputs."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from covcli.core.errors import CovcliError, first_few

MOST_NAMED = 6
DEPTH = 4  # the maximum nesting


def find_logits(output: Any, images: int, classes: int, wanted: str = "") -> Tensor:
    """Return the logits among a network's outputs.

    Parameters
    ----------
    output
        A tensor, or tensors nested in tuples, lists, mappings and objects.
    images, classes
        The shape of the logits.
    wanted
        The name of the logits, as `named_tensors` yields it. "" chooses the only tensor of the
        right shape, or the one named `logits` if there are several.

    Returns
    -------
    Tensor
        Shape (images, classes).

    Raises
    ------
    CovcliError
        If no tensor, or more than one, could be the logits.

    Examples
    --------
    >>> import torch
    >>> scores, features = torch.zeros(2, 10), torch.ones(2, 64)
    >>> find_logits({"head": (features, scores)}, 2, 10) is scores
    True
    """
    if isinstance(output, Tensor):
        return _alone(output, images, classes)
    tensors = dict(named_tensors(output))
    fitting = {name: t for name, t in tensors.items() if tuple(t.shape) == (images, classes)}
    if wanted:
        if wanted not in fitting:
            raise CovcliError(
                f"the network returns no {wanted!r} of shape ({images}, {classes})",
                where="--logits",
                fix=_describe(tensors),
            )
        return fitting[wanted]
    if len({id(tensor) for tensor in fitting.values()}) == 1:
        return next(iter(fitting.values()))
    named = [name for name in fitting if name.split(".")[-1] == "logits"]
    if len(named) == 1:
        return fitting[named[0]]
    if fitting:
        raise CovcliError(
            f"the network returns several tensors that could be the logits: {', '.join(fitting)}",
            where="the network",
            fix=f"name one, as --logits {next(iter(fitting))}",
        )
    raise CovcliError(
        f"the network returns no logits of shape ({images}, {classes})",
        where="the network",
        fix=_describe(tensors),
    )


def _alone(output: Tensor, images: int, classes: int) -> Tensor:
    """Return the network's only output as logits; spatial dimensions of size 1 are removed."""
    if output.ndim > 2 and output.shape[1:].numel() == classes == output.shape[1]:
        output = output.flatten(1)
    if output.ndim != 2 or output.shape[1] != classes:
        raise CovcliError(
            f"the network returns a tensor of shape {tuple(output.shape)}, "
            f"not logits of shape ({images}, {classes})",
            where="the network",
        )
    return output


def named_tensors(output: Any, name: str = "", depth: int = DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a nested output with a name such as `0`, `logits` or `heads.1`."""
    if isinstance(output, Tensor):
        yield name, output
        return
    for key, part in _parts(output) if depth else ():
        yield from named_tensors(part, f"{name}.{key}" if name else key, depth - 1)


def _parts(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((str(key), part) for key, part in output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)
    elif isinstance(output, list | tuple):
        yield from ((str(place), part) for place, part in enumerate(output))
    elif is_dataclass(output):  # its fields may lie in slots
        yield from ((part.name, getattr(output, part.name)) for part in fields(output))
    elif hasattr(output, "__dict__"):
        yield from vars(output).items()


def _describe(tensors: Mapping[str, Tensor]) -> str:
    shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    return f"it returns {first_few(shown, MOST_NAMED) or 'no tensor'}"
