"""Labels: a set's classes are those of the network by name, whatever their order and number."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covcli.core.errors import CovcliError
from covcli.data import datasets
from covcli.data.images import ImageSet, in_memory
from covcli.data.labels import adopted, matched, numbered, taught

NAMES = ["ant", "bee", "cat", "dog", "eel"]


def images(labels: Sequence[int], classes: Sequence[str] = ()) -> ImageSet:
    pixels = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    return in_memory("set", pixels, torch.tensor(labels), tuple(classes))


@given(
    network=st.permutations(NAMES),
    named=st.lists(st.sampled_from(NAMES), unique=True, min_size=1),
    data=st.data(),
)
def test_every_image_keeps_the_name_of_its_class(
    network: list[str], named: list[str], data: st.DataObject
) -> None:
    labels = data.draw(st.lists(st.integers(0, len(named) - 1), min_size=1))
    read = images(labels, named)
    renumbered = matched(read, network)
    assert renumbered.images.classes == tuple(network)
    names = [network[label] for label in renumbered.images.known_labels().tolist()]
    assert names == [named[label] for label in labels]
    assert renumbered.images.fingerprint == read.fingerprint
    absent = [name for name in network if name not in names]
    assert all(repr(name) in note for name in absent for note in renumbered.notes)
    assert bool(renumbered.notes) == bool(absent)
    rows = torch.tensor([len(labels) - 1])
    assert renumbered.images.select(rows).fingerprint == read.select(rows).fingerprint


def test_a_class_that_the_network_does_not_know_is_named() -> None:
    read = images([0, 1, 2], ["ant", "wasp", "cow"])
    with pytest.raises(CovcliError, match=r"class 'wasp', 'cow' is unknown to the network"):
        matched(read, ["ant", "bee"])
    # without images of it, it does not matter
    assert matched(read.select(torch.tensor([0])), ["ant", "bee"]).images.labels is not None


def test_numbers_are_the_networks_outputs_or_its_names_where_those_are_numbers() -> None:
    assert matched(images([2, 0]), ["x", "y", "z"]).images.known_labels().tolist() == [2, 0]
    assert matched(images([3, 1]), ["1", "2", "3"]).images.known_labels().tolist() == [2, 0]
    with pytest.raises(CovcliError, match="class '0' is unknown to the network"):
        matched(images([0]), ["1", "2"])
    for bad, network in (([3], ["x", "y", "z"]), ([-1], ["x"]), ([2], ["0", "1"])):
        with pytest.raises(CovcliError, match=r"labels from .*, but the network has classes 0 to"):
            matched(images(bad), network)
    with pytest.raises(CovcliError, match=r"from 1 to 3, .* 0 to 2; count them by --labels-from 1"):
        matched(images([1, 3]), numbered(3))


def test_a_network_without_names_takes_them_in_order_and_says_so() -> None:
    renumbered = matched(images([0, 1, 2], ["ant", "bee", "cat"]), numbered(3))
    assert renumbered.images.known_labels().tolist() == [0, 1, 2]
    assert "its outputs are taken for ant, bee, cat, in this order" in renumbered.notes[0]
    with pytest.raises(CovcliError, match="names 2 classes, but the network has 3 without names"):
        matched(images([0, 1], ["ant", "cat"]), numbered(3))
    assert adopted(images([0, 1], ["ant", "cat"]), 2) == ("ant", "cat")
    assert adopted(images([0, 1]), 3) == ("0", "1", "2")
    with pytest.raises(CovcliError, match="names 2 classes"):
        adopted(images([0, 1], ["ant", "cat"]), 3)


@given(st.lists(st.integers(0, 40), min_size=2).filter(lambda labels: len(set(labels)) > 1))
def test_numbers_with_gaps_become_classes_without(labels: list[int]) -> None:
    training = taught(images(labels))
    values = sorted(set(labels))
    assert training.images.classes == tuple(str(v) for v in values)
    assert training.images.known_labels().tolist() == [values.index(v) for v in labels]
    assert training.images.fingerprint == images(labels).fingerprint
    assert bool(training.notes) == (values != list(range(len(values))))
    again = matched(images(labels), training.images.classes)  # a later set of the same form
    assert torch.equal(again.images.known_labels(), training.images.known_labels())
    assert again.notes == ()


def test_the_mapping_of_labels_from_1_is_said() -> None:
    (note,) = taught(images([1, 2, 3])).notes
    assert "label 1 is class 0, label 2 is class 1, label 3 is class 2" in note


def test_a_single_class_is_refused_before_training() -> None:
    for single in (images([4, 4]), images([0, 0], ["images"])):
        with pytest.raises(CovcliError, match=r"holds one class, '(4|images)': a network learns"):
            taught(single)


def test_labels_below_0_are_refused_before_training() -> None:
    with pytest.raises(CovcliError, match="label -1 is below 0; leave such images out"):
        taught(images([0, -1, 1]))


def test_a_named_class_without_an_image_is_refused_before_training() -> None:
    with pytest.raises(CovcliError, match="no image of class 'bee': a network cannot learn it"):
        taught(images([0, 2], ["ant", "bee", "cat"]))


def test_an_npz_names_its_classes(tmp_path: Path) -> None:
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    named = {"images": pixels, "labels": np.array([2, 0, 1])}
    np.savez(tmp_path / "x.npz", **named, classes=np.array(["bee", "ant", "käfer"]))
    assert datasets.load(f"npz:{tmp_path}/x.npz", "train").classes == ("bee", "ant", "käfer")
    for classes in (np.array([["a", "b"]]), np.array([1, 2, 3]), np.array(["a", "a", "b"])):
        np.savez(tmp_path / "y.npz", **named, classes=classes)
        with pytest.raises(CovcliError, match=r"classes are .*; store their names as text"):
            datasets.load(f"npz:{tmp_path}/y.npz", "train")
    np.savez(tmp_path / "z.npz", **named, classes=np.array(["a", "b"]))
    with pytest.raises(CovcliError, match="labels from 0 to 2, but it names classes 0 to 1"):
        taught(datasets.load(f"npz:{tmp_path}/z.npz", "train"))
