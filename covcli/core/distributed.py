"""Ranks: the processes of one run under torchrun. Each processes a share of the batches.

All ranks run the same program and compute the same results. Only the first rank writes files and
prints. Without torchrun there is one rank, and no function here communicates.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from covcli.core.environment import whole_number
from covcli.core.errors import CovcliError
from covcli.core.signals import Interrupted

T = TypeVar("T")
# A rank may wait this long for the others, for example while one of them attacks a single batch.
PATIENCE = timedelta(hours=6)
# A failed rank waits this long for the error of the first rank, so that one error is printed once.
SECONDS_TO_HEAR = 2.0
CONTACT = "lost contact with another rank, which torchrun names"


class Store(Protocol):
    """A key-value store that all ranks can read and write, even while one of them fails."""

    def set(self, key: str, value: str) -> None:
        """Store a value."""

    def get(self, key: str) -> bytes:
        """Return a stored value."""

    def check(self, keys: list[str]) -> bool:
        """Return whether values are stored under all those keys."""


@dataclass(frozen=True)
class Team:
    """The rank of this process, the number of ranks, and their store."""

    rank: int = 0
    size: int = 1
    store: Store | None = None


_team = Team()


def start(device: str) -> None:
    """Join the other ranks if torchrun started several processes.

    Parameters
    ----------
    device
        The name of the device that will compute. CUDA tensors are reduced by nccl, others by gloo.
    """
    global _team
    ranks = whole_number("WORLD_SIZE", 1)
    if ranks == 1 or _team.size > 1:
        return
    if whole_number("RANK", ranks) >= ranks:
        raise CovcliError(
            f"is not below WORLD_SIZE, {ranks}, or not set", where="RANK",
            fix="start covcli by torchrun, or unset WORLD_SIZE",
        )  # fmt: skip
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    except ValueError as error:  # the master's address is missing, or its port is no number
        raise CovcliError(
            str(error), where="torch.distributed", fix="start covcli by torchrun"
        ) from None
    backend = "cpu:gloo,cuda:nccl" if _is_cuda(device) else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    _team = Team(rank, size, store)


def stop() -> None:
    """Leave the process group when the work is done."""
    global _team
    if _team.size > 1:
        dist.destroy_process_group()
        _team = Team()


def _is_cuda(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def rank() -> int:
    """Return this process's rank, counted from 0."""
    return _team.rank


def size() -> int:
    """Return the number of ranks."""
    return _team.size


def is_first() -> bool:
    """Return whether this is the first rank, which writes files and prints."""
    return _team.rank == 0


@contextmanager
def alone() -> Iterator[None]:
    """Run the block on every rank as if it were the only one: the work is not shared."""
    global _team
    team, _team = _team, Team()
    try:
        yield
    finally:
        _team = team


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Run the block first on one rank of each machine, so that the others reuse its downloads."""
    late = whole_number("LOCAL_RANK", 0) > 0
    if late:
        highest(0)
    yield
    if not late:
        highest(0)


def share(parts: Sequence[T]) -> list[T]:
    """Return this rank's share of the parts. The shares of all ranks are disjoint."""
    return list(parts[_team.rank :: _team.size])


def reduce(tensors: Mapping[str, Tensor], reductions: Mapping[str, str]) -> None:
    """Reduce each tensor over the ranks, in place, by its declared reduction: sum, min or max.

    A tensor declared "same" is left alone: every rank computed it from reduced tensors.
    """
    if _team.size == 1:
        return
    operations = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    for name in sorted(tensors):
        if reductions[name] in operations:
            dist.all_reduce(tensors[name], operations[reductions[name]])


def collect(batches: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the results of all ranks, in the order of the set.

    Parameters
    ----------
    batches
        For each batch of this rank: its row numbers (consecutive, ascending), then tensors with
        one entry per row. At least one rank must have a batch.

    Returns
    -------
    tuple of Tensor
        Those tensors over the whole set, on the CPU; the same on every rank.
    """
    mine = [tuple(column.cpu() for column in part) for part in batches]
    every = [part for theirs in gather(mine) for part in theirs]
    every = sorted(every, key=lambda part: int(part[0][0]))
    return tuple(torch.cat(column) for column in zip(*every, strict=True))[1:]


def gather(value: T) -> list[T]:
    """Return what every rank passes, in the order of ranks, on every rank."""
    if _team.size == 1:
        return [value]
    gathered: list[Any] = [None] * _team.size
    dist.all_gather_object(gathered, value)
    return gathered


def agree(value: T) -> T:
    """Return the first rank's value on every rank."""
    if _team.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def part(batch: Tensor) -> Tensor:
    """Return this rank's part of a batch that is split about evenly over the ranks."""
    return batch.tensor_split(_team.size)[_team.rank]


def highest(number: int) -> int:
    """Return the maximum of a number over the ranks; every rank must call it."""
    maximum = torch.tensor(number)
    reduce({"": maximum}, {"": "max"})
    return int(maximum)


def total(sums: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks."""
    summed = sums.clone()
    reduce({"": summed}, {"": "sum"})
    return summed


def train_together(model: nn.Module) -> nn.Module:
    """Return the network wrapped so that gradients are averaged over the ranks.

    Weights may be unused, as in an auxiliary head. `find_unused_parameters` also stops torch from
    regrouping gradients after the first step. Regrouping would change the rounding, and a resumed
    run would differ from an uninterrupted one.
    """
    if _team.size == 1:
        return model
    return DistributedDataParallel(model, find_unused_parameters=True)


def take_over_buffers(model: nn.Module) -> None:
    """Copy the first rank's running statistics to all ranks; each rank collected its own."""
    if _team.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def worded(error: BaseException, message: str) -> str:
    """Return the error message to print on stderr, with the rank; "" to print nothing.

    An error that all ranks raise is printed by the first rank only. If another rank failed earlier
    with a different error, this one is treated as its consequence and not printed.
    """
    team = _team
    if team.size == 1 or team.store is None:
        return message
    if isinstance(error, Interrupted):
        return message if team.rank == 0 else ""
    others = [r for r in range(team.size) if r != team.rank]
    try:
        if _lost_contact(error):
            known = _heard(team.store, others)
            time.sleep(SECONDS_TO_HEAR)  # so that torchrun reports the rank that failed first
            return "" if known else f"error: {_named(CONTACT)}"
        before = _heard(team.store, others, seconds=0)
        team.store.set(_key(team.rank), message)
        if before not in (None, message):
            time.sleep(SECONDS_TO_HEAR)
            return ""
        if team.rank and _heard(team.store, [0]) == message:
            return ""
    except RuntimeError:  # the rank that held the store has ended
        pass
    kind, _, text = message.partition(": ")
    return f"{kind}: {_named(text)}" if team.rank else message


def _named(text: str) -> str:
    return f"rank {_team.rank}: {text}"


def _lost_contact(error: BaseException) -> bool:
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def _heard(store: Store, ranks: list[int], seconds: float = SECONDS_TO_HEAR) -> str | None:
    """Return the error of the first of these ranks that fails within `seconds`, or None."""
    end = time.monotonic() + seconds
    while True:
        for other in ranks:
            if store.check([_key(other)]):
                return store.get(_key(other)).decode()
        if time.monotonic() >= end:
            return None
        time.sleep(0.05)


def _key(number: int) -> str:
    return f"covcli failed {number}"
