"""Copies: the same image in two sets, or twice in one, whatever its file is called."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from covcli.data.images import ImageSet

Digests = NDArray[np.int64]  # one an image; 0 for an image that is not known
MOST_COPIES = 0.02  # data has a few equal images, and data that was read twice has many


def digests_of(images: "ImageSet") -> Digests | None:
    """Return a digest of each image, int64 of shape (N,); None if the source does not know them.

    Digests of two sets can be compared if their sources are of the same kind.
    """
    digests: Digests | None = getattr(images.source, "row_digests", None)
    return None if digests is None else digests[images.rows.numpy()]


def shared(images: "ImageSet", others: "ImageSet") -> int:
    """Return how many images of a set are in another too, as rows of one source or as copies."""
    if images.source.fingerprint == others.source.fingerprint:
        return int(np.isin(images.rows.numpy(), others.rows.numpy()).sum())
    both = _comparable(images, others)
    return 0 if both is None else _known_in(*both)


def doubts(trusted: "ImageSet", held_out: "ImageSet") -> list[str]:
    """Return what copies among the trusted and the calibration images mean, one sentence each."""
    both = _comparable(trusted, held_out)
    return [] if both is None else of_digests(*both)


def _comparable(one: "ImageSet", two: "ImageSet") -> tuple[Digests, Digests] | None:
    """Return the digests of two sets; None if they cannot be compared, or are not known."""
    if type(one.source) is not type(two.source):
        return None
    here, there = digests_of(one), digests_of(two)
    return None if here is None or there is None else (here, there)


def _known_in(images: Digests, others: Digests) -> int:
    """Return how many known images of a set are in another."""
    return int(np.isin(images[images != 0], others).sum())


def of_digests(trusted: Digests, held_out: Digests) -> list[str]:
    """Return the sentences of `doubts` from the digests of two sets.

    Examples
    --------
    >>> of_digests(np.array([1, 2, 3]), np.array([3, 4, 5]))
    ['1 of 3 calibration images are trusted images too: the rate of false alarms ...']
    """
    known = held_out[held_out != 0]
    said = []
    if count := _known_in(held_out, trusted):
        said.append(
            f"{count} of {len(held_out)} calibration images are trusted images too: the rate of "
            "false alarms is higher than promised; hold others out"
        )
    copies = len(known) - len(np.unique(known))
    if copies > MOST_COPIES * len(held_out):
        said.append(
            f"{copies} of {len(held_out)} calibration images are copies of others, but count as "
            "images of their own"
        )
    return said
