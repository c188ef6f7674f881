"""Batches of a program's own data: which tensor holds the images, and which the labels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from covcli.core.errors import CovcliError, one_line

# The usual names of class numbers in a batch with names.
LABELS = {"label", "labels", "target", "targets", "y", "class", "class_id", "class_idx"}
LONGEST_REASON = 150  # characters of a library's message


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return the images and the labels of a batch.

    Labels are class numbers of shape (N,) or (N, 1), also as floats, or one-hot rows. Of several
    whole numbers per image, those with a usual name are the labels, or those that directly follow
    the images, as in (image, label, index).

    Parameters
    ----------
    batch
        A tensor, or tensors in nested sequences and mappings, with exactly one float tensor of
        shape (N, C, H, W).

    Returns
    -------
    tuple
        Images, float32 of shape (N, C, H, W), and labels, int64 of shape (N,), or None; both on
        the CPU.

    Raises
    ------
    CovcliError
        If images and labels cannot be identified, or images are not floats.

    Examples
    --------
    >>> images, labels = split_batch({"y": torch.tensor([3]), "x": torch.rand(1, 3, 8, 8)})
    >>> images.shape, labels
    (torch.Size([1, 3, 8, 8]), tensor([3]))
    """
    named = list(_tensors(batch))
    places = [k for k, (_, tensor) in enumerate(named) if tensor.ndim == 4]
    if len(places) != 1:
        raise _unclear(named, "one tensor of images")
    images = named[places[0]][1]
    if not images.is_floating_point():
        raise CovcliError(
            f"yields images of {images.dtype}, not floats",
            where="the loader",
            fix="prepare images as the network takes them, by the dataset's transform",
        )
    labels = _labels(named, places[0], len(images))
    return images.float().cpu(), None if labels is None else labels.cpu()


def class_numbers(labels: Tensor, images: int) -> Tensor | None:
    """Return labels as class numbers, int64 of shape (N,); None if they are none.

    Parameters
    ----------
    labels
        Whole numbers of shape (N,) or (N, 1), of any type, or one-hot rows of shape (N, K).
    images
        The number of images, N.

    Examples
    --------
    >>> class_numbers(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2)
    tensor([1, 0])
    >>> class_numbers(torch.tensor([0.3, 1.0]), 2) is None
    True
    """
    if labels.shape[:1] != (images,) or labels.ndim > 2 or labels.is_complex():
        return None
    if labels.ndim == 1 or labels.shape[1] == 1:
        whole = labels.reshape(images).to(torch.int64)
        return whole if bool((whole == labels.reshape(images)).all()) else None
    one_hot = ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()
    return labels.to(torch.int64).argmax(1) if bool(one_hot) else None


def collated(items: list[Any]) -> Any:
    """Combine items into a batch as torch does; raise a CovcliError if that cannot be."""
    try:
        return default_collate(items)
    except (TypeError, RuntimeError) as error:
        raise CovcliError(
            f"its items cannot be combined into a batch ({one_line(str(error))[:LONGEST_REASON]})",
            where="the dataset",
            fix="let its transform return tensors of one shape, as ToTensor does",
        ) from None


def is_batch(item: Any) -> bool:
    """Return whether an item already holds a batch of images, of shape (N, C, H, W)."""
    return any(tensor.ndim == 4 for _, tensor in _tensors(item))


def _tensors(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch, each with its key in the innermost mapping."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _tensors(value, str(key).casefold())
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value, name)


def _labels(named: Sequence[tuple[str, Tensor]], place: int, images: int) -> Tensor | None:
    """Return the labels among the tensors of a batch, with the images at a place; or None."""
    found = [
        (k, name, tensor.is_floating_point() or (tensor.ndim == 2 and tensor.shape[1] > 1), numbers)
        for k, (name, tensor) in enumerate(named)
        if k != place and (numbers := class_numbers(tensor, images)) is not None
    ]
    usual = [entry for entry in found if entry[1] in LABELS]
    plain = [entry for entry in found if not entry[2]]  # whole numbers, one an image
    follows = [entry for entry in found if entry[0] == place + 1 and not entry[1]]
    if len(usual) == 1:
        return usual[0][3]
    several = plain or found
    # A whole number is no label if rather the tensor before it could be one, as a one-hot row.
    if len(several) == 1 and (several is found or not follows or follows[0] in plain):
        return several[0][3]
    if follows and follows[0] in several:
        return follows[0][3]
    if not found:
        return None
    raise _unclear(named, "one tensor of labels")


def _unclear(named: Sequence[tuple[str, Tensor]], wanted: str) -> CovcliError:
    shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for _, t in named) or "no tensor"
    return CovcliError(
        f"expected images of shape (N, C, H, W) and labels of shape (N,), got {shapes}",
        where="the loader",
        fix=f"yield {wanted}",
    )
