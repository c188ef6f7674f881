"""Values stored as a byte each: rounded outward where ranges need it, by the finest units."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from covcli.methods import Layout, State
from covcli.methods.codes import Coding
from covcli.methods.ensemble import coded_ranges, stored_ranges

LARGEST = float(np.finfo(np.float32).max)
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, LARGEST, -LARGEST, 1e-45, -1e-45, 1e-38, 65504.0, 65520.0]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
)
ROWS = st.integers(1, 5).flatmap(
    lambda rows: npst.arrays(np.float32, (2, rows, 4), elements=FLOATS)
)


def stored(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    classes, neurons = low.shape
    tensors = coded_ranges(low, high)
    assert {t.element_size() for n, t in tensors.items() if n in ("low", "high")} == {1}
    ends = stored_ranges(State(Layout(classes, (neurons,), (neurons,)), tensors))
    return ends["low"], ends["high"]


@settings(max_examples=400, deadline=None)
@given(ends=ROWS, empty=st.integers(0, 4))
def test_coded_ranges_hold_what_the_ranges_hold(ends: np.ndarray, empty: int) -> None:
    low, high = (torch.from_numpy(end) for end in (ends.min(0), ends.max(0)))
    low[empty:], high[empty:] = torch.inf, -torch.inf  # classes without images
    outer_low, outer_high = stored(low, high)
    assert outer_low.dtype == torch.float32
    assert bool((outer_low <= low).all() & (outer_high >= high).all())
    assert bool(outer_low[:empty].isfinite().all() & outer_high[:empty].isfinite().all())
    assert bool((outer_low[empty:] == torch.inf).all() & (outer_high[empty:] == -torch.inf).all())


@settings(max_examples=200, deadline=None)
@given(
    ends=npst.arrays(np.float64, (2, 6, 3), elements=st.floats(0, 1)), scale=st.integers(-90, 90)
)
def test_coded_ranges_are_near_the_ranges(ends: np.ndarray, scale: int) -> None:
    """No end is moved by more than a code's step, which is finest near the lowest end."""
    ends = np.ldexp(ends, scale).astype(np.float32)
    low, high = (torch.from_numpy(end) for end in (ends.min(0), ends.max(0)))
    outer_low, outer_high = stored(low, high)
    lowest, highest = low.amin(0).double(), high.amax(0).double()
    width = highest - lowest
    for outer, end in ((outer_low, low), (outer_high, high)):
        share = ((end.double() - lowest) / width.clamp_min(1e-300)).clamp(0, 1)
        moved = (outer.double() - end.double()).abs()
        # A step from c² to (c + 1)², in units of at least the width over 255²; powers of two.
        unit = 2 * torch.maximum(width / (255**2 - 1), lowest.abs() / 32767).clamp_min(2.0**-128)
        step = unit * (2 * (share * width / (unit / 2).clamp_min(1e-300)).sqrt() + 4)
        assert bool((moved <= step).all())


@settings(max_examples=200, deadline=None)
@given(rows=npst.arrays(np.float32, (4, 3), elements=FLOATS))
def test_means_are_rounded_to_the_nearest_code(rows: np.ndarray) -> None:
    values = torch.from_numpy(rows)
    coding = Coding.over(values.amin(0), values.amax(0))
    decoded = coding.decode(coding.encode(values, torch.round)).double().numpy()
    for column, base, exponent in zip(
        range(3), coding.base.tolist(), coding.exponent.tolist(), strict=True
    ):
        unit = math.ldexp(1.0, exponent)
        exact = rows[:, column].astype(np.float64)
        assert np.abs(decoded[:, column] - exact).max() <= unit / 2 * (1 + 1e-9)
        spread = max(np.ptp(exact) / 254, np.abs(exact.min()) / 32767, 2.0**-128)
        assert unit <= 2 * spread
        assert base * unit <= exact.min()
