"""What `evaluate` is told."""

from dataclasses import dataclass
from pathlib import Path

from covcli.evaluation.gates import Gate
from covcli.signature.guarantee import Mode


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` is told; `None` takes the newest run's, or the signature's own.

    `explain` says how many images of each set to explain, the most suspicious first; `gates` what
    the figures are held against.
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
    explain: int = 0
    gates: tuple[Gate, ...] = ()
    model: str | None = None
    runs: Path = Path("runs")
    data_dir: Path | None = None
    output: Path | None = None
    force: bool = False
    device: str = "auto"
    seed: int = 0
