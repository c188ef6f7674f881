"""Results of `check`: one result for each image, and a summary."""

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
    """The contribution of a coverage point to an image's score: its name, and its share."""

    name: str
    share: float


@dataclass(frozen=True)
class CheckedImage:
    r"""The result of one image. If it cannot be read, only path, verdict and reason are set.

    Attributes
    ----------
    path
        The file, or the specification and the row. Bytes that are not UTF-8 are escaped, as in
        `caf\xe9.png`.
    verdict
        "trusted", "unsure" (a familiar image, an answer that does not pass), "untrusted" (a
        foreign or attacked image) or "unreadable".
    predicted
        The index of the most probable class.
    class_name
        The name of this class.
    softmax_confidence
        The highest softmax probability.
    score, p_value, confidence
        As in `covcli.Verdicts`.
    reason
        Why an image cannot be read; None for others.
    why
        The coverage points with the largest shares, in descending order; None if not requested.
    log10_martingale
        The decimal logarithm of the drift martingale after the image; None without a watch.

    Examples
    --------
    >>> from covcli import CheckConfig, check
    >>> config = CheckConfig(["digits?split=test&limit=1"], why=True)
    >>> (image,) = check(config)  # with the signature in runs/latest
    >>> image.path, 0 < image.p_value <= 1, len(image.why)
    ('digits?split=test&limit=1#0', True, 3)
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
    """A summary of all images of a check.

    Attributes
    ----------
    images
        The number of images, including unreadable ones.
    verdicts
        The number of images by verdict.
    drift
        The state of the drift watch after the last image; None without a watch.

    Examples
    --------
    >>> verdicts = {"trusted": 8, "unsure": 0, "untrusted": 2, "unreadable": 0}
    >>> summary = CheckSummary(10, verdicts)
    >>> summary.share(["untrusted"]), summary.faults(["untrusted"], most=0.1)
    (0.2, ['2 of 10 images are untrusted, more than 0.1'])
    """

    images: int
    verdicts: dict[str, int]
    drift: DriftStatus | None = None

    def share(self, verdicts: Sequence[str]) -> float:
        """Return the share of the images with one of those verdicts; 0 without any image."""
        return sum(self.verdicts[v] for v in verdicts) / self.images if self.images else 0.0

    def faults(self, named: Sequence[str], most: float | None) -> list[str]:
        """Return the faults on which a command has to fail, one sentence each; empty without.

        Parameters
        ----------
        named
            Verdicts, or "drift". Without a verdict, and with `most`, "untrusted" is used.
        most
            The largest allowed share of images with one of these verdicts; None allows none.

        Raises
        ------
        CovcliError
            If a name is not in `FAULTS`, or there is no drift watch.
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
    """Raise a CovcliError if the options for failing are invalid."""
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
    """Counts of results. They need little memory, because p-values have few distinct values."""

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
        """Return the smallest p-value that at least this share of images does not exceed, or NaN.

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
