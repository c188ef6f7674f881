"""The coverage methods: each summarises trusted activations and scores new inputs."""

from covcli.methods.base import METHODS, Method, Scorer, make_method
from covcli.methods.contributions import ActivationCoverage
from covcli.methods.ensemble import Ensemble
from covcli.methods.gaussian import Gauss
from covcli.methods.layout import Layout
from covcli.methods.ranges import MultiRange, PaperMultiRange, SingleRange
from covcli.methods.ranks import NeuronRank
from covcli.methods.state import Reduction, State

__all__ = [
    "METHODS",
    "ActivationCoverage",
    "Ensemble",
    "Gauss",
    "Layout",
    "Method",
    "MultiRange",
    "NeuronRank",
    "PaperMultiRange",
    "Reduction",
    "Scorer",
    "SingleRange",
    "State",
    "make_method",
]
