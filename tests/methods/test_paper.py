"""What is called the paper's, against the equations of arXiv 2101.12100, section IV."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import neurons_of

from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.evaluation.explain import explain
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.combination import plain_mean
from covcli.signature.monitor import Monitor


def test_the_score_is_the_coverage_and_the_confidence_the_papers(run: Path, tmp_path: Path) -> None:
    config = SignatureConfig(run / "checkpoint.pt", "mrc-paper", output=tmp_path / "s.safetensors")
    build_signature(config, Silent())
    monitor = Monitor.load(config.checkpoint, tmp_path / "s.safetensors")
    digits = datasets.load("digits?limit=120", "test")
    verdicts = monitor(digits.batch(torch.arange(120), (3, 32, 32)))
    state = signatures.load(tmp_path / "s.safetensors")[0].state
    neurons, logits, sizes = neurons_of(config.checkpoint, digits)
    k = logits.argmax(1)
    low, high = (state[end].numpy()[k] for end in ("low", "high"))
    width = np.where(high > low, high - low, 1)
    section = np.clip(((neurons - low) / width * 10).astype(int), 0, 9)
    count = np.take_along_axis(state["sections"].numpy()[k], section[:, :, None], 2)[:, :, 0]
    ends = np.cumsum([0, *sizes])
    largest = np.maximum(*(np.abs(state[end].numpy()).max(0) for end in ("low", "high")))
    reach = np.concatenate(  # of rounding
        [np.full(b - a, 1e-5 * largest[a:b].max()) for a, b in itertools.pairwise(ends)]
    )
    outside = (neurons < low - reach) | (neurons > high + reach)
    cost = np.where(outside, 1, 1 - count / state["count"].numpy()[k, None])
    eta = np.mean([cost[:, a:b].mean(1) for a, b in itertools.pairwise(ends)], 0)
    scores = verdicts.score.numpy()
    np.testing.assert_allclose(scores, eta, atol=5e-3)  # a neuron on the edge of a section moves
    assert float(np.median(np.abs(scores - eta))) < 1e-5
    tau = monitor.judge.rule.overall
    expected = np.exp(-scores * np.log(2) / tau)
    clear = np.abs(expected - 0.5) > 1e-9
    np.testing.assert_allclose(verdicts.confidence.numpy()[clear], expected[clear])
    (explanation,) = explain(monitor.judge, digits, [0])
    assert sum(point.share for point in explanation.points) == pytest.approx(1)


def test_a_plain_mean_is_the_mean() -> None:
    columns = 0.1 + torch.rand(50, 7, dtype=torch.float64)
    combination = plain_mean(7)
    torch.testing.assert_close(combination.score(columns), columns.mean(1), rtol=1e-12, atol=1e-12)
    z, shares = combination.shares(columns)
    torch.testing.assert_close(z, columns)
    torch.testing.assert_close(shares, columns / columns.sum(1, keepdim=True))
