"""What the suite's networks show of its images: computed once a network and set, and kept in files.

Each file is written whole or not at all, so a run that was cut off goes on where it stopped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from suite_networks import Data, part, six_classes
from torch import Tensor

from covcli.attacks import attacks
from covcli.core.files import fingerprint
from covcli.core.progress import Progress
from covcli.core.specs import parse
from covcli.data import datasets
from covcli.data.corruptions import CorruptSource
from covcli.data.images import ImageSet, Source
from covcli.data.preprocessing import Shape
from covcli.evaluation.baselines.adapters import FittingImages, Network
from covcli.evaluation.baselines.compare import HIGHEST
from covcli.evaluation.baselines.detectors import BASELINES
from covcli.methods import Layout, State, make_method
from covcli.models.architectures import Classifier
from covcli.models.sweep import sweep
from covcli.signature.calibration import fits
from covcli.signature.fit import How, fit_signature
from covcli.signature.signature import Signature, layout_of
from covcli.signature.surrogates import DISTORTIONS, distorted

# What one file holds of one method.
Part: TypeAlias = dict[str, Any]
Make: TypeAlias = Callable[[], ImageSet]
GROUPS = ("far", "near", "corruption", "attack", "own errors")
CORRUPTIONS = ("gaussian_noise", "defocus_blur", "fog", "contrast", "pixelate")
SEVERITIES = (1, 3, 5)
PERTURBATIONS = (2, 4, 8)
POOL, TRUSTED = "pool", "trusted"
# Too slow for this size, see docs/results.md.
LEFT_OUT = ("gram",)


@dataclass(frozen=True)
class Sizes:
    """How many images.

    Attributes
    ----------
    fitted
        Of the signature and the baselines.
    pool
        That calibrations are drawn from.
    trusted
        Trusted test images.
    untrusted, corrupted, attacked
        Of each untrusted set of the kind.
    """

    fitted: int = 3000
    pool: int = 1500
    trusted: int = 1000
    untrusted: int = 250
    corrupted: int = 100
    attacked: int = 100


@dataclass(frozen=True)
class TurnedSource:
    """The images of another source, turned by so many right angles."""

    source: Source
    turns: int

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Read the rows and turn them."""
        return torch.rot90(self.source.read(rows, shape), self.turns, (2, 3))

    @property
    def fingerprint(self) -> str:
        """Name what determines the pixels."""
        return f"{self.turns} {self.source.fingerprint}"


