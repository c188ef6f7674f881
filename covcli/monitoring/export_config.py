"""Configuration of `export`."""

from dataclasses import dataclass
from pathlib import Path

from covcli.core.choices import ExportFormat, InputForm, Mode, Rate
from covcli.core.settings import settle


@dataclass(frozen=True)
class ExportConfig:
    """Configuration of `export`; `None` selects the newest run, or the signature's own value.

    Attributes
    ----------
    output
        The file; by default `monitor.onnx` or `monitor.pt2` in the folder of the signature.
    format
        "onnx", or "torch" for a program of torch.export; by default the output's file name
        extension decides.
    input
        The file's form of input: "uint8", or "normalised" floats.
    checkpoint, signature, method
        The files; by default the newest of the newest run, or the newest signature of a method.
    alpha, guarantee, max_error
        See `covcli.signature.guarantee.Guarantee`.
    calibration
        The images to verify the file with; by default those that calibrated the signature.
    runs
        The folder of run folders.
    data_dir, force
        As in `covcli.SignatureConfig`.

    Examples
    --------
    >>> ExportConfig("monitor.onnx", format="tflite")
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: --format tflite: must be 'onnx' or 'torch'
    """

    output: Path | None = None
    format: ExportFormat | None = None
    input: InputForm = "uint8"
    checkpoint: Path | None = None
    signature: Path | None = None
    method: str | None = None
    alpha: Rate | None = None
    guarantee: Mode | None = None
    max_error: Rate | None = None
    calibration: str | None = None
    runs: Path = Path("runs")
    data_dir: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        settle(self)
