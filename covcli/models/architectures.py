"""MODELS: the classifiers that covcli trains and watches; normalisation is part of each."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import torch
import torchvision
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.specs import Registry, suggestion
from covcli.data.images import ImageSet, Shape
from covcli.methods.state import Granularity
from covcli.models.points import Point, find_points

log = logging.getLogger(__name__)
Statistics: TypeAlias = tuple[float, ...]
Precision: TypeAlias = Literal["float32", "bfloat16"]
IMAGENET: tuple[Statistics, Statistics] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10: tuple[Statistics, Statistics] = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class ModelSpec:
    """All that rebuilds a network without its weights.

    Attributes
    ----------
    name
        A name in MODELS, or `torchvision:NAME`.
    classes
        How many classes it tells apart.
    shape
        Channels, height and width of its input.
    mean, deviation
        Per channel, of pixels in [0, 1]; subtracted and divided by inside the network.
    pretrained
        Whether it has the layout of torchvision's ImageNet weights.
    """

    name: str
    classes: int
    shape: Shape
    mean: Statistics
    deviation: Statistics
    pretrained: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the specification as plain lists and numbers."""
        return {**asdict(self), "shape": list(self.shape), "mean": list(self.mean),
                "deviation": list(self.deviation)}  # fmt: skip

    @classmethod
    def from_dict(cls, document: Any, where: object) -> "ModelSpec":
        """Rebuild a specification that was read from a file; a malformed one is a CovcliError."""
        try:
            values = {field.name: document[field.name] for field in fields(cls)}
            channels, height, width = (int(side) for side in values["shape"])
            spec = cls(
                name=str(values["name"]),
                classes=int(values["classes"]),
                shape=(channels, height, width),
                mean=tuple(float(v) for v in values["mean"]),
                deviation=tuple(float(v) for v in values["deviation"]),
                pretrained=bool(values["pretrained"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CovcliError(f"has a malformed model entry ({error!r})", where=where) from None
        sizes_fit = channels in (1, 3) and 0 < height <= 4096 and 0 < width <= 4096
        if not (sizes_fit and 0 < spec.classes <= 100_000 and len(spec.mean) == channels
                and len(spec.deviation) == channels and min(spec.deviation) > 0):  # fmt: skip
            raise CovcliError("has a model entry out of range", where=where)
        return spec


def precision(text: str) -> Precision:
    """Return the precision of that name; another is a ValueError."""
    for known in get_args(Precision):
        if text == known:
            return text  # type: ignore[return-value]
    raise ValueError(f"precision {text!r}")


class Classifier(nn.Module):
    """A network behind its normalisation.

    Parameters
    ----------
    spec
        What it was built from.
    network
        Maps normalised images (B, C, H, W) to logits (B, classes).

    Attributes
    ----------
    precision
        "bfloat16" computes what can be so in bfloat16 (torch.autocast); the weights stay float32.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, spec: ModelSpec, network: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.network = network
        self.precision: Precision = "float32"
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("deviation", torch.tensor(spec.deviation).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W) with pixels in [0, 1]."""
        return self.classify((images - self.mean) / self.deviation)

    def classify(self, normalised: Tensor) -> Tensor:
        """Return the logits of images that were normalised already."""
        low = self.precision == "bfloat16"
        with torch.autocast(normalised.device.type, torch.bfloat16, enabled=low):
            output = self.network(normalised)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits.float()

    def pixels(self, normalised: Tensor) -> Tensor:
        """Return normalised images as pixels in [0, 1]."""
        return normalised * self.deviation + self.mean

    def on(self, device: torch.device) -> "Classifier":
        """Return the network on a device, in the memory layout that convolutions like best."""
        return self.to(device).to(memory_format=torch.channels_last)

    def points(self, granularity: Granularity) -> list[Point]:
        """Return the coverage points, named as in the network."""
        example = torch.zeros(2, *self.spec.shape, device=self.mean.device)
        return find_points(self.network, (example - self.mean) / self.deviation, granularity)


@dataclass(frozen=True)
class Architecture:
    """How a registered model is made.

    Attributes
    ----------
    build
        Takes the number of classes and whether the layout is that of the pretrained weights.
    size
        Height and width of its input.
    statistics
        Mean and deviation assumed for weights that come without a checkpoint.
    weights
        torchvision's name of the pretrained model, or None where there is none.
    """

    build: Callable[[int, bool], nn.Module]
    size: int = 32
    statistics: tuple[Statistics, Statistics] = CIFAR10
    weights: str | None = None


MODELS: Registry[Architecture] = Registry("model")


def model(
    name: str, *, size: int = 32, weights: str | None = None
) -> Callable[[Callable[[int, bool], nn.Module]], Callable[[int, bool], nn.Module]]:
    """Register a function of (classes, pretrained) that returns a network, under a name."""

    def decorate(build: Callable[[int, bool], nn.Module]) -> Callable[[int, bool], nn.Module]:
        MODELS.add(name)(Architecture(build, size, weights=weights))
        return build

    return decorate


class Vgg(nn.Module):
    """A VGG's convolutions (Simonyan and Zisserman, 2015), global average pooling, a small head."""

    def __init__(self, features: nn.Module, classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(), nn.Dropout(),
            nn.Linear(512, 512), nn.ReLU(), nn.Dropout(),
            nn.Linear(512, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def _vgg(name: str, classes: int, pretrained: bool) -> nn.Module:
    whole: nn.Module = getattr(torchvision.models, name)(num_classes=classes)
    return whole if pretrained else Vgg(whole.get_submodule("features"), classes)


@model("vgg19", weights="vgg19_bn")
def vgg19(classes: int, pretrained: bool) -> nn.Module:
    """VGG19 with batch normalisation: 16 convolutions and 2 hidden layers, 18 coverage points."""
    return _vgg("vgg19_bn", classes, pretrained)


@model("vgg11", weights="vgg11_bn")
def vgg11(classes: int, pretrained: bool) -> nn.Module:
    """VGG11 with batch normalisation, for quick runs: 10 coverage points."""
    return _vgg("vgg11_bn", classes, pretrained)


@model("resnet18", weights="resnet18")
def resnet18(classes: int, pretrained: bool) -> nn.Module:
    """ResNet18 (He et al., 2016); without ImageNet weights its stem is 3×3 with no pooling."""
    network: nn.Module = torchvision.models.resnet18(num_classes=classes)
    if not pretrained:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network


def architecture(name: str) -> Architecture:
    """Return the architecture of a name in MODELS or of `torchvision:NAME`."""
    if not name.startswith("torchvision:"):
        return MODELS.get(name)
    known = torchvision.models.list_models(module=torchvision.models)
    short = name.removeprefix("torchvision:")
    if short not in known:
        raise CovcliError(f"unknown torchvision model {short!r}", fix=suggestion(short, known))

    def build(classes: int, _pretrained: bool) -> nn.Module:
        takes_aux = short in ("googlenet", "inception_v3")
        extra = {"aux_logits": False, "init_weights": True} if takes_aux else {}
        network: nn.Module = torchvision.models.get_model(short, num_classes=classes, **extra)
        return network

    size = 299 if short == "inception_v3" else 224
    return Architecture(build, size, IMAGENET, short)


def input_shape(name: str, pretrained: bool) -> Shape:
    """Return the channels, height and width that a model takes."""
    size = 224 if pretrained and name in MODELS else architecture(name).size
    return (3, size, size)


def build(spec: ModelSpec) -> Classifier:
    """Build a network with fresh weights drawn from torch's global generator."""
    return Classifier(spec, architecture(spec.name).build(spec.classes, spec.pretrained)).eval()


def load_pretrained(model: Classifier) -> None:
    """Fill a network with torchvision's ImageNet weights, all but a head of another size.

    Raises
    ------
    CovcliError
        If there are none for this model, or they cannot be downloaded.
    """
    name = architecture(model.spec.name).weights
    if name is None:
        raise CovcliError("has no pretrained weights", where=f"model {model.spec.name!r}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    log.info("reading torchvision's weights of %s", name)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise CovcliError(
            f"the weights of {name} could not be downloaded ({error})",
            where="--pretrained",
            fix=f"check the network, or put the file into {torch.hub.get_dir()}/checkpoints",
        ) from None
    own = model.network.state_dict()
    own.update({k: v for k, v in state.items() if k in own and v.shape == own[k].shape})
    model.network.load_state_dict(own)


def from_state(spec: ModelSpec, state: Mapping[str, Tensor], where: object) -> Classifier:
    """Build a network with the weights of a checkpoint; others than its own are a CovcliError."""
    model = build(spec)
    _load(model, state, where)
    return model


def from_bare_state(
    name: str,
    state: Mapping[str, Tensor],
    where: object,
    statistics: tuple[Statistics, Statistics] | None = None,
) -> Classifier:
    """Build a network around a bare state dict, choosing the layout that its shapes fit.

    Parameters
    ----------
    name
        The model's name.
    state
        Weights under the network's own names; half precision is turned to single.
    where
        Names the weights in an error.
    statistics
        Mean and deviation per channel that the weights were trained with; by default those of
        CIFAR-10, or of ImageNet for ImageNet's layouts and torchvision's models.

    Raises
    ------
    CovcliError
        If the weights fit no layout of the model.
    """
    made = architecture(name)
    vectors = [tensor for tensor in state.values() if tensor.ndim == 1]
    if not vectors:
        raise CovcliError("has no bias vector, so no classes to count", where=where)
    classes = len(vectors[-1])
    for pretrained in (False, True):
        mean, deviation = statistics or (IMAGENET if pretrained else made.statistics)
        spec = ModelSpec(name, classes, input_shape(name, pretrained), mean, deviation, pretrained)
        model = build(spec)
        own = model.network.state_dict()
        if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in state.items()}:
            model.network.load_state_dict(dict(state))
            return model
    raise CovcliError(f"the weights do not fit model {name!r}", where=where, fix="name its --model")


def _load(model: Classifier, state: Mapping[str, Tensor], where: object) -> None:
    try:
        model.load_state_dict(dict(state))
    except RuntimeError:
        raise CovcliError(
            f"the weights do not fit model {model.spec.name!r}", where=where
        ) from None


def pixel_statistics(images: ImageSet, shape: Shape) -> tuple[Statistics, Statistics]:
    """Return each channel's mean and deviation in [0, 1] over at most 5,000 to 10,000 images."""
    rows = torch.arange(0, len(images), max(1, len(images) // 5000))
    total = torch.zeros(shape[0], dtype=torch.float64)
    squares = torch.zeros(shape[0], dtype=torch.float64)
    for part in rows.split(500):
        pixels = images.batch(part, shape).double() / 255
        total += pixels.mean((2, 3)).sum(0)
        squares += pixels.square().mean((2, 3)).sum(0)
    mean = total / len(rows)
    deviation = (squares / len(rows) - mean.square()).clamp_min(1e-4).sqrt()
    return tuple(mean.tolist()), tuple(deviation.tolist())


def read_statistics(
    mean: str | None, deviation: str | None
) -> tuple[Statistics, Statistics] | None:
    """Read `--mean` and `--std`, three numbers each with commas between; both or neither.

    Raises
    ------
    CovcliError
        If one is missing or is not three numbers, or a deviation is not above 0.
    """
    if mean is None and deviation is None:
        return None
    try:
        means = tuple(float(part) for part in (mean or "").split(","))
        deviations = tuple(float(part) for part in (deviation or "").split(","))
    except ValueError:
        means = deviations = ()
    if not (len(means) == len(deviations) == 3 and min(deviations) > 0):
        raise CovcliError("expected three numbers each, as 0.49,0.48,0.45", where="--mean, --std")
    return means, deviations
