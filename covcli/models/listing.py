"""list_points: the places of a network where covcli looks, and where it could."""

from dataclasses import dataclass
from pathlib import Path

import torch

from covcli.core.errors import CovcliError
from covcli.methods.state import Granularity
from covcli.models import architectures
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier, ModelSpec
from covcli.models.weights import Foreign
from covcli.reporting.tables import Table


@dataclass(frozen=True)
class ListedPoint:
    """A place of a network.

    Attributes
    ----------
    name
        What `--points` calls it.
    kind
        "marked", "activation", "attention", "normalisation", "layer" or "module".
    what
        The class of the module, or the function that is called.
    shape
        Of its output for one image.
    channel_dim
        Which of its dimensions counts channels, counted without the batch.
    neurons
        How many neurons it has.
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
        Shape of its input, and how images become such.
    granularity
        What the neurons are.
    watched, neurons
        How many coverage points there are, and neurons in all of them.
    unwatchable
        Activations that hold no part for each image, and cannot be watched.
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
    told: Foreign,
    classes: int = 10,
    granularity: Granularity = "channel",
    patterns: tuple[str, ...] = (),
    every: bool = False,
) -> PointList:
    """Watch a network of a checkpoint, or one of random weights, and list its coverage points.

    Parameters
    ----------
    checkpoint
        A checkpoint or weights; None for random weights of the model that is told.
    told
        What the caller says of weights without a checkpoint, and of random ones.
    classes
        Of a network of random weights.
    patterns
        Which points are chosen; none for those that the checkpoint was trained with, or the default
        ones.
    every
        Whether to list every place, not the coverage points alone.

    Raises
    ------
    CovcliError
        If there is no such network, or a pattern matches nothing.
    """
    if checkpoint is not None:
        source = checkpoints.load(checkpoint, told)
        model, trained = source.model, tuple(source.training.get("points", ()))
    else:
        model, trained = _random(told, classes), ()
    survey = model.survey(granularity)
    chosen = survey.choose(patterns or trained)
    names = {each.point.name for each in chosen}
    points = [
        ListedPoint(
            name=each.point.name,
            kind=each.kind,
            what=each.what,
            shape=each.shape,
            channel_dim=each.point.channel_dim % (len(each.shape) + 1) - 1,
            neurons=each.point.neurons,
            watched=each.point.name in names,
        )
        for each in (survey.candidates if every else chosen)
    ]
    spec = model.spec
    return PointList(
        model=spec.name,
        classes=spec.classes,
        input=f"{'×'.join(map(str, spec.shape))}, {spec.preprocess.describe(spec.shape)}",
        granularity=granularity,
        watched=len(chosen),
        neurons=sum(each.point.neurons for each in chosen),
        unwatchable=list(survey.unwatchable),
        points=points,
    )


def _random(told: Foreign, classes: int) -> Classifier:
    if told.model is None:
        raise CovcliError("name a checkpoint, or a --model")
    made = architectures.architecture(told.model)
    shape = made.shape.changed(told.preprocess)
    mean, deviation = told.statistics or made.statistics
    spec = ModelSpec(
        told.model, classes, shape, mean, deviation, False, shape.preprocess, told.logits
    )
    with torch.random.fork_rng(devices=[]):
        return architectures.build(spec)


def as_table(found: PointList) -> Table:
    """Return the points as a table."""
    rows = [
        [
            point.name, f"{point.kind}: {point.what}", "×".join(map(str, point.shape)),
            str(point.shape[point.channel_dim]), str(point.neurons),
            *(["yes" if point.watched else "–"] if len(found.points) != found.watched else []),
        ]
        for point in found.points
    ]  # fmt: skip
    head = ["name", "what", "shape", "channels", "neurons"]
    if len(found.points) != found.watched:
        head.append("watched")
    title = (
        f"{found.model}: {found.watched} coverage points, {found.neurons} neurons; "
        f"input {found.input}"
    )
    return Table(title, head, rows)
