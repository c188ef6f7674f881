"""Images that a program prepared for its own network: tensors, torch datasets and data loaders.

The network receives the loader's values unchanged. Surrogates, such as noisy copies, are computed
on pixels from 0 to 255, so the values of black and white must be known.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from covcli.core.errors import CovcliError
from covcli.data.batches import collated, is_batch, split_batch
from covcli.data.images import ImageSet, Origin
from covcli.data.preprocessing import Shape

SAMPLE = 128  # images from which a set's range and fingerprint are computed
BATCH = 64
# Means of two samples of the same images are closer than this, in deviations between images.
FAR, LEAST_COMPARED = 2.0, 20


@dataclass(frozen=True)
class Scale:
    """The normalisation of prepared values: value = (pixel/255 − mean) / deviation.

    Attributes
    ----------
    mean, deviation
        Of pixels in [0, 1], float32 of shape (C, 1, 1).

    Examples
    --------
    >>> scale = Scale.between(black=torch.tensor([-1.0]), white=torch.tensor([1.0]))
    >>> scale.to_pixels(torch.zeros(1, 1, 1)).item()
    128
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def between(cls, black: Tensor, white: Tensor) -> "Scale":
        """Return the scale from the values of black and white, each of shape (C,)."""
        deviation = 1 / (white - black).clamp_min(1e-6)
        return cls((-black * deviation).view(-1, 1, 1), deviation.view(-1, 1, 1))

    def to_pixels(self, values: Tensor) -> Tensor:
        """Convert values (…, C, H, W) to the nearest pixels, uint8."""
        pixels = (values * self.deviation + self.mean) * 255
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def to_values(self, pixels: Tensor) -> Tensor:
        """Convert pixels, uint8 of shape (…, C, H, W), to values."""
        return (pixels.float().div_(255) - self.mean) / self.deviation


@dataclass
class Sightings:
    """What was seen of a dataset's images while they were read.

    Attributes
    ----------
    digests
        A digest of each image that was read, int64 of shape (N,), 0 for the others. Digests of one
        process can be compared with each other.
    differ
        Whether an image was read twice with different values.
    """

    digests: np.ndarray
    differ: bool = False

    def note(self, rows: Sequence[int], images: Tensor) -> None:
        """Note the images of those rows, float32 of shape (len(rows), C, H, W)."""
        for row, image in zip(rows, images.cpu().numpy(), strict=True):
            digest = hash(image.tobytes()) or 1
            self.differ |= self.digests[row] not in (0, digest)
            self.digests[row] = digest


