"""Images: where they come from, and how they are read."""

from covcli.data.datasets import DATASETS

__all__ = ["DATASETS"]
