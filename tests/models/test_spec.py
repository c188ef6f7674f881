"""A model's specification, read from a file or an option, holds numbers that can be computed."""

import math
from typing import Any

import pytest

from covcli.core.errors import CovcliError
from covcli.models.spec import CIFAR10, ModelSpec
from covcli.signature.config import read_statistics

GOOD = ModelSpec("vgg11", 10, (3, 32, 32), *CIFAR10).as_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", [math.nan] * 3), ("mean", [0, math.inf, 0]), ("mean", [10**400, 0, 0]),
        ("deviation", [1, math.nan, 1]), ("deviation", [0.2, math.inf, 1]),
        ("deviation", [1, 0, 1]), ("classes", math.inf), ("classes", 10**400),
        ("classes", math.nan), ("shape", [3, math.inf, 32]), ("shape", [3, 10**400, 32]),
        ("shape", [3, 32]), ("shape", None), ("preprocess", {"resize": [10**5000, 8]}),
    ],
)  # fmt: skip
def test_numbers_that_a_network_cannot_have_are_refused(key: str, value: Any) -> None:
    assert ModelSpec.from_dict(GOOD, "x").as_dict() == GOOD
    with pytest.raises(CovcliError) as caught:
        ModelSpec.from_dict({**GOOD, key: value}, "x")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["nan,1,1", "1,inf,1", "1,-inf,1", "1e999,1,1", "1,1", "a,1,1"])
def test_pixel_statistics_are_finite(text: str) -> None:
    for mean, deviation in ((text, "1,1,1"), ("1,1,1", text)):
        with pytest.raises(CovcliError, match="expected three numbers"):
            read_statistics(mean, deviation)
