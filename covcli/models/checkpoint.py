"""Checkpoints: a network's weights, with its specification and the record of its data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.core.files import Format, fingerprint
from covcli.core.weights_only import load_weights_only
from covcli.data import recorded
from covcli.data.images import DataRecord
from covcli.methods import make_method
from covcli.models import architectures
from covcli.models.architectures import Classifier, ModelSpec
from covcli.models.weights import Foreign, from_foreign, from_spec

CHECKPOINT = Format(
    "covcli checkpoint",
    schema=1,
    keys=frozenset({"model", "state", "classes", "trusted", "calibration_rows", "training"}),
)


@dataclass(frozen=True)
class Checkpoint:
    """A network and its origin.

    Attributes
    ----------
    path
        The file that it was read from.
    model
        The network, in evaluation mode, on the CPU.
    classes
        Class names.
    trusted
        The data that it was trained on; None for weights trained elsewhere.
    calibration_rows
        The rows of `trusted` that were held out from training, int64 of shape (n,).
    training
        The settings of the training; empty for weights trained elsewhere.
    bare
        Whether the file held only weights.
    """

    path: Path
    model: Classifier
    classes: tuple[str, ...]
    trusted: DataRecord | None
    calibration_rows: Tensor
    training: Mapping[str, Any]
    bare: bool = False


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    Examples
    --------
    >>> from pathlib import Path
    >>> save(Path("copy.pt"), load(Path("runs/latest/checkpoint.pt")))
    >>> load(Path("copy.pt")).classes[:3]
    ('0', '1', '2')
    """
    save_checkpoint(
        path,
        {
            "model": checkpoint.model.spec.as_dict(),
            "state": {k: v.detach().cpu() for k, v in checkpoint.model.state_dict().items()},
            "classes": list(checkpoint.classes),
            "trusted": vars(checkpoint.trusted) if checkpoint.trusted else None,
            "calibration_rows": checkpoint.calibration_rows,
            "training": dict(checkpoint.training),
        },
    )


def load(path: Path, foreign: Foreign | ModelSpec | str | None = None) -> Checkpoint:
    """Read a checkpoint, or weights that were trained elsewhere.

    Parameters
    ----------
    path
        The file.
    foreign
        For weights without a checkpoint: the model's name, further settings, or the complete
        specification of the network.

    Raises
    ------
    CovcliError
        If the file cannot be read, is of another kind, or its weights do not fit the model.

    Examples
    --------
    >>> from pathlib import Path
    >>> checkpoint = load(Path("runs/latest/checkpoint.pt"))
    >>> checkpoint.model.spec.name, len(checkpoint.classes)
    ('tiny', 10)
    """
    document = load_weights_only(path)
    if not isinstance(document.get("format"), str):
        return _bare(path, document, foreign)
    content = _checked(path, document)
    spec = ModelSpec.from_dict(content["model"], path)
    if isinstance(foreign, Foreign):
        _refuse_contradiction(spec, foreign, path)
    model = architectures.from_state(spec, content["state"], path)
    rows, trusted, classes = content["calibration_rows"], content["trusted"], content["classes"]
    try:
        record = DataRecord.read(trusted) if trusted else None
        if record:
            record = recorded.verified(record, lambda: fingerprint(model.state_dict()))
        consistent = rows.dtype == torch.int64 and rows.ndim == 1 and len(classes) == spec.classes
        training = dict(content["training"])
        if training:
            make_method(training["method"])
            consistent &= 0 <= training["confidence_threshold"] <= 1
            consistent &= all(isinstance(pattern, str) for pattern in training.get("points", ()))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise CovcliError(f"is inconsistent ({error})", where=path) from None
    if not consistent:
        raise CovcliError("is inconsistent (classes or calibration rows)", where=path)
    names = tuple(str(name) for name in classes)
    return Checkpoint(path, model, names, record, rows, training)


def _refuse_contradiction(spec: ModelSpec, foreign: Foreign, path: Path) -> None:
    """Raise a CovcliError if the caller's settings contradict the checkpoint's record."""
    if foreign.model not in (None, spec.name):
        raise CovcliError(f"is a checkpoint of {spec.name!r}", where=f"{path}: --model")
    options = {"--mean, --std": foreign.statistics, "--preprocess": foreign.preprocess,
               "--logits": foreign.logits}  # fmt: skip
    for option, value in options.items():
        if value:
            raise CovcliError(
                f"{option} is only for weights without a checkpoint; this file records its own",
                where=path,
            )


def _bare(
    path: Path, document: Mapping[str, Any], foreign: Foreign | ModelSpec | str | None
) -> Checkpoint:
    if isinstance(foreign, ModelSpec):
        model = from_spec(document, foreign, path)
    else:
        settings = foreign if isinstance(foreign, Foreign) else Foreign(foreign)
        model = from_foreign(document, settings, path)
    classes = tuple(str(k) for k in range(model.spec.classes))
    return Checkpoint(path, model, classes, None, torch.empty(0, dtype=torch.int64), {}, True)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; `content` has the keys of CHECKPOINT and plain values."""
    CHECKPOINT.save(path, content)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that `save_checkpoint` wrote, without unpickling objects.

    Raises
    ------
    CovcliError
        If the file is missing, of another kind, damaged, or holds NaN or infinite weights.
    """
    return _checked(path, load_weights_only(path))


def _checked(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    content = CHECKPOINT.content(path, document)
    state = content["state"]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    ):
        raise CovcliError("is neither a checkpoint nor a state dict", where=path)
    architectures.check_finite(state, path)
    return content