@dataclass(frozen=True)
class Subject:
    """A network of the suite, and the images that it is tried on.

    Attributes
    ----------
    name
        In the tables.
    model
        The network.
    data
        "cifar10" or "fashion-mnist".
    six
        Whether it knows six of the ten classes.
    sources
        The folder of real images.
    folder
        Where all of this network's files lie.
    sizes
        How many images.
    """

    name: str
    model: Classifier
    data: str
    six: bool
    sources: Data
    folder: Path
    sizes: Sizes

    def layout(self, method: str) -> Layout:
        """Return which neurons a method reads."""
        points = self.model.points(make_method(method).reads("channel"))
        return layout_of(points, self.model.spec.classes)

    def split(self, split: Any) -> ImageSet:
        """Return the images of the classes that the network knows, in a drawn order."""
        if self.six:
            home = six_classes(self.sources, self.data, self.folder.parents[1])
            images = datasets.load(f"npz:{home}", split)
        else:
            images = self.sources.load(self.data, split)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
        return images.select(order)

    @cached_property
    def fitted(self) -> ImageSet:
        """Training images."""
        return self.split("train").select(torch.arange(self.sizes.fitted))

    @cached_property
    def test(self) -> ImageSet:
        """The pool of calibration images, and behind it trusted test images."""
        return self.split("test").select(torch.arange(self.sizes.pool + self.sizes.trusted))

    @property
    def pool(self) -> ImageSet:
        """The images that calibrations are drawn from."""
        return self.test.select(torch.arange(self.sizes.pool))

    @property
    def trusted(self) -> ImageSet:
        """Trusted test images."""
        return self.test.select(torch.arange(self.sizes.pool, len(self.test)))

    def untrusted(self, progress: Progress) -> Iterator[tuple[str, str, Make]]:
        """Yield the group, the name and the maker of each untrusted set."""
        for name in self._far():
            yield "far", name, partial(self._foreign, name)
        if self.six:
            yield "near", "held-out classes", self._held_out
        for turns in (1, 2):
            yield "near", f"turned {90 * turns}", partial(self._turned, turns)
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                yield "corruption", f"{name} {severity}", partial(self._corrupted, name, severity)
        for kind in ("fgsm", "pgd"):
            for eps in PERTURBATIONS:
                yield "attack", f"{kind} {eps}", partial(self._attacked, kind, eps, progress)

    def _far(self) -> list[str]:
        other = "fashion-mnist" if self.data == "cifar10" else "cifar10"
        return ["mnist", other, "photos", "noise:gaussian", "noise:uniform"]

    def _foreign(self, name: str) -> ImageSet:
        count = self.sizes.untrusted
        if name in ("cifar10", "fashion-mnist"):
            return self.sources.load(name, "test").select(torch.arange(count))
        return datasets.load(f"{name}?limit={count}", "test", self.sources.folder)

    def _held_out(self) -> ImageSet:
        others = part(self.sources.load(self.data, "test"), kept=False)
        return others.spread(self.sizes.untrusted)

    def _turned(self, turns: int) -> ImageSet:
        images = self.trusted.select(torch.arange(self.sizes.untrusted))
        return replace(images, source=TurnedSource(images.source, turns))

    def _corrupted(self, name: str, severity: int) -> ImageSet:
        images = self.trusted.select(torch.arange(self.sizes.corrupted))
        return replace(images, source=CorruptSource(images.source, name, severity, 0))

    def _attacked(self, kind: str, eps: int, progress: Progress) -> ImageSet:
        images = self.trusted.select(torch.arange(self.sizes.attacked))
        spec = parse(f"attack:{kind}?eps={eps}/255")
        return attacks.run_attack(spec, self.model, images, images.known_labels(), progress)


@dataclass(frozen=True)
class Shown:
    """What a network shows of a set.

    Attributes
    ----------
    evidence
        By method, without what the logits add, float64 of shape (n, columns).
    elsewhere
        The same, measured against a drawn class that is not the predicted one.
    logits
        float32 of shape (n, classes).
    labels
        int64 of shape (n,); None of images of none of the network's classes.
    baselines
        Scores by name, float64 of shape (n,); none of calibration images.
    """

    evidence: Mapping[str, Tensor]
    elsewhere: Mapping[str, Tensor]
    logits: Tensor
    labels: Tensor | None
    baselines: Mapping[str, Tensor]


