"""What `evaluate` is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from covcli.core.choices import Mode, Seed
from covcli.core.settings import settle

LOWER_IS_BETTER = {"fpr95", "false_alarm_rate"}
Statistic: TypeAlias = Literal["value", "low", "high"]


@dataclass(frozen=True)
class Gate:
    """A figure and its bound: what to reach, or for fpr95 and false_alarm_rate not to exceed.

    Attributes
    ----------
    metric, value
        The metric and the bound, in [0, 1].
    name
        The untrusted set that it is asked of; None for every set.
    statistic
        What of the metric is held against the bound: its value, or an end of its 95% interval.
    """

    metric: str
    value: float
    name: str | None = None
    statistic: Statistic = "value"

    @property
    def relation(self) -> Literal[">=", "<="]:
        """How a figure that passes stands to the bound."""
        return "<=" if self.metric in LOWER_IS_BETTER else ">="


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` is told; `None` takes the newest run's, or the signature's own.

    Attributes
    ----------
    untrusted
        The untrusted sets: specifications of data, noise or attacks.
    checkpoint, signature
        The files; by default the newest of the newest run.
    method
        Takes the newest signature of that method.
    trusted
        Trusted test images; by default the test split of those that built the signature.
    alpha, guarantee, max_error
        See `covcli.signature.guarantee.Guarantee`.
    baselines
        Detectors of pytorch-ood to compare with, or "all".
    explain
        How many images of each set to explain, the most suspicious first.
    gates
        What the figures are held against.
    model
        The model of bare weights, which the signature knows already.
    runs, output
        The folder of run folders, and the folder of the results; by default the signature's.
    data_dir, force, device, seed
        As in `covcli.SignatureConfig`.

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
    alpha: float | None = None
    guarantee: Mode | None = None
    max_error: float | None = None
    baselines: tuple[str, ...] = ()
    explain: Annotated[int, Interval(ge=0)] = 0
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
