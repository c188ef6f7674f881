"""The images that a signature was made from, found again by what it records of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from covcli.core.errors import CovcliError
from covcli.data import datasets, labels
from covcli.data.images import ImageSet


def trusted_images(
    record: dict[str, Any], classes: Sequence[str], data_dir: Path | None, otherwise: str
) -> ImageSet:
    """Load the images that built a signature, less those that calibrated it.

    Parameters
    ----------
    record
        What the signature records.
    classes
        The network's class names.
    data_dir
        The folder that downloaded sets live in.
    otherwise
        What the user can do without the images, as "leave --baseline out".

    Raises
    ------
    CovcliError
        If the images are no longer there, or the signature was merged from parts.
    """
    entry = record["trusted"]
    if "parts" in record:
        raise _gone(entry["spec"], otherwise, "the signature was merged from parts")
    try:
        images = datasets.load(entry["spec"], "train", data_dir)
    except CovcliError as error:
        raise _gone(entry["spec"], otherwise, str(error)) from None
    if images.source.fingerprint == record["calibration"]["source"]:
        images = images.without(torch.tensor(record["calibration_rows"]))
    if images.fingerprint != entry["images"]:
        raise _gone(entry["spec"], otherwise, "its fingerprint is another")
    return labels.matched(images, classes).images


def calibration_images(record: dict[str, Any], data_dir: Path | None, otherwise: str) -> ImageSet:
    """Load the images that calibrated a signature, in the order in which they were read.

    Parameters and errors are those of `trusted_images`.
    """
    entry, reason = record["calibration"], "its fingerprint is another"
    for split in ("test", "train"):  # the record does not say which one it was
        try:
            images = datasets.load(entry["spec"], split, data_dir)
        except CovcliError as error:
            reason = str(error)
            continue
        places = {row: place for place, row in enumerate(images.rows.tolist())}
        rows = [places[row] for row in record["calibration_rows"] if row in places]
        chosen = images.select(torch.tensor(rows, dtype=torch.int64))
        if chosen.fingerprint == entry["images"]:
            return chosen
    raise _gone(entry["spec"], otherwise, reason)


def _gone(spec: str, otherwise: str, reason: str) -> CovcliError:
    return CovcliError(
        f"is not there as the signature read it ({reason})",
        where=spec,
        fix=f"restore it, or {otherwise}",
    )
