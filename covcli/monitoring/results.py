"""What `check` finds: a result an image, and their sum."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from covcli.core.errors import CovcliError
from covcli.core.specs import suggestion
from covcli.monitoring.config import FAULTS
from covcli.monitoring.drift import DriftStatus
from covcli.signature.judge import TRUSTED, UNSURE, UNTRUSTED

UNREADABLE = "unreadable"
VERDICTS = (TRUSTED, UNSURE, UNTRUSTED, UNREADABLE)


@dataclass(frozen=True)
class PointTold:
    """How much one coverage point adds to an image's score: its name, and its share of it."""

    name: str
    share: float


@dataclass(frozen=True)
class CheckedImage:
    r"""What is said of one image. Where it cannot be read, there are but its path and the reason.

    Attributes
    ----------
    path
        The file, or the specification and the row; bytes that are no UTF-8 are spelled out, as in
        `caf\xe9.png`.
    verdict
        "trusted", "unsure" (a familiar image, an answer that does not pass), "untrusted" (a
        foreign or attacked image) or "unreadable".
    predicted
        The number of the most probable class.
    class_name
        Its name.
    softmax_confidence
        The highest softmax probability.
    score, p_value, confidence
        As in `covcli.Verdicts`.
    reason
        Why an image cannot be read; None for others.
    why
        The coverage points that tell most, in their order; None where nobody asked.
    log10_martingale
        The decimal logarithm of the drift martingale after the image; None without a watch.
    """

    path: str
    verdict: str
    predicted: int | None = None
    class_name: str | None = None
    softmax_confidence: float | None = None
    score: float | None = None
    p_value: float | None = None
    confidence: float | None = None
    reason: str | None = None
    why: tuple[PointTold, ...] | None = None
    log10_martingale: float | None = None


@dataclass(frozen=True)
class CheckSummary:
    """What is said of all images of a call.

    Attributes
    ----------
    images
        How many were named, those that cannot be read included.
    verdicts
        How many got each verdict.
    drift
        The state of the watch after them; None without one.
    """

    images: int
    verdicts: dict[str, int]
    drift: DriftStatus | None = None

    def share(self, verdicts: Sequence[str]) -> float:
        """Return the share of the images with one of those verdicts; 0 without any image."""
        return sum(self.verdicts[v] for v in verdicts) / self.images if self.images else 0.0

    def faults(self, named: Sequence[str], most: float | None) -> list[str]:
        """Return what a caller wants to fail on, a sentence each; none if all is well.

        Parameters
        ----------
        named
            Verdicts, or "drift"; without a verdict, and with `most`, "untrusted".
        most
            The share of all images that may have one of those verdicts; None for none of them.

        Raises
        ------
        CovcliError
            If a name is none of `FAULTS`, or drift was not watched for.
        """
        check_faults(named, most, self.drift is not None)
        verdicts = [fault for fault in named if fault != "drift"]
        if most is not None and not verdicts:
            verdicts = [UNTRUSTED]
        faults = []
        count, share = sum(self.verdicts[v] for v in verdicts), self.share(verdicts)
        if share > (most or 0):
            bound = "" if most is None else f", more than {most:g}"
            faults.append(f"{count} of {self.images} images are {' or '.join(verdicts)}{bound}")
        if "drift" in named and self.drift is not None and self.drift.alarm:
            faults.append(f"drift: an alarm at image {self.drift.alarm_image}")
        return faults


def check_faults(named: Sequence[str], most: float | None, watched: bool) -> None:
    """Raise a CovcliError if what a command is to fail on cannot be."""
    if most is not None and not 0 <= most < 1:
        raise CovcliError("must be at least 0 and below 1", where=f"--max-share {most:g}")
    for fault in named:
        if fault not in FAULTS:
            raise CovcliError(
                "is no such fault", where=f"--fail-on {fault}", fix=suggestion(fault, list(FAULTS))
            )
    if "drift" in named and not watched:
        raise CovcliError("is not watched for", where="--fail-on drift", fix="add --drift 0.01")


@dataclass
class Tally:
    """Counts results as they come, in the memory of a few: p-values have few different values."""

    verdicts: Counter[str] = field(default_factory=Counter)
    p_values: Counter[float] = field(default_factory=Counter)

    def add(self, images: Sequence[CheckedImage]) -> None:
        """Count some results."""
        self.verdicts.update(image.verdict for image in images)
        self.p_values.update(image.p_value for image in images if image.p_value is not None)

    def summary(self, drift: DriftStatus | None) -> CheckSummary:
        """Return the counts so far."""
        counts = {verdict: self.verdicts[verdict] for verdict in VERDICTS}
        return CheckSummary(self.verdicts.total(), counts, drift)

    def quantile(self, share: float) -> float:
        """Return the smallest p-value that at least this share does not exceed; NaN without any.

        Examples
        --------
        >>> tally = Tally(p_values=Counter({0.1: 1, 0.5: 2, 0.9: 1}))
        >>> tally.quantile(0.25), tally.quantile(0.5), tally.quantile(1.0)
        (0.1, 0.5, 0.9)
        """
        wanted, seen = share * self.p_values.total(), 0
        for value in sorted(self.p_values):
            seen += self.p_values[value]
            if seen >= wanted:
                return value
        return float("nan")
