"""The record in a signature: the data that built it, and the data that calibrated it."""

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
    """One of the built signatures that a merged one consists of.

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
    """The data and settings that a signature was built from.

    Attributes
    ----------
    trusted
        The record of the trusted images.
    trusted_images
        The number of images read.
    trusted_counts
        The number of images of each class that define the signature.
    relaxed_classes
        Classes with too few confident images, where all correct ones were used.
    confidence_threshold
        The smallest softmax confidence of a trusted image, in [0, 1].
    accuracy
        The network's accuracy on the images read, in [0, 1].
    calibration
        The record of the calibration images.
    calibration_images
        The number of calibration images.
    calibration_rows
        Their rows in the source, in the order in which they were read.
    provenance
        Versions, command line, device, threads, seed and time.
    parts
        The built signatures that a merged one consists of, in order; empty for one that was built.
    extent
        The smallest and the largest value of images that a program prepared; None for pixels.

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
    extent: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain values, as in the signature's file."""
        document = asdict(self)
        if not self.parts:
            del document["parts"]
        if self.extent is None:
            del document["extent"]
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], classes: int) -> "Record":
        """Rebuild the record of a signature with that many classes.

        Raises
        ------
        ValueError
            If the document does not have the form of `as_dict`.
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
        """Return a record that was read from a file, with only the seals valid for a network."""
        return replace(
            self,
            trusted=recorded.verified(self.trusted, lambda: network),
            calibration=recorded.verified(self.calibration, lambda: network),
        )

    def sealed(self, network: str) -> "Record":
        """Return the record with seals, so that this user may read its data again unasked."""
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
        """Load the images that built the signature, without the calibration images.

        Parameters
        ----------
        classes
            The network's class names.
        data_dir
            The folder of downloaded sets.
        otherwise
            Advice for the error: what the user can do without the images, such as "leave --baseline
            out".
        named
            Specifications that the user named, and so allows to read.

        Raises
        ------
        CovcliError
            If the images are no longer available or may not be read, or the signature was merged
            from parts.
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
            raise _gone(self.trusted.spec, otherwise, "its fingerprint differs")
        return labels.matched(images, classes).images

    def calibration_set(
        self, data_dir: Path | None, otherwise: str, named: Collection[str | None] = ()
    ) -> ImageSet:
        """Load the calibration images, in the order in which they were read.

        Parameters and errors are those of `trusted_set`.
        """
        recorded.allow(self.calibration, otherwise, named)
        entry, reason = self.calibration, "its fingerprint differs"
        for split in ("test", "train"):  # the record does not contain the split
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
        """Return a set without the calibration images."""
        return less(images, self.calibration.source, torch.tensor(self.calibration_rows))


def less(images: ImageSet, source: str, rows: Tensor) -> ImageSet:
    """Return a set without some images, given by the fingerprint of their source and their rows.

    Calibration images must neither build a signature nor be evaluated with it, because their scores
    would be too good.

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
        f"is not available as it was when the signature was built ({reason})",
        where=spec,
        fix=f"restore it, or {otherwise}",
    )
