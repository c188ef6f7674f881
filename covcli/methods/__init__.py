"""The methods: each summarises trusted activations and scores a new input against them."""

from covcli.methods.base import METHODS, Method, Reduction, State, make_method
from covcli.methods.ranges import MultiRange, SingleRange

__all__ = ["METHODS", "Method", "MultiRange", "Reduction", "SingleRange", "State", "make_method"]
