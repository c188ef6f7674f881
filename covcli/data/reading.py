"""The settings for reading image files in this process, from a command's options.

A specification can set the same for one set (`folder:photos?skip-unreadable`). Records use that
form, so that a later command needs no options to read the same images.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from covcli.core.specs import YES, Spec, count, extended, flag, parse, positive_count
from covcli.data.decoding import MAX_PIXELS


@dataclass(frozen=True)
class Reading:
    """How files of images are read.

    Attributes
    ----------
    max_pixels
        The maximum number of pixels of an image.
    skip_unreadable
        Whether files that cannot be read are skipped instead of raising an error.
    labels_from
        The number of the first class, for numeric labels without class names.
    """

    max_pixels: int = MAX_PIXELS
    skip_unreadable: bool = False
    labels_from: int = 0

    @classmethod
    def of(cls, spec: Spec) -> "Reading":
        """Return the settings of a specification; those of the process where it has none."""
        return cls(
            spec.take("max-pixels", positive_count, _process.max_pixels),
            spec.take("skip-unreadable", flag, _process.skip_unreadable),
            spec.take("labels-from", count, _process.labels_from),
        )


# The reading parameters of each form of data.
OF_FILES = ["max-pixels", "skip-unreadable"]
OF_NUMBERS = ["labels-from"]
FORMS = {
    "folder": OF_FILES, "csv": [*OF_FILES, *OF_NUMBERS], "npz": OF_NUMBERS, "textures": OF_FILES,
    "places365": OF_FILES, "inaturalist": OF_FILES, "lsun": OF_FILES, "openood": OF_FILES,
}  # fmt: skip

_process = Reading()


def current() -> Reading:
    """Return how this process reads."""
    return _process


def configure(**changes: Any) -> None:
    """Change the settings of this process; the arguments are fields of `Reading`."""
    global _process
    _process = replace(_process, **changes)
    if _process.max_pixels > MAX_PIXELS:  # PIL enforces its own limit too
        Image.MAX_IMAGE_PIXELS = _process.max_pixels


@contextmanager
def configured(**changes: Any) -> Iterator[None]:
    """Change the settings of this process within a block.

    Examples
    --------
    >>> with configured(labels_from=1):
    ...     completed("csv:list.csv")
    'csv:list.csv?labels-from=1'
    """
    global _process
    before, limit = _process, Image.MAX_IMAGE_PIXELS
    configure(**changes)
    try:
        yield
    finally:
        _process, Image.MAX_IMAGE_PIXELS = before, limit


def completed(text: str) -> str:
    """Return a specification with the process's non-default settings as parameters."""
    usual = Reading()
    wanted = {
        "max-pixels": (_process.max_pixels, usual.max_pixels, str(_process.max_pixels)),
        "skip-unreadable": (_process.skip_unreadable, usual.skip_unreadable, YES),
        "labels-from": (_process.labels_from, usual.labels_from, str(_process.labels_from)),
    }
    for key in FORMS.get(parse(text).name, ()):
        value, ordinary, written = wanted[key]
        if value != ordinary:
            text = extended(text, key, written)
    return text
