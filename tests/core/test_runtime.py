"""Devices: what cannot compute is refused."""

import pytest

from covcli.core import runtime
from covcli.core.errors import CovcliError


@pytest.mark.parametrize("name", ["meta", "cpu:x", "", "cuda:99999999999999999999", "\ud800", "\0",
                                  "[/]", "gpu", "cpu" * 2000])  # fmt: skip
def test_a_device_that_computes_nothing_is_refused(name: str) -> None:
    with pytest.raises(CovcliError) as caught:
        runtime.choose_device(name)
    assert str(caught.value).isprintable()
