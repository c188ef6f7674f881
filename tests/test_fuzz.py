"""Hostile input of every kind: refused in one line, or accepted; nothing else comes of it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fuzz

INPUTS = 500
# Those of which an input takes more than a few milliseconds, in CI with fewer.
DEAR = {"command line": 100, "bare weights": 100}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Target:
    torch.set_num_threads(1)
    return fuzz.Target(tmp_path_factory.mktemp("fuzz"), drawn=0)


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_hostile_input_is_refused_in_one_line_or_accepted(target: fuzz.Target, reader: str) -> None:
    inputs = DEAR.get(reader, INPUTS)
    tally = fuzz.attack(target.readers()[reader], range(inputs))
    assert tally.else_count == {}, fuzz.table({reader: tally})
    assert tally.refused + tally.accepted == tally.inputs == inputs
    assert tally.accepted > 0
    assert tally.refused > 0 or reader == "name"
