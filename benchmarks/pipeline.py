"""What reading and augmenting images costs an epoch of training.

    python benchmarks/pipeline.py --data DIR --weights FILE

Prints a Markdown table of ratios, or one JSON document with --json. The network underneath is a
plain loop that trains on batches which lie in memory as float tensors, shuffled and augmented
already: forward pass, cross-entropy, backward pass, step of the optimizer and of the schedule.
Every epoch trains the same copy of the network on, by steps too small to matter, over --images
images. Without --data and --weights: random images, of which a file is written and read back, and
random weights.

- epoch_memory, epoch_npz: `engine.epoch` from an ImageSet, in memory or read from a file by `npz:`
  (a file's pixels lie in another order), against the plain loop: reading and shuffling rows,
  turning them to floats on the device, and counting what the log needs.
- epoch_memory_augmented, epoch_npz_augmented: the same with --augment crop-flip.
- engine_alone: `engine.epoch` on the same ready batches as uint8, against the plain loop; what it
  takes beside reading and augmenting.
- plain_again: the plain loop once more in every turn, against itself; what differs from 1 is noise.
- npz_load: opening the file once, against a whole epoch of the plain loop over all its images.

And of a folder of --pictures JPEGs of 500×375, patches of photographs, without any network:

- folder_throughput: images per second, decoded, resized to 256 and cut to 224, in units of
  torchvision's `ImageFolder` in a `DataLoader` of as many workers as covcli has threads. Both yield
  uint8 in batches; torchvision's `ToTensor` would cost it more.
- folder_throughput_as_covcli: the same with covcli's default preparation (bilinear to the least
  size that covers) on both sides.
- folder_listing: seconds to list --listed empty files in 10 classes, in units of `ImageFolder`'s.
- folder_fingerprint_first, folder_fingerprint_again: digesting the folder's contents, once and when
  they are known, in units of reading the folder by covcli.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from common import Ratio, Work
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from covcli.core.choices import Augmentation
from covcli.data import datasets
from covcli.data.image_files import decoders
from covcli.data.images import ImageSet, batches, in_memory
from covcli.data.preprocessing import InputShape, Preprocess, Shape
from covcli.models.sweep import to_network
from covcli.training.epoch import Trainer, augment, draw_moves, epoch

QUICK = {"repetitions": 1, "images": 24, "batch_size": 8, "pictures": 12, "listed": 40}
PICTURE = (500, 375)  # width and height: the usual size of ImageNet's
RESIZED: dict[str, tuple[InputShape, int]] = {
    "folder_throughput": (InputShape((3, 224, 224), Preprocess(256)), 256),
    "folder_throughput_as_covcli": (InputShape((3, 224, 224)), 224),
}


def options() -> argparse.Namespace:
    parser = common.parser(__doc__, repetitions=5)
    parser.add_argument("--images", type=int, default=384, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=512, help="JPEGs of a folder")
    parser.add_argument("--listed", type=int, default=100_000, help="files that are listed only")
    parser.add_argument("--only-folder", action="store_true", help="measure no epochs")
    return common.read_options(parser, QUICK)


@dataclass(frozen=True)
class ReadySource:
    """Batches that lie ready; the first row asked for names the batch."""

    ready: list[Tensor]
    size: int
    fingerprint: str = "ready"

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return the batch, without gathering rows."""
        return self.ready[int(rows[0]) // self.size]


def plain_epoch(trainer: Trainer, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Train on batches that lie ready, and do nothing else."""
    trainer.model.train()
    for inputs, targets in batches:
        loss = torch.nn.functional.cross_entropy(trainer.model(inputs), targets)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()
        trainer.schedule.step()


def our_epoch(trainer: Trainer, images: ImageSet, parts: list[Tensor], how: Augmentation) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in epoch(trainer, images, images.known_labels(), parts, how, generator):
        pass


def open_file(args: argparse.Namespace, images: ImageSet, folder: Path) -> tuple[str, ImageSet]:
    """Return a specification of a file, and what it holds; random images are written first."""
    where = common.npz_folder(args)
    if where is None:
        where = folder
        pixels = images.batch(torch.arange(len(images)), (3, 32, 32)).permute(0, 2, 3, 1)
        labels = images.known_labels().numpy()
        np.savez(folder / "train.npz", images=pixels.contiguous().numpy(), labels=labels)
    spec = f"npz:{where}"
    return spec, datasets.load(spec, "train")


def measured(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Ratio], ImageSet]:
    model = common.network(args)
    trusted, _ = common.load_images(args, model, args.images, 1)
    spec, whole = open_file(args, trusted, folder)
    file = common.cycled(whole, args.images)
    shape = model.spec.shape
    memory = in_memory("memory", file.batch(torch.arange(len(file)), shape), file.labels)
    labels = memory.known_labels()
    generator = torch.Generator().manual_seed(0)
    parts = list(torch.randperm(len(memory), generator=generator).split(args.batch_size))
    moves = [draw_moves("crop-flip", len(rows), shape, generator) for rows in parts]
    ready = [augment(memory.batch(rows, shape), m) for rows, m in zip(parts, moves, strict=True)]
    floats = [(to_network(pixels, common.CPU), labels[rows])
              for pixels, rows in zip(ready, parts, strict=True)]  # fmt: skip
    batched = ImageSet("ready", ReadySource(ready, args.batch_size), torch.arange(len(memory)),
                       labels[torch.cat(parts)])  # fmt: skip
    in_order = list(torch.arange(len(memory)).split(args.batch_size))
    ours: dict[str, tuple[ImageSet, list[Tensor], Augmentation]] = {
        "engine_alone": (batched, in_order, "none"),
        "epoch_memory": (memory, parts, "none"),
        "epoch_memory_augmented": (memory, parts, "crop-flip"),
        "epoch_npz": (file, parts, "none"),
        "epoch_npz_augmented": (file, parts, "crop-flip"),
    }
    trainer = common.trainer(model)
    variants: dict[str, Work] = {"plain": partial(plain_epoch, trainer, floats)}
    variants |= {name: partial(our_epoch, trainer, *what) for name, what in ours.items()}
    variants["plain_again"] = partial(plain_epoch, trainer, floats)
    common.note("epochs")
    seconds = common.interleaved(variants, args.repetitions)
    ratios = {
        name: common.ratio(seconds[name], seconds["plain"]) for name in (*ours, "plain_again")
    }
    # By itself: the memory that it frees would slow down whichever epoch came next.
    opening = common.interleaved({"file": lambda: datasets.load(spec, "train")}, args.repetitions)
    share = args.images / len(whole)
    ratios["npz_load"] = common.ratio(opening["file"], seconds["plain"], share)
    return ratios, file


def write_pictures(folder: Path, count: int) -> None:
    """Write patches of photographs as JPEGs, in four classes."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator = np.random.default_rng(0)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        width = int(generator.integers(300, 500))
        left = int(generator.integers(0, photograph.width - width))
        top = int(generator.integers(0, photograph.height - width * 3 // 4))
        box = (left, top, left + width, top + width * 3 // 4)
        path = folder / f"class{i % 4}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.crop(box).resize(PICTURE, Image.Resampling.BICUBIC).save(path, quality=90)


def read_ours(images: ImageSet, shape: InputShape, size: int) -> None:
    for _rows, pixels in batches(images, list(torch.arange(len(images)).split(size)), shape):
        assert pixels.dtype == torch.uint8


def read_theirs(folder: Path, resize: int, size: int) -> None:
    transform = Compose([Resize(resize), CenterCrop(224), PILToTensor()])
    workers = decoders()._max_workers
    loader = DataLoader(ImageFolder(folder, transform), batch_size=size, num_workers=workers)
    for pixels, _labels in loader:
        assert pixels.dtype == torch.uint8


def of_folder(args: argparse.Namespace, folder: Path) -> dict[str, Ratio]:
    """Measure what is read from a folder of image files."""
    common.note("a folder of pictures")
    pictures, listed = folder / "pictures", folder / "listed"
    write_pictures(pictures, args.pictures)
    os.environ["XDG_CACHE_HOME"] = str(folder)  # where digests are remembered
    images, size = datasets.load(f"folder:{pictures}", "test"), args.batch_size
    variants: dict[str, Work] = {}
    for name, (shape, resize) in RESIZED.items():
        variants[name] = partial(read_ours, images, shape, size)
        variants[f"their {name}"] = partial(read_theirs, pictures, resize, size)
    seconds = common.interleaved(variants, args.repetitions)
    ratios = {name: common.ratio(seconds[f"their {name}"], seconds[name]) for name in RESIZED}
    reading = seconds["folder_throughput"]
    for name in ("first", "again"):
        again = datasets.load(f"folder:{pictures}", "test")  # remembers nothing by itself
        once = common.interleaved({name: partial(getattr, again, "fingerprint")}, 1, False)
        ratios[f"folder_fingerprint_{name}"] = common.ratio(once[name], reading[:1])
    common.note("listing")
    for i in range(args.listed):
        path = listed / f"class{i % 10}" / f"{i:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    variants = {"ours": lambda: datasets.load(f"folder:{listed}", "test"),
                "theirs": lambda: ImageFolder(listed)}  # fmt: skip
    seconds = common.interleaved(variants, args.repetitions)
    ratios["folder_listing"] = common.ratio(seconds["ours"], seconds["theirs"])
    return ratios


def main() -> None:
    args = options()
    images: dict[str, ImageSet] = {}
    ratios: dict[str, Ratio] = {}
    with tempfile.TemporaryDirectory() as folder:
        if not args.only_folder:
            ratios, images["an epoch"] = measured(args, Path(folder))
        ratios |= of_folder(args, Path(folder))
    common.note("done")
    legend = "Ratios to a plain loop over ready tensors. Each figure: the script's first lines."
    common.Report(ratios).show(args, legend, images)


if __name__ == "__main__":
    main()
