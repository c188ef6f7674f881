"""Weights that were trained elsewhere: located in a file, and matched to an architecture.

A file may hold only weights, or also an optimiser's state. Wrappers may have added prefixes, and
some weights may be used only in training. Weights fit if every weight and buffer of the network is
present with its name and shape. A warning reports ambiguous choices and ignored weights.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covcli.core.errors import CovcliError, first_few
from covcli.core.weights_only import index_of
from covcli.models.architectures import Classifier, architecture, build, check_finite, check_kinds
from covcli.models.nearest import Nearest, nearest_architecture
from covcli.models.registry import Architecture, Sides
from covcli.models.spec import ModelSpec, Normalisation

log = logging.getLogger(__name__)

# Wrapper modules that add their name to the names of the weights, at any level.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGED = re.compile(r"(^|[._])(ema|avg|averaged?|swa)([._]|$)", re.IGNORECASE)
# The usual keys of a network's weights in a file.
USUAL = {
    "", "state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights",
    "params", "backbone", "student",
}  # fmt: skip
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loops|hyper_param|history", re.IGNORECASE)
OPTIMISER = "param_groups"  # a key that only the state of an optimizer has
# Modules that are used only in training, by the first part of the name.
ONLY_TRAINING = re.compile(
    r"(aux.*|AuxLogits|criterion.*|loss.*|.*_loss|.*metrics?|(train|val|valid|test)_.*|teacher.*"
    r"|ema.*|.*_ema|n_averaged)"
)
# Buffers that networks compute themselves, or that profilers add, at any level.
COMPUTED = {
    "n_averaged", "total_ops", "total_params", "relative_position_index", "attn_mask",
    "position_ids",
}  # fmt: skip
# BatchNorm's counter since torch 0.4.1, which is not used in evaluation.
COUNTED = "num_batches_tracked"
DEPTH = 4
SHOWN = 3
FEW, MORE = 3, 5


@dataclass(frozen=True)
class Foreign:
    """The caller's settings for weights without a checkpoint.

    Attributes
    ----------
    model
        The architecture's name, or None.
    statistics
        Mean and deviation of the pixels in [0, 1], per channel; None for those of the architecture.
    preprocess
        The text of `--preprocess`, or None.
    logits
        The name of the logits among the network's outputs; "" if they are unambiguous.
    """

    model: str | None = None
    statistics: Normalisation | None = None
    preprocess: str | None = None
    logits: str = ""


@dataclass(frozen=True)
class Place:
    """A state dict in a file.

    Attributes
    ----------
    name
        The keys that lead to it, joined by dots; "" for the file's top level.
    tensors
        Its tensors, by names without wrappers.
    """

    name: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of a network's weights and buffers, for any number of classes.

    Attributes
    ----------
    names
        The network's names, by names without wrappers.
    shapes
        The shapes in a network of `FEW` classes, by names without wrappers.
    growth
        For each name that depends on the number of classes: the dimension, and its growth per
        class.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, Sides]
    growth: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, entry: Architecture, pretrained: bool) -> "Skeleton":
        """Compare the shapes of a network with two numbers of classes; allocates no weights."""
        few, more = (entry.shapes(classes, pretrained) for classes in (FEW, MORE))
        growth = {}
        for name, shape in few.items():
            for dim, (one, two) in enumerate(zip(shape, more.get(name, shape), strict=False)):
                if one != two:
                    growth[_plain(name)] = dim, (two - one) // (MORE - FEW)
        return cls(
            {_plain(name): name for name in few},
            {_plain(name): shape for name, shape in few.items()},
            growth,
        )

    def classes(self, given: Mapping[str, Sides]) -> int | None:
        """Return the number of classes that most shapes imply; None if no shape depends on it."""
        counts: Counter[int] = Counter()
        for name, (dim, step) in self.growth.items():
            if len(given.get(name, ())) == len(self.shapes[name]):
                more, rest = divmod(given[name][dim] - self.shapes[name][dim], step)
                if rest == 0 and FEW + more > 0:
                    counts[FEW + more] += 1
        return counts.most_common(1)[0][0] if counts else None

    def shape(self, name: str, classes: int) -> Sides:
        """Return the shape of a weight in a network of that many classes."""
        shape = list(self.shapes[name])
        if name in self.growth:
            dim, step = self.growth[name]
            shape[dim] += step * (classes - FEW)
        return tuple(shape)


@dataclass(frozen=True)
class Match:
    """The comparison of a network with the weights at a place, under a prefix.

    Attributes
    ----------
    place, prefix
        The weights.
    classes
        The number of classes by their shapes; None if it cannot be determined.
    missing, unexpected
        Names that only the network has, and names that only the weights have.
    reshaped
        Names whose shape differs, with both shapes.
    ignored
        Names that are ignored.
    """

    place: Place
    prefix: str
    classes: int | None
    missing: Sequence[str]
    unexpected: Sequence[str]
    reshaped: Sequence[tuple[str, Sides, Sides]]
    ignored: Sequence[str]

    @property
    def wrong(self) -> int:
        """The number of names that do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    @property
    def fits(self) -> bool:
        """Whether all weights of the network are present, and no others."""
        return self.wrong == 0 and self.classes is not None

    @property
    def only_named_otherwise(self) -> bool:
        """Whether the missing weights could be present under other names."""
        return not self.reshaped and 0 < len(self.missing) <= 2 * len(self.unexpected)

    @property
    def where(self) -> str:
        """The place and the prefix as one name."""
        return ".".join(part for part in (self.place.name, self.prefix.rstrip(".")) if part)

    @property
    def averaged(self) -> bool:
        """Whether the weights are an average over the training."""
        return bool(AVERAGED.search(self.where)) or "n_averaged" in self.place.tensors

    @property
    def unusual(self) -> int:
        """The number of parts of its name that are not usual keys of a network's weights."""
        return sum(part not in USUAL for part in self.where.split("."))

    def tensors(self, skeleton: Skeleton) -> dict[str, Tensor]:
        """Return the tensors under the network's names."""
        here = self.place.tensors
        return {
            name: here[self.prefix + plain]
            for plain, name in skeleton.names.items()
            if self.prefix + plain in here
        }

    def describe(self) -> str:
        """Return a description of what does not fit, with at most three names of each kind."""
        reshaped = [f"{name} {here} instead of {wanted}" for name, here, wanted in self.reshaped]
        kinds = {"missing": self.missing, "unexpected": self.unexpected,
                 "of another shape": reshaped}  # fmt: skip
        parts = [f"{kind}: {first_few(names, SHOWN)}" for kind, names in kinds.items() if names]
        return "; ".join(parts) or "no layer grows with the number of classes"


