"""The allowed values of settings. The command line imports this module, so it needs no torch."""

from typing import Annotated, Literal, TypeAlias, get_args

from annotated_types import Interval

# How activations become neurons: a channel's mean and maximum, or every position.
GranularityChoice: TypeAlias = Literal["channel", "unit"]
# The kinds of guarantee for a false-alarm rate; see `covcli.signature.guarantee.Guarantee`.
Mode: TypeAlias = Literal["marginal", "by-class", "certified", "certified-overall"]
# Whether to compute in bfloat16: never, always, or where that measures faster.
AmpMode: TypeAlias = Literal["off", "bf16", "auto"]
# How training images are augmented; "auto" chooses by the data set.
Augmentation: TypeAlias = Literal["none", "crop", "crop-flip"]
AugmentationChoice: TypeAlias = Literal["auto", Augmentation]
# In which form a monitor is exported, and what the exported file takes.
ExportFormat: TypeAlias = Literal["onnx", "torch"]
InputForm: TypeAlias = Literal["uint8", "normalised"]
# What `covcli list` lists.
RegistryKind: TypeAlias = Literal[
    "models", "datasets", "methods", "attacks", "corruptions", "baselines", "sections"
]
REGISTRIES: tuple[RegistryKind, ...] = get_args(RegistryKind)

# The largest number of anything that a command counts: more is a slip of the keyboard.
MOST = 1_000_000
Seed = Annotated[int, Interval(ge=0, lt=2**31)]
# A rate of errors: of false alarms, of wrong answers, or of false alarms of the drift watch.
Rate = Annotated[float, Interval(gt=0, lt=1)]
