"""From a folder of images to the names under a report's thumbnails."""

from pathlib import Path

import numpy as np
from PIL import Image

from covcli.core.progress import Silent
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.reporting.per_image import read_scores
from covcli.reporting.report import report


def test_a_thumbnail_of_a_file_bears_its_name(run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0)
    (tmp_path / "odd").mkdir()
    for name in ("b<i>", "a", "c"):
        image = Image.fromarray(pixels.integers(0, 256, (9, 9), np.uint8))
        image.save(tmp_path / "odd" / f"{name}.png")
    spec = f"folder:{tmp_path}/odd"
    evaluate(EvaluationConfig((spec,), runs=run.parent), Silent())
    scores = read_scores(run / "scores.csv.gz")
    assert scores["trusted"].file is None
    assert scores[spec].file is not None
    assert sorted(scores[spec].file) == ["a.png", "b<i>.png", "c.png"]
    page = report(run).html.read_text()
    for name in ("a.png", "b&lt;i&gt;.png", "c.png"):
        assert f"<span>{name}</span>" in page
        assert f'alt="{name} of {spec}: ' in page
