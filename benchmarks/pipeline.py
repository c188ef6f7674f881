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
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from common import Ratio, Work
from torch import Tensor

from covcli.core.choices import Augmentation
from covcli.data import datasets
from covcli.data.images import ImageSet, in_memory
from covcli.data.preprocessing import Shape
from covcli.models.sweep import to_network
from covcli.training.epoch import Trainer, augment, draw_moves, epoch

QUICK = {"repetitions": 1, "images": 24, "batch_size": 8}


def options() -> argparse.Namespace:
    parser = common.parser(__doc__, repetitions=5)
    parser.add_argument("--images", type=int, default=384, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=64)
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


def main() -> None:
    args = options()
    with tempfile.TemporaryDirectory() as folder:
        ratios, file = measured(args, Path(folder))
    common.note("done")
    legend = "Ratios to a plain loop over ready tensors. Each figure: the script's first lines."
    common.Report(ratios).show(args, legend, {"an epoch": file})


if __name__ == "__main__":
    main()
