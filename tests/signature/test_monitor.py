"""The monitor: what it takes, and what it leaves on the network."""

import copy
import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from covcli.core.errors import CovcliError
from covcli.data import datasets
from covcli.signature.monitor import Monitor


def test_the_monitor_takes_bytes_of_any_size_and_floats_of_its_own(run: Path) -> None:
    monitor = Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors", alpha=0.1)
    digits = datasets.load("digits?limit=40", "test")
    small = digits.source.read(digits.rows, (1, 8, 8))
    adapted = digits.batch(torch.arange(40), (3, 32, 32))
    verdicts = [monitor(small), monitor(adapted), monitor(adapted.float() / 255)]
    for other in verdicts[1:]:
        assert torch.equal(verdicts[0].score, other.score)
    found = verdicts[0]
    assert torch.equal(found.untrusted, found.p_value <= 0.1)
    assert torch.equal(found.untrusted, found.confidence < 0.5)
    for wrong in (torch.zeros(3, 32, 32), torch.zeros(0, 3, 32, 32), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(CovcliError, match="Monitor"):
            monitor(wrong)
    with pytest.raises(CovcliError, match="NaN"):
        monitor(torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(CovcliError, match="too few"):
        Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors", alpha=0.001)


def test_a_monitors_hooks_are_silent_between_calls_and_leave_with_it(run: Path) -> None:
    monitor = Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors")
    model, images = monitor.model, torch.zeros(2, *monitor.model.spec.shape)
    verdicts = monitor(images)
    with torch.inference_mode():
        logits = model(images)
    assert torch.equal(logits, verdicts.logits)
    assert torch.equal(monitor(images).score, verdicts.score)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(images), logits)
    hooks = [module._forward_hooks for module in model.modules()]
    assert any(hooks)
    del monitor
    gc.collect()
    assert not any(hooks)


def test_another_number_of_threads_changes_the_last_bits_only(run: Path) -> None:
    monitor = Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors")
    digits = datasets.load("digits", "test")
    images = digits.batch(torch.arange(len(digits)), (3, 32, 32))
    before = torch.get_num_threads()
    try:
        scores = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scores.append(monitor(images).score.numpy())
    finally:
        torch.set_num_threads(before)
    for other in scores[1:]:
        np.testing.assert_allclose(scores[0], other, rtol=0, atol=0.05)
        assert np.median(np.abs(scores[0] - other)) < 1e-5
