"""Sets that an evaluation has checked, and opens when their turn comes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from covcli import attacks, data
from covcli.adaptive import Monitored
from covcli.images import ImageSet, MemorySource, in_memory
from covcli.models import Classifier
from covcli.progress import Progress
from covcli.specs import parse


@dataclass(frozen=True)
class Opener:
    """A set that was checked, and is opened when its turn comes.

    Attributes
    ----------
    name
        The specification.
    identity
        Equal for equal images.
    open
        Returns the images.
    start
        For an attack, the trusted images that it starts from.
    """

    name: str
    identity: str
    open: Callable[[Progress], ImageSet]
    start: ImageSet | None = None

    @classmethod
    def of(cls, images: ImageSet) -> "Opener":
        """Return the opener of a set that is loaded already."""
        return cls(images.name, images.fingerprint, lambda _progress: images)

    def pixels(self, images: ImageSet) -> Tensor | None:
        """Return an attack's images, which are dear to make again; None for others."""
        if self.start is None or not isinstance(images.source, MemorySource):
            return None
        return images.source.images

    def made_of(self, pixels: Tensor) -> ImageSet:
        """Return the images that an attack made earlier."""
        assert self.start is not None
        return in_memory(self.name, pixels, self.start.labels, self.start.classes)


def opener(
    text: str,
    model: Classifier,
    trusted: ImageSet,
    look: Callable[[], Monitored],
    data_dir: Path | None,
) -> Opener:
    """Check an untrusted specification now, so that an error does not come after hours.

    Parameters
    ----------
    text
        The specification.
    model
        The network that an attack deceives.
    trusted
        The images that an attack starts from.
    look
        Returns the monitored network, for an attack that knows the monitor.
    data_dir
        The folder that downloaded sets live in.

    Raises
    ------
    CovcliError
        If the specification or its data is bad.
    """
    spec = parse(text)
    if not attacks.is_attack(spec):
        return Opener.of(data.load(text, "test", data_dir))
    monitored = look() if attacks.make_attack(spec).needs_signature else None
    start = trusted.select(attacks.attacked_rows(spec, trusted))
    labels = start.known_labels()
    return Opener(
        text,
        f"{text} {start.fingerprint}",
        lambda progress: attacks.run_attack(spec, model, start, labels, progress, monitored),
        start,
    )
