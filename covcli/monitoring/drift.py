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
    """What a watch has seen so far. Images are numbered from 1 on, over all calls.

    Attributes
    ----------
    delta
        With at least probability 1 − δ there is never an alarm while nothing has changed.
    run_length
        Between two quick alarms, while nothing has changed, lie at least so many images in the
        mean.
    seed
        Of the lots that decide between equal scores.
    images
        How many images were seen.
    log10_martingale
        The decimal logarithm of the martingale after the last of them.
    log10_highest
        The highest that it has been; the alarm is at log10(1/δ), and is never taken back.
    log10_lowest
        The lowest that it has been until the alarm.
    lowest_image
        The image after which that was (0: the beginning): the change came about there, if one
        came.
    alarm_image
        The image that the alarm came with; None without one.
    alarm_name
        What that image was called; None where nothing was said.
    log10_quick
        The decimal logarithm of the Shiryaev-Roberts statistic; minus infinity at the beginning.
    quick_alarms
        How often it has reached the run length, and begun anew.
    quick_image
        The image that the last of them came with; None without one.
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

    A verdict's false-alarm rate is promised for images that are exchangeable with the calibration
    images. The watch tests just that, on the scores: each new image is ranked among the scores
    that rank the monitor's p-values and all images seen since, and a martingale bets against these
    ranks being uniform. While nothing has changed, an alarm ever comes with a probability of at
    most δ, however long one watches. What it cannot see is a change that leaves the scores as they
    are, and one that comes so slowly that it becomes what is usual.

    Parameters
    ----------
    monitor
        A monitor, or its judge.
    delta
        The probability of ever raising a false alarm, in (0, 1).
    run_length
        How many images lie between two false quick alarms, in the mean, at least.
    seed
        Of the lots that decide between equal scores.

    Raises
    ------
    CovcliError
        If a number is out of its bounds.

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
        """Take the next images of the stream, in their order.

        Parameters
        ----------
        seen
            Their verdicts, or their scores, float64 of shape (B,).
        names
            What they are called, to name the one that an alarm comes with; or nothing.

        Returns
        -------
        ndarray
            The decimal logarithm of the martingale after each of them, float64 of shape (B,).

        Raises
        ------
        CovcliError
            If a score is NaN.
        """
        scores = np.asarray(seen.score if isinstance(seen, Verdicts) else seen, np.float64)
        if scores.ndim != 1 or bool(np.isnan(scores).any()):
            raise CovcliError("scores are NaN, or not one a number an image", where="DriftWatch")
        first = self.status.images
        ranked = self._bag.rank(scores, lots(self.status.seed, first, len(scores)))
        values = np.empty(len(scores))
        told = _Told(asdict(self.status))
        for i, p in enumerate(ranked.tolist()):
            self._martingale.step(p)
            values[i] = float(self._martingale.log) / math.log(10)
            quick = float(self._martingale.quick) / math.log(10)
            if told.see(values[i], quick, names[i] if names else None):
                self._martingale.quick = np.array(-math.inf)
        self.status = DriftStatus(**told.fields)
        return values

    def save(self, path: Path | str) -> None:
        """Write the state to a file, whole or not at all; `DriftWatch.load` goes on with it.

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
        """Read a state that `save` wrote, of the same signature.

        Raises
        ------
        CovcliError
            If the file is missing, damaged, of another kind, or of another signature.
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


@dataclass
class _Told:
    """The fields of a status while images come in."""

    fields: dict[str, Any]

    def see(self, log10: float, quick: float, name: str | None) -> bool:
        """Take the values after one more image; return whether the quick alarm sounds."""
        told = self.fields
        told["images"] += 1
        told["log10_martingale"], told["log10_quick"] = log10, quick
        told["log10_highest"] = max(told["log10_highest"], log10)
        if told["alarm_image"] is None and log10 >= -math.log10(told["delta"]):
            told["alarm_image"], told["alarm_name"] = told["images"], name
        if told["alarm_image"] is None and log10 < told["log10_lowest"]:
            told["log10_lowest"], told["lowest_image"] = log10, told["images"]
        if quick < math.log10(told["run_length"]):
            return False
        told["quick_alarms"] += 1
        told["quick_image"] = told["images"]
        return True


def _judge(monitor: Monitor | Judge) -> Judge:
    return monitor.judge if isinstance(monitor, Monitor) else monitor


def _identity(judge: Judge) -> str:
    """Return a digest of all that scores depend on, and of those that begin the bag."""
    signature, calibration = judge.signature, judge.calibration
    state = files.fingerprint(signature.state.tensors)
    parts = [signature.fingerprint, signature.method.spec(), state, vars(calibration.combination)]
    return files.digest([*parts, calibration.scores])


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