@dataclass(frozen=True)
class PreparedSource:
    """A torch dataset of images that are ready for a network.

    Attributes
    ----------
    dataset
        Returns an image with its label, or an image, by index.
    collate
        The loader's function that combines items into a batch.
    workers
        The number of processes that read.
    labels
        The labels of the items used, by index; None without labels.
    """

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any]
    workers: int
    labels: Mapping[int, int] | None

    @cached_property
    def seen(self) -> Sightings:
        """What was seen of the images so far."""
        return Sightings(np.zeros(_length(self.dataset), np.int64))

    @property
    def row_digests(self) -> np.ndarray:
        """The digests of the images that were read, see `Sightings`."""
        return self.seen.digests

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return the images of those rows, float32 of shape (len(rows), *shape)."""
        return next(self.stream([rows], shape, workers=0))

    def stream(
        self, parts: Sequence[Tensor], shape: Shape, workers: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the images of each part, read ahead by the loader's number of processes."""
        numbers = [part.tolist() for part in parts]
        loader = _loader(self.dataset, numbers, self.collate, self.workers, workers)
        for part, batch in zip(numbers, loader, strict=True):
            images, labels = split_batch(batch)
            if labels is not None and self.labels is not None:
                known = [self.labels[row] for row in part]
                if labels.tolist() != known:
                    raise CovcliError(
                        "yields labels that differ from its list of labels",
                        where=type(self.dataset).__name__,
                    )
            self.seen.note(part, images)
            yield _checked(images, shape)

    @cached_property
    def sample(self) -> Tensor:
        """At most 128 images, drawn at random, float32 of shape (n, C, H, W)."""
        rows = sorted(self.labels) if self.labels is not None else range(_length(self.dataset))
        # Evenly spaced ones could be all of one class, where classes take turns.
        drawn = np.random.default_rng(0).permutation(len(rows))[:SAMPLE]
        few = [rows[i] for i in sorted(drawn.tolist())]
        loader = _loader(self.dataset, [few[i : i + BATCH] for i in range(0, len(few), BATCH)],
                         self.collate, self.workers, 0)  # fmt: skip
        images = torch.cat([split_batch(batch)[0] for batch in loader])
        self.seen.note(few, images)
        return images

    @cached_property
    def extent(self) -> tuple[float, float]:
        """The smallest and the largest value of the sample."""
        low, high = torch.aminmax(self.sample)
        return float(low), float(high)

    @cached_property
    def scale(self) -> Scale:
        """The normalisation: from the dataset's Normalize, or from the sample's extremes."""
        if (known := normalisation(self.dataset)) is not None:
            return Scale(*(torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in known))
        low, high = self.sample.amin((0, 2, 3)), self.sample.amax((0, 2, 3))
        if bool((low >= 0).all()) and bool((high <= 1).all()):  # not normalised
            low, high = torch.zeros_like(low), torch.ones_like(high)
        return Scale.between(low, high)

    @cached_property
    def fingerprint(self) -> str:
        """The digest of a sample of the images, of all labels and of the length."""
        digest = hashlib.sha256(f"{type(self.dataset).__name__} {_length(self.dataset)}".encode())
        digest.update(np.ascontiguousarray(self.sample.numpy()).data)
        digest.update(repr(sorted((self.labels or {}).items())).encode())
        return digest.hexdigest()


def prepared(data: Any, name: str) -> ImageSet:
    """Return images that a program prepared for its network, as an image set.

    Parameters
    ----------
    data
        A torch Dataset or DataLoader that yields images and labels, an iterable of batches, or
        tensors: images (N, C, H, W) and labels (N,); see `split_batch`. A loader is read in the
        order of its dataset, with its collate function and processes; only items of its sampler are
        read. Iterable data is read once, in this process, and kept in memory.
    name
        The name of the images, for messages.

    Raises
    ------
    CovcliError
        If there are no images, or they are not floats of one shape (C, H, W).

    Examples
    --------
    >>> images = prepared((torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])), "trusted")
    >>> len(images), images.labels.tolist()
    (6, [0, 1, 2, 0, 1, 2])
    """
    collate: Callable[[list[Any]], Any] = collated
    workers, rows = 0, None
    if isinstance(data, DataLoader):
        loader, data = data, data.dataset
        if isinstance(data, IterableDataset) or loader.batch_sampler is None:
            data = _kept(_alone(loader))
        else:
            workers, rows = loader.num_workers, _rows_of(loader)
            collate = collated if loader.collate_fn is default_collate else loader.collate_fn
    elif _is_stream(data):
        data = _kept(data)
    dataset = _dataset(data, name)
    rows = list(range(_length(dataset))) if rows is None else rows
    if not rows:
        raise CovcliError("holds no image", where=name)
    labels = _labels(dataset, rows, collate, workers)
    known = None if labels is None else dict(zip(rows, labels, strict=True))
    source = PreparedSource(dataset, collate, workers, known)
    assert source.sample.ndim == 4  # reading the sample refuses bad images before any work
    tensor = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    names = tuple(str(c) for c in getattr(dataset, "classes", ()))
    origin = Origin(spec=f"python:{name}")
    return ImageSet(name, source, torch.tensor(rows), tensor, names, origin=origin)


