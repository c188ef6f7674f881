"""Networks: architectures, checkpoints, coverage points, and inference over an image set."""

from covcli.models.architectures import MODELS, model

__all__ = ["MODELS", "model"]
