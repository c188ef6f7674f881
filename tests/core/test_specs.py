"""Specifications: the allowed numbers, names and parameters."""

import resource
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covcli.attacks.attacks import make_attack
from covcli.core import specs
from covcli.core.errors import CovcliError
from covcli.data import datasets
from covcli.evaluation.gates import parse_gate
from covcli.methods import make_method

DIGITS = "9" * 5000


@pytest.mark.parametrize(
    "text",
    [
        f"{name}={value}"
        for name in ("noise:uniform?limit", "noise:uniform?seed", "noise:uniform?offset")
        for value in (10**11, 2**64, DIGITS, "1e9", "-1", "٣", "0x10", "1_000", "1.0")
        if not (name.endswith(("seed", "offset")) and value == 10**11)
    ]
    + ["digits?shuffle=18446744073709551616", "digits?offset=1000000000000000000"],
)
def test_absurd_numbers_of_data_are_refused_before_memory_is_taken(text: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CovcliError) as caught:
        datasets.load(text, "test")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("text", ["digits?offset=5&limit=9223372036854775807",
                                  "noise:uniform?seed=9223372036854775807&limit=3",
                                  "digits?shuffle=9223372036854775807"])  # fmt: skip
def test_the_largest_numbers_are_taken(text: str) -> None:
    images = datasets.load(text, "test")
    assert images.batch(torch.arange(2), (3, 8, 8)).shape == (2, 3, 8, 8)


# Python's Fraction works for minutes, and without bound on memory, on the first three.
@pytest.mark.parametrize(
    "value",
    ["1e999999999", "1e-999999999", f"1/1{DIGITS}", "1/0", "nan", "inf", "1e308", "1e-320", DIGITS,
     "1_0", "٣", "", "1j", "-1"],
)  # fmt: skip
def test_numbers_that_nothing_computes_with_are_refused_at_once(value: str) -> None:
    for read in (
        lambda: make_attack(specs.parse(f"attack:fgsm?eps={value}")),
        lambda: make_method(f"gauss?shrinkage={value}"),
        lambda: parse_gate(f"auroc={value}"),
    ):
        with pytest.raises(CovcliError) as caught:
            read()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["attack:pgd?steps=2147483648", "attack:cw?steps=1000001",
                                  "attack:cw?binary_search_steps=9999999"])  # fmt: skip
def test_steps_without_end_are_refused(text: str) -> None:
    with pytest.raises(CovcliError, match="from 1 to 1,000,000"):
        make_attack(specs.parse(text))


@pytest.mark.parametrize("text", ["mrc?sections=1001", "nac?bins=1000000000"])
def test_tables_without_bound_are_refused(text: str) -> None:
    with pytest.raises(CovcliError, match="from 1 to 1,000"):
        make_method(text)


@given(st.from_regex(r"[0-9]{1,6}(\.[0-9]{1,6})?(e-?[0-3])?", fullmatch=True))
def test_a_fraction_is_the_number_that_it_says(text: str) -> None:
    value = Fraction(text)
    if Fraction(1, 10**9) <= value <= 10**9:
        assert specs.fraction(text) == float(value)
    else:
        with pytest.raises(ValueError, match="positive number"):
            specs.fraction(text)


@given(st.integers(1, 10**6), st.integers(1, 10**3))
def test_a_fraction_of_two_numbers_is_their_quotient(above: int, below: int) -> None:
    assert specs.fraction(f"{above}/{below}") == float(Fraction(above, below))


@pytest.mark.parametrize("text", ["folder:a\0b", "npz:\ud800", "digits?limit=\0", "\0"])
def test_what_no_name_can_hold_is_refused(text: str) -> None:
    with pytest.raises(CovcliError, match="no name can have") as caught:
        datasets.load(text, "test")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["folder:~nobody-of-that-name/x", "npz:~nobody-of-that-name",
                                  f"folder:{'x' * 5000}", "csv:%00"])  # fmt: skip
def test_a_path_that_cannot_be_looked_at_is_refused(text: str) -> None:
    with pytest.raises(CovcliError) as caught:
        datasets.load(text, "test")
    assert str(caught.value).isprintable()
