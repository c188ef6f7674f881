"""A paused training from anybody: its position is taken over only if it is one of this training."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config

from covcli.core.errors import CovcliError
from covcli.core.signals import Interrupted
from covcli.data import datasets
from covcli.training.paused import PAUSED
from covcli.training.session import Session
from covcli.training.train import train


class StopAfter:
    """Interrupts a training after so many images."""

    def __init__(self, images: int) -> None:
        self.left = images

    def start(self, title: str, total: int) -> None: ...

    def note(self, line: str) -> None: ...

    def advance(self, images: int) -> None:
        self.left -= images
        if self.left <= 0:
            raise Interrupted(2)


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, dict[str, Any]]:
    runs = tmp_path_factory.mktemp("runs")
    config = tiny_config(runs, trusted="digits?limit=400", epochs=3)
    with pytest.raises(Interrupted):
        train(config, StopAfter(700))
    session = Session(config, datasets.load(config.trusted, "train"))
    return session, PAUSED.load(runs / "tiny" / "last.pt")


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def first(values: dict[Any, Any]) -> Any:
    return values[next(iter(values))]


CHANGES: dict[str, Callable[[Any], None]] = {
    "threads that cannot be started": put("threads", value=10**6),
    "no threads": put("threads", value=0),
    "threads beyond any integer": put("threads", value=10**400),
    "a step before the first": put("step", value=-1),
    "a step beyond the epoch": put("step", value=10**9),
    "half a step": put("step", value=2.5),
    "sums of another shape": put("sums", value=torch.zeros(3)),
    "sums that are none": put("sums", value="x"),
    "sums of NaN": lambda content: content["sums"].fill_(torch.nan),
    "more epochs than there are": lambda content: content["history"].extend(content["history"] * 9),
    "a schedule of another length": put("schedule", "total_steps", value=3),
    "a schedule elsewhere": put("schedule", "last_epoch", value=10**6),
    "a schedule whose method is a number": put("schedule", "step", value=1),
    "a rate that is none": put("schedule", "_last_lr", value=["x"]),
    "a rate of NaN": put("optimizer", "param_groups", 0, "lr", value=float("nan")),
    "another momentum": put("optimizer", "param_groups", 0, "nesterov", value=False),
    "groups of other weights": put("optimizer", "param_groups", 0, "params", value=[0]),
    "momentum of another shape": lambda c: first(c["optimizer"]["state"]).update(
        momentum_buffer=torch.zeros(1)
    ),
    "momentum of NaN": lambda c: first(c["optimizer"]["state"])["momentum_buffer"].fill_(torch.nan),
    "weights of another shape": lambda c: c["model"].update(
        {next(iter(c["model"])): torch.zeros(7)}
    ),
    "a running signature of another network": lambda c: c["running"].update(low=torch.zeros(2, 2)),
    "a running signature of NaN": lambda c: c["running"]["low"].fill_(torch.nan),
    "another generator": put("generator", value=torch.zeros(3, dtype=torch.uint8)),
    "no history": put("history", value=None),
}


def test_an_own_position_is_taken_over(paused: tuple[Session, dict[str, Any]]) -> None:
    session, content = paused
    assert content["running"] is not None
    session.restore(deepcopy(content), Path("last.pt"))
    assert session.step == content["step"] > 0


@pytest.mark.parametrize("name", CHANGES)
def test_another_position_is_refused_in_one_line(
    paused: tuple[Session, dict[str, Any]], name: str
) -> None:
    session, content = paused
    changed = deepcopy(content)
    CHANGES[name](changed)
    before = torch.get_num_threads()
    with pytest.raises(CovcliError, match="is inconsistent") as caught:
        session.restore(changed, Path("last.pt"))
    assert str(caught.value).isprintable()
    assert torch.get_num_threads() == before
