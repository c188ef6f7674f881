"""Ranks: the processes of one run under torchrun, each with its share of the batches.

Every rank runs the same program and ends with the same results; only the first one writes and
prints. Started without torchrun a process is the only rank, and nothing here communicates.
"""

import os
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

from covcli.core.signals import Interrupted

T = TypeVar("T")
# One rank may work while the others wait: on an attack that is a single batch, for instance.
PATIENCE = timedelta(hours=6)
# How long a failed rank waits to hear whether the first one fails alike, and speaks for all.
SECONDS_TO_HEAR = 2.0
CONTACT = "lost contact with another rank, which torchrun names"


class Store(Protocol):
    """Where ranks leave word for each other, also while one of them is failing."""

    def set(self, key: str, value: str) -> None:
        """Leave a word."""

    def get(self, key: str) -> bytes:
        """Return a word."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all those words have been left."""


@dataclass(frozen=True)
class Team:
    """The place of a process among the ranks of its run."""

    rank: int = 0
    size: int = 1
    store: Store | None = None


_team = Team()


def start(device: str) -> None:
    """Join the other ranks if torchrun has started this process beside others.

    Parameters
    ----------
    device
        The name of the device that will compute: tensors on CUDA are reduced by nccl, all others
        by gloo.
    """
    global _team
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _team.size > 1:
        return
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if _is_cuda(device) else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    _team = Team(rank, size, store)


def stop() -> None:
    """Leave the other ranks, once the work is done."""
    global _team
    if _team.size > 1:
        dist.destroy_process_group()
        _team = Team()


def _is_cuda(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def rank() -> int:
    """Return which rank this process is, from 0 on."""
    return _team.rank


def size() -> int:
    """Return how many ranks there are."""
    return _team.size


def is_first() -> bool:
    """Return whether this is the rank that writes and prints."""
    return _team.rank == 0


@contextmanager
def alone() -> Iterator[None]:
    """Do the block's work as a whole on every rank, as if each were the only one."""
    global _team
    team, _team = _team, Team()
    try:
        yield
    finally:
        _team = team


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one rank of each machine run the block before the others: what it fetches, they find."""
    late = int(os.environ.get("LOCAL_RANK", "0")) > 0
    if late:
        highest(0)
    yield
    if not late:
        highest(0)


def share(parts: Sequence[T]) -> list[T]:
    """Return this rank's share of the parts: disjoint from the others', none twice."""
    return list(parts[_team.rank :: _team.size])


def reduce(tensors: Mapping[str, Tensor], reductions: Mapping[str, str]) -> None:
    """Reduce each tensor over the ranks, in place, as declared: by sum, min or max.

    What is declared "same" is so already, since every rank made it from reduced tensors.
    """
    if _team.size == 1:
        return
    operations = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    for name in sorted(tensors):
        if reductions[name] in operations:
            dist.all_reduce(tensors[name], operations[reductions[name]])


def collect(found: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Put together what all ranks have found, in the order of the set.

    Parameters
    ----------
    found
        For each batch of this rank its rows, ascending and one after another, and tensors with
        one entry a row. Some rank must have a batch.

    Returns
    -------
    tuple of Tensor
        Those tensors over the whole set, on the CPU; the same on every rank.
    """
    mine = [tuple(column.cpu() for column in part) for part in found]
    every = mine
    if _team.size > 1:
        gathered: list[Any] = [None] * _team.size
        dist.all_gather_object(gathered, mine)
        every = [part for theirs in gathered for part in theirs]
    every = sorted(every, key=lambda part: int(part[0][0]))
    return tuple(torch.cat(column) for column in zip(*every, strict=True))[1:]


def agree(value: T) -> T:
    """Return what the first rank passes, on every rank."""
    if _team.size == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]


def part(batch: Tensor) -> Tensor:
    """Return this rank's part of a batch of which every rank takes about as many rows."""
    return batch.tensor_split(_team.size)[_team.rank]


def highest(number: int) -> int:
    """Return the highest of the numbers that the ranks pass; all of them meet here."""
    found = torch.tensor(number)
    reduce({"": found}, {"": "max"})
    return int(found)


def total(sums: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks."""
    summed = sums.clone()
    reduce({"": summed}, {"": "sum"})
    return summed


def train_together(model: nn.Module) -> nn.Module:
    """Return the network as all ranks train it: gradients are averaged over them.

    Weights may go unused, as in an auxiliary head. Expecting that also keeps torch from grouping
    the gradients anew after the first step, by which a resumed run would round otherwise than one
    that was not interrupted.
    """
    if _team.size == 1:
        return model
    return DistributedDataParallel(model, find_unused_parameters=True)


def take_over_buffers(model: nn.Module) -> None:
    """Give every rank the first one's running statistics, which each has collected for itself."""
    if _team.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def worded(error: BaseException, message: str) -> str:
    """Word a failure for stderr so that each is read once, with its rank; "" to keep silent.

    The first rank speaks for what fails everywhere. What fails after another rank has failed in
    another way is taken for a consequence, and left to that rank to tell.
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
            time.sleep(SECONDS_TO_HEAR)  # so that torchrun finds the rank first that failed first
            return "" if known else f"error: {_named(CONTACT)}"
        before = _heard(team.store, others, seconds=0)
        team.store.set(_key(team.rank), message)
        if before not in (None, message):
            time.sleep(SECONDS_TO_HEAR)
            return ""
        if team.rank and _heard(team.store, [0]) == message:
            return ""
    except RuntimeError:  # the store has ended with the rank that kept it
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
    """Return the word of the first of these ranks to fail, if one does within some seconds."""
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
