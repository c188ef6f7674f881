"""An exported monitor: one graph from images to verdicts, and the description in its file."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from covcli.core import settings
from covcli.core.choices import ExportFormat, InputForm
from covcli.core.errors import CovcliError, is_memory_error, one_line
from covcli.signature.calibration import Calibration
from covcli.signature.chain import Chain
from covcli.signature.judge import TRUSTED, UNSURE, UNTRUSTED, Judge

# The key of the description in the file, a JSON document.
KEY = "covcli"
SCHEMA = 1
MOST_IMAGES = 1 << 20
# A score within this distance of a calibration score, in units of the largest one (or 1), is
# replaced by it.
SNAP = 1e-7
OUTPUTS = ("logits", "predicted", "score", "p_value", "confidence", "untrusted")
VERDICTS = (TRUSTED, UNSURE, UNTRUSTED)
LONGEST_REASON = 200


@dataclass(frozen=True)
class Verification:
    """The differences between an exported file and its monitor, on the same images.

    Attributes
    ----------
    images, noise
        How many images were run through both, and how many of them are noise, added because there
        were too few calibration images.
    logits, score, p_value, confidence
        The largest differences; but for the logits, where both predict the same class.
    predicted, verdicts
        The number of images whose predicted class differs, and whose verdict differs.
    score_tolerance
        The tolerance of scores.
    beyond
        The number of images whose scores differ by more: rounding has moved a neuron across an end
        of its range.

    Examples
    --------
    >>> same = Verification(
    ...     images=256, noise=0, logits=2e-6, score=1e-5, p_value=0.0, confidence=3e-7,
    ...     predicted=0, verdicts=0, score_tolerance=0.01, beyond=0,
    ... )
    >>> str(same).partition(":")[0]
    '256 images through file and monitor'
    """

    images: int
    noise: int
    logits: float
    score: float
    p_value: float
    confidence: float
    predicted: int
    verdicts: int
    score_tolerance: float
    beyond: int

    def __str__(self) -> str:
        noise = f" ({self.noise} of noise)" if self.noise else ""
        return (
            f"{self.images} images{noise} through file and monitor: largest differences logits "
            f"{self.logits:.2g}, score {self.score:.2g} (tolerance {self.score_tolerance:.2g}, "
            f"{self.beyond} beyond), p-value {self.p_value:.2g}, confidence {self.confidence:.2g}; "
            f"{self.predicted} classes and {self.verdicts} verdicts differ"
        )


@dataclass(frozen=True)
class ExportedMonitor:
    """The description of an exported file.

    Attributes
    ----------
    schema
        Version of this document.
    format
        "onnx" or "torch".
    input
        "uint8": bytes; "normalised": floats from which `mean` was subtracted, divided by
        `deviation`.
    shape
        Channels, height and width of an image.
    preprocess
        How images of other sizes are resized, in the notation of `--preprocess`.
    mean, deviation
        Mean and deviation of pixels in [0, 1], by channel. A file that takes bytes applies them
        itself.
    outputs
        Names of the outputs.
    verdicts
        The meaning of the numbers of the output "verdict"; empty without that output.
    classes
        Class names.
    model, method, granularity
        Names of the network, the method and the granularity.
    alpha, guarantee, max_error, statement
        The guarantee, see `covcli.signature.guarantee.Guarantee`, and the same as a sentence.
    checkpoint_fingerprint, signature_fingerprint
        Fingerprints of the network's weights, and of the signature's file.
    verification
        The differences between the file and the monitor.
    provenance
        Versions, command line, device and time of the export.

    Examples
    --------
    >>> from pathlib import Path
    >>> from covcli import ExportConfig, export
    >>> from covcli.monitoring.export import read_exported
    >>> written = export(ExportConfig("monitor.pt2")).monitor  # of runs/latest
    >>> read_exported(Path("monitor.pt2")) == written
    True
    >>> written.shape, written.classes[:3], written.guarantee, written.alpha
    ((3, 32, 32), ('0', '1', '2'), 'marginal', 0.05)
    """

    schema: int
    format: ExportFormat
    input: InputForm
    shape: tuple[int, int, int]
    preprocess: str
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    outputs: tuple[str, ...]
    verdicts: tuple[str, ...]
    classes: tuple[str, ...]
    model: str
    method: str
    granularity: str
    alpha: float
    guarantee: str
    max_error: float | None
    statement: str
    checkpoint_fingerprint: str
    signature_fingerprint: str
    verification: Verification
    provenance: dict[str, Any]

    def packed(self) -> str:
        """Return the document as stored in the file."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def unpacked(cls, document: Any, where: object) -> "ExportedMonitor":
        """Rebuild a document that `packed` wrote; any other document raises a CovcliError."""
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            raise CovcliError(f"is no exported monitor of schema {SCHEMA}", where=where)
        try:
            return settings.read(cls, document)
        except ValueError as error:
            raise CovcliError(f"does not hold together ({error})", where=where) from None


