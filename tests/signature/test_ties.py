"""Equal images have equal verdicts, however their scores are rounded."""

import dataclasses

import numpy as np
import pytest
import torch

from covcli.signature.calibration import Observed, calibrate, fits
from covcli.signature.guarantee import MODES, Guarantee
from covcli.signature.ties import Ties

ROUNDING = 3e-6


def _stream(images: int, share: float, seed: int) -> tuple[Observed, np.ndarray]:
    """Return results on images, a share of which is one test card, answered wrongly."""
    generator = np.random.default_rng(seed)
    card = generator.random(images) < share
    evidence = generator.normal(size=(images, 4))
    evidence[card] = [1.5, 0.5, 1.0, 0.2]
    evidence += ROUNDING * generator.normal(size=evidence.shape)
    doubt = np.where(card, 0.2, 0.5 * generator.random(images))
    doubt *= 1 + ROUNDING * generator.normal(size=images)
    wrong = card | (generator.random(images) < 0.02)
    predicted = torch.zeros(images, dtype=torch.int64)
    columns = (torch.from_numpy(values) for values in (evidence, doubt, wrong))
    return Observed(*list(columns)[:2], predicted, torch.from_numpy(wrong)), card


@pytest.mark.parametrize("share", [0.08, 0.5, 0.97])
@pytest.mark.parametrize("mode", MODES)
def test_images_that_come_again_are_no_false_alarms(mode: str, share: float) -> None:
    """At the threshold, a rounding error would flag all of them: 8 to 97% for a promised 5%."""
    observed, _ = _stream(800, share, 0)
    calibration = calibrate(observed, fits(800, 0))
    guarantee = Guarantee(0.05, mode)  # type: ignore[arg-type]
    rule = calibration.rule(guarantee, ("only",))
    new, card = _stream(2000, share, 1)
    scores = calibration.score(new.evidence)
    assert len(scores[torch.from_numpy(card)].unique()) == 1
    flagged = rule.untrusted(scores, new.predicted)
    assert float(flagged.double().mean()) < 0.08
    if not guarantee.certain:
        assert torch.equal(flagged, rule.p_value(scores, new.predicted) <= 0.05)
    assert torch.equal(flagged, rule.confidence(scores, new.predicted) < 0.5)


def test_one_score_of_all_images_flags_none_of_them() -> None:
    evidence = torch.ones(40, 3, dtype=torch.float64)
    nothing = torch.zeros(40, dtype=torch.int64)
    calibration = calibrate(Observed(evidence, nothing.double(), nothing, None), fits(40, 0))
    rule = calibration.rule(Guarantee(0.05), ("only",))
    scores = calibration.score(evidence + 1e-7)
    assert not bool(rule.untrusted(scores, nothing).any())
    assert bool((rule.p_value(scores, nothing) == 1).all())


def test_wrong_answers_that_come_again_do_not_pass_by_rounding() -> None:
    """The walk over doubts ends exactly where the card's errors begin."""
    observed, _ = _stream(1500, 0.2, 2)
    calibration = calibrate(observed, fits(1500, 0))
    rule = calibration.rule(Guarantee(0.05, "marginal", 0.1), ("only",))
    new, card = _stream(2000, 0.2, 3)
    scores = calibration.score(new.evidence)
    passing = ~(
        rule.untrusted(scores, new.predicted) | rule.unsure(scores, new.predicted, new.softmax)
    )
    assert new.wrong is not None
    assert 0.2 < float(passing.double().mean()) < 0.5
    assert float(new.wrong[passing].double().mean()) < 0.1
    assert not bool(passing[torch.from_numpy(card)].any())


def test_scores_that_are_not_shared_stay_as_they_are() -> None:
    generator = np.random.default_rng(4)
    for images in (8, 19, 300, 20_000):
        scores = torch.from_numpy(generator.exponential(size=images))
        ties = Ties.among(scores)
        assert len(ties.values) == 0
        assert torch.equal(ties.joined(scores), scores)


def test_what_is_stored_joins_as_what_was_fitted() -> None:
    """A signature that is read again judges the same: its scores are joined already."""
    observed, _ = _stream(800, 0.3, 5)
    calibration = calibrate(observed, fits(800, 0))
    again = dataclasses.replace(calibration)
    new, _ = _stream(500, 0.3, 6)
    assert torch.equal(calibration.score(new.evidence), again.score(new.evidence))
    assert torch.equal(calibration.ties.joined(calibration.scores), calibration.scores)