def from_foreign(document: Mapping[Any, Any], foreign: Foreign, where: object) -> Classifier:
    """Build a network around weights that were trained elsewhere.

    Parameters
    ----------
    document
        The file's content: a state dict, or nested dictionaries with state dicts.
    foreign
        The architecture, and the caller's other settings.
    where
        The file, for errors.

    Raises
    ------
    CovcliError
        If no architecture is named, or the weights do not fit it.
    """
    candidates = places(document, where)
    if foreign.model is None:
        nearest = nearest_architecture([place.tensors for place in candidates])
        raise CovcliError("is a bare state dict", where=where, fix=_to_name(nearest))
    entry = architecture(foreign.model)
    tried: list[Match] = []
    for pretrained in entry.layouts:
        skeleton = Skeleton.of(entry, pretrained)
        matches = [match for place in candidates for match in _matches(skeleton, place)]
        tried += matches
        chosen = _chosen([match for match in matches if match.fits], where)
        older = [match for match in matches if match.classes and match.only_named_otherwise]
        for match in [chosen] if chosen else sorted(older, key=lambda match: match.wrong)[:1]:
            model = build(_spec(foreign, entry, pretrained, match.classes or FEW))
            if chosen or _converted(model, match):
                return _filled(model, match, skeleton, where)
    raise _misfit(foreign.model, tried, candidates, where)


def _spec(foreign: Foreign, entry: Architecture, pretrained: bool, classes: int) -> ModelSpec:
    assert foreign.model is not None
    shape, statistics = entry.expects(pretrained)
    shape = shape.changed(foreign.preprocess)
    mean, deviation = foreign.statistics or statistics
    return ModelSpec(
        foreign.model, classes, shape, mean, deviation, pretrained, shape.preprocess, foreign.logits
    )


def _converted(model: Classifier, match: Match) -> bool:
    """Load weights of an older layout, which torch's modules convert; return whether all fit."""
    tensors = {
        name.removeprefix(match.prefix): tensor
        for name, tensor in match.place.tensors.items()
        if name.startswith(match.prefix)
    }
    try:
        result = model.network.load_state_dict(tensors, strict=False)
    except RuntimeError:
        return False
    missing = [name for name in result.missing_keys if not name.endswith(COUNTED)]
    return not missing and all(map(_only_training, result.unexpected_keys))


def from_spec(document: Mapping[Any, Any], spec: ModelSpec, where: object) -> Classifier:
    """Build the network of a specification around weights that were trained elsewhere.

    Raises
    ------
    CovcliError
        If the weights do not fit it.
    """
    candidates = places(document, where)
    skeleton = Skeleton.of(architecture(spec.name), spec.pretrained)
    matches = [match for place in candidates for match in _matches(skeleton, place)]
    fitting = [match for match in matches if match.fits and match.classes == spec.classes]
    chosen = _chosen(fitting, where)
    if chosen is None:
        best = min(matches, key=lambda match: match.wrong)
        reason = f"they tell {best.classes} apart" if best.fits else best.describe()
        raise CovcliError(
            f"the weights do not fit model {spec.name!r} of {spec.classes} classes: {reason}",
            where=where,
            fix="name the weights that the signature was built from",
        )
    return _filled(build(spec), chosen, skeleton, where)


def places(document: Mapping[Any, Any], where: object) -> list[Place]:
    """Return every state dict in a file; raise a CovcliError if there is none."""
    state_dicts = [Place(name, tensors) for name, tensors in _walk(document, "", DEPTH)]
    if not state_dicts:
        held = first_few([str(key) for key in document], FEW) or "nothing"
        optimiser = ", the state of an optimizer" if OPTIMISER in document else ""
        raise CovcliError(
            f"is neither a checkpoint nor a state dict: it holds {held}{optimiser}", where=where
        )
    return state_dicts


