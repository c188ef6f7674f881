"""list: list the entries of the registries of models, data, methods and others."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from covcli.core.choices import REGISTRIES, RegistryKind
from covcli.core.specs import Spec, Value

# Whole libraries of models, which no registry lists.
FAMILIES = {
    "torchvision:NAME": "Any of torchvision's classifiers, as `torchvision:convnext_tiny`.",
    "timm:NAME": "Any of timm's models, as `timm:vit_tiny_patch16_224` (needs `covcli[timm]`).",
}


@dataclass(frozen=True)
class Registered:
    """An entry of a registry.

    Attributes
    ----------
    kind
        The registry, one of `covcli.core.choices.REGISTRIES`.
    name
        The name in options and specifications.
    summary
        The first sentence of its documentation; empty without documentation.
    parameters
        Its parameters in a specification, with their defaults; None for a parameter without a
        default, or whose default depends on other parameters.
    """

    kind: RegistryKind
    name: str
    summary: str
    parameters: Mapping[str, Any]

    @property
    def row(self) -> list[str]:
        """The entry as cells: kind, name, and the summary with the parameters."""
        words = [
            key if value is None else f"{key}={value:.4g}" if isinstance(value, float)
            else f"{key}={value}"
            for key, value in self.parameters.items()
        ]  # fmt: skip
        described = f" [{', '.join(words)}]" if words else ""
        return [self.kind, self.name, f"{self.summary}{described}".strip()]


@dataclass(frozen=True)
class RegistryList:
    """The result of `list`, in the order of the registries."""

    entries: list[Registered]


def list_registered(kinds: Sequence[RegistryKind] = ()) -> RegistryList:
    """List the entries of registries, including those of plugins.

    Parameters
    ----------
    kinds
        The registries; empty for all.

    Examples
    --------
    >>> from covcli.monitoring.registries import list_registered
    >>> {entry.name: entry.parameters for entry in list_registered(["methods"]).entries}["mrc"]
    {'sections': 10, 'cost': 'surprisal'}
    """
    wanted = kinds or REGISTRIES
    return RegistryList([entry for kind in wanted for entry in _READERS[kind]()])


def first_sentence(documented: object) -> str:
    """Return the summary of an object's docstring; empty without one.

    Examples
    --------
    >>> first_sentence(first_sentence)
    "Return the summary of an object's docstring; empty without one."
    """
    paragraph = (inspect.getdoc(documented) or "").partition("\n\n")[0]
    return " ".join(paragraph.split())


class _AskedError(Exception):
    """Stops a loader after it declared its parameters."""


@dataclass(frozen=True)
class _Asking(Spec):
    """A specification that records the parameters that are read from it, with their defaults.

    With `stops`, a loader is stopped when it declares its parameters, before it does anything.
    """

    asked: dict[str, Any] = field(default_factory=dict)
    stops: bool = False

    @classmethod
    def of(cls, name: str, argument: str = "", stops: bool = False) -> "_Asking":
        return cls(name, name, argument, {}, stops=stops)

    def only(self, allowed: list[str]) -> None:
        self.asked.update(dict.fromkeys(allowed))
        if self.stops:
            raise _AskedError

    def take(self, key: str, convert: Callable[[str], Value], default: Value) -> Value:
        self.asked[key] = default
        return default


def _models() -> Iterator[Registered]:
    from covcli.models.architectures import MODELS

    for name in MODELS:
        entry = MODELS.get(name)
        known = {"input": "×".join(map(str, entry.shape))}
        if entry.published is not None:
            known["pretrained"] = entry.published.name
        yield Registered("models", name, first_sentence(entry.build), known)
    for name, summary in FAMILIES.items():
        yield Registered("models", name, summary, {})


def _datasets() -> Iterator[Registered]:
    from covcli.data.datasets import DATASETS
    from covcli.data.registry import Request

    for name in DATASETS:
        loader = DATASETS.get(name)
        asking = _Asking.of(name, stops=True)
        # covcli's loaders declare their parameters first; a plugin's may not, so it is not called.
        if loader.__module__.startswith("covcli."):
            with contextlib.suppress(_AskedError):
                loader(Request(asking, "train"))
        yield Registered("datasets", name, first_sentence(loader), asking.asked)


def _methods() -> Iterator[Registered]:
    from covcli.methods.base import METHODS

    for name in METHODS:
        kind = METHODS.get(name)
        known = {f.name: None if f.default is MISSING else f.default for f in fields(kind)}
        yield Registered("methods", name, first_sentence(kind), known)


def _attacks() -> Iterator[Registered]:
    from covcli.attacks.attacks import ATTACKS

    for name in ATTACKS:
        maker, asking = ATTACKS.get(name), _Asking.of("attack", name)
        maker(asking)  # creates an attack, but does not run it
        yield Registered("attacks", name, first_sentence(maker), asking.asked)


def _corruptions() -> Iterator[Registered]:
    from covcli.data.corruptions import CORRUPTIONS

    known = {"severity": 3, "seed": 0, "of": None}
    for name in CORRUPTIONS:
        yield Registered(
            "corruptions",
            name.replace("_", "-"),
            first_sentence(CORRUPTIONS.get(name).apply),
            known,
        )


def _baselines() -> Iterator[Registered]:
    from covcli.evaluation.baselines.detectors import BASELINES

    for name in BASELINES:
        yield Registered("baselines", name, first_sentence(BASELINES.get(name).fit), {})


def _sections() -> Iterator[Registered]:
    from covcli.reporting.sections import SECTIONS

    for name in SECTIONS:
        yield Registered("sections", name, first_sentence(SECTIONS.get(name)), {})


_READERS: Mapping[RegistryKind, Callable[[], Iterator[Registered]]] = {
    "models": _models, "datasets": _datasets, "methods": _methods, "attacks": _attacks,
    "corruptions": _corruptions, "baselines": _baselines, "sections": _sections,
}  # fmt: skip
