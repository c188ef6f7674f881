"""The settings of `evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from covcli.core.choices import MOST, Mode, Rate, Seed
from covcli.core.settings import settle

LOWER_IS_BETTER = {"fpr95", "false_alarm_rate"}
Statistic: TypeAlias = Literal["value", "low", "high"]


@dataclass(frozen=True)
class Gate:
    """A bound that a metric must reach; fpr95 and false_alarm_rate must not exceed it.

    Attributes
    ----------
    metric, value
        The metric and the bound, in [0, 1].
    name
        The untrusted set to check; None for every set.
    statistic
        The part of the metric that is compared: its value, or a limit of its 95% interval.

    Examples
    --------
    >>> Gate("fpr95", 0.1, statistic="high").relation
    '<='
    """

    metric: str
    value: float
    name: str | None = None
    statistic: Statistic = "value"

    @property
    def relation(self) -> Literal[">=", "<="]:
        """The relation of a passing metric to the bound."""
        return "<=" if self.metric in LOWER_IS_BETTER else ">="


@dataclass(frozen=True)
class EvaluationConfig:
    """The settings of `evaluate`.

    Attributes
    ----------
    untrusted
        The untrusted sets: specifications of data, noise or attacks.
    checkpoint, signature
        The files. None: the newest of the newest run.
    method
        Selects the newest signature of that method; None: of any method.
    trusted
        Trusted test images. None: the test split of the data that built the signature.
    alpha, guarantee, max_error
        See `covcli.signature.guarantee.Guarantee`. None: the signature's.
    baselines
        Detectors of pytorch-ood to compare with, or "all".
    explain
        The number of images of each set to explain, the most suspicious first.
    gates
        Bounds that metrics must reach.
    model
        The model of bare weights; the signature records it too.
    runs, output
        The folder of run folders, and the folder of the results. None: the signature's folder.
    data_dir, force, device, seed
        As in `covcli.SignatureConfig`.

    Raises
    ------
    CovcliError
        If a value has the wrong type or is out of bounds.

    Examples
    --------
    >>> config = EvaluationConfig(("mnist", "attack:pgd"), gates=(Gate("auroc", 0.95),))
    >>> config.untrusted
    ('mnist', 'attack:pgd')
    """

    untrusted: tuple[str, ...]
    checkpoint: Path | None = None
    signature: Path | None = None
    method: str | None = None
    trusted: str | None = None
    alpha: Rate | None = None
    guarantee: Mode | None = None
    max_error: Rate | None = None
    baselines: tuple[str, ...] = ()
    explain: Annotated[int, Interval(ge=0, le=MOST)] = 0
    gates: tuple[Gate, ...] = ()
    model: str | None = None
    runs: Path = Path("runs")
    data_dir: Path | None = None
    output: Path | None = None
    force: bool = False
    device: str = "auto"
    seed: Seed = 0

    def __post_init__(self) -> None:
        settle(self)