class Evidence:
    """All that a network shows, from files or from the network.

    Parameters
    ----------
    subject
        The network and its images.
    methods
        Which of our methods.
    baselines
        Which baselines.
    progress
        Is told of all work.
    """

    def __init__(
        self, subject: Subject, methods: Sequence[str], baselines: Sequence[str], progress: Progress
    ) -> None:
        self.subject, self.methods, self.baselines = subject, methods, baselines
        self.progress = progress
        subject.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def _signatures(self) -> dict[str, Signature]:
        return {method: self._signature(method) for method in self.methods}

    def _signature(self, name: str) -> Signature:
        """Return a signature; fold its state where it is not kept yet."""
        file = self.subject.folder / f"state {name}.pt"
        images, model, method = self.subject.fitted, self.subject.model, make_method(name)
        if not file.is_file():
            self.progress.note(f"{self.subject.name}: signature {name}")
            signature, _, _ = fit_signature(model, images, How(method), self.progress)
            state = signature.state
            keep(file, {"tensors": state.tensors, "reductions": state.reductions})
        granularity = method.reads("channel")
        return Signature(
            method, granularity, tuple(model.points(granularity)),
            State(self.subject.layout(name), **torch.load(file, weights_only=True)), model.spec,
            fingerprint(model.state_dict()), images.classes,
        )  # fmt: skip

    @cached_property
    def _detectors(self) -> tuple[Network, dict[str, Callable[..., Tensor]]]:
        self.progress.note(f"{self.subject.name}: baselines")
        network, fitted = Network(self.subject.model), self.subject.fitted
        held_out = self.subject.pool.select(fits(self.subject.sizes.pool, 0).nonzero()[:, 0])
        images = FittingImages(network, fitted, fitted.known_labels(), self.progress, held_out)
        return network, {name: BASELINES.get(name).fit(images) for name in self.baselines}

    def shown(self, name: str, images: Make, baselines: bool = True) -> Shown:
        """Return what the network shows of a set, from its files where they are there."""
        once = cache(images)
        parts = self._by_method(name, self.methods, once)
        scores = {}
        if baselines and self.baselines:
            file = self.subject.folder / f"{name} baselines.pt"
            scores = kept(file, lambda: self._baselines(name, once()))
        first = next(iter(parts.values()))
        return Shown(
            {method: entry["evidence"] for method, entry in parts.items()},
            {method: entry["elsewhere"] for method, entry in parts.items()},
            first["logits"], first["labels"], scores,
        )  # fmt: skip

    def surrogates(self, method: str) -> dict[str, Part]:
        """Return what a method shows of the pool, distorted in each way."""
        pool = self.subject.pool
        copies = {kind: partial(distorted, pool, kind) for kind in DISTORTIONS}
        return {
            kind: self._by_method(f"{POOL} {kind}", [method], make)[method]
            for kind, make in copies.items()
        }

    def _by_method(self, name: str, methods: Sequence[str], images: Make) -> dict[str, Part]:
        """Return what each method shows of a set; one sweep serves all with the same neurons."""
        files = {method: self.subject.folder / f"{name} {method}.pt" for method in methods}
        missing = [method for method in methods if not files[method].is_file()]
        for granularity in {make_method(method).reads("channel") for method in missing}:
            mine = [m for m in missing if make_method(m).reads("channel") == granularity]
            for method, shown in self._swept(name, images(), mine).items():
                keep(files[method], shown)
        return {method: torch.load(files[method], weights_only=True) for method in methods}

    def _swept(self, name: str, images: ImageSet, methods: Sequence[str]) -> dict[str, Part]:
        signatures = [self._signatures[method] for method in methods]
        parts: dict[str, list[tuple[Tensor, ...]]] = {method: [] for method in methods}
        generator, classes = torch.Generator().manual_seed(0), len(signatures[0].classes)
        points, granularity = signatures[0].points, signatures[0].granularity
        title = f"{self.subject.name}: {name}"
        for batch in sweep(self.subject.model, images, points, granularity, self.progress, title):
            best = batch.logits.argmax(1)
            other = (best + torch.randint(1, classes, best.shape, generator=generator)) % classes
            for method, signature in zip(methods, signatures, strict=True):
                measured = [signature.scorer(batch.neurons, k) for k in (best, other)]
                parts[method].append((*measured, batch.logits))
        joined = {m: [torch.cat(column) for column in zip(*each, strict=True)]
                  for m, each in parts.items()}  # fmt: skip
        names = ("evidence", "elsewhere", "logits")
        return {m: dict(zip(names, each, strict=True)) | {"labels": images.labels}
                for m, each in joined.items()}  # fmt: skip

    def _baselines(self, name: str, images: ImageSet) -> dict[str, Tensor]:
        network, detectors = self._detectors
        parts: dict[str, list[Tensor]] = {each: [] for each in detectors}
        title = f"{self.subject.name}, {name}: baselines"
        for batch in network.read(images, self.progress, title):
            for each, detector in detectors.items():
                parts[each].append(detector(batch).detach().double().cpu())
        joined = {each: torch.cat(scores) for each, scores in parts.items()}
        return {each: s.nan_to_num(HIGHEST, HIGHEST, -HIGHEST) for each, s in joined.items()}


def keep(file: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(file)


def kept(file: Path, make: Callable[[], Part]) -> Part:
    """Return a file's content; make it where there is none."""
    if not file.is_file():
        keep(file, make())
    content: Part = torch.load(file, weights_only=True)
    return content
