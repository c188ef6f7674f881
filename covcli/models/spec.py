"""ModelSpec: the description from which a network is rebuilt, without its weights."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from covcli.core.errors import CovcliError
from covcli.data.preprocessing import COVERING, InputShape, Preprocess, Shape

Statistics: TypeAlias = tuple[float, ...]
Normalisation: TypeAlias = tuple[Statistics, Statistics]
Precision: TypeAlias = Literal["float32", "bfloat16"]
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OWN = "python:"
CIFAR10: Normalisation = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class ModelSpec:
    """The description from which a network is rebuilt, without its weights.

    Attributes
    ----------
    name
        A name in MODELS, `torchvision:NAME` or `timm:NAME`; `python:CLASS` for a network of a
        program, which also prepares its images.
    classes
        The number of classes.
    shape
        Channels, height and width of its input. It becomes an `InputShape` with `preprocess`, so
        that images read in this shape are preprocessed for the network.
    mean, deviation
        Per channel, of pixels in [0, 1]; subtracted and divided by inside the network.
    pretrained
        Whether it has the layout of torchvision's ImageNet weights.
    preprocess
        How images are resized.
    logits
        The name of the logits among the network's outputs; "" if they are unambiguous.

    Examples
    --------
    >>> spec = ModelSpec("vgg11", 10, (3, 32, 32), *CIFAR10)
    >>> ModelSpec.from_dict(spec.as_dict(), "example") == spec
    True
    """

    name: str
    classes: int
    shape: Shape
    mean: Statistics
    deviation: Statistics
    pretrained: bool = False
    preprocess: Preprocess = COVERING
    logits: str = ""

    def __post_init__(self) -> None:
        """Attach the preprocessing to the shape."""
        object.__setattr__(self, "shape", InputShape(self.shape, self.preprocess))

    @classmethod
    def own(cls, network: object, classes: int, shape: Shape, logits: str = "") -> "ModelSpec":
        """Return the specification of a program's own network, which needs no preprocessing."""
        zeros, ones = (0.0,) * shape[0], (1.0,) * shape[0]
        return cls(f"{OWN}{type(network).__name__}", classes, shape, zeros, ones, logits=logits)

    @property
    def is_own(self) -> bool:
        """Whether it is a program's own network, whose images the program prepares."""
        return self.name.startswith(OWN)

    def as_dict(self) -> dict[str, Any]:
        """Return the specification as plain lists and numbers."""
        return {**asdict(self), "shape": list(self.shape), "mean": list(self.mean),
                "deviation": list(self.deviation), "preprocess": self.preprocess.as_dict(),
                }  # fmt: skip

    @classmethod
    def from_dict(cls, document: Any, where: object) -> "ModelSpec":
        """Rebuild a specification from a file's document; raise a CovcliError if malformed.

        Files of earlier versions lack preprocessing and logits; the defaults are used.
        """
        try:
            channels, height, width = (int(side) for side in document["shape"])
            spec = cls(
                name=str(document["name"]),
                classes=int(document["classes"]),
                shape=(channels, height, width),
                mean=tuple(float(v) for v in document["mean"]),
                deviation=tuple(float(v) for v in document["deviation"]),
                pretrained=bool(document["pretrained"]),
                preprocess=Preprocess.from_dict(
                    document.get("preprocess", COVERING.as_dict())
                ),
                logits=str(document.get("logits", "")),
            )  # fmt: skip
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CovcliError(f"has a malformed model entry ({error!r})", where=where) from None
        sizes_fit = (
            (channels in (1, 3) or (spec.is_own and channels > 0))
            and 0 < height <= 4096
            and 0 < width <= 4096
        )
        finite = all(map(math.isfinite, [*spec.mean, *spec.deviation]))
        if not (sizes_fit and finite and 0 < spec.classes <= 100_000 and len(spec.mean) == channels
                and len(spec.deviation) == channels and min(spec.deviation) > 0):  # fmt: skip
            raise CovcliError("has a model entry out of range", where=where)
        return spec


def precision(text: str) -> Precision:
    """Return the precision of a name; raise a ValueError for an unknown name."""
    for known in get_args(Precision):
        if text == known:
            return text  # type: ignore[return-value]
    raise ValueError(f"precision {text!r}")
