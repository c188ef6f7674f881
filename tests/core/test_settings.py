"""Settings and documents are held to their annotations."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval

from covcli.core.errors import CovcliError
from covcli.core.settings import read, settle
from covcli.training.config import TrainConfig


@dataclass(frozen=True)
class Config:
    epochs: Annotated[int, Interval(ge=1)] = 3
    rate: Annotated[float, Interval(gt=0, lt=math.inf)] = 0.1
    amp: Literal["off", "auto"] = "off"
    sets: tuple[str, ...] = ()
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Outer:
    inner: tuple[Config, ...]
    values: dict[str, Any]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs 0: must be greater than or equal to 1"),
        ({"epochs": 1.5}, "--epochs 1.5: must be a valid integer"),
        ({"epochs": None}, "--epochs None: must be a valid integer"),
        ({"rate": 0}, "--rate 0: must be greater than 0"),
        ({"rate": math.inf}, "--rate inf: must be finite"),
        ({"rate": math.nan}, "--rate nan: must be finite"),
        ({"amp": "of"}, "--amp of: must be 'off' or 'auto'"),
        ({"sets": "mnist"}, "--sets mnist: must be a valid tuple"),
        ({"data_dir": 3}, "--data-dir 3: must be a path"),
    ],
)
def test_a_setting_outside_its_annotation_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CovcliError) as caught:
        Config(**changes)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_what_means_the_same_is_converted() -> None:
    config = Config(sets=["a", "b"], data_dir="data", rate=1)  # type: ignore[arg-type]
    assert config == Config(sets=("a", "b"), data_dir=Path("data"), rate=1.0)
    assert isinstance(config.rate, float)


def test_a_document_is_read_whole_or_refused_in_one_line() -> None:
    document = {"inner": [{"epochs": 2}, {}], "values": {"a": [1]}, "newer": 1}
    assert read(Outer, document) == Outer((Config(2), Config()), {"a": [1]})
    for wrong, place in (
        ({"inner": []}, "values: is missing"),
        ({"inner": [{"sets": [3]}], "values": {}}, "inner.0.sets.0: must be"),
        ({"inner": 3, "values": {}}, "inner: must be"),
        ([], "the document: must be"),
    ):
        with pytest.raises(ValueError, match=place) as caught:
            read(Outer, wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_a_value_of_any_size_is_refused_in_one_line() -> None:
    values: list[Any] = [10**5000, -(10**5000), 1e400, float("nan"), "9" * 6000, 2**63]
    for value in values:
        with pytest.raises(CovcliError, match="--seed ") as caught:
            TrainConfig(seed=value)
        assert str(caught.value).isprintable()
