"""Devices: what cannot compute is refused."""

import pytest
import torch

from covcli.core import runtime
from covcli.core.errors import CovcliError


@pytest.mark.parametrize("name", ["meta", "cpu:x", "", "cuda:99999999999999999999", "\ud800", "\0",
                                  "[/]", "gpu", "cpu" * 2000])  # fmt: skip
def test_a_device_that_computes_nothing_is_refused(name: str) -> None:
    with pytest.raises(CovcliError) as caught:
        runtime.choose_device(name)
    assert str(caught.value).isprintable()


def test_other_defaults_of_torch_are_refused() -> None:
    with torch.device("meta"), pytest.raises(CovcliError, match=r"device is meta; call covcli in"):
        runtime.choose_device("cpu")
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(CovcliError, match=r"default type is torch\.float64"):
            runtime.choose_device("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
