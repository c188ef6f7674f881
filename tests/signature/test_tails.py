"""How rare a value is: quantiles of what was fitted, an exponential tail, and what the score is."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from covcli.methods.logits import LOGIT_EVIDENCE, doubt, energy, read_logits
from covcli.signature import combination
from covcli.signature.combination import Arrangement, fit_combination
from covcli.signature.tails import SHARES, Tails


def columns(*values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(values, 1))


def test_rarity_is_the_log_of_the_true_share_in_body_and_tail() -> None:
    """Of two distributions whose tails are known; the exponential one is met beyond all images."""
    generator = np.random.default_rng(0)
    drawn = columns(generator.exponential(3, 20_000), generator.normal(5, 2, 20_000))
    tails = Tails.fit(drawn)
    at = np.linspace(0.2, 60, 200)
    exact = at / 3
    rarity = tails.rarity(columns(at, at))[:, 0].numpy()
    np.testing.assert_allclose(rarity, exact, rtol=0.04, atol=0.05)
    inside = np.linspace(3, 9, 50)  # a normal tail is lighter: only its body is met
    rarity = tails.rarity(columns(inside, inside))[:, 1].numpy()
    np.testing.assert_allclose(rarity, -stats.norm(5, 2).logsf(inside), atol=0.25)


@pytest.mark.parametrize("count", [2, 3, 20, 1000])
@pytest.mark.parametrize("kind", ["continuous", "ties", "constant"])
def test_rarity_rises_and_stays_finite_whatever_was_fitted(count: int, kind: str) -> None:
    generator = np.random.default_rng(count)
    values = generator.normal(size=count) * (kind != "constant")
    values = values.round() if kind == "ties" else values
    tails = Tails.fit(columns(values))
    assert bool((tails.slopes > 0).all())
    at = np.linspace(-9, 9, 500)
    rarity = tails.rarity(columns(at))[:, 0].numpy()
    assert np.isfinite(rarity).all()
    assert (np.diff(rarity) > 0).all()
    lowest = tails.rarity(columns(values.min(keepdims=True)))
    assert float(lowest) == pytest.approx(0, abs=1e-9)


def test_knots_have_the_share_of_images_that_is_stated() -> None:
    values = np.random.default_rng(1).permutation(np.arange(800.0))
    knots = Tails.fit(columns(values)).knots[0].numpy()
    assert [(values >= knot).mean() for knot in knots] == list(SHARES)


def test_the_logits_say_what_softmax_and_energy_say() -> None:
    logits = torch.from_numpy(np.random.default_rng(2).normal(0, 3, (50, 6)))
    p = np.exp(logits.numpy())
    np.testing.assert_allclose(doubt(logits).exp(), 1 - (p / p.sum(1, keepdims=True)).max(1))
    np.testing.assert_allclose(energy(logits), -np.log(p.sum(1)))
    for name, names in LOGIT_EVIDENCE.items():
        assert read_logits(name, logits).shape == (50, len(names))
    saturated = torch.tensor([[1e4, 0.0], [0.0, 0.0]])
    assert bool(read_logits("both", saturated).isfinite().all())


@pytest.mark.parametrize("names", [("doubt", "energy"), ("doubt",), ("energy",)])
def test_the_score_adds_up_what_is_rare(names: tuple[str, ...]) -> None:
    """Three terms: all voices; the energy together with the last generalist; the doubt."""
    generator = np.random.default_rng(3)
    fitted = generator.normal(size=(400, 3 + len(names)))
    blocks = ((0, 1), (1, 3))
    combined = fit_combination(torch.from_numpy(fitted), [], Arrangement(blocks, names))
    rows = generator.normal(0, 3, (300, 3 + len(names)))
    voice = fit_combination(torch.from_numpy(fitted[:, :3]), [], Arrangement(blocks))
    assert torch.equal(combined.center, voice.center)

    def rare(read: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
        return Tails.fit(columns(read(fitted))).rarity(columns(read(x)))[:, 0].numpy()

    def loudest(x: np.ndarray) -> np.ndarray:
        return voice.score(torch.from_numpy(x[:, :3])).numpy()

    def distance(x: np.ndarray) -> np.ndarray:
        z = (x[:, 1:3] - fitted[:, 1:3].mean(0)) / fitted[:, 1:3].std(0, ddof=1)
        return np.log(np.exp(z / combination.COLUMNS).mean(1))

    def score(x: np.ndarray) -> np.ndarray:
        total = np.exp(rare(loudest, x))
        for place, name in enumerate(names, 3):
            b = rare(lambda y, place=place: y[:, place], x)
            if name == "energy":
                b = 0.6 * (rare(distance, x) + np.minimum(b, 4)) - 0.5
            total += np.exp(b if name == "energy" else np.minimum(b, 1.25))
        return np.log(total)

    expected = score(rows) - score(fitted).min()
    np.testing.assert_allclose(combined.score(torch.from_numpy(rows)).numpy(), expected, atol=1e-9)
    _, shares = combined.shares(torch.from_numpy(rows))
    assert bool((shares >= 0).all())
    heard = shares.sum(1).numpy()
    assert ((heard > 0) & (heard < 1 + 1e-9)).all()
    assert heard.min() < 0.5
    loud = rows.copy()
    loud[:, :3] = 50.0
    assert float(combined.shares(torch.from_numpy(loud))[1].sum(1).min()) > 0.9


def test_what_the_logits_add_has_a_gradient() -> None:
    """An attack that knows the score must be able to lower it by the logits as well."""
    generator = np.random.default_rng(4)
    combined = fit_combination(
        torch.from_numpy(generator.normal(size=(100, 4))), [], Arrangement(logits=("energy",))
    )
    evidence = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    combined.score(evidence).sum().backward()
    assert evidence.grad is not None
    assert bool((evidence.grad > 0).all())
    assert math.isfinite(float(evidence.grad.sum()))
