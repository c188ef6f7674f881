"""The version, on the ground floor: it needs nothing."""

__version__ = "0.1.0"
