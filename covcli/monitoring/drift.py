"""DriftWatch: an alarm when the images of a stream are no longer like the calibration images."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import ArrayLike

from covcli.core import files, settings
from covcli.core.errors import CovcliError
from covcli.monitoring.martingale import BETS, RATES, Bag, Floats, Martingale, lots
from covcli.signature.judge import Judge, Verdicts
from covcli.signature.monitor import Monitor

RUN_LENGTH = 100_000
Share = Annotated[float, Interval(gt=0, lt=1)]
Count = Annotated[int, Interval(ge=0, lt=2**62)]
STATE = files.Format(
    "covcli drift state",
    schema=1,
    keys=frozenset({"of", "told", "held", "counts", "shares", "capital", "quick"}),
)


@dataclass(frozen=True)
class DriftStatus:
    """The state of a drift watch. Images are numbered from 1 on, over all calls.

    Attributes
    ----------
    delta
        δ: while nothing changes, the probability that there is ever an alarm is at most δ.
    run_length
        While nothing changes, the mean number of images between two quick alarms is at least this.
    seed
        Seed of the random numbers that order equal scores.
    images
        Number of images so far.
    log10_martingale
        The decimal logarithm of the martingale after the last image.
    log10_highest
        Its highest value. The alarm is raised at log10(1/δ), and is permanent.
    log10_lowest
        Its lowest value before the alarm.
    lowest_image
        The image after which it was lowest (0: the start). After an alarm, this is the estimate of
        where the change began.
    alarm_image
        The image that raised the alarm; None without an alarm.
    alarm_name
        The name of that image; None if it was not given.
    log10_quick
        The decimal logarithm of the Shiryaev-Roberts statistic; minus infinity at the start.
    quick_alarms
        How often the statistic reached the run length, and was reset.
    quick_image
        The image that raised the last quick alarm; None without one.

    Examples
    --------
    >>> status = DriftStatus(delta=0.01, run_length=1000, seed=0, images=50, alarm_image=42)
    >>> status.alarm
    True
    """

    delta: Share
    run_length: Annotated[int, Interval(ge=1, lt=2**62)]
    seed: Count
    images: Count = 0
    log10_martingale: float = 0.0
    log10_highest: float = 0.0
    log10_lowest: float = 0.0
    lowest_image: Count = 0
    alarm_image: Count | None = None
    alarm_name: str | None = None
    log10_quick: float = -math.inf
    quick_alarms: Count = 0
    quick_image: Count | None = None

    @property
    def alarm(self) -> bool:
        """Whether there was an alarm."""
        return self.alarm_image is not None


class DriftWatch:
    """Watches whether the images of a stream are still like those that calibrated a monitor.

    The false-alarm rate of verdicts is guaranteed for images that are exchangeable with the
    calibration images. The watch tests this assumption on the scores: it ranks each new image among
    the calibration scores and all images seen since, and a martingale bets against these ranks
    being uniform. While nothing changes, the probability that an alarm is ever raised is at most δ,
    for a stream of any length. The watch does not detect a change that leaves the scores
    unchanged. It may miss a change that is very slow.

    Parameters
    ----------
    monitor
        A monitor, or its judge.
    delta
        The largest probability of ever raising a false alarm, in (0, 1).
    run_length
        The least mean number of images between two false quick alarms.
    seed
        Seed of the random numbers that order equal scores.

    Raises
    ------
    CovcliError
        If a number is out of bounds.

    Examples
    --------
    >>> import torch
    >>> from covcli import DriftWatch, Monitor
    >>> monitor = Monitor.load(
    ...     "runs/latest/checkpoint.pt", "runs/latest/signature-ensemble.safetensors"
    ... )
    >>> watch = DriftWatch(monitor, delta=0.01)
    >>> verdicts = monitor(torch.zeros(64, 3, 32, 32, dtype=torch.uint8))
    >>> values = watch.update(verdicts)  # log10 of the martingale after each image
    >>> watch.status.alarm, watch.status.alarm_image < 20  # black images are no digits
    (True, True)
    """

    def __init__(
        self,
        monitor: Monitor | Judge,
        delta: float = 0.01,
        *,
        run_length: int = RUN_LENGTH,
        seed: int = 0,
    ) -> None:
        try:
            begun = DriftStatus(delta, run_length, seed)
            self.status = settings.read(DriftStatus, asdict(begun))
        except ValueError as error:
            raise CovcliError(str(error), where="DriftWatch") from None
        self._of = _identity(_judge(monitor))
        self._bag = Bag.of(_judge(monitor).calibration.scores.numpy())
        self._martingale = Martingale.begin()

    def update(self, seen: Verdicts | ArrayLike, names: Sequence[str] = ()) -> Floats:
        """Process the next images of the stream, in order.

        Parameters
        ----------
        seen
            Their verdicts, or their scores, float64 of shape (B,).
        names
            Their names, used to name the image that raises an alarm; optional.

        Returns
        -------
        ndarray
            The decimal logarithm of the martingale after each of them, float64 of shape (B,).

        Raises
        ------
        CovcliError
            If a score is no number or NaN, or the names are not one an image. The watch is then as
            it was before.
        """
        try:
            scores = np.asarray(seen.score if isinstance(seen, Verdicts) else seen, np.float64)
        except (TypeError, ValueError):
            raise CovcliError("scores are no numbers", where="DriftWatch") from None
        if scores.ndim != 1 or bool(np.isnan(scores).any()):
            raise CovcliError("scores are NaN, or not one a number an image", where="DriftWatch")
        if len(names) not in (0, len(scores)):
            raise CovcliError(f"{len(names)} names of {len(scores)} images", where="DriftWatch")
        first = self.status.images
        ranked = self._bag.rank(scores, lots(self.status.seed, first, len(scores)))
        values = np.empty(len(scores))
        running = _RunningStatus(asdict(self.status))
        for i, p in enumerate(ranked.tolist()):
            self._martingale.step(p)
            values[i] = float(self._martingale.log) / math.log(10)
            quick = float(self._martingale.quick) / math.log(10)
            if running.see(float(values[i]), quick, str(names[i]) if len(names) else None):
                self._martingale.quick = np.array(-math.inf)
        self.status = DriftStatus(**running.fields)
        return values

    def save(self, path: Path | str) -> None:
        """Write the state to a file, atomically; `DriftWatch.load` continues from it.

        Raises
        ------
        CovcliError
            If the file cannot be written.
        """
        held, counts = self._bag.content
        arrays = {
            "held": held, "counts": counts, "shares": self._martingale.shares,
            "capital": self._martingale.capital, "quick": self._martingale.quick,
        }  # fmt: skip
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        STATE.save(Path(path), {"of": self._of, "told": asdict(self.status), **tensors})

    @classmethod
    def load(cls, path: Path | str, monitor: Monitor | Judge) -> Self:
        """Read a state that `save` wrote, for the same signature.

        Raises
        ------
        CovcliError
            If the file is missing, damaged, of another kind, or belongs to another signature.
        """
        path = Path(path)
        content = STATE.load(path)
        if content["of"] != _identity(_judge(monitor)):
            raise CovcliError(
                "belongs to another signature", where=path, fix="name another --drift-state"
            )
        watch = cls(monitor)
        try:
            watch.status = settings.read(DriftStatus, content["told"])
            arrays = {name: content[name].numpy() for name in STATE.keys - {"of", "told"}}
            _check(arrays, len(watch._bag) + watch.status.images)
        except (TypeError, ValueError, AttributeError) as error:
            raise CovcliError(f"does not hold together ({error})", where=path) from None
        watch._bag = Bag(arrays["held"], arrays["counts"])
        watch._martingale = Martingale(arrays["shares"], arrays["capital"], arrays["quick"])
        return watch


def read_status(path: Path) -> DriftStatus:
    """Return the status in a file that `DriftWatch.save` wrote, of any signature.

    Raises
    ------
    CovcliError
        If the file is missing, damaged, or of another kind.
    """
    try:
        return settings.read(DriftStatus, STATE.load(path)["told"])
    except ValueError as error:
        raise CovcliError(f"is inconsistent ({error})", where=path) from None


@dataclass
class _RunningStatus:
    """The fields of a status during an update."""

    fields: dict[str, Any]

    def see(self, log10: float, quick: float, name: str | None) -> bool:
        """Record the values after one more image; return whether there is a quick alarm."""
        status = self.fields
        status["images"] += 1
        status["log10_martingale"], status["log10_quick"] = log10, quick
        status["log10_highest"] = max(status["log10_highest"], log10)
        if status["alarm_image"] is None and log10 >= -math.log10(status["delta"]):
            status["alarm_image"], status["alarm_name"] = status["images"], name
        if status["alarm_image"] is None and log10 < status["log10_lowest"]:
            status["log10_lowest"], status["lowest_image"] = log10, status["images"]
        if quick < math.log10(status["run_length"]):
            return False
        status["quick_alarms"] += 1
        status["quick_image"] = status["images"]
        return True


def _judge(monitor: Monitor | Judge) -> Judge:
    return monitor.judge if isinstance(monitor, Monitor) else monitor


def _identity(judge: Judge) -> str:
    """Return a digest of everything that determines scores, and of the calibration scores."""
    signature, calibration = judge.signature, judge.calibration
    state = files.fingerprint(signature.state.tensors)
    # Its fields alone: `vars` holds what it has cached too, once it has scored.
    combination = asdict(calibration.combination)
    return files.digest(
        [signature.fingerprint, signature.method.spec(), state, combination, calibration.scores]
    )


def _check(arrays: dict[str, np.ndarray], scores: int) -> None:
    """Raise a ValueError unless the arrays of a state are what `save` writes."""
    shapes = {"shares": (len(RATES), BETS), "capital": (len(RATES),), "quick": ()}
    for name, shape in shapes.items():
        if arrays[name].dtype != np.float64 or arrays[name].shape != shape:
            raise ValueError(f"{name} of another shape or type")
    held, counts = arrays["held"], arrays["counts"]
    whole = held.dtype == counts.dtype == np.int64 and held.shape == counts.shape == (len(held),)
    if not whole or bool((np.diff(held) <= 0).any()) or bool((counts < 1).any()):
        raise ValueError("scores out of order")
    if int(counts.sum()) != scores:
        raise ValueError("another number of scores than images")
    shares, capital = arrays["shares"], arrays["capital"]
    if not np.allclose(shares.sum(1), 1) or bool((shares < 0).any() | ~np.isfinite(capital).all()):
        raise ValueError("capital that cannot be")
