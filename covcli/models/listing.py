"""list_points: the coverage points of a network, and other places that could be."""

from dataclasses import dataclass
from pathlib import Path

import torch

from covcli.core.errors import CovcliError
from covcli.methods.state import Granularity
from covcli.models import architectures
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier, ModelSpec
from covcli.models.survey import Candidate
from covcli.models.weights import Foreign
from covcli.reporting.tables import Table


@dataclass(frozen=True)
class ListedPoint:
    """A place in a network that could be a coverage point.

    Attributes
    ----------
    name
        The name for `--points`.
    kind
        "marked", "activation", "attention", "normalisation", "layer", "gate" or "module".
    what
        The class of the module, or the function that is called.
    shape
        The shape of its output for one image.
    channel_dim
        The dimension of the channels in `shape`.
    neurons
        The number of its neurons.
    watched
        Whether it is a coverage point.
    """

    name: str
    kind: str
    what: str
    shape: tuple[int, ...]
    channel_dim: int
    neurons: int
    watched: bool


@dataclass(frozen=True)
class PointList:
    """The coverage points of a network.

    Attributes
    ----------
    model, classes
        The network.
    input
        The shape of its input, and the preprocessing.
    granularity
        What the neurons are.
    watched, neurons
        The number of coverage points, and of all their neurons.
    unwatchable
        Activations that cannot be recorded, because their outputs cannot be divided by image.
    points
        The coverage points, or all places, in the order of a forward pass.
    """

    model: str
    classes: int
    input: str
    granularity: Granularity
    watched: int
    neurons: int
    unwatchable: list[str]
    points: list[ListedPoint]


def list_points(
    checkpoint: Path | None,
    foreign: Foreign,
    classes: int = 10,
    granularity: Granularity = "channel",
    patterns: tuple[str, ...] = (),
    every: bool = False,
) -> PointList:
    """List the coverage points of a checkpoint's network, or of a network with random weights.

    Parameters
    ----------
    checkpoint
        A checkpoint or weights; None for random weights.
    foreign
        The model and its settings, for random weights or weights without a checkpoint.
    classes
        The number of classes of a network with random weights.
    granularity
        What the neurons are.
    patterns
        Patterns of names that choose the coverage points. Empty: those of the checkpoint's
        training, or the default points.
    every
        Whether to list all places, not only the coverage points.

    Raises
    ------
    CovcliError
        If there is no such network, or a pattern matches no place.

    Examples
    --------
    >>> from torch import nn
    >>> @architectures.model("small", size=8)
    ... def small(classes, pretrained):
    ...     head = nn.Linear(4 * 6 * 6, classes)
    ...     return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), head)
    >>> points = list_points(None, Foreign("small")).points
    >>> [(point.name, point.what, point.shape, point.neurons) for point in points]
    [('1', 'ReLU', (4, 6, 6), 8)]
    """
    if checkpoint is not None:
        source = checkpoints.load(checkpoint, foreign)
        model, trained = source.model, tuple(source.training.get("points", ()))
    else:
        model, trained = _random(foreign, classes), ()
    survey, spec = model.survey(granularity), model.spec
    chosen = survey.choose(patterns or trained)
    watched = {each.point.name for each in chosen}
    places = survey.candidates if every else chosen
    return PointList(
        model=spec.name,
        classes=spec.classes,
        input=f"{'×'.join(map(str, spec.shape))}, {spec.preprocess.describe(spec.shape)}",
        granularity=granularity,
        watched=len(chosen),
        neurons=sum(each.point.neurons for each in chosen),
        unwatchable=list(survey.unwatchable),
        points=[_listed(each, each.point.name in watched) for each in places],
    )


def _listed(place: Candidate, watched: bool) -> ListedPoint:
    return ListedPoint(
        name=place.point.name,
        kind=place.kind,
        what=place.what,
        shape=place.shape,
        channel_dim=place.point.channel_dim % (len(place.shape) + 1) - 1,
        neurons=place.point.neurons,
        watched=watched,
    )


def _random(foreign: Foreign, classes: int) -> Classifier:
    if foreign.model is None:
        raise CovcliError("name a checkpoint, or a --model")
    entry = architectures.architecture(foreign.model)
    shape = entry.shape.changed(foreign.preprocess)
    mean, deviation = foreign.statistics or entry.statistics
    spec = ModelSpec(
        foreign.model, classes, shape, mean, deviation, False, shape.preprocess, foreign.logits
    )
    with torch.random.fork_rng(devices=[]):
        return architectures.build(spec)


def as_table(listed: PointList) -> Table:
    """Return the points as a table."""
    rows = [
        [
            point.name, f"{point.kind}: {point.what}", "×".join(map(str, point.shape)),
            str(point.shape[point.channel_dim]), str(point.neurons),
            *(["yes" if point.watched else "–"] if len(listed.points) != listed.watched else []),
        ]
        for point in listed.points
    ]  # fmt: skip
    head = ["name", "what", "shape", "channels", "neurons"]
    if len(listed.points) != listed.watched:
        head.append("watched")
    title = (
        f"{listed.model}: {listed.watched} coverage points, {listed.neurons} neurons; "
        f"input {listed.input}"
    )
    return Table(title, head, rows)
