"""Checkpoints: a network's weights, and all that rebuilds it and its data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.core.files import Format, load_weights_only
from covcli.data.images import DataRecord
from covcli.methods import make_method
from covcli.models import architectures
from covcli.models.architectures import Classifier, ModelSpec, Statistics

CHECKPOINT = Format(
    "covcli checkpoint",
    schema=1,
    keys=frozenset({"model", "state", "classes", "trusted", "calibration_rows", "training"}),
)


@dataclass(frozen=True)
class Checkpoint:
    """A network, and where it comes from.

    Attributes
    ----------
    path
        The file it was read from.
    model
        The network, in evaluation mode, on the CPU.
    classes
        Class names.
    trusted
        The data it was trained on; None for weights trained elsewhere.
    calibration_rows
        Which images of `trusted` were held out from training, int64 of shape (n,).
    training
        The settings of the training, empty for weights trained elsewhere.
    bare
        Whether the file held weights alone.
    """

    path: Path
    model: Classifier
    classes: tuple[str, ...]
    trusted: DataRecord | None
    calibration_rows: Tensor
    training: Mapping[str, Any]
    bare: bool = False


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint."""
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


def load(
    path: Path,
    bare_model: str | ModelSpec | None = None,
    statistics: tuple[Statistics, Statistics] | None = None,
) -> Checkpoint:
    """Read a checkpoint, or a bare state dict for a model that the caller names.

    Parameters
    ----------
    path
        The file.
    bare_model
        For a bare state dict: the model's name, or the whole specification.
    statistics
        For a bare state dict: mean and deviation of the pixels it was trained with.

    Raises
    ------
    CovcliError
        If the file cannot be read, is of another kind, or its weights fit no such model.
    """
    content = load_checkpoint(path)
    if "model" not in content:
        return _bare(path, content["state"], bare_model, statistics)
    spec = ModelSpec.from_dict(content["model"], path)
    model = architectures.from_state(spec, content["state"], path)
    rows, trusted, classes = content["calibration_rows"], content["trusted"], content["classes"]
    try:
        record = DataRecord(**trusted) if trusted else None
        whole = rows.dtype == torch.int64 and rows.ndim == 1 and len(classes) == spec.classes
        training = dict(content["training"])
        if training:
            make_method(training["method"])
            whole &= 0 <= training["confidence_threshold"] <= 1
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise CovcliError(f"does not hold together ({error})", where=path) from None
    if not whole:
        raise CovcliError("does not hold together (classes or calibration rows)", where=path)
    names = tuple(str(name) for name in classes)
    return Checkpoint(path, model, names, record, rows, training)


def _bare(
    path: Path,
    state: Mapping[str, Tensor],
    bare_model: str | ModelSpec | None,
    statistics: tuple[Statistics, Statistics] | None,
) -> Checkpoint:
    if bare_model is None:
        raise CovcliError("is a bare state dict", where=path, fix="name its --model")
    if isinstance(bare_model, ModelSpec):
        model = architectures.build(bare_model)
        model.network.load_state_dict(_fitting(model, state, path))
    else:
        model = architectures.from_bare_state(bare_model, state, path, statistics)
    classes = tuple(str(k) for k in range(model.spec.classes))
    return Checkpoint(path, model, classes, None, torch.empty(0, dtype=torch.int64), {}, True)


def _fitting(model: Classifier, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if shapes != {name: tensor.shape for name, tensor in model.network.state_dict().items()}:
        raise CovcliError(f"the weights do not fit model {model.spec.name!r}", where=path)
    return dict(state)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint: `content` has the keys of CHECKPOINT, of plain types."""
    CHECKPOINT.save(path, content)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or a bare state dict as `{"state": ...}`, without unpickling objects.

    Raises
    ------
    CovcliError
        If the file is missing, of another kind, damaged, or holds NaN or infinite weights.
    """
    document = load_weights_only(path)
    if isinstance(document.get("format"), str):
        content = CHECKPOINT.content(path, document)
    else:
        content = {"state": document.get("state_dict", document)}
    state = content["state"]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    ):
        raise CovcliError("is neither a checkpoint nor a state dict", where=path)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CovcliError(f"weights {name!r} hold NaN or infinity", where=path)
    return content
