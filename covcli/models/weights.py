"""Weights that were trained elsewhere: found in what a file holds, and fitted to an architecture.

A file may hold them alone or beside an optimiser, under prefixes that wrappers add, and with parts
that only training uses. They fit if every weight and buffer of the network is there by its name and
in its shape. What is chosen among several, and what is left out, is said.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.models.architectures import Classifier, architecture, build, check_kinds
from covcli.models.nearest import nearest_architecture
from covcli.models.registry import Architecture
from covcli.models.spec import ModelSpec, Normalisation

log = logging.getLogger(__name__)
Sides: TypeAlias = tuple[int, ...]

# Modules that wrap others and put their name into the names of the weights, wherever they stand.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGED = re.compile(r"(^|[._])(ema|avg|averaged?|swa)([._]|$)", re.IGNORECASE)
# Names under which the network's own weights usually lie.
USUAL = {
    "", "state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights",
    "params", "backbone", "student",
}  # fmt: skip
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loops|hyper_param|history", re.IGNORECASE)
# Parts of a file's network that only training uses, by the name of its outermost module.
ONLY_TRAINING = re.compile(
    r"(aux.*|AuxLogits|criterion.*|loss.*|.*_loss|.*metrics?|(train|val|valid|test)_.*|teacher.*"
    r"|ema.*|.*_ema|n_averaged)"
)
# Buffers that networks compute by themselves, or that profilers leave behind, wherever they stand.
COMPUTED = {
    "n_averaged", "total_ops", "total_params", "relative_position_index", "attn_mask",
    "position_ids",
}  # fmt: skip
# What BatchNorm counts since torch 0.4.1, and reads nowhere in evaluation.
COUNTED = "num_batches_tracked"
DEPTH = 4
SHOWN = 3
FEW, MORE = 3, 5


@dataclass(frozen=True)
class Foreign:
    """What a caller says of weights that come without a checkpoint.

    Attributes
    ----------
    model
        The architecture's name, or None where it was not said.
    statistics
        Mean and deviation of the pixels; None for what the architecture expects.
    preprocess
        What `--preprocess` says, or None.
    logits
        Which of the network's outputs are the logits; "" where that is plain.
    """

    model: str | None = None
    statistics: Normalisation | None = None
    preprocess: str | None = None
    logits: str = ""


@dataclass(frozen=True)
class Place:
    """A state dict in a file: where it stands there ("" for the file itself), and its tensors.

    The names of the tensors are those without wrappers.
    """

    name: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of a network's weights and buffers, whatever the number of classes.

    Attributes
    ----------
    names
        The network's names, by the same names without wrappers.
    shapes
        The shapes in a network of `FEW` classes, by names without wrappers.
    growth
        Of each name that depends on the number of classes the dimension, and by how much it grows
        with a class.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, Sides]
    growth: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, made: Architecture, pretrained: bool) -> "Skeleton":
        """Build a network for two numbers of classes, without memory for weights, and compare."""
        few, more = (made.shapes(classes, pretrained) for classes in (FEW, MORE))
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

    def classes(self, found: Mapping[str, Sides]) -> int | None:
        """Return how many classes most of these weights tell apart; None if none depends on it."""
        counts: Counter[int] = Counter()
        for name, (dim, step) in self.growth.items():
            if len(found.get(name, ())) == len(self.shapes[name]):
                more, rest = divmod(found[name][dim] - self.shapes[name][dim], step)
                if rest == 0 and FEW + more > 0:
                    counts[FEW + more] += 1
        return counts.most_common(1)[0][0] if counts else None

    def shape(self, name: str, classes: int) -> Sides:
        """Return the shape of a weight in a network of so many classes."""
        shape = list(self.shapes[name])
        if name in self.growth:
            dim, step = self.growth[name]
            shape[dim] += step * (classes - FEW)
        return tuple(shape)


@dataclass(frozen=True)
class Match:
    """How the weights of a place, under a prefix, fit a network.

    Attributes
    ----------
    place, prefix
        Which weights.
    classes
        How many classes they tell apart; None if that cannot be seen.
    missing, unexpected
        The network's names that are not there, and other names than the network's.
    reshaped
        Names of another shape than in the network, with both shapes.
    ignored
        Names that are left out.
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
        """How many names do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    @property
    def fits(self) -> bool:
        """Whether all of the network is there, and nothing else."""
        return self.wrong == 0 and self.classes is not None

    @property
    def only_named_otherwise(self) -> bool:
        """Whether what is missing could be there under other names."""
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
        """How many parts of its name are none under which a network's own weights usually lie."""
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
        """Word what does not fit, three names of each kind."""
        reshaped = [f"{name} {here} instead of {wanted}" for name, here, wanted in self.reshaped]
        kinds = {"missing": self.missing, "unexpected": self.unexpected,
                 "of another shape": reshaped}  # fmt: skip
        parts = [f"{kind}: {_first(names)}" for kind, names in kinds.items() if names]
        return "; ".join(parts) or "no layer grows with the number of classes"


