"""covcli: coverage analysis that tells which answers of an image classifier can be trusted.

The names below load on first use, because torch takes seconds to import and the
command line's help needs none of it.
"""

from importlib import import_module

from covcli.core.version import __version__

TYPE_CHECKING = False  # the module typing takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from covcli.evaluation.config import EvaluationConfig
    from covcli.evaluation.evaluate import evaluate
    from covcli.models.points import CoverageLayer
    from covcli.monitoring.check import check
    from covcli.monitoring.compare import ReleaseComparison, compare
    from covcli.monitoring.config import CheckConfig
    from covcli.monitoring.drift import DriftStatus, DriftWatch
    from covcli.monitoring.export import ExportResult, export
    from covcli.monitoring.export_config import ExportConfig
    from covcli.monitoring.results import CheckedImage
    from covcli.reporting.documents import EvaluationResult
    from covcli.reporting.report import ReportResult, report
    from covcli.signature.build import SignatureResult, build_signature
    from covcli.signature.config import MergeConfig, SignatureConfig
    from covcli.signature.merge import merge_signatures
    from covcli.signature.monitor import Monitor, Verdicts
    from covcli.training.config import TrainConfig
    from covcli.training.loss import ConfidenceLoss
    from covcli.training.train import TrainResult, train

__all__ = [
    "CheckConfig",
    "CheckedImage",
    "ConfidenceLoss",
    "CoverageLayer",
    "DriftStatus",
    "DriftWatch",
    "EvaluationConfig",
    "EvaluationResult",
    "ExportConfig",
    "ExportResult",
    "MergeConfig",
    "Monitor",
    "ReleaseComparison",
    "ReportResult",
    "SignatureConfig",
    "SignatureResult",
    "TrainConfig",
    "TrainResult",
    "Verdicts",
    "__version__",
    "build_signature",
    "check",
    "compare",
    "evaluate",
    "export",
    "merge_signatures",
    "report",
    "train",
]

_HOMES = {
    "CheckConfig": "monitoring.config",
    "CheckedImage": "monitoring.results",
    "ConfidenceLoss": "training.loss",
    "CoverageLayer": "models.points",
    "DriftStatus": "monitoring.drift",
    "DriftWatch": "monitoring.drift",
    "EvaluationConfig": "evaluation.config",
    "EvaluationResult": "reporting.documents",
    "ExportConfig": "monitoring.export_config",
    "ExportResult": "monitoring.export",
    "MergeConfig": "signature.config",
    "Monitor": "signature.monitor",
    "ReleaseComparison": "monitoring.compare",
    "ReportResult": "reporting.report",
    "SignatureConfig": "signature.config",
    "SignatureResult": "signature.build",
    "TrainConfig": "training.config",
    "TrainResult": "training.train",
    "Verdicts": "signature.monitor",
    "build_signature": "signature.build",
    "check": "monitoring.check",
    "compare": "monitoring.compare",
    "evaluate": "evaluation.evaluate",
    "export": "monitoring.export",
    "merge_signatures": "signature.merge",
    "report": "reporting.report",
    "train": "training.train",
}


def __getattr__(name: str) -> "Any":
    """Import the module that holds a public name when the name is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'covcli' has no attribute {name!r}")
    return getattr(import_module(f"covcli.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names, those that have not been imported yet too."""
    return sorted({*globals(), *__all__})
