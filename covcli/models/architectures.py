"""Architectures by name, and the Classifier, a network with its normalisation."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
import torchvision
from torch import Tensor, nn

from covcli.core.errors import CovcliError, one_line
from covcli.data.images import ImageSet
from covcli.data.preprocessing import InputShape, Shape
from covcli.methods.state import Granularity
from covcli.models import zoo
from covcli.models.logits import find_logits
from covcli.models.points import Outputs, Point
from covcli.models.pooling import pool
from covcli.models.registry import MODELS, Architecture, Build
from covcli.models.spec import (
    CIFAR10,
    IMAGENET,
    OWN,
    ModelSpec,
    Normalisation,
    Precision,
    Statistics,
    precision,
)
from covcli.models.survey import IMAGES, Survey, alike, look
from covcli.models.watchable import check_same

__all__ = [
    "CIFAR10", "IMAGENET", "MODELS", "Architecture", "Classifier", "ModelSpec", "Precision",
    "Statistics", "architecture", "build", "from_state", "load_pretrained", "model",
    "pixel_statistics", "precision",
]  # fmt: skip
log = logging.getLogger(__name__)
# The errors that a network raises on images of an unsuitable shape.
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError)

LONGEST_REASON = 200  # characters of a network's own error


class Classifier(nn.Module):
    """A network that normalises its input.

    Parameters
    ----------
    spec
        The specification that it was built from.
    network
        Maps normalised images (B, C, H, W) to logits (B, classes), or to nested tensors that
        contain them.

    Attributes
    ----------
    precision
        "bfloat16" uses torch.autocast; the weights stay float32.
    watched
        Patterns of names that choose the coverage points; empty for the default points.
    pairs
        Whether a single image is run as a batch of two copies, for a network that cannot process
        one image.

    Examples
    --------
    >>> spec = ModelSpec("linear", 10, (3, 8, 8), mean=(0.5,) * 3, deviation=(0.2,) * 3)
    >>> classifier = Classifier(spec, nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    >>> classifier(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, spec: ModelSpec, network: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.network = network
        self.precision: Precision = "float32"
        self.watched: tuple[str, ...] = ()
        self.pairs = False
        mean, deviation = torch.tensor([spec.mean, spec.deviation], dtype=torch.float32)
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("deviation", deviation.view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W) with pixels in [0, 1].

        Raises
        ------
        CovcliError
            If the network returns no logits, or several tensors that could be them.
        """
        return self.classify((images - self.mean) / self.deviation)

    def classify(self, normalised: Tensor) -> Tensor:
        """Return the logits of normalised images; raises as `forward` does."""
        low = self.precision == "bfloat16"
        alone = self.pairs and normalised.shape[0] == 1
        images = normalised.repeat(2, 1, 1, 1) if alone else normalised
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
            output = self.network(images)
        classes, wanted = self.spec.classes, self.spec.logits
        logits = find_logits(output, images.shape[0], classes, wanted).float()
        return logits[:1] if alone else logits

    def pixels(self, normalised: Tensor) -> Tensor:
        """Convert normalised images to pixels in [0, 1]."""
        return normalised * self.deviation + self.mean

    def on(self, device: torch.device) -> "Classifier":
        """Move the network to a device, in channels-last layout, which is fast for convolutions."""
        return self.to(device).to(memory_format=torch.channels_last)

    def points(self, granularity: Granularity) -> list[Point]:
        """Return the coverage points; raises as `survey` does."""
        return [each.point for each in self.survey(granularity).choose(self.watched)]

    def survey(self, granularity: Granularity) -> Survey:
        """Run the network on noise, and find its possible coverage points.

        Raises
        ------
        CovcliError
            If the network fails on images of its shape, or returns no logits.
        """
        example = self._example()
        try:
            seen = look(self.network, example, granularity)
            self._try_single(example)
        except FAILURES as error:
            own = self.spec.is_own
            raise refused_images(
                self.spec.shape,
                error,
                where=f"model {self.spec.name!r}",
                fix=None if own else "set its input size, for example --preprocess crop=224",
            ) from error
        few, more = (
            find_logits(output, images, self.spec.classes, self.spec.logits)
            for output, images in zip(seen.outputs, IMAGES, strict=True)
        )
        if not alike(few, more[: len(few)]):
            check_same(self.network, example)
            log.warning("the network's answer depends on the other images of the batch")
        if are_probabilities(more):
            log.warning(
                "the network returns probabilities or their logarithms, not logits: leave out its "
                "softmax"
            )
        if seen.unwatchable:
            log.warning(
                "%d activations are not watched: their outputs cannot be divided by image: %s",
                len(seen.unwatchable), ", ".join(seen.unwatchable[:3]),
            )  # fmt: skip
        return seen

    def shows(self, points: Sequence[Point], granularity: Granularity) -> bool:
        """Return whether the network has these points with the same numbers of neurons."""
        neurons: dict[str, int] = {}

        def see(point: Point, output: Tensor) -> None:
            neurons[point.name] = pool(output, point.channel_dim, granularity).shape[1]

        for self.pairs in (False, True):
            try:
                with Outputs(self.network, points, see), torch.no_grad():
                    self.eval().classify(self._example())
            except (CovcliError, *FAILURES):
                continue
            return neurons == {point.name: point.neurons for point in points}
        return False

    def _example(self) -> Tensor:
        """Return one black image, normalised."""
        black = self.mean.new_zeros(1, *self.spec.shape)
        return (black - self.mean) / self.deviation

    def _try_single(self, example: Tensor) -> None:
        """Set `pairs` if the network cannot process a single image."""
        self.pairs = False
        try:
            with torch.no_grad():
                self.eval().classify(example)
        except (CovcliError, *FAILURES):
            self.pairs = True


def model(name: str, *, size: int = 32, weights: str | None = None) -> Callable[[Build], Build]:
    """Return a decorator that registers a function of (classes, pretrained) under a model name.

    The function returns a network with random weights, which maps normalised images to logits.

    Parameters
    ----------
    name
        The name for `--model`.
    size
        Height and width of its input in pixels.
    weights
        torchvision's name of ImageNet weights that fit the layout `pretrained`; None if there are
        none.

    Examples
    --------
    >>> @model("linear", size=8)
    ... def linear(classes, pretrained):
    ...     hidden = nn.Linear(3 * 8 * 8, 16)
    ...     return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(16, classes))
    >>> tuple(input_shape("linear", pretrained=False))
    (3, 8, 8)
    """

    def decorate(build: Build) -> Build:
        published = None if weights is None else zoo.torchvision_published(weights)
        layouts = (False,) if weights is None else (False, True)
        shape = InputShape((3, size, size))
        MODELS.add(name)(Architecture(build, shape, CIFAR10, published, layouts))
        return build

    return decorate


class Vgg(nn.Module):
    """A VGG (Simonyan and Zisserman, 2015) with global average pooling and a small head."""

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
    """Return the architecture of a name in MODELS, of `torchvision:NAME` or of `timm:NAME`.

    Raises
    ------
    CovcliError
        If the name is unknown, or its library is not installed.

    Examples
    --------
    >>> tuple(architecture("torchvision:densenet121").shape)
    (3, 224, 224)
    """
    if name.startswith(OWN):
        raise CovcliError(
            f"{name.removeprefix(OWN)} is a network of a Python program",
            where="the signature",
            fix="load both there, by Monitor.load(signature, network)",
        )
    family, colon, short = name.partition(":")
    if colon and family in zoo.FAMILIES:
        return zoo.FAMILIES[family](short)
    return MODELS.get(name)


def input_shape(name: str, pretrained: bool) -> InputShape:
    """Return channels, height and width of a model's input, with the preprocessing.

    Examples
    --------
    >>> tuple(input_shape("vgg11", pretrained=True))
    (3, 224, 224)
    """
    shape, _ = architecture(name).expects(pretrained)
    return shape


def build(spec: ModelSpec) -> Classifier:
    """Build a network, in evaluation mode, with random weights from torch's global generator."""
    return Classifier(spec, architecture(spec.name).build(spec.classes, spec.pretrained)).eval()


def load_pretrained(model: Classifier) -> None:
    """Load published ImageNet weights into a network, except a head of another size.

    Raises
    ------
    CovcliError
        If this model has no published weights, or they cannot be downloaded.
    """
    published = architecture(model.spec.name).published
    if published is None:
        raise CovcliError("has no pretrained weights", where=f"model {model.spec.name!r}")
    log.info("reading the published weights of %s", published.name)
    try:
        state = published.state()
    except (OSError, RuntimeError) as error:
        raise CovcliError(
            f"the weights of {published.name} could not be downloaded ({error})",
            where="--pretrained",
            fix="check the connection; torchvision keeps its files in "
            f"{torch.hub.get_dir()}/checkpoints, timm in the cache of Hugging Face",
        ) from None
    own = model.network.state_dict()
    own.update({k: v for k, v in state.items() if k in own and v.shape == own[k].shape})
    model.network.load_state_dict(own)


def from_state(spec: ModelSpec, state: Mapping[str, Tensor], where: object) -> Classifier:
    """Build a network with the weights of a checkpoint; raise a CovcliError if they do not fit.

    The shapes are compared first, so that a small file cannot allocate a large network.
    """
    own = architecture(spec.name).shapes(spec.classes, spec.pretrained)
    prefix = "network."
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != {n.removeprefix(prefix): s for n, s in given.items() if n.startswith(prefix)}:
        raise CovcliError(f"the weights do not fit model {spec.name!r}", where=where)
    model = build(spec)
    check_kinds(model.state_dict(), state, where)
    try:
        model.load_state_dict(dict(state))
    except RuntimeError:
        raise CovcliError(f"the weights do not fit model {spec.name!r}", where=where) from None
    return model


def check_kinds(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise a CovcliError if a network's real weights are whole or complex numbers in a file.

    torch would convert them, and drop an imaginary part.
    """
    for name, tensor in own.items():
        if name in tensors and tensor.is_floating_point() and not tensors[name].is_floating_point():
            raise CovcliError(f"weights {name!r} are of {tensors[name].dtype}", where=where)


def refused_images(
    shape: Sequence[int], error: Exception, where: object, fix: str | None
) -> CovcliError:
    """Return the error of a network that fails on images of its shape."""
    reason = one_line(f"{type(error).__name__}: {error}")
    return CovcliError(
        f"the network refuses images of shape {tuple(shape)} ({reason[:LONGEST_REASON]})",
        where=where,
        fix=fix,
    )


def are_probabilities(logits: Tensor) -> bool:
    """Return whether all rows are probabilities, or logarithms of probabilities.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 1.0]])
    >>> [are_probabilities(f(logits)) for f in (lambda x: x.softmax(1), lambda x: x.log_softmax(1))]
    [True, True]
    >>> are_probabilities(logits)
    False
    """
    if logits.shape[1] == 1:
        return False
    shares = logits.double() if bool((logits >= 0).all()) else logits.double().exp()
    return bool(((shares.sum(1) - 1).abs() < 1e-3).all())


def check_finite(tensors: Mapping[str, object], where: object) -> None:
    """Raise a CovcliError if weights hold NaN or infinity; what is no tensor is passed over."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            # torch does not check formats of 8 bits
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            if not bool(wide.isfinite().all()):
                raise CovcliError(f"weights {name!r} hold NaN or infinity", where=where)


def pixel_statistics(images: ImageSet, shape: Shape) -> Normalisation:
    """Return each channel's mean and deviation in [0, 1], over at most 10,000 images.

    Examples
    --------
    >>> from covcli.data import datasets
    >>> mean, deviation = pixel_statistics(datasets.load("digits", "train"), (1, 8, 8))
    >>> round(mean[0], 2), round(deviation[0], 2)
    (0.31, 0.38)
    """
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
