"""Images that a program has prepared: tensors, datasets, loaders, in any form that they come in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)
from torchvision import transforms
from torchvision.datasets import ImageFolder

from covcli.core.errors import CovcliError
from covcli.data.images import batches
from covcli.data.prepared import PreparedSource, Scale, normalisation, prepared

IMAGES = torch.rand(10, 3, 4, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 4


class Items(Dataset[Any]):
    """A dataset of items of any form, with no list of labels."""

    def __init__(self, form: str = "tuple") -> None:
        self.form = form

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, i: int) -> Any:
        image, label = IMAGES[i], int(LABELS[i])
        if self.form == "dict":
            return {"pixel_values": image, "labels": label, "id": f"image {i}"}
        return (image, label, f"image {i}") if self.form == "more" else (image, label)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(IMAGES, LABELS, strict=True)


def read(data: Any) -> tuple[Tensor, Tensor | None]:
    images = prepared(data, "x")
    parts = torch.arange(len(images)).split(3)
    shape = (3, 4, 5)
    streamed = torch.cat([pixels for _, pixels in batches(images, parts, shape)])
    assert torch.equal(streamed, images.batch(torch.arange(len(images)), shape))
    return streamed, images.labels


@pytest.mark.parametrize(
    "data",
    [
        (IMAGES, LABELS), [IMAGES.numpy(), LABELS.numpy()], TensorDataset(IMAGES, LABELS), Items(),
        Items("dict"), Items("more"), DataLoader(Items(), 3), DataLoader(Items("dict"), 4),
        DataLoader(Items(), 3, shuffle=True, drop_last=True), Stream(), DataLoader(Stream(), 3),
        DataLoader(TensorDataset(IMAGES, LABELS), 3, shuffle=True), DataLoader(Items(), 3,
        num_workers=2), ConcatDataset([Subset(TensorDataset(IMAGES, LABELS), range(6)),
        TensorDataset(IMAGES[6:], LABELS[6:])]), DataLoader([(IMAGES[:4], LABELS[:4]),
        (IMAGES[4:], LABELS[4:])], batch_size=None),
    ],
)  # fmt: skip
def test_all_images_and_labels_are_read_in_order_whatever_they_come_in(data: Any) -> None:
    images, labels = read(data)
    assert torch.equal(images, IMAGES)
    assert labels is not None
    assert torch.equal(labels, LABELS)


def forms_of_labels() -> dict[str, Any]:
    """Return items whose labels are said otherwise than by whole numbers of shape (N,)."""
    index, one_hot = torch.arange(10) + 7, torch.eye(4)[LABELS]
    return {
        "floats": [(IMAGES[i], float(LABELS[i])) for i in range(10)],
        "a column": TensorDataset(IMAGES, LABELS[:, None]),
        "bytes": (IMAGES, LABELS.to(torch.uint8)),
        "one-hot": TensorDataset(IMAGES, one_hot),
        "one-hot whole": (IMAGES, one_hot.long()),
        "an index after": TensorDataset(IMAGES, LABELS, index),
        "an index before": TensorDataset(index, IMAGES, LABELS),
        "names": [{"index": int(index[i]), "Label": int(LABELS[i]), "x": IMAGES[i]}
                  for i in range(10)],
        "nested": [(IMAGES[i], {"target": int(LABELS[i]), "area": 0.5}) for i in range(10)],
        "a weight after": TensorDataset(IMAGES, LABELS, torch.ones(10)),
    }  # fmt: skip


@pytest.mark.parametrize("form", forms_of_labels())
def test_labels_are_found_however_they_are_said(form: str) -> None:
    images, labels = read(forms_of_labels()[form])
    assert torch.equal(images, IMAGES)
    assert labels is not None
    assert labels.dtype == torch.int64
    assert torch.equal(labels, LABELS)


def test_labels_that_are_not_clear_are_never_guessed() -> None:
    index = torch.arange(10)
    one_hot = torch.eye(4)[LABELS]
    for data in ([{"a": 1, "b": 2, "x": IMAGES[0]}], TensorDataset(IMAGES, one_hot, index),
                 [{"label": 1, "target": 2, "x": IMAGES[0]}],
                 TensorDataset(index, index, IMAGES)):  # fmt: skip
        with pytest.raises(CovcliError, match="yield one tensor of labels"):
            prepared(data, "x")
    for labels in (one_hot * 0.9 + 0.025, torch.rand(10), torch.randn(10, 3)):
        assert prepared(TensorDataset(IMAGES, labels), "x").labels is None


def test_anything_that_yields_batches_or_items_is_read_once() -> None:
    def batches_of(size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(IMAGES.split(size), LABELS.split(size), strict=True)

    class Fetcher:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return batches_of(3)

    for data in (
        batches_of(4),
        list(batches_of(3)),
        Fetcher(),
        iter(Items()),
        DataLoader(Stream(), 3, num_workers=2),
    ):  # each process would yield all of it
        images, labels = read(data)
        assert torch.equal(images, IMAGES)
        assert torch.equal(labels, LABELS)  # type: ignore[arg-type]


def test_images_that_differ_from_reading_to_reading_are_noticed() -> None:
    class Noisy(Items):
        def __getitem__(self, i: int) -> Any:
            return IMAGES[i] + 1e-3 * torch.rand(3, 4, 5), int(LABELS[i])

    for dataset, differ in ((Noisy(), True), (Items(), False)):
        images = prepared(dataset, "x")
        images.batch(torch.arange(10), (3, 4, 5))
        assert isinstance(images.source, PreparedSource)
        assert images.source.seen.differ is differ
        assert len(set(images.source.seen.digests.tolist())) == 10


def test_a_sampler_decides_which_images_are_read() -> None:
    rows = [7, 2, 5]
    loader = DataLoader(Items(), 2, sampler=SubsetRandomSampler(rows))
    for data in (loader, Subset(Items(), sorted(rows)), DataLoader(Subset(Items(), sorted(rows)))):
        images, labels = read(data)
        assert torch.equal(images, IMAGES[sorted(rows)])
        assert torch.equal(labels, LABELS[sorted(rows)])  # type: ignore[arg-type]


def test_images_without_labels_have_none() -> None:
    for data in (IMAGES, TensorDataset(IMAGES), DataLoader(TensorDataset(IMAGES), 3)):
        images, labels = read(data)
        assert torch.equal(images, IMAGES)
        assert labels is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((IMAGES, LABELS[:3]), "expected images and as many labels"),
        ((255 * IMAGES).to(torch.uint8), "yields images of torch.uint8"),
        ((IMAGES, LABELS + 0.5), None),
        ([Image.new("RGB", (5, 4))], "cannot be combined into a batch .*PIL.*; let its transform"),
        ([(IMAGES[0], 1), (IMAGES[1, :, 1:], 1)], "cannot be combined into a batch"),
        (([IMAGES[0], IMAGES[0]], LABELS[:2]), "got tuple|cannot be combined"),
        ((IMAGES[0], LABELS[:3]), "expected images of shape"),
        (TensorDataset(IMAGES, IMAGES), "expected images of shape"),
        ((IMAGES[:0], LABELS[:0]), "holds no image"),
        ("digits", "got str"),
        (3, "got int"),
    ],
)
def test_what_is_no_images_is_refused(data: Any, said: str | None) -> None:
    if said is None:  # no whole numbers: no labels
        assert prepared(data, "x").labels is None
        return
    with pytest.raises(CovcliError, match=said):
        prepared(data, "x")


def test_a_list_of_labels_that_is_wrong_is_noticed() -> None:
    class Shifted(Items):
        targets = (LABELS + 1).tolist()

    with pytest.raises(CovcliError, match="labels that differ from its list"):
        read(Shifted())

    class Named(Items):
        targets = ["a"] * 10

    assert torch.equal(read(Named())[1], LABELS)  # type: ignore[arg-type]


def test_a_folder_of_images_keeps_its_labels_classes_and_normalisation(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    steps = [transforms.ToTensor(), transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))]
    dataset = ImageFolder(tmp_path, transforms.Compose(steps))
    images = prepared(DataLoader(dataset, 2, shuffle=True), "x")
    assert images.classes == ("a", "b")
    assert images.known_labels().tolist() == [0, 0, 0, 1, 1, 1]
    source = images.source
    assert isinstance(source, PreparedSource)
    values = images.batch(torch.arange(6), (3, 4, 5))
    order = [0, 2, 4, 1, 3, 5]
    restored = source.scale.to_pixels(values)
    assert torch.equal(restored, torch.from_numpy(pixels[order]).permute(0, 3, 1, 2))
    assert torch.equal(source.scale.to_values(restored), values)
    assert normalisation(Subset(dataset, [1])) == normalisation(dataset)


def test_without_a_normalize_the_extremes_are_black_and_white() -> None:
    pixels = torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8)
    pixels[0, :, 0, 0], pixels[1, :, 0, 0] = 0, 255
    values = (pixels / 255 - 0.4) / 0.3
    source = prepared(values, "x").source
    assert isinstance(source, PreparedSource)
    assert torch.equal(source.scale.to_pixels(values), pixels)
    torch.testing.assert_close(source.scale.to_values(pixels), values)
    plain = prepared(0.2 + pixels / 512, "x").source  # within [0, 1]: not normalised
    assert isinstance(plain, PreparedSource)
    assert torch.equal(plain.scale.mean, torch.zeros(3, 1, 1))
    scale = Scale.between(torch.tensor([-2.0]), torch.tensor([3.0]))
    black_and_white = scale.to_values(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert black_and_white.flatten().tolist() == pytest.approx([-2, 3])


def test_fingerprints_follow_the_images_and_the_labels() -> None:
    def fingerprint(images: Tensor, labels: Tensor) -> str:
        return prepared((images, labels), "x").fingerprint

    whole = fingerprint(IMAGES, LABELS)
    assert fingerprint(IMAGES.clone(), LABELS.clone()) == whole
    assert fingerprint(IMAGES + 1e-6, LABELS) != whole
    assert fingerprint(IMAGES, LABELS.flip(0)) != whole
    assert fingerprint(IMAGES[:9], LABELS[:9]) != whole
