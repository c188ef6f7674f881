"""How covcli's corruptions compare with a published implementation, by the statistics of pixels.

    python -m venv other && other/bin/pip install imagecorruptions-imaug covcli
    other/bin/python benchmarks/corruptions.py

Corrupts 16 patches of scikit-learn's two photographs, 224 pixels wide, by both, in all severities,
and prints for each corruption the largest difference over the severities of: the mean of the
pixels; their deviation; the mean distance to the patch before; the mean step from a pixel to the
next one. All are means over the patches, of 255. Corruptions without chance are compared pixel by
pixel too. The photographs of frost are those of the other package. Its elastic_transform is not the
published program's (it moves no points, and has settings of its own), and covcli's is: that row
says how far the two lie apart.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

from covcli.data.corruptions import CORRUPTIONS, SEVERITIES

Pixels = NDArray[np.uint8]
SIDE = 224
FIGURES = ("mean", "deviation", "distance", "step")
WITHOUT_CHANCE = (
    "gaussian_blur", "defocus_blur", "zoom_blur", "contrast", "brightness", "saturate",
    "jpeg_compression", "pixelate",
)  # fmt: skip


def patches() -> list[Pixels]:
    """Return the patches: four by two of each photograph."""
    sheets = load_sample_images().images
    return [
        np.ascontiguousarray(sheet[top : top + SIDE, left : left + SIDE])
        for sheet in sheets
        for top in (0, sheet.shape[0] - SIDE)
        for left in np.linspace(0, sheet.shape[1] - SIDE, 4).astype(int).tolist()
    ]


def ours(name: str, severity: int, images: list[Pixels], seed: int = 0) -> list[Pixels]:
    """Corrupt images by covcli."""
    corrupt = CORRUPTIONS.get(name)
    return [
        np.floor(corrupt(image / 255, severity, np.random.default_rng([seed, i])) * 255 + 1e-9)
        .astype(np.uint8)
        for i, image in enumerate(images)
    ]  # fmt: skip


def theirs(name: str, severity: int, images: list[Pixels]) -> list[Pixels]:
    """Corrupt images by the other implementation."""
    from imagecorruptions import corrupt

    np.random.seed(0)  # noqa: NPY002 - it draws from the global generator
    return [corrupt(image, severity, name) for image in images]


def statistics(before: list[Pixels], after: list[Pixels]) -> dict[str, float]:
    """Return the figures, each a mean over the images."""
    rows = []
    for first, second in zip(before, after, strict=True):
        a, b = first.astype(float), second.astype(float)
        steps = np.abs(np.diff(b, axis=0)).mean() + np.abs(np.diff(b, axis=1)).mean()
        rows.append((b.mean(), b.std(), np.abs(a - b).mean(), steps / 2))
    return dict(zip(FIGURES, np.mean(rows, 0).tolist(), strict=True))


def main() -> None:
    images = patches()
    print("| corruption | mean | deviation | distance | step | pixels |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in CORRUPTIONS:
        differences, pixels = [], []
        for severity in range(1, SEVERITIES + 1):
            mine, other = ours(name, severity, images), theirs(name, severity, images)
            mine_figures, other_figures = statistics(images, mine), statistics(images, other)
            differences.append([mine_figures[f] - other_figures[f] for f in FIGURES])
            pixels.append(np.abs(np.array(mine).astype(int) - np.array(other)).mean())
        largest = np.abs(differences).max(0)
        exact = f"{max(pixels):.2f}" if name in WITHOUT_CHANCE else "-"
        print(f"| {name} | {' | '.join(f'{d:.2f}' for d in largest)} | {exact} |", flush=True)


if __name__ == "__main__":
    main()
