"""Which networks of a program can be watched: a hook must see each activation of each pass."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from covcli.core.errors import CovcliError
from covcli.models.logits import named_tensors

COMPILED = "_orig_mod"  # the attribute of `torch.compile(network)` that holds the network
QUANTISED = ("torch.ao.nn.", "torch.nn.quantized.")


def check_watchable(network: nn.Module) -> None:
    """Raise a CovcliError if hooks do not see a network's activations, or weights have no shape.

    Quantised networks are refused too: an image's answer depends on the others of its batch, as the
    scale of its numbers does.

    Examples
    --------
    >>> check_watchable(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)))
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: the network: has weights without a shape (1); run it once...
    """
    for name, module in network.named_modules():
        if reason := _reason(module):
            inside = f" ({name})" if name else ""
            raise CovcliError(f"{reason[0]}{inside}", where="the network", fix=reason[1])


def _reason(module: nn.Module) -> tuple[str, str] | None:
    """Return why a module cannot be watched, and what to do; None if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript, in which no hook sees activations", "pass the nn.Module itself"
    if is_compiled(module):
        return (
            "is compiled, where no hook sees activations",
            "compile it neither inside nor in place",
        )
    if type(module).__module__.startswith(QUANTISED):
        return "is quantised by the scale of each batch or layer", "pass the network in floats"
    if any(map(is_lazy, _tensors(module))):
        return "has weights without a shape", "run it once, before it is trained"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module runs what torch.compile has made of it."""
    # Asked of every module at each call: `hasattr` is twenty times slower where it says no.
    return COMPILED in module._modules or module._compiled_call_impl is not None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def check_same(network: nn.Module, example: Tensor) -> None:
    """Raise a CovcliError if a network in evaluation mode answers the same image in two ways."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        images = torch.randn_like(example).expand(2, *example.shape[1:])
        one, two = (dict(named_tensors(network(images))) for _ in range(2))
    if any(not torch.equal(tensor, two[name]) for name, tensor in one.items()):
        raise CovcliError(
            "answers the same images differently each time", where="the network",
            fix="pass training=self.training to F.dropout, and draw nothing in evaluation mode",
        )  # fmt: skip