def _walk(
    document: Mapping[Any, Any], name: str, depth: int
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    tensors = {k: v for k, v in document.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        plain = {_plain(key): tensor for key, tensor in tensors.items()}
        yield name, plain if len(plain) == len(tensors) else tensors
    for key, value in document.items() if depth and OPTIMISER not in document else ():
        if isinstance(value, Mapping) and not NOT_WEIGHTS.search(str(key)):
            yield from _walk(value, f"{name}.{key}" if name else str(key), depth - 1)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _matches(skeleton: Skeleton, place: Place) -> list[Match]:
    """Compare a state dict with a network, for every prefix that its names suggest."""
    names = list(skeleton.names)
    prefixes = {""} | {
        name.removesuffix(anchor)
        for anchor in {*names[:1], *names[-1:]}
        for name in place.tensors
        if name.endswith(f".{anchor}")
    }
    return [_match(skeleton, place, prefix) for prefix in sorted(prefixes)]


def _match(skeleton: Skeleton, place: Place, prefix: str) -> Match:
    inside = {
        name.removeprefix(prefix): tuple(tensor.shape)
        for name, tensor in place.tensors.items()
        if name.startswith(prefix)
    }
    own = {name: shape for name, shape in inside.items() if name in skeleton.names}
    others = [name for name in inside if name not in own]
    ignored = [name for name in others if _only_training(name)]
    classes = skeleton.classes(own)
    wanted = {name: skeleton.shape(name, classes or FEW) for name in own}
    return Match(
        place,
        prefix,
        classes,
        missing=[n for n in skeleton.names if n not in own and not n.endswith(COUNTED)],
        unexpected=[name for name in others if name not in ignored],
        reshaped=[(name, own[name], wanted[name]) for name in own if own[name] != wanted[name]],
        ignored=ignored + [name for name in place.tensors if not name.startswith(prefix)],
    )


def _only_training(name: str) -> bool:
    parts = name.split(".")
    return bool(ONLY_TRAINING.fullmatch(parts[0])) or parts[-1] in COMPUTED


def _chosen(fitting: Sequence[Match], where: object) -> Match | None:
    """Return the averaged weights, or those at the most usual place; raise on a tie."""
    if not fitting:
        return None
    ranked = sorted(fitting, key=lambda match: (not match.averaged, match.unusual))
    best, *others = ranked
    for other in others:
        tie = (best.averaged, best.unusual) == (other.averaged, other.unusual)
        if tie and not _equal(best, other):
            raise CovcliError(
                f"holds several sets of weights that fit: {best.where}, {other.where}",
                where=where,
                fix="save only the right one by torch.save",
            )
    unlike = [other.where or "the file's top" for other in others if not _equal(best, other)]
    if unlike:
        kind = "averaged weights" if best.averaged else "weights"
        log.warning("%s: uses the %s %s, not %s", where, kind, best.where, ", ".join(unlike))
    elif best.averaged:
        log.warning("%s: uses averaged weights (%s)", where, best.where or "n_averaged")
    return best


def _equal(one: Match, other: Match) -> bool:
    """Return whether two matches hold the same weights."""
    here, there = one.place.tensors, other.place.tensors
    names = [name.removeprefix(one.prefix) for name in here if name.startswith(one.prefix)]
    return all(
        other.prefix + name in there
        and torch.equal(here[one.prefix + name], there[other.prefix + name])
        for name in names
        if not _only_training(name)
    )


def _filled(model: Classifier, chosen: Match, skeleton: Skeleton, where: object) -> Classifier:
    """Load fitting weights into a network, and warn about ignored weights."""
    own = model.network.state_dict()
    tensors = chosen.tensors(skeleton)
    check_kinds(own, tensors, where)
    own.update(tensors)
    check_finite(own, where)
    model.network.load_state_dict(own)
    parts = sorted({name.split(".")[0] for name in chosen.ignored})
    if parts:
        log.warning(
            "%s: ignores weights that the network does not have: %s", where, first_few(parts, SHOWN)
        )
    return model


def _misfit(
    name: str, tried: Sequence[Match], candidates: Sequence[Place], where: object
) -> CovcliError:
    """Return the error for the best match, with the architecture that fits better."""
    best = min(tried, key=lambda match: match.wrong)
    nearest = nearest_architecture([place.tensors for place in candidates])
    if index := index_of(Path(str(where))):
        fix = f"name the index of all parts, {index}"
    elif nearest == Nearest(name, 1) and best.only_named_otherwise:
        fix = "the shapes fit: save them under the names that the network has"
    else:
        fix = _to_name(nearest)
    return CovcliError(
        f"the weights do not fit model {name!r}: {best.describe()}", where=where, fix=fix
    )


def _to_name(nearest: Nearest | None) -> str:
    return "name its --model" + (f"; the nearest architecture is {nearest}" if nearest else "")
