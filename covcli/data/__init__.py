"""Image sets: their sources, how they are read, and their labels."""

from covcli.data.datasets import DATASETS, load

__all__ = ["DATASETS", "load"]
