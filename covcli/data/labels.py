"""Labels: the mapping of a set's classes to a network's classes, by name, never by position."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from covcli.core.errors import CovcliError, first_few
from covcli.core.specs import suggestion
from covcli.data.images import ImageSet
from covcli.data.listing import class_name

log = logging.getLogger(__name__)
NAMED = 10  # at most this many names are listed, the others counted


@dataclass(frozen=True)
class Matched:
    """A set whose labels are a network's class numbers.

    Attributes
    ----------
    images
        The set under the network's numbers and names.
    notes
        Remarks for readers of the results, one sentence each.
    """

    images: ImageSet
    notes: tuple[str, ...] = ()

    def said(self) -> ImageSet:
        """Log the notes as warnings, and return the set."""
        for note in self.notes:
            log.warning("%s", note)
        return self.images


def numbered(count: int) -> tuple[str, ...]:
    """Return the names "0", "1", … of classes that have only numbers."""
    return tuple(str(k) for k in range(count))


def taught(images: ImageSet) -> Matched:
    """Return the set to train a network on; its `classes` become the network's.

    Named classes keep their names and order. Numeric labels are renumbered from 0 without gaps, and
    each class is named by its original number.

    Raises
    ------
    CovcliError
        If there are no labels, there is one class, a label is negative, or a named class has no
        image.

    Examples
    --------
    >>> import torch
    >>> from covcli.data.images import in_memory
    >>> images = in_memory("pets", torch.zeros(3, 3, 8, 8, dtype=torch.uint8), [4, 7, 4])
    >>> training = taught(images).images
    >>> training.labels.tolist(), training.classes
    ([0, 1, 0], ('4', '7'))
    """
    labels = images.known_labels()
    present, places = labels.unique(return_inverse=True)
    if max(len(images.classes), len(present)) < 2:
        name = images.classes[0] if images.classes else int(present[0])
        raise CovcliError(
            f"holds one class, {str(name)!r}: a network learns to tell two or more apart",
            where=images.name,
            fix="name the folder of the class folders" if images.by_class else None,
        )
    if images.classes:
        _check_range(images, len(images.classes))
        if absent := _absent(images.classes, present):
            raise CovcliError(
                f"no image of {listed('class', absent)}: a network cannot learn it",
                where=images.name,
                fix="add images, or remove the class",
            )
        return Matched(images)
    if int(present[0]) < 0:
        raise CovcliError(
            f"label {int(present[0])} is below 0", where=images.name, fix="leave such images out"
        )
    names = tuple(str(value) for value in present.tolist())
    if names == numbered(len(names)):
        return Matched(replace(images, classes=names))
    mapping = ", ".join(f"label {name} is class {k}" for k, name in enumerate(names[:NAMED]))
    more = ", …" if len(names) > NAMED else ""
    note = f"{images.name}: the labels do not run from 0 on without a gap: {mapping}{more}"
    return Matched(_numbered_as(images, places, names), (note,))


def matched(images: ImageSet, classes: Sequence[str]) -> Matched:
    """Return a set with its labels renumbered to the classes of a network.

    A set with class names is matched by name. Numeric labels are matched to the network's class
    names if those are numbers too; otherwise they are its class numbers.

    Parameters
    ----------
    images
        A labelled set, with its own class numbers.
    classes
        The network's class names, in the order of its outputs.

    Raises
    ------
    CovcliError
        If the set has no labels, or an image of a class that the network does not have.

    Examples
    --------
    >>> import torch
    >>> from covcli.data.images import in_memory
    >>> pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    >>> images = in_memory("pets", pixels, torch.tensor([0, 1]), ("ant", "cat"))
    >>> pets = matched(images, ("ant", "bee", "cat"))
    >>> pets.images.labels.tolist(), pets.notes
    ([0, 2], ("pets: no image of class 'bee'",))
    """
    labels, classes = images.known_labels(), tuple(classes)
    known = {class_name(name): k for k, name in enumerate(classes)}
    notes = []
    if images.classes:
        _check_range(images, len(images.classes))
        names = tuple(map(class_name, images.classes))
        if not known.keys() & set(names) and classes == numbered(len(classes)):
            notes.append(_by_position(images, len(classes)))
            known = {name: k for k, name in enumerate(names)}
        table = torch.tensor([known.get(name, -1) for name in names])
        numbers = table[labels]
        unknown = [names[k] for k in labels[numbers < 0].unique().tolist()]
    elif classes == numbered(len(classes)) or not all(name.isdecimal() for name in classes):
        _check_range(images, len(classes), "the network has")  # numbers count the outputs
        numbers, unknown = labels, []
    else:
        values, places = labels.unique(return_inverse=True)
        names = tuple(str(value) for value in values.tolist())
        numbers = torch.tensor([known.get(name, -1) for name in names])[places]
        unknown = [name for name in names if name not in known]
    if unknown:
        raise CovcliError(
            f"{listed('class', unknown)} is unknown to the network",
            where=images.name,
            fix=suggestion(unknown[0], list(classes[:NAMED])),
        )
    if absent := _absent(classes, numbers.unique()):
        notes.append(f"{images.name}: no image of {listed('class', absent)}")
    return Matched(_numbered_as(images, numbers, classes), tuple(notes))


def adopted(images: ImageSet, count: int) -> tuple[str, ...]:
    """Return names for the `count` outputs of a network without names: those of a set, in order.

    Raises
    ------
    CovcliError
        If the set names another number of classes, so that they cannot be assigned.
    """
    if not images.classes:
        return numbered(count)
    if len(images.classes) != count:
        raise CovcliError(
            f"names {len(images.classes)} classes, but the network has {count} without names",
            where=images.name,
            fix="name images of all classes",
        )
    spelled = first_few(images.classes, NAMED)
    log.info("the network's outputs are taken for these classes, in this order: %s", spelled)
    return images.classes


def _by_position(images: ImageSet, count: int) -> str:
    names = adopted(images, count)
    return (
        f"{images.name}: the network's classes have no names: its outputs are taken for "
        f"{first_few(names, NAMED)}, in this order"
    )


def _numbered_as(images: ImageSet, labels: Tensor, classes: tuple[str, ...]) -> ImageSet:
    as_read = images.known_labels() if images.as_read is None else images.as_read
    return replace(images, labels=labels, classes=classes, as_read=as_read)


def _check_range(images: ImageSet, count: int, who: str = "it names") -> None:
    low, high = (int(value) for value in images.known_labels().aminmax())
    if low < 0 or high >= count:
        raise CovcliError(
            f"labels from {low} to {high}, but {who} classes 0 to {count - 1}",
            where=images.name,
            fix=f"count them by --labels-from {low}" if 0 < low <= high < low + count else None,
        )


def _absent(classes: Sequence[str], present: Tensor) -> list[str]:
    there = set(present.tolist())
    return [name for k, name in enumerate(classes) if k not in there]


def listed(kind: str, names: Sequence[str]) -> str:
    """Return the kind and the first names, quoted, and how many more there are.

    Examples
    --------
    >>> listed("class", ["ant", "bee"])
    "class 'ant', 'bee'"
    """
    return f"{kind} {first_few([repr(name) for name in names], NAMED)}"