def prepared_otherwise(images: Tensor, extent: tuple[float, float]) -> str | None:
    """Describe the range of a batch that was hardly prepared as other images were.

    A foreign image may have any value of the range. So only two signs count: values that exceed the
    range by more than its width, such as bytes; and pixels of [0, 1] where the range has negative
    values, such as images that were not normalised.

    Parameters
    ----------
    images
        Floats of any shape.
    extent
        The smallest and the largest value of the other images.

    Returns
    -------
    str or None
        Both ranges; None without a sign.

    Examples
    --------
    >>> prepared_otherwise(torch.tensor([0.0, 255.0]), (-2.1, 2.6))
    'from 0 to 255, where the images that built the signature are from -2.1 to 2.6'
    >>> prepared_otherwise(torch.tensor([-2.0, 3.0]), (-2.1, 2.6)) is None
    True
    """
    low, high = (float(end) for end in torch.aminmax(images))
    width = extent[1] - extent[0]
    outside = low < extent[0] - width or high > extent[1] + width
    pixels = low >= 0 and high <= 1 and high - low > 0.5
    if not outside and not (pixels and extent[0] < -0.1 * width):
        return None
    return (
        f"from {low:.3g} to {high:.3g}, where the images that built the signature are "
        f"from {extent[0]:.3g} to {extent[1]:.3g}"
    )


def far_apart(one: Tensor, two: Tensor) -> bool:
    """Return whether two samples of images cannot be prepared alike, by their mean values.

    The samples come from one distribution, so their means differ by a fraction of the deviation
    between images.

    Parameters
    ----------
    one, two
        Shapes (N, C, H, W) and (M, C, H, W).

    Examples
    --------
    >>> images = torch.rand(50, 3, 4, 4)
    >>> far_apart(images[:25], images[25:]), far_apart(images[:25], (images[25:] - 0.2) / 0.2)
    (False, True)
    """
    if min(len(one), len(two)) < LEAST_COMPARED:
        return False
    means = [images.double().mean((2, 3)) for images in (one, two)]
    variance = sum(mean.var(0) for mean in means) / 2
    apart = (means[0].mean(0) - means[1].mean(0)).square()
    return bool((apart > FAR**2 * variance).any())


def normalisation(dataset: Any) -> tuple[Sequence[float], Sequence[float]] | None:
    """Return the mean and deviation of a dataset's Normalize; None unless it has exactly one.

    Subsets and composed transforms are searched too.

    Examples
    --------
    >>> from torchvision import datasets, transforms
    >>> steps = [transforms.ToTensor(), transforms.Normalize([0.5], [0.25])]
    >>> images = datasets.FakeData(4, transform=transforms.Compose(steps))
    >>> normalisation(images)
    ((0.5,), (0.25,))
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    transforms = [getattr(dataset, "transform", None), getattr(dataset, "transforms", None)]
    scales = {
        (tuple(map(float, t.mean)), tuple(map(float, t.std)))
        for transform in transforms
        for t in _flat(transform)
        if type(t).__name__ == "Normalize" and hasattr(t, "mean") and hasattr(t, "std")
    }
    return scales.pop() if len(scales) == 1 else None


def _flat(transform: Any) -> Iterator[Any]:
    inner = getattr(transform, "transforms", None) or getattr(transform, "transform", None)
    if isinstance(transform, nn.Sequential):
        inner = list(transform)
    if inner is None:
        yield transform
        return
    for each in inner if isinstance(inner, list | tuple) else [inner]:
        yield from _flat(each)


def _checked(images: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(images.shape[1:]) != tuple(shape):
        raise CovcliError(
            f"yields images of shape {tuple(images.shape[1:])} beside others of {tuple(shape)}",
            where="the loader",
        )
    return images


def _loader(
    dataset: Dataset[Any],
    batches: list[list[int]],
    collate: Callable[[list[Any]], Any],
    workers: int,
    asked: int | None,
) -> DataLoader[Any]:
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate,
        num_workers=workers if asked is None else asked, generator=torch.Generator(),
    )  # fmt: skip


def _rows_of(loader: DataLoader[Any]) -> list[int]:
    """Return the indices of the items that a loader reads, in ascending order."""
    with torch.random.fork_rng(devices=[]):
        if type(loader.batch_sampler) is BatchSampler:
            numbers = list(loader.sampler)  # including those of a last, smaller batch
        else:
            numbers = [number for batch in loader.batch_sampler or () for number in batch]
    return sorted({int(number) for number in numbers})


def _is_stream(data: Any) -> bool:
    """Return whether data is read item by item, as a generator, or holds whole batches."""
    if isinstance(data, list | tuple):
        return bool(data) and not isinstance(data[0], Tensor | np.ndarray) and is_batch(data[0])
    whole = isinstance(data, str | bytes | Mapping | Tensor | np.ndarray)
    indexed = hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
    return isinstance(data, Iterable) and not whole and not indexed


def _alone(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of iterable data without processes: each would yield all of it again."""
    if type(loader) is not DataLoader or not isinstance(loader.dataset, IterableDataset):
        return loader
    return DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)


