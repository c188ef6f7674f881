"""The baselines of an evaluation, fitted on the signature's images and run on every set."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from covcli.core import distributed
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress
from covcli.data.images import ImageSet
from covcli.evaluation.baselines.adapters import FittingImages, Network
from covcli.evaluation.baselines.detectors import BASELINES, Detector, library
from covcli.signature.guarantee import Guarantee, Rule, make_rule
from covcli.signature.judge import Judge
from covcli.signature.record import Record

# The score, least trusted, for NaN and infinite scores of a detector.
HIGHEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Plan:
    """Checked baselines, with the images that they are fitted and calibrated on.

    Attributes
    ----------
    names
        Names in BASELINES; if empty, the other attributes are None.
    network
        The network.
    trusted
        The images that built the signature.
    fitting
        The calibration images that fit the signature's combination.
    ranking
        The other calibration images, which rank scores.
    """

    names: tuple[str, ...]
    network: Network | None
    trusted: ImageSet | None
    fitting: ImageSet | None
    ranking: ImageSet | None

    @property
    def versions(self) -> dict[str, str]:
        """The version of pytorch-ood, if there are baselines."""
        return {"pytorch-ood": metadata.version("pytorch-ood")} if self.names else {}


@dataclass(frozen=True)
class Comparison:
    """Fitted baselines.

    Attributes
    ----------
    network
        The network; None without baselines.
    detectors
        The detectors by name.
    rules
        The thresholds that keep the evaluation's guarantee, by name. They are computed like the
        signature's own, from the same calibration images.
    """

    network: Network | None
    detectors: dict[str, Detector]
    rules: dict[str, Rule]

    def score(self, images: ImageSet, progress: Progress) -> dict[str, np.ndarray]:
        """Score a set in one pass; return scores by name, float64 of shape (N,)."""
        if self.network is None:
            return {}
        return _score(self.network, self.detectors, images, progress)[0]


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names without duplicates, or every baseline for "all".

    Raises
    ------
    CovcliError
        If a name is unknown.

    Examples
    --------
    >>> expand(["knn", "energy", "knn"])
    ('knn', 'energy')
    """
    if "all" in names:
        return tuple(BASELINES)
    for name in names:
        BASELINES.get(name)
    return tuple(dict.fromkeys(names))


def prepare(
    names: Sequence[str],
    judge: Judge,
    record: Record,
    data_dir: Path | None,
    named: Collection[str | None] = (),
) -> Plan:
    """Check baselines and load their images, before any work is done.

    Parameters
    ----------
    names
        Names in BASELINES, or "all".
    judge
        The network and its calibration.
    record
        The signature's record of its images.
    data_dir
        The folder of downloaded sets.
    named
        Specifications of data that the user named, and so allows to read.

    Raises
    ------
    CovcliError
        If a name is unknown, pytorch-ood is not installed, a baseline needs a last linear layer
        that the network does not have, or the images are no longer available.
    """
    chosen = expand(names)
    if not chosen:
        return Plan(chosen, None, None, None, None)
    library()
    model = judge.model
    network = Network(model)
    for name in chosen:
        if BASELINES.get(name).features and network.last is None:
            others = [other for other in BASELINES if not BASELINES.get(other).features]
            raise CovcliError(
                f"its logits do not come from a linear layer, whose input {name!r} needs",
                where=f"model {model.spec.name!r}",
                fix=f"choose among {', '.join(others)}",
            )
    otherwise = "leave --baseline out"
    trusted = record.trusted_set(judge.signature.classes, data_dir, otherwise, named)
    held_out = record.calibration_set(data_dir, otherwise, named)
    fitting, ranking = (
        held_out.select(torch.nonzero(rows)[:, 0])
        for rows in (judge.calibration.fitting, ~judge.calibration.fitting)
    )
    return Plan(chosen, network, trusted, fitting, ranking)


def fit(plan: Plan, guarantee: Guarantee, progress: Progress) -> Comparison:
    """Fit the planned baselines, and compute their thresholds on the calibration images."""
    if plan.network is None or plan.trusted is None or plan.fitting is None or plan.ranking is None:
        return Comparison(None, {}, {})
    labels = plan.trusted.known_labels()
    trusted = FittingImages(plan.network, plan.trusted, labels, progress, plan.fitting)
    with distributed.alone():  # each rank fits the detectors on all images
        detectors = {}
        for name in plan.names:
            progress.start(f"fitting {name}", len(plan.trusted))
            detectors[name] = BASELINES.get(name).fit(trusted)
    scores, predicted = _score(plan.network, detectors, plan.ranking, progress)
    classes = plan.network.model.spec.classes
    rules = {
        name: make_rule(torch.from_numpy(theirs), predicted, classes, guarantee)
        for name, theirs in scores.items()
    }
    return Comparison(plan.network, detectors, rules)


def _score(
    network: Network, detectors: dict[str, Detector], images: ImageSet, progress: Progress
) -> tuple[dict[str, np.ndarray], Tensor]:
    """Return the scores by name, and the predicted classes."""
    parts = []
    for batch in network.read(images, progress, f"baselines on {images.name}"):
        theirs = [detector(batch).detach().double() for detector in detectors.values()]
        parts.append((batch.rows, batch.logits.argmax(1), *theirs))
    predicted, *columns = distributed.collect(parts)
    clean = [scores.nan_to_num(HIGHEST, HIGHEST, -HIGHEST).numpy() for scores in columns]
    return dict(zip(detectors, clean, strict=True)), predicted
