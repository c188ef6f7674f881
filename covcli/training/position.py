"""Checks of a paused training's position before it is restored; the file may be untrusted."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from covcli.core import runtime
from covcli.methods import State
from covcli.signature.signature import layout_of
from covcli.training.epoch import SUMS, Trainer
from covcli.training.loss import RUNNING

# The entries of a one-cycle schedule, and of an optimizer's groups, that a step changes.
MOVING = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
CYCLED = {"lr", "momentum"}


def check(content: Mapping[str, Any], trainer: Trainer, steps: int, epochs: int) -> None:
    """Raise an error unless a position belongs to this training; `Session.restore` converts it.

    Parameters
    ----------
    content
        The content of the file.
    trainer
        The training, at its start.
    steps, epochs
        The number of steps per epoch, and of epochs.
    """
    done, step, sums = len(content["history"]), content["step"], content["sums"]
    if not (isinstance(step, int) and 0 <= step <= steps and done <= epochs):
        raise ValueError("a step beyond its epoch")
    if not 1 <= int(content["threads"]) <= runtime.MOST_THREADS:
        raise ValueError("a number of threads out of range")
    if not (isinstance(sums, Tensor) and sums.shape == (len(SUMS),) and _is_finite(sums)):
        raise ValueError("sums of another epoch")
    _check_schedule(content["schedule"], trainer.schedule.state_dict(), done * steps + step)
    _check_optimizer(content["optimizer"], trainer.optimizer)
    if content["running"] is not None:
        _check_running(content["running"], content["reductions"], trainer)


def _check_schedule(stored: Mapping[str, Any], own: Mapping[str, Any], done: int) -> None:
    fixed = (own.keys() & stored.keys()) - MOVING
    if not stored.keys() <= own.keys() or any(stored[key] != own[key] for key in fixed):
        raise ValueError("another schedule")
    rates = stored["_last_lr"]
    if stored["last_epoch"] != done or not all(map(_is_number, [*rates, stored["_step_count"]])):
        raise ValueError("a schedule at another step")


def _check_optimizer(stored: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    groups = optimizer.state_dict()["param_groups"]
    for theirs, ours in zip(stored["param_groups"], groups, strict=True):
        if theirs.keys() != ours.keys() or not all(_is_number(theirs[key]) for key in CYCLED):
            raise ValueError("an optimizer of other settings")
        if any(theirs[key] != ours[key] for key in ours.keys() - CYCLED):
            raise ValueError("an optimizer of other settings")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, entry in stored["state"].items():
        buffer = entry["momentum_buffer"]
        if entry.keys() != {"momentum_buffer"} or not _is_finite(buffer):
            raise ValueError("an optimizer of another kind")
        if buffer.shape != weights[number].shape:
            raise ValueError("an optimizer of other weights")


def _check_running(stored: Any, reductions: Any, trainer: Trainer) -> None:
    layout = layout_of(trainer.points, trainer.model.spec.classes)
    RUNNING.check(State(layout, dict(stored), dict(reductions)))


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
