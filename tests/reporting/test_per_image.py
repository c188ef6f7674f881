"""scores.csv.gz and samples.npz: what is written is what is read, and the files keep their form."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from example import scores
from hypothesis import given, settings
from hypothesis import strategies as st

from covcli.core.errors import CovcliError
from covcli.reporting.per_image import (
    ExplainedImage,
    ImageScores,
    Samples,
    Thumbnails,
    pack_samples,
    pack_scores,
    read_samples,
    read_scores,
)

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


def image_scores(seed: int, images: int, labelled: bool, baselines: list[str]) -> ImageScores:
    """Return the example's scores, with large and negative ones, any class, and any verdict."""
    generator, plain = np.random.default_rng(seed), scores(0.0, images, baselines, seed)
    return replace(
        plain,
        predicted=generator.integers(0, 10, images),
        label=plain.label if labelled else None,
        scores={**plain.scores, "coverage": generator.normal(0, 1e6, images)},
        unsure=generator.random(images) < 0.5,
    )


@settings(max_examples=25, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=3, unique=True), labelled=st.booleans())
def test_scores_come_back_by_set(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], labelled: bool
) -> None:
    path = tmp_path_factory.mktemp("scores") / "scores.csv.gz"
    sets = {name: image_scores(i, 3 + i, labelled, ["knn"]) for i, name in enumerate(names)}
    path.write_bytes(pack_scores(sets))
    stored = read_scores(path)
    assert list(stored) == names
    for name, of in sets.items():
        again = stored[name]
        assert (again.label is None) == (of.label is None)
        for field in (
            "predicted",
            "p_value",
            "confidence",
            "softmax_confidence",
            "untrusted",
            "unsure",
        ):
            np.testing.assert_array_equal(getattr(again, field), getattr(of, field))
        for score in ("coverage", "knn"):
            np.testing.assert_array_equal(again.scores[score], of.scores[score])
        np.testing.assert_allclose(again.scores["softmax"], of.scores["softmax"], atol=1e-15)
        assert list(again.baselines) == ["knn"]


def test_the_table_has_the_documented_columns(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(pack_scores({"trusted": image_scores(0, 3, False, ["knn"])}))
    text = gzip.decompress((tmp_path / "s").read_bytes()).decode()
    assert text.splitlines()[0] == (
        "set,index,label,predicted,score,p_value,confidence,untrusted,unsure,softmax_confidence,"
        "knn_score"
    )
    table = pd.read_csv(tmp_path / "s", compression="gzip")
    assert table["index"].tolist() == [0, 1, 2]
    assert table["label"].tolist() == [-1, -1, -1]


def test_files_are_named_where_images_are_of_files(tmp_path: Path) -> None:
    names = np.array(
        ["a/1.png", '\udcff,\n".png', "=x.png", "a\rb.png", "\r\n.png", " NA"], np.object_
    )
    named = replace(image_scores(0, 6, False, ["knn"]), file=names)
    sets = {"folder:a": named, "noise": image_scores(1, 2, True, ["knn"])}
    (tmp_path / "s").write_bytes(pack_scores(sets))
    again = read_scores(tmp_path / "s")
    assert again["folder:a"].file is not None
    assert again["folder:a"].file.tolist() == names.tolist()
    assert list(again["folder:a"].baselines) == ["knn"]
    assert again["noise"].file is None


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "", "set,index\n", "set,index,label,predicted,score,p_value,confidence,"
             "untrusted,softmax_confidence\nx,0,0,zero,1,1,1,1,1\n"],
)  # fmt: skip
def test_another_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(CovcliError, match="cannot be read") as caught:
        read_scores(tmp_path / "s")
    assert "\n" not in str(caught.value)


def thumbnails(rows: list[int]) -> Thumbnails:
    pixels = np.random.default_rng(len(rows)).integers(0, 256, (len(rows), 3, 4, 4), np.uint8)
    return Thumbnails(np.array(rows, np.int64), pixels)


SAMPLES = Samples(
    flagged=[thumbnails([]), thumbnails([2, 0])],
    passed=[thumbnails([1]), thumbnails([])],
    explained=[
        ExplainedImage(np.zeros((1, 2, 2), np.uint8), np.ones((3, 2), np.float32)),
        ExplainedImage(np.ones((3, 2, 2), np.uint8), None),
    ],
)


def test_samples_come_back_under_their_names(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    path.write_bytes(pack_samples(SAMPLES))
    with np.load(path) as archive:
        assert set(archive.files) == {
            "explained_0", "explained_0_map", "explained_1", "0_passed", "0_passed_rows",
            "1_flagged", "1_flagged_rows",
        }  # fmt: skip
    samples = read_samples(path, 2, 2)
    for mine, theirs in zip(
        [*SAMPLES.flagged, *SAMPLES.passed], [*samples.flagged, *samples.passed], strict=True
    ):
        np.testing.assert_array_equal(mine.rows, theirs.rows)
        assert mine.images.tobytes() == theirs.images.tobytes()
    for mine, theirs in zip(SAMPLES.explained, samples.explained, strict=True):
        np.testing.assert_array_equal(mine.image, theirs.image)
        assert (mine.fires is None) == (theirs.fires is None)


@pytest.mark.parametrize(
    "changes",
    [
        {"explained_1": None}, {"explained_0": np.zeros((2, 2), np.uint8)},
        {"explained_0_map": np.zeros(3)}, {"0_passed_rows": None},
        {"0_passed_rows": np.arange(2)}, {"1_flagged": np.zeros((2, 3, 4, 4))},
        {"1_flagged": np.zeros((2, 3, 0, 4), np.uint8)},
    ],
)  # fmt: skip
def test_misshapen_samples_are_refused(tmp_path: Path, changes: dict[str, np.ndarray]) -> None:
    path = tmp_path / "samples.npz"
    path.write_bytes(pack_samples(SAMPLES))
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    with pytest.raises(CovcliError, match="cannot be read"):
        read_samples(path, 2, 2)
