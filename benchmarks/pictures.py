"""The pictures of the documents, drawn from a run's results by the functions that draw reports.

    python benchmarks/pictures.py runs/latest --trusted CIFAR-10 --untrusted MNIST

Writes first.png (coverage by layer beside the scores, with the threshold) and accuracy.png
(accuracy by bin of confidence).
"""

import argparse
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from covcli.reporting.blocks import Picture, ReportData
from covcli.reporting.pictures import coverage_picture, scores_picture
from covcli.reporting.report import read
from covcli.reporting.sections import confidence

HEIGHT = 3.6  # inches
DPI = 130


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder with an evaluation")
    parser.add_argument("--trusted", default="trusted", help="name of the trusted images")
    parser.add_argument("--untrusted", default="untrusted", help="name of the untrusted set")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    return parser.parse_args()


def drawn(figure: Figure) -> np.ndarray:
    """Return a figure's pixels on white, which both themes of a page show alike."""
    figure.set_size_inches(figure.get_size_inches()[0], HEIGHT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return np.asarray(Image.open(buffer).convert("RGB"))


def first(data: ReportData, names: dict[str, str]) -> np.ndarray:
    """Draw coverage by layer and the distribution of the scores side by side."""
    points = data.evaluation.points
    shares = {names[key]: [point.coverage[key] for point in points] for key in data.sets}
    scores = {names[key]: data.scores[key].scores["coverage"] for key in data.sets}
    layers = coverage_picture([point.name for point in points], shares)
    piles = scores_picture(scores, data.evaluation.signature.threshold)
    return np.concatenate([drawn(layers), drawn(piles)], axis=1)


def main() -> None:
    given = options()
    data = read(given.run)
    names = dict(zip(data.sets, (given.trusted, given.untrusted), strict=True))
    given.output.mkdir(parents=True, exist_ok=True)
    pictures = {"first": first(data, names)}
    section = confidence(data)
    assert section is not None
    bars = section.blocks[0]
    assert isinstance(bars, Picture)
    pictures["accuracy"] = drawn(bars.figure)
    for name, pixels in pictures.items():
        image = Image.fromarray(pixels).quantize(64, dither=Image.Dither.NONE)
        image.save(given.output / f"{name}.png", optimize=True)
        print(given.output / f"{name}.png")


if __name__ == "__main__":
    main()
