"""Every score on several networks and many sets, over calibration draws: the suite's table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeAlias

import torch
from scipy.stats import rankdata
from suite_evidence import GROUPS, LEFT_OUT, POOL, TRUSTED, Evidence, Part, Shown, Sizes, Subject
from suite_networks import RECIPES, Data, trained
from torch import Tensor

from covcli.core.progress import Progress
from covcli.evaluation.metrics import Curves
from covcli.methods import Method, make_method
from covcli.methods.logits import LOGIT_EVIDENCE, read_logits
from covcli.models import checkpoint as checkpoints
from covcli.signature.calibration import Calibration, Observed, calibrate, fits, softmax_score
from covcli.signature.combination import Arrangement
from covcli.signature.fit import SURROGATE_IMAGES
from covcli.signature.surrogates import EXPERTS, OTHER_CLASS, draw

__all__ = ["LEFT_OUT", "NETWORKS", "Choice", "Data", "measured", "print_tables", "run"]
NETWORKS = ("vgg19", *RECIPES)
ERRORS = GROUPS[-1]
# AUROC by group and set.
Figures: TypeAlias = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """One score on one network.

    Attributes
    ----------
    network, score
        Names.
    draws
        AUROC by group and set, of each calibration draw; one entry of a baseline.
    """

    network: str
    score: str
    draws: list[Figures]

    def groups(self, group: str) -> list[float]:
        """Return the mean over a group's sets, of each draw."""
        return [fmean(figures[group].values()) for figures in self.draws]


@dataclass(frozen=True)
class Choice:
    """Which scores the suite compares.

    Attributes
    ----------
    methods, baselines
        Names.
    draws
        How many calibrations of each method.
    calibrated
        Images of a calibration, of those in the pool.
    """

    methods: tuple[str, ...]
    baselines: tuple[str, ...]
    draws: int
    calibrated: int = 1000


def subjects(
    folder: Path, data: Data, vgg19: Path | None, names: Sequence[str], progress: Progress
) -> Iterator[Subject]:
    """Yield the networks; those of a recipe are trained first."""
    for name in names:
        place, sizes = folder / "evidence" / name, Sizes()
        if name in RECIPES:
            checkpoint = trained(name, data, folder, progress)
            model = checkpoints.load(checkpoint).model.on(torch.device("cpu"))
            yield Subject(name, model, RECIPES[name].data, True, data, place, sizes)
        elif vgg19 is not None:
            model = checkpoints.load(vgg19, "vgg19").model.on(torch.device("cpu"))
            yield Subject(name, model, "cifar10", False, data, place, sizes)
        else:
            progress.note("no weights of a VGG19 (--vgg19): the suite goes on without it")


