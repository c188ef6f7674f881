"""What a data specification such as `npz:data?split=test&limit=100` means."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.core.specs import parse, without
from covcli.data import forms, recorded, selection
from covcli.data import named as named_sets
from covcli.data.images import DataRecord, ImageSet
from covcli.data.listing import Split
from covcli.data.reading import completed
from covcli.data.registry import DATASETS, PARTS, Request, default_data_dir, say_once

__all__ = ["DATASETS", "check_labels", "default_data_dir", "load", "reload", "whole"]
ROOMS = (forms, named_sets)  # they fill DATASETS


def load(
    text: str, split: Split, data_dir: Path | None = None, ran_in: Path | None = None
) -> ImageSet:
    """Load the images that a specification names.

    Parameters
    ----------
    text
        For example `cifar10`, `npz:FILE-OR-FOLDER`, `folder:DIR`, `csv:FILE`, `noise:uniform`, each
        with `?split=train|test&offset=N&limit=N`, and `shuffle=SEED` or `first`.
    split
        The split to read where the specification names none.
    data_dir
        The folder that downloaded sets live in; by default the one of `default_data_dir`.
    ran_in
        Where a relative path begins if there is nothing where the process runs.

    Raises
    ------
    CovcliError
        If the name or a parameter is unknown, or the data is missing, unreadable or empty.

    Examples
    --------
    >>> images = load("digits?limit=100", "train")
    >>> len(images), images.classes[0]
    (100, '0')
    """
    spec = parse(completed(text))
    loader = DATASETS.get(spec.name)
    images = loader(Request(spec, spec.take("split", _split, split), data_dir, ran_in))
    chosen, notes = selection.select(replace(images, name=text), spec)
    for note in notes:
        say_once(note)
    return chosen


def reload(
    record: DataRecord,
    split: Split,
    data_dir: Path | None,
    fix: str,
    named: Collection[str | None] = (),
) -> ImageSet:
    """Load the images that a record names; a relative path is looked for in both folders.

    A path is read only if this user's covcli has written the record, or the user names it too.

    Parameters
    ----------
    record
        What a checkpoint or a signature says of its data. Its path begins where the command runs
        and, if there is nothing, where it ran when the record was written.
    split, data_dir
        As for `load`.
    fix
        How the user can allow to read a path that somebody else's file names.
    named
        Specifications that the user has named.

    Raises
    ------
    CovcliError
        As `load` does, or if the path may not be read.
    """
    recorded.allow(record, fix, named)
    ran_in = Path(record.ran_in) if record.seal and record.ran_in else None
    return load(record.spec, split, data_dir, ran_in)


def whole(spec: str) -> str:
    """Return a specification less what takes a part of the data.

    Examples
    --------
    >>> whole("npz:data?split=train&limit=500&labels-from=1")
    'npz:data?labels-from=1'
    """
    return without(spec, PARTS)


def check_labels(images: ImageSet, classes: int) -> Tensor:
    """Return the labels of a set for a network of so many classes; others are a CovcliError."""
    labels = images.known_labels()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise CovcliError(
            f"labels from {low} to {high}, but the network has classes 0 to {classes - 1}",
            where=images.name,
        )
    return labels


def _split(text: str) -> Split:
    if text == "train":
        return "train"
    if text == "test":
        return "test"
    raise ValueError("expected train or test")