@dataclass(frozen=True)
class SnappingCalibration(Calibration):
    """A calibration that replaces a score by a calibration score that is within rounding of it.

    Coverage counts neurons, so many images have exactly the same score. If another library rounds
    differently, a score would be just above or below its equals, and its rank would change by
    their number.

    Attributes
    ----------
    reach
        How far a score may lie off.
    """

    reach: float = 0.0

    @classmethod
    def of(cls, calibration: Calibration) -> "SnappingCalibration":
        """Return the same calibration, but for that."""
        own = {f.name: getattr(calibration, f.name) for f in fields(calibration)}
        return cls(**own, reach=SNAP * max(1.0, float(calibration.scores.abs().max())))

    def score(self, evidence: Tensor) -> Tensor:
        """Return the score of evidence (B, P), float64 of shape (B,); see `Calibration.score`."""
        score = super().score(evidence)
        nearest = (score[:, None] - self.scores).abs().argmin(1)
        near = self.scores.index_select(0, nearest)
        return torch.where((score - near).abs() <= self.reach, near, score)


class MonitorGraph(nn.Module):
    """The chain from images to verdicts with the inputs and outputs of an exported file.

    Parameters
    ----------
    judge
        The network with its signature and calibration.
    form
        The form of the images: bytes, or normalised floats.
    """

    def __init__(self, judge: Judge, form: InputForm) -> None:
        super().__init__()
        calibration = SnappingCalibration.of(judge.calibration)
        judge = replace(judge, calibration=calibration)
        self.chain = Chain(judge, normalised=form == "normalised")
        self.form = form
        self.bounded = judge.rule.guarantee.max_error is not None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs of `forward`."""
        return (*OUTPUTS, "verdict") if self.bounded else OUTPUTS

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Classify images (B, C, H, W) and judge each; return `outputs`, of length B each."""
        judged = self.chain(images.float() / 255 if self.form == "uint8" else images)
        outputs = tuple(judged[name] for name in OUTPUTS)
        if not self.bounded:
            return outputs
        # Indices into VERDICTS; no image is both.
        return *outputs, 2 * judged["untrusted"].long() + judged["unsure"].long()

    def example(self) -> Tensor:
        """Return two black images, of the type that `forward` takes."""
        kind = torch.uint8 if self.form == "uint8" else torch.float32
        return torch.zeros(2, *self.chain.model.spec.shape, dtype=kind)


def traced(graph: MonitorGraph) -> torch.export.ExportedProgram:
    """Export the graph by torch, for any number of images.

    Raises
    ------
    CovcliError
        If torch cannot export the network; it gives torch's reason.
    """
    batch = {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)}
    graph.eval().requires_grad_(False)
    try:
        # No tensor requires gradients; the faster code without them writes to memory twice.
        with quiet(), torch.enable_grad():
            return torch.export.export(graph, (graph.example(),), dynamic_shapes=(batch,))
    except Exception as error:
        raise refusal(error, "torch", graph.chain.model.spec.name) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of libraries about their steps and about failed graphs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def refusal(error: Exception, by: str, model: str) -> Exception:
    """Return the error to raise if a library cannot export a network, with its reason."""
    if isinstance(error, CovcliError) or is_memory_error(error):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = one_line(f"{type(error).__name__}: {lines[0] if lines else ''}")
    return CovcliError(
        f"{by} cannot export this network ({reason[:LONGEST_REASON]})", where=f"model {model!r}"
    )