@dataclass(frozen=True)
class Pool:
    """What a network shows of the images that calibrations are drawn from.

    Attributes
    ----------
    shown
        Of the images themselves.
    surrogates
        By method and kind of distortion, of their distorted copies.
    blocks
        By method, see `Method.blocks`.
    """

    shown: Shown
    surrogates: Mapping[str, Mapping[str, Part]]
    blocks: Mapping[str, tuple[tuple[int, int], ...]]

    def calibration(self, name: str, seed: int, count: int) -> Calibration:
        """Calibrate a method on a draw of so many images."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self.shown.logits), generator=generator)[:count]
        method, logits = make_method(name), self.shown.logits[rows]
        evidence = read(method, self.shown.evidence[name][rows], logits)
        observed = Observed(evidence, softmax_score(logits), logits.argmax(1), None)
        fitting = fits(count, seed)
        outliers = self._outliers(method, rows, fitting, seed) if method.experts else []
        arrangement = Arrangement(self.blocks[name], LOGIT_EVIDENCE[method.logit_evidence])
        return calibrate(observed, fitting, outliers, arrangement=arrangement, plain=method.plain)

    def _outliers(self, method: Method, rows: Tensor, fitting: Tensor, seed: int) -> list[Tensor]:
        """Return the evidence of surrogate outliers, as `fit_judge` gathers it."""
        name = method.name
        mine = rows[draw(fitting, SURROGATE_IMAGES, self.shown.logits.shape[1], seed).rows]
        logits = self.shown.logits[mine]
        kinds = {OTHER_CLASS: read(method, self.shown.elsewhere[name][mine], logits)}
        for kind, part in self.surrogates[name].items():
            kinds[kind] = read(method, part["evidence"][mine], part["logits"][mine])
        return [torch.cat([kinds[kind] for kind in expert]) for expert in EXPERTS.values()]


def read(method: Method, evidence: Tensor, logits: Tensor) -> Tensor:
    """Return the evidence with what the method reads of the logits."""
    return torch.cat([evidence, read_logits(method.logit_evidence, logits)], 1)


def area(trusted: Tensor, untrusted: Tensor) -> float:
    return Curves(trusted.numpy(), untrusted.numpy()).auroc()


def measured(subject: Subject, choice: Choice, progress: Progress) -> list[Row]:
    """Return the rows of one network."""
    seen = Evidence(subject, choice.methods, choice.baselines, progress)
    trusted = seen.shown(TRUSTED, lambda: subject.trusted)
    sets = {(group, name): seen.shown(name, images)
            for group, name, images in subject.untrusted(progress)}  # fmt: skip
    pool = Pool(
        seen.shown(POOL, lambda: subject.pool, baselines=False),
        {m: seen.surrogates(m) for m in choice.methods if make_method(m).experts},
        {
            m: Arrangement.of(make_method(m), len(subject.layout(m).sizes)).blocks
            for m in choice.methods
        },
    )
    assert trusted.labels is not None
    wrong = trusted.logits.argmax(1) != trusted.labels

    def figures(own: Tensor, others: Mapping[tuple[str, str], Tensor]) -> Figures:
        areas: dict[str, dict[str, float]] = {group: {} for group in GROUPS}
        for (group, name), scores in others.items():
            areas[group][name] = area(own, scores)
        areas[ERRORS]["wrong answers"] = area(own[~wrong], own[wrong])
        return areas

    rows = []
    for name in choice.methods:
        method = make_method(name)
        evidence = {key: read(method, s.evidence[name], s.logits) for key, s in sets.items()}
        own = read(method, trusted.evidence[name], trusted.logits)
        draws = []
        for seed in range(choice.draws):
            score = pool.calibration(name, seed, choice.calibrated).score
            draws.append(figures(score(own), {key: score(part) for key, part in evidence.items()}))
        rows.append(Row(subject.name, f"covcli {name}", draws))
    for name in choice.baselines:
        one = figures(trusted.baselines[name], {k: s.baselines[name] for k, s in sets.items()})
        rows.append(Row(subject.name, name, [one]))
    accuracy = 1 - float(wrong.double().mean())
    progress.note(f"{subject.name}: accuracy {100 * accuracy:.1f}%")
    return rows


def print_tables(rows: Sequence[Row]) -> None:
    """Print a table over all networks, and one for each."""
    networks = list(dict.fromkeys(row.network for row in rows))
    by_score: dict[str, list[Row]] = {}
    for row in rows:
        by_score.setdefault(row.score, []).append(row)
    groups = [group for group in GROUPS if all(row.draws[0][group] for row in rows)]
    ranks = worst_ranks(by_score, groups)
    means = {s: {g: over_networks(mine, g) for g in groups} for s, mine in by_score.items()}
    overall = {s: fmean(values[g][0] for g in groups) for s, values in means.items()}
    order = sorted(by_score, key=lambda score: -overall[score])
    print(f"| AUROC, %: {', '.join(networks)} | {' | '.join(groups)} | mean | mean rank |")
    print(f"| --- |{' --- |' * (len(groups) + 2)}")
    for score in order:
        cells = [f"{mean:.1f}{spread} ({ranks[score][g][1]:.0f})"
                 for g in groups for mean, spread in [means[score][g]]]  # fmt: skip
        rank = fmean(ranks[score][g][0] for g in groups)
        print(f"| {score} | {' | '.join(cells)} | {overall[score]:.1f} | {rank:.1f} |")
    for network in networks:
        print_network(network, [by_score[score] for score in order], groups)


def over_networks(rows: Sequence[Row], group: str) -> tuple[float, str]:
    """Return the mean over the networks, and the deviation of that mean between draws."""
    draws = [fmean(values) for values in zip(*(row.groups(group) for row in rows), strict=True)]
    spread = f" ± {100 * stdev(draws):.1f}" if len(draws) > 1 else ""
    return 100 * fmean(draws), spread


def worst_ranks(
    by_score: Mapping[str, Sequence[Row]], groups: Sequence[str]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return each score's mean and worst rank over the networks, by group; the best has rank 1."""
    ranks: dict[str, dict[str, tuple[float, float]]] = {score: {} for score in by_score}
    for group in groups:
        means = [[-fmean(row.groups(group)) for row in rows] for rows in by_score.values()]
        places = rankdata(means, axis=0)
        for score, mine in zip(by_score, places, strict=True):
            ranks[score][group] = (float(mine.mean()), float(mine.max()))
    return ranks


def print_network(network: str, rows: Sequence[Sequence[Row]], groups: Sequence[str]) -> None:
    """Print the sets of one network."""
    mine = [row for each in rows for row in each if row.network == network]
    names = [(group, name) for group in groups for name in mine[0].draws[0][group]]
    print(f"\n| {network}: AUROC, % | {' | '.join(name for _, name in names)} |")
    print(f"| --- |{' --- |' * len(names)}")
    for row in mine:
        values = [100 * fmean(figures[g][n] for figures in row.draws) for g, n in names]
        print(f"| {row.score} | {' | '.join(f'{value:.1f}' for value in values)} |")


def run(
    folder: Path,
    data: Data,
    vgg19: Path | None,
    names: Sequence[str],
    choice: Choice,
    progress: Progress,
) -> list[Row]:
    """Return every network's rows; what the folder holds already is not computed again."""
    return [
        row
        for subject in subjects(folder, data, vgg19, names, progress)
        for row in measured(subject, choice, progress)
    ]
