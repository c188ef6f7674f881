"""Coverage during training: trusted and untrusted images, by a temporary signature."""

from collections.abc import Mapping

from covcli.attacks import attacks
from covcli.core import distributed
from covcli.core.progress import Silent
from covcli.core.specs import parse
from covcli.data.images import ImageSet
from covcli.models.architectures import Classifier
from covcli.models.sweep import sweep
from covcli.reporting.documents import Watch, WatchedSet
from covcli.signature.fit import How, fit_signature
from covcli.signature.signature import Signature


def watch(
    model: Classifier,
    how: How,
    training: ImageSet,
    held_out: ImageSet,
    untrusted: Mapping[str, ImageSet | None],
    most: int,
) -> Watch:
    """Build a signature from training images, and measure coverage on held-out and untrusted ones.

    Parameters
    ----------
    model
        The network.
    how
        The method of the signature, and its settings.
    training
        Trusted images for the signature.
    held_out
        Trusted images that are not in `training`.
    untrusted
        Sets by their specifications; None for an attack, which starts from `held_out`.
    most
        The largest number of images read of each set, evenly spaced.
    """
    signature, _, _ = fit_signature(model, training, how, Silent())
    sets = [_look(model, signature, "trusted", held_out.spread(most))]
    for text, named in untrusted.items():
        if named is None:
            spec = parse(text)
            few = held_out.select(attacks.attacked_rows(spec, held_out)[: most // 4])
            images = attacks.run_attack(spec, model, few, few.known_labels(), Silent())
        else:
            images = named.spread(most)
        sets.append(_look(model, signature, text, images))
    return Watch([point.name for point in signature.points], sets)


def _look(model: Classifier, signature: Signature, name: str, images: ImageSet) -> WatchedSet:
    parts = []
    for batch in sweep(model, images, signature.points, signature.granularity, Silent(), ""):
        sure, predicted = batch.logits.softmax(1).max(1)
        parts.append((batch.rows, sure, signature.scorer.coverage(batch.neurons, predicted)))
    confidence, coverage = distributed.collect(parts)
    shares = coverage.mean(0).tolist()
    return WatchedSet(
        name, len(images), float(confidence.double().mean()), sum(shares) / len(shares), shares
    )