def from_foreign(document: Mapping[Any, Any], told: Foreign, where: object) -> Classifier:
    """Build a network around weights that were trained elsewhere.

    Parameters
    ----------
    document
        What the file holds: a state dict, or state dicts in dictionaries.
    told
        The architecture, and what else the caller knows.
    where
        Names the file in an error.

    Raises
    ------
    CovcliError
        If no architecture is named, or the weights do not fit it.
    """
    found = places(document, where)
    if told.model is None:
        hint = nearest_architecture([place.tensors for place in found])
        raise CovcliError("is a bare state dict", where=where, fix=f"name its --model{hint}")
    made = architecture(told.model)
    tried: list[Match] = []
    for pretrained in made.layouts:
        skeleton = Skeleton.of(made, pretrained)
        matches = [match for place in found for match in _matches(skeleton, place)]
        tried += matches
        chosen = _chosen([match for match in matches if match.fits], where)
        older = [match for match in matches if match.classes and match.only_named_otherwise]
        for match in [chosen] if chosen else sorted(older, key=lambda match: match.wrong)[:1]:
            model = build(_spec(told, made, pretrained, match.classes or FEW))
            if chosen or _converted(model, match):
                return _filled(model, match, skeleton, where)
    raise _misfit(told.model, tried, found, where)


def _spec(told: Foreign, made: Architecture, pretrained: bool, classes: int) -> ModelSpec:
    assert told.model is not None
    shape, statistics = made.expects(pretrained)
    shape = shape.changed(told.preprocess)
    mean, deviation = told.statistics or statistics
    return ModelSpec(
        told.model, classes, shape, mean, deviation, pretrained, shape.preprocess, told.logits
    )


def _converted(model: Classifier, match: Match) -> bool:
    """Let torch load weights of an older layout, which modules convert; return whether all fit."""
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
    found = places(document, where)
    skeleton = Skeleton.of(architecture(spec.name), spec.pretrained)
    matches = [match for place in found for match in _matches(skeleton, place)]
    fitting = [match for match in matches if match.fits and match.classes == spec.classes]
    chosen = _chosen(fitting, where)
    if chosen is None:
        raise _misfit(spec.name, matches, found, where)
    return _filled(build(spec), chosen, skeleton, where)


def places(document: Mapping[Any, Any], where: object) -> list[Place]:
    """Return every state dict that a file holds; a file without any is a CovcliError."""
    found = [Place(name, tensors) for name, tensors in _walk(document, "", DEPTH)]
    if not found:
        raise CovcliError("is neither a checkpoint nor a state dict", where=where)
    return found


def _walk(
    document: Mapping[Any, Any], name: str, depth: int
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    tensors = {k: v for k, v in document.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        plain = {_plain(key): tensor for key, tensor in tensors.items()}
        yield name, plain if len(plain) == len(tensors) else tensors
    for key, value in document.items() if depth else ():
        if isinstance(value, Mapping) and not NOT_WEIGHTS.search(str(key)):
            yield from _walk(value, f"{name}.{key}" if name else str(key), depth - 1)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _matches(skeleton: Skeleton, place: Place) -> list[Match]:
    """Compare a state dict with a network, under every prefix that its names suggest."""
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
    """Return the averaged weights, or those in the most usual place; a tie is a CovcliError."""
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
                fix="save the one that counts alone, by torch.save",
            )
    unlike = [other.where or "the file's top" for other in others if not _equal(best, other)]
    if unlike:
        kind = "averaged weights" if best.averaged else "weights"
        log.warning("%s: takes the %s %s, not %s", where, kind, best.where, ", ".join(unlike))
    elif best.averaged:
        log.warning("%s: takes averaged weights (%s)", where, best.where or "n_averaged")
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
    """Fill a network with weights that fit it, and say what is left out."""
    own = model.network.state_dict()
    tensors = chosen.tensors(skeleton)
    check_kinds(own, tensors, where)
    own.update(tensors)
    for name, tensor in own.items():
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if floating and not bool(tensor.isfinite().all()):
            raise CovcliError(f"weights {name!r} hold NaN or infinity", where=where)
    model.network.load_state_dict(own)
    parts = sorted({name.split(".")[0] for name in chosen.ignored})
    if parts:
        log.warning("%s: leaves out what the network does not have: %s", where, _first(parts))
    return model


def _misfit(
    name: str, tried: Sequence[Match], found: Sequence[Place], where: object
) -> CovcliError:
    """Word what does not fit in the weights that come nearest, and which architecture does."""
    best = min(tried, key=lambda match: match.wrong)
    hint = nearest_architecture([place.tensors for place in found])
    return CovcliError(
        f"the weights do not fit model {name!r}: {best.describe()}",
        where=where,
        fix=f"name its --model{hint}",
    )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
