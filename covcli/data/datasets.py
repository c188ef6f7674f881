"""Loading of data specifications such as `npz:data?split=test&limit=100`."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.core.specs import count, parse, without
from covcli.data import forms, openood, recorded, selection
from covcli.data import named as named_sets
from covcli.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptSource
from covcli.data.images import DataRecord, ImageSet
from covcli.data.listing import Split
from covcli.data.openood import expand
from covcli.data.reading import completed
from covcli.data.registry import DATASETS, PARTS, Request, default_data_dir, say_once

__all__ = [
    "DATASETS",
    "check_labels",
    "check_name",
    "default_data_dir",
    "expand",
    "load",
    "reload",
    "whole",
]
LOADERS = (forms, named_sets, openood)  # importing these modules fills DATASETS


def load(
    text: str,
    split: Split,
    data_dir: Path | None = None,
    ran_in: Path | None = None,
    *,
    in_order: bool = False,
) -> ImageSet:
    """Load the images that a specification names.

    Parameters
    ----------
    text
        For example `cifar10`, `npz:FILE-OR-FOLDER`, `folder:DIR`, `csv:FILE`, `noise:uniform`. Each
        takes `?split=train|test&offset=N&limit=N`, and `shuffle=SEED` or `first`.
    split
        The split to read if the specification names none.
    data_dir
        The folder of downloaded sets; None: the one of `default_data_dir`.
    ran_in
        A second folder for relative paths, used if a path is not in the working directory.
    in_order
        Whether the images will be read once and in their order: then an archive of any size takes
        the memory of a batch.

    Returns
    -------
    ImageSet
        The selected images; pixels are read later, in batches.

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
    wanted = spec.take("split", _split, split)
    images = loader(Request(spec, wanted, data_dir, ran_in, in_order))
    chosen, notes = selection.select(replace(images, name=text), spec)
    for note in notes:
        say_once(note)
    return chosen


def check_name(text: str) -> None:
    """Raise a CovcliError if a specification names nothing that is known; no data is looked for.

    Examples
    --------
    >>> check_name("corrupt:fgo?of=digits")
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: unknown corruption 'fgo'; did you mean 'fog'? known: ...
    """
    spec = parse(text)
    DATASETS.get(spec.name)
    if spec.name == "noise":
        forms.noise_kind(spec)
    if spec.name == "corrupt":
        CORRUPTIONS.get(spec.argument.replace("-", "_"))
        if "of" in spec.parameters:
            check_name(spec.parameters["of"])


def reload(
    record: DataRecord,
    split: Split,
    data_dir: Path | None,
    fix: str,
    named: Collection[str | None] = (),
) -> ImageSet:
    """Load the images that the record in a checkpoint or a signature names.

    A path is read only if this user's covcli wrote the record, or the user names the path too.

    Parameters
    ----------
    record
        The record of the data. A relative path is looked up in the working directory, then in the
        directory where the record was written.
    split, data_dir
        As for `load`.
    fix
        Advice for the error: how the user can allow the path of an untrusted file to be read.
    named
        Specifications that the user named.

    Raises
    ------
    CovcliError
        As `load` does, or if reading the path is not allowed.
    """
    recorded.allow(record, fix, named)
    ran_in = Path(record.ran_in) if record.seal and record.ran_in else None
    return load(record.spec, split, data_dir, ran_in)


def whole(spec: str) -> str:
    """Return a specification without the parameters that select a part of the data.

    Examples
    --------
    >>> whole("npz:data?split=train&limit=500&labels-from=1")
    'npz:data?labels-from=1'
    """
    return without(spec, PARTS)


def check_labels(images: ImageSet, classes: int) -> Tensor:
    """Return the labels of a set, checked for a network with that many classes.

    Raises
    ------
    CovcliError
        If the set has no labels, or a label is not in 0 … classes − 1.

    Examples
    --------
    >>> check_labels(load("digits?limit=100", "test"), classes=10).unique().tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    labels = images.known_labels()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise CovcliError(
            f"labels from {low} to {high}, but the network has classes 0 to {classes - 1}",
            where=images.name,
        )
    return labels


@DATASETS.add("corrupt")
def corrupt(request: Request) -> ImageSet:
    """`corrupt:NAME?severity=3&of=SPEC`: the images of another specification, corrupted.

    A corruption of Hendrycks and Dietterich (ICLR 2019), with `severity` from 1 to 5 (default 3)
    and `seed`.

    Examples
    --------
    >>> len(load("corrupt:fog?severity=2&of=digits?limit=5", "test"))
    5
    """
    spec = request.spec
    spec.only([*PARTS, "severity", "seed", "of"])
    name = spec.argument.replace("-", "_")
    CORRUPTIONS.get(name)  # raises for an unknown name
    if "of" not in spec.parameters:
        raise CovcliError("corrupts no images", where=spec.text, fix="end it with &of=SPEC")
    images = load(spec.parameters["of"], request.split, request.folder, request.ran_in)
    severity = spec.take("severity", _severity, 3)
    source = CorruptSource(images.source, name, severity, spec.take("seed", count, 0))
    nested = images.origin.spec or images.name
    head = spec.text.removesuffix(spec.parameters["of"])
    return replace(images, source=source, origin=replace(images.origin, spec=head + nested))


def _severity(text: str) -> int:
    if text not in map(str, range(1, SEVERITIES + 1)):
        raise ValueError("expected a number from 1 to 5")
    return int(text)


def _split(text: str) -> Split:
    if text == "train":
        return "train"
    if text == "test":
        return "test"
    raise ValueError("expected train or test")
