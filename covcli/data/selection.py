"""Selection of a part of a set by a specification: `offset`, `limit`, `shuffle` and `first`."""

import numpy as np
import torch
from torch import Tensor

from covcli.core.errors import CovcliError, first_few
from covcli.core.specs import Spec, count, flag, positive_count
from covcli.data.images import ImageSet

NAMED = 10


def select(images: ImageSet, spec: Spec) -> tuple[ImageSet, list[str]]:
    """Return the images that a specification selects, and remarks about the selection.

    Parameters and errors are those of `selected_rows`.
    """
    rows = selected_rows(images, spec, len(images))
    if len(rows) == len(images):
        return images, []
    chosen = images.select(rows)
    return chosen, _lacking(images, chosen)


def selected_rows(images: ImageSet, spec: Spec, limit: int) -> Tensor:
    """Return the positions of the images that a specification selects, in the set's order.

    `offset` skips images, and `limit` takes images after them, in a random order or in the set's
    own order. The random order is stratified: every part of it has the class shares of the whole
    set. Parts that do not overlap have no image in common.

    Parameters
    ----------
    images
        The set. If its source lists one class after another, the order is random with seed 0;
        `shuffle=SEED` changes the seed, and `first` keeps the source's order. For other sets, the
        order is the source's own, and `shuffle=SEED` randomises it.
    spec
        The specification.
    limit
        The number of images to take if the specification has no `limit`.

    Returns
    -------
    Tensor
        int64 of shape (n,), ascending.

    Raises
    ------
    CovcliError
        If no image is left, or a parameter is invalid.

    Examples
    --------
    >>> from covcli.core.specs import parse
    >>> from covcli.data.images import in_memory
    >>> images = in_memory("grey", np.zeros((5, 1, 8, 8), np.uint8), None)
    >>> selected_rows(images, parse("grey?offset=1&limit=2"), limit=5).tolist()
    [1, 2]
    """
    first = spec.take("first", flag, False)
    if first and "shuffle" in spec.parameters:
        raise CovcliError("first and shuffle exclude each other", where=spec.text)
    offset = spec.take("offset", count, 0)
    limit = spec.take("limit", positive_count, limit)
    seed = spec.take("shuffle", count, 0)
    if offset >= len(images):
        raise CovcliError(
            f"no image left: there are {len(images)}, the offset is {offset}", where=spec.text
        )
    if (images.by_class and not first) or "shuffle" in spec.parameters:
        order = drawn_order(images.labels, len(images), seed)
    else:
        order = torch.arange(len(images))
    return order[offset : min(offset + limit, len(images))].sort().values


def drawn_order(labels: Tensor | None, images: int, seed: int) -> Tensor:
    """Return a random order of which every part has about the class shares of the whole.

    Parameters
    ----------
    labels
        int64 of shape (images,); None treats all images as one class.
    images
        The number of images.
    seed
        The seed of the random order.

    Returns
    -------
    Tensor
        A permutation, int64 of shape (images,).

    Examples
    --------
    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> labels[drawn_order(labels, 6, seed=0)[:3]].bincount().tolist()
    [2, 1]
    """
    ticket = np.random.default_rng(seed).random(images)
    groups = np.zeros(images, np.int64) if labels is None else labels.numpy()
    _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    by_class = np.lexsort((ticket, groups))
    rank = np.empty(images, np.int64)
    rank[by_class] = np.arange(images) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = (rank + 0.5) / sizes[groups]  # the relative position within the class, from 0 to 1
    return torch.from_numpy(np.lexsort((ticket, place)))


def _lacking(images: ImageSet, chosen: ImageSet) -> list[str]:
    """Return a remark if the selected images lack classes of the whole set."""
    if images.labels is None or chosen.labels is None:
        return []
    gone = sorted(set(images.labels.tolist()) - set(chosen.labels.tolist()))
    if not gone:
        return []
    names = [repr(images.classes[k]) if k < len(images.classes) else str(k) for k in gone]
    hint = "" if images.by_class else "; &shuffle=SEED draws across the classes"
    return [f"{images.name}: this part lacks class {first_few(names, NAMED)}{hint}"]
