"""Image sets: their sources, how they are read, and their labels."""

from covcli.data.datasets import DATASETS

__all__ = ["DATASETS"]
