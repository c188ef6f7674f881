"""Pictures: legible whatever is drawn."""

import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from covcli.core.errors import one_line
from covcli.reporting.pictures import (
    MOST_LABELS,
    Line,
    coverage_picture,
    lines_picture,
    scores_picture,
    thinned,
)
from covcli.reporting.svg import inline
from covcli.reporting.thumbnails import heat


@pytest.mark.parametrize("points", [1, 18, 20, 21, 49, 121])
def test_many_layers_are_thinned(points: int) -> None:
    names = [f"layer{i}" for i in range(points)]
    (axes,) = coverage_picture(names, {"trusted": [0.9] * points}).axes
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    places = axes.get_xticks()
    assert labels == [names[int(place)] for place in places]
    assert min(points, MOST_LABELS // 2) <= len(labels) <= MOST_LABELS
    assert len(axes.lines[0].get_xdata()) == points
    assert thinned(points, points) == list(range(points))


@pytest.mark.parametrize("threshold", [3.87, 1e-4, 2e5, -2.0, 0.0, np.inf])
@pytest.mark.parametrize("far", [1.0, 1e3, 1e9])
@pytest.mark.parametrize("away", [0.5, 2.0, 1e4])
def test_one_set_far_off_leaves_the_others_legible(
    threshold: float, far: float, away: float
) -> None:
    unit = abs(threshold) if np.isfinite(threshold) and threshold else 1.0
    generator = np.random.default_rng(0)
    base = threshold if np.isfinite(threshold) else 0.0
    trusted = base - unit * (away + generator.normal(0, 0.2 * away, 500))
    figure = scores_picture({"trusted": trusted, "far": trusted + far * unit}, threshold)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    across = axes.transData.transform([(x, 0) for x in (base, *trusted)])[:, 0]
    width = axes.bbox.width
    assert across[0] - np.median(across[1:]) > 0.02 * width or not np.isfinite(threshold)
    assert np.ptp(across[1:]) > 0.02 * width
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert 2 <= len(ticks) <= 8
    counts = [patch.get_data().values for patch in axes.patches]
    assert [values.sum() for values in counts] == pytest.approx([100, 100])


def test_scores_that_are_all_equal_can_be_drawn() -> None:
    scores_picture({"trusted": np.zeros(5), "other": np.zeros(3)}, 0.0)


def test_charts_on_one_page_share_no_id_and_keep_their_names() -> None:
    lines = [Line("a<b>&$x$", np.arange(3.0), np.arange(3.0), "#0072b2", "-", "o")]
    first, second = (
        ET.fromstring(inline(lines_picture(lines, ("x", "y"), 3.0), name, 'seen "here"'))
        for name in ("one", "two")
    )
    ids = [{e.get("id") for e in root.iter() if e.get("id")} for root in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert first.get("aria-label") == 'seen "here"'
    assert "a<b>&$x$" in [e.text for e in first.iter("text")]
    strokes = {e.get("stroke") for e in first.iter()}
    assert "var(--series-0)" in strokes
    assert not [e for e in first.iter() if e.get("style")]
    before = [float(n) for n in (first.get("viewBox") or "").split()]
    assert before[2] == pytest.approx(5.4 * 72, rel=0.1)


def test_heat_shows_where_a_channel_fires() -> None:
    image = np.full((3, 8, 8), 100, np.uint8)
    fires = np.zeros((2, 2), np.float32)
    fires[0, 1] = 5
    shown = heat(image, fires)
    assert shown.shape == (3, 64, 64)
    quiet = shown[:, 40:, :24]
    assert (quiet == quiet[0, 0, 0]).all()  # grey where nothing fires
    red, green, blue = (shown[k, :32, 32:] for k in range(3))
    assert red.min() > green.max() >= blue.max() or blue.max() < red.min()
    np.testing.assert_array_equal(heat(image, np.ones((2, 2), np.float32))[0], quiet[0, 0, 0])


@pytest.mark.parametrize(
    "name",
    ["_hidden", "", "$x^$", "$\\frac{$", "\\$", "a$b", "\ud800", "\x00", "\u202ex", "[/]",
     "<script>", "x" * 5000, "%s", "日本", "\\"],
)  # fmt: skip
def test_any_name_is_drawn_and_stands_in_the_legend(name: str) -> None:
    figure = coverage_picture(["first"], {"trusted": [0.9], name: [0.5]})
    drawn = inline(figure, "x", one_line(name))
    ET.fromstring(drawn)
    figure.savefig(io.BytesIO(), format="png")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2
