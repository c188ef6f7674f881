"""What settings may be chosen from, in a module that needs no torch: the command line reads it."""

from typing import Annotated, Literal, TypeAlias, get_args

from annotated_types import Interval

# How activations become neurons: a channel's mean and maximum, or every position.
GranularityChoice: TypeAlias = Literal["channel", "unit"]
# In which sense a false-alarm rate is kept; see `covcli.signature.guarantee.Guarantee`.
Mode: TypeAlias = Literal["marginal", "by-class", "certified", "certified-overall"]
# Whether to compute in bfloat16: never, always, or where that measures faster.
AmpMode: TypeAlias = Literal["off", "bf16", "auto"]
# How training images are changed; "auto" goes by the data.
Augmentation: TypeAlias = Literal["none", "crop", "crop-flip"]
AugmentationChoice: TypeAlias = Literal["auto", Augmentation]
# What `covcli list` lists.
RegistryKind: TypeAlias = Literal[
    "models", "datasets", "methods", "attacks", "corruptions", "baselines", "sections"
]
REGISTRIES: tuple[RegistryKind, ...] = get_args(RegistryKind)

Seed = Annotated[int, Interval(ge=0, lt=2**31)]