def _kept(batches: Any) -> Dataset[Any]:
    """Read iterable data once, and keep it in memory."""
    with torch.random.fork_rng(devices=[]):
        parts = [split_batch(_batched(batch)) for batch in batches]
    if not parts:
        raise CovcliError("yields nothing", where="the loader")
    images = torch.cat([images for images, _ in parts])
    if any(labels is None for _, labels in parts):
        return TensorDataset(images)
    return TensorDataset(images, torch.cat([labels for _, labels in parts if labels is not None]))


def _batched(item: Any) -> Any:
    """Convert a single image (with its label) to a batch of one; return a batch unchanged."""
    return item if is_batch(item) else collated([item])


def _dataset(data: Any, name: str) -> Dataset[Any]:
    """Convert tensors or arrays to a dataset; return a dataset unchanged."""
    if isinstance(data, Tensor | np.ndarray):
        data = (data,)
    if isinstance(data, tuple | list) and all(isinstance(p, Tensor | np.ndarray) for p in data):
        tensors = [torch.as_tensor(part) for part in data]
        if not 1 <= len(tensors) <= 2 or len({len(tensor) for tensor in tensors}) != 1:
            raise CovcliError("expected images and as many labels", where=name)
        return TensorDataset(*tensors)
    known = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if not known or isinstance(data, str | bytes | Mapping):
        raise CovcliError(
            f"got {type(data).__name__}", where=name,
            fix="pass a torch Dataset or DataLoader, or tensors of images and labels",
        )  # fmt: skip
    dataset: Dataset[Any] = data
    return dataset


def _length(dataset: Any) -> int:
    return len(dataset)


def _labels(
    dataset: Dataset[Any],
    rows: list[int],
    collate: Callable[[list[Any]], Any],
    workers: int,
) -> list[int] | None:
    """Return the labels of those items: from the dataset's list, or by reading all items."""
    listed = _listed(dataset)
    if listed is not None:
        return [int(listed[row]) for row in rows]
    labels: list[int] = []
    parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    for batch in _loader(dataset, parts, collate, workers, None):
        _, part = split_batch(batch)
        if part is None:
            return None
        labels += part.tolist()
    return labels


def _listed(dataset: Any) -> Sequence[Any] | None:
    """Return the list of labels of a dataset, or None if it has none that can be relied on.

    The list is compared with the labels of the items when these are read.
    """
    if isinstance(dataset, Subset):
        whole = _listed(dataset.dataset)
        return None if whole is None else [whole[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_listed(part) for part in dataset.datasets]
        return None if None in parts else [label for part in parts for label in part or ()]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    listed = getattr(dataset, "targets", None)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        listed = dataset.tensors[1]
    if not isinstance(listed, list | Tensor | np.ndarray) or len(listed) != _length(dataset):
        return None
    try:
        labels = torch.as_tensor(listed)
    except (TypeError, ValueError):  # names
        return None
    whole_numbers = not labels.is_floating_point() and labels.ndim == 1
    return labels.tolist() if whole_numbers else None
