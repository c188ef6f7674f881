"""What a signature records of its making: the data that built it, and that calibrated it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor

from covcli.core import settings
from covcli.core.errors import CovcliError
from covcli.data import datasets, labels, recorded
from covcli.data.images import DataRecord, ImageSet

Count = Annotated[int, Interval(ge=0, lt=2**63)]
Number = Annotated[int, Interval(ge=1, lt=2**63)]
Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True)
class MergedPart:
    """One of the signatures that another was merged from.

    Attributes
    ----------
    file
        The digest of its file.
    trusted, trusted_images
        As in `Record`.
    """

    file: str
    trusted: DataRecord
    trusted_images: Number


@dataclass(frozen=True)
class Record:
    """What a signature was made from.

    Attributes
    ----------
    trusted
        The images that built it.
    trusted_images
        How many of them were read.
    trusted_counts
        How many of each class define the signature.
    relaxed_classes
        Classes where confident images were too few, so that all correct ones count.
    confidence_threshold
        The softmax confidence from which on a correct image counts.
    accuracy
        The network's accuracy on the images read.
    calibration
        The images that calibrated it.
    calibration_images
        How many there are.
    calibration_rows
        Which rows of their source they are, in the order in which they were read.
    provenance
        Versions, command line, device, threads, seed, time.
    parts
        The signatures that it was merged from, in order; empty for one that was built.

    Examples
    --------
    >>> from pathlib import Path
    >>> from covcli.signature import signature
    >>> *_, record = signature.load(Path("runs/latest/signature-ensemble.safetensors"))
    >>> record.trusted_images, record.calibration_images
    (1078, 359)
    >>> Record.from_dict(record.as_dict(), classes=10) == record
    True
    """

    trusted: DataRecord
    trusted_images: Number
    trusted_counts: tuple[Count, ...]
    relaxed_classes: tuple[Count, ...]
    confidence_threshold: Share
    accuracy: Share
    calibration: DataRecord
    calibration_images: Count
    calibration_rows: tuple[Count, ...]
    provenance: dict[str, Any]
    parts: tuple[MergedPart, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain values, as the signature's file holds it."""
        document = asdict(self)
        if not self.parts:
            del document["parts"]
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], classes: int) -> "Record":
        """Rebuild a record of a signature with so many classes.

        Raises
        ------
        ValueError
            If the document is not one that `as_dict` writes.
        """
        record = settings.read(cls, document)
        if len(record.trusted_counts) != classes or any(
            k >= classes for k in record.relaxed_classes
        ):
            raise ValueError("a record of other classes")
        if len(record.calibration_rows) != record.calibration_images:
            raise ValueError("a record of other calibration images")
        return record

    def known_to(self, network: str) -> "Record":
        """Return the record as read from a file, with the seals that hold for a network."""
        return replace(
            self,
            trusted=recorded.verified(self.trusted, lambda: network),
            calibration=recorded.verified(self.calibration, lambda: network),
        )

    def sealed(self, network: str) -> "Record":
        """Return the record to be written, of data that the user may read again unasked."""
        return replace(
            self,
            trusted=recorded.sealed(self.trusted, network),
            calibration=recorded.sealed(self.calibration, network),
        )

    def trusted_set(
        self,
        classes: Sequence[str],
        data_dir: Path | None,
        otherwise: str,
        named: Collection[str | None] = (),
    ) -> ImageSet:
        """Load the images that built the signature, less those that calibrated it.

        Parameters
        ----------
        classes
            The network's class names.
        data_dir
            The folder that downloaded sets live in.
        otherwise
            What the user can do without the images, as "leave --baseline out".
        named
            Specifications that the user has named, and so allows to read.

        Raises
        ------
        CovcliError
            If the images are no longer there or may not be read, or the signature was merged from
            parts.
        """
        recorded.allow(self.trusted, otherwise, named)
        if self.parts:
            raise _gone(self.trusted.spec, otherwise, "the signature was merged from parts")
        try:
            images = datasets.reload(self.trusted, "train", data_dir, otherwise, named)
        except CovcliError as error:
            raise _gone(self.trusted.spec, otherwise, str(error)) from None
        images = self.less_calibration(images)
        if images.fingerprint != self.trusted.images:
            raise _gone(self.trusted.spec, otherwise, "its fingerprint is another")
        return labels.matched(images, classes).images

    def calibration_set(
        self, data_dir: Path | None, otherwise: str, named: Collection[str | None] = ()
    ) -> ImageSet:
        """Load the images that calibrated the signature, in the order in which they were read.

        Parameters and errors are those of `trusted_set`.
        """
        recorded.allow(self.calibration, otherwise, named)
        entry, reason = self.calibration, "its fingerprint is another"
        for split in ("test", "train"):  # the record does not say which one it was
            try:
                images = datasets.reload(entry, split, data_dir, otherwise, named)
            except CovcliError as error:
                reason = str(error)
                continue
            places = {row: place for place, row in enumerate(images.rows.tolist())}
            rows = [places[row] for row in self.calibration_rows if row in places]
            chosen = images.select(torch.tensor(rows, dtype=torch.int64))
            if chosen.fingerprint == entry.images:
                return chosen
        raise _gone(entry.spec, otherwise, reason)

    def less_calibration(self, images: ImageSet) -> ImageSet:
        """Return a set less the images that calibrated the signature."""
        return less(images, self.calibration.source, torch.tensor(self.calibration_rows))


def less(images: ImageSet, source: str, rows: Tensor) -> ImageSet:
    """Return a set less some images, given by the fingerprint of their source and their rows.

    Images that calibrate must neither build a signature nor be scored by it: each scored the
    better for having been there.

    Examples
    --------
    >>> import torch
    >>> from covcli.data import datasets
    >>> digits = datasets.load("digits", "test")
    >>> len(digits), len(less(digits, digits.source.fingerprint, torch.arange(60)))
    (360, 300)
    """
    return images.without(rows) if images.source.fingerprint == source else images


def _gone(spec: str, otherwise: str, reason: str) -> CovcliError:
    return CovcliError(
        f"is not there as the signature read it ({reason})",
        where=spec,
        fix=f"restore it, or {otherwise}",
    )
