"""Architectures of other libraries: `torchvision:NAME` and `timm:NAME`.

Input size, resizing and normalisation come from the library's configuration of its weights. They
are also the defaults for other weights; `--preprocess`, `--mean` and `--std` change them.
"""

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any, Literal

import torchvision
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.specs import suggestion
from covcli.data.preprocessing import INTERPOLATIONS, InputShape, Interpolation, Preprocess
from covcli.models.registry import Architecture, Published
from covcli.models.spec import Normalisation

# With torchvision's own weights, both networks normalise their input a second time
# (`transform_input`). The two normalisations together have mean and deviation 0.5.
HALF: Normalisation = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {"googlenet": HALF, "inception_v3": HALF}
# Their auxiliary heads, which only training uses, are omitted.
WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}


def torchvision_published(name: str) -> Published:
    """Return torchvision's default weights of one of its classifiers."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    height, width = (2 * preset.crop_size)[:2]
    resize = preset.resize_size[0] if len(preset.resize_size) == 1 else tuple(preset.resize_size)
    how = Preprocess(resize, _interpolation(preset.interpolation.value))
    return Published(
        name,
        InputShape((3, height, width), how),
        STATISTICS.get(name, (tuple(preset.mean), tuple(preset.std))),
        lambda: _torchvision_state(name),
    )


def _torchvision_state(name: str) -> Mapping[str, Tensor]:
    weights = torchvision.models.get_model_weights(name).DEFAULT
    state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    return state


def torchvision_architecture(name: str) -> Architecture:
    """Return one of torchvision's classifiers; raise a CovcliError for an unknown name."""
    known = torchvision_names()
    if name not in known:
        raise CovcliError(f"unknown torchvision model {name!r}", fix=suggestion(name, known))
    extra = WITHOUT_AUXILIARY if name in STATISTICS else {}

    def build(classes: int, _pretrained: bool) -> nn.Module:
        network: nn.Module = torchvision.models.get_model(name, num_classes=classes, **extra)
        return network

    published = torchvision_published(name)
    return Architecture(build, published.shape, published.statistics, published)


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classifiers."""
    return list(torchvision.models.list_models(module=torchvision.models))


def torchvision_parameters(name: str) -> int:
    """Return the number of parameters of torchvision's weights of a classifier."""
    return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def timm_architecture(name: str) -> Architecture:
    """Return one of timm's models, `NAME` or `NAME.TAG` for a tag's configuration.

    Raises
    ------
    CovcliError
        If timm is not installed, does not know the name, or preprocesses images for this model in
        an unsupported way (padding instead of cropping).
    """
    timm = _timm()
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        near = get_close_matches(plain, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise CovcliError(f"unknown timm model {name!r}", fix=hint)
    try:
        configuration = timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(timm.list_pretrained(f"{plain}.*")) or "none"
        raise CovcliError(f"unknown weights {name!r} of timm", fix=f"known: {tags}") from None
    settings = configuration.to_dict() if configuration is not None else {}
    data = timm.data.resolve_data_config(pretrained_cfg=settings)

    def build(classes: int, _pretrained: bool) -> nn.Module:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
        return network

    shape = _timm_shape(data, name)
    statistics = tuple(map(float, data["mean"])), tuple(map(float, data["std"]))
    has_weights = settings.get("url") or settings.get("hf_hub_id")
    published = Published(name, shape, statistics, lambda: _timm_state(name))
    return Architecture(build, shape, statistics, published if has_weights else None)


def timm_names(pattern: str) -> list[str]:
    """Return the names of timm's models that match, short ones first; none without timm."""
    try:
        names: list[str] = _timm().list_models(pattern)
    except CovcliError:
        return []
    return sorted(names, key=lambda name: (len(name), name))


def _timm_shape(data: Mapping[str, Any], name: str) -> InputShape:
    channels, height, width = data["input_size"]
    if data["crop_mode"] == "border" or height != width:
        raise CovcliError(
            f"timm prepares its images in a way that covcli does not support "
            f"(crop mode {data['crop_mode']!r}, {height}×{width})",
            where=f"timm:{name}",
            fix="register the network under another name by --plugin",
        )
    side = math.floor(height / data["crop_pct"])  # timm's own rounding
    resize = (side, side) if data["crop_mode"] == "squash" else side
    how = Preprocess(resize, _interpolation(data["interpolation"]))
    return InputShape((channels, height, width), how)


def _timm_state(name: str) -> Mapping[str, Tensor]:
    return dict(_timm().create_model(name, pretrained=True).state_dict())


def _timm() -> ModuleType:
    try:
        import timm
        import timm.data
    except ImportError:
        raise CovcliError(
            "needs the package timm", where="timm:NAME", fix="pip install 'covcli[timm]'"
        ) from None
    module: ModuleType = timm
    return module


def _interpolation(name: str) -> Interpolation:
    for known in INTERPOLATIONS:
        if name == known:
            return known
    return "bicubic"  # instead of Lanczos and others, which torch cannot compute


FAMILIES: Mapping[Literal["torchvision", "timm"] | str, Callable[[str], Architecture]] = {
    "torchvision": torchvision_architecture,
    "timm": timm_architecture,
}
