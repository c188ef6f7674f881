"""Selections: which part of a source `offset`, `limit`, `shuffle` and `first` take."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from covcli.attacks.attacks import attacked_rows
from covcli.core.errors import CovcliError
from covcli.core.specs import parse
from covcli.data import registry
from covcli.data.datasets import load
from covcli.data.images import ImageSet, in_memory
from covcli.data.selection import drawn_order


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_every_part_of_a_drawn_order_has_the_classes_in_their_shares(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    labels = torch.repeat_interleave(torch.tensor(sizes))
    order = drawn_order(labels, len(labels), seed)
    assert order.sort().values.tolist() == list(range(len(labels)))
    begin = data.draw(st.integers(0, len(labels) - 1))
    end = data.draw(st.integers(begin + 1, len(labels)))
    counts = torch.bincount(labels[order[begin:end]], minlength=len(sizes))
    shares = torch.tensor(sizes) * (end - begin) / len(labels)
    assert float((counts - shares).abs().max()) <= 2


def test_a_drawn_order_is_random_within_a_class_and_by_seed() -> None:
    labels = torch.repeat_interleave(torch.tensor([50, 50]))
    firsts = torch.stack([drawn_order(labels, 100, seed)[:10] for seed in range(400)])
    counts = torch.bincount(firsts.flatten(), minlength=100)
    # 4,000 draws over 100 images: 40 each, with a deviation of 6
    assert 10 < int(counts.min()) < int(counts.max()) < 70
    assert torch.equal(drawn_order(labels, 100, 7), drawn_order(labels, 100, 7))
    alone = drawn_order(None, 100, 0)
    assert alone.sort().values.tolist() == list(range(100))
    assert alone.tolist() != list(range(100))


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """A folder of three classes with 30, 60 and 90 images."""
    for name, count in (("daisy", 30), ("rose", 60), ("tulip", 90)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (2, 2), i).save(tmp_path / name / f"{i:02}.png")
    return tmp_path


def counts(images: ImageSet) -> list[int]:
    return torch.bincount(images.known_labels(), minlength=3).tolist()


def test_a_limit_of_a_folder_draws_across_its_classes(flowers: Path) -> None:
    text = f"folder:{flowers}"
    assert counts(load(f"{text}?limit=90", "train")) == [15, 30, 45]
    assert counts(load(f"{text}?limit=90&first", "train")) == [30, 60, 0]
    assert counts(load(text, "train")) == [30, 60, 90]
    half, rest = (load(f"{text}?limit=90&offset={n}", "train") for n in (0, 90))
    assert sorted(half.rows.tolist() + rest.rows.tolist()) == list(range(180))
    again = load(f"{text}?limit=90", "train")
    assert torch.equal(again.rows, half.rows)
    other = load(f"{text}?limit=90&shuffle=1", "train")
    assert counts(other) == [15, 30, 45]
    assert other.rows.tolist() != half.rows.tolist()
    assert half.rows.tolist() == sorted(half.rows.tolist())
    with pytest.raises(CovcliError, match="first and shuffle exclude each other"):
        load(f"{text}?limit=90&shuffle=1&first", "train")
    with pytest.raises(CovcliError, match="no image left: there are 180, the offset is 180"):
        load(f"{text}?offset=180", "train")


def test_an_attack_on_a_folder_starts_from_all_of_its_classes(flowers: Path) -> None:
    images = load(f"folder:{flowers}", "test")
    rows = attacked_rows(parse("attack:fgsm?limit=90"), images)
    assert counts(images.select(rows)) == [15, 30, 45]
    assert attacked_rows(parse("attack:fgsm?limit=9&offset=1&first"), images).tolist() == [
        *range(1, 10)
    ]


def test_an_archive_keeps_its_order_and_says_what_a_part_of_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.say_once.cache_clear()
    caplog.set_level(logging.WARNING, "covcli")
    path = tmp_path / "x.npz"
    labels = np.repeat([0, 1, 2], 20)
    np.savez(path, images=np.zeros((60, 2, 2), np.uint8), labels=labels)
    part = load(f"npz:{path}?limit=10&offset=25", "train")
    assert part.rows.tolist() == list(range(25, 35))
    assert "this part lacks class 0, 2; &shuffle=SEED draws across the classes" in caplog.text
    caplog.clear()
    drawn = load(f"npz:{path}?limit=9&shuffle=3", "train")
    assert counts(drawn) == [3, 3, 3]
    assert not caplog.records


def test_a_selection_of_unlabelled_images_is_drawn_too(flowers: Path) -> None:
    rows = load(f"folder:{flowers}/rose?limit=20", "test").rows.tolist()
    assert len(rows) == 20
    assert rows != list(range(20))


def test_images_in_memory_keep_their_order() -> None:
    images = in_memory("x", torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.arange(40) % 2)
    assert attacked_rows(parse("attack:fgsm?limit=4&offset=3"), images).tolist() == [3, 4, 5, 6]
