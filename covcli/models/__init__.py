"""Networks: architectures, checkpoints, coverage points, and the sweep over a set of images."""

from covcli.models.architectures import MODELS, model

__all__ = ["MODELS", "model"]
