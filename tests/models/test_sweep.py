"""The sweep over a set of images."""

import pytest
import torch

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data.images import in_memory
from covcli.models import checkpoint as checkpoints
from covcli.models.points import Recorder
from covcli.models.sweep import Swept, forward, sweep
from covcli.training.train import TrainResult


def test_activations_that_are_not_finite_are_named(trained: TrainResult) -> None:
    model = checkpoints.load(trained.checkpoint).model
    points = model.points("channel")
    with torch.no_grad():
        model.network.second[0].weight.fill_(3e38)
    images = in_memory("x", torch.full((2, 3, 32, 32), 255, dtype=torch.uint8), None)
    with pytest.raises(CovcliError, match=r"'second\.2' are NaN or infinite"):
        list(sweep(model, images, points, "channel", Silent(), ""))


def test_batches_of_a_device_are_checked_together_and_none_is_missed(
    trained: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoints.load(trained.checkpoint).model
    points, batches = model.points("channel"), list[Swept]()
    pixels = torch.zeros(5 * 64, 3, 32, 32, dtype=torch.uint8)
    pixels[3 * 64] = 255
    images = in_memory("x", pixels, None)

    def overflow(_model: object, given: tuple[torch.Tensor]) -> torch.Tensor:
        return given[0].masked_fill(given[0] == 1, torch.inf)

    def read(rows: torch.Tensor) -> None:
        batches.clear()
        batches.extend(sweep(model, images.select(rows), points, "channel", Silent(), ""))

    monkeypatch.setattr("covcli.models.sweep.checked_together", lambda _device: 3)
    with model.register_forward_pre_hook(overflow):
        read(torch.arange(3 * 64))
        assert len(batches) == 3
        with pytest.raises(CovcliError, match=r"coverage point 'first\S*' are NaN or infinite"):
            read(torch.arange(5 * 64))
    assert len(batches) == 5


def test_large_activations_whose_sum_overflows_are_finite(trained: TrainResult) -> None:
    model = checkpoints.load(trained.checkpoint).model.eval()
    images = torch.zeros(2, *model.spec.shape)
    point, *_ = model.points("channel")
    large = torch.full((2, point.neurons), 3e38)
    recorder = Recorder(model.network, [point], "channel")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), recorder:
        patch.setattr(recorder, "take", lambda _logits: large)
        assert forward(model, recorder, images)[1] is large


def test_hooks_do_not_change_the_answer(trained: TrainResult) -> None:
    model = checkpoints.load(trained.checkpoint).model
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        bare = model(images)
        with Recorder(model.network, model.points("channel"), "channel") as recorder:
            watched = model(images)
            recorder.take(torch.empty(0))
    assert torch.equal(bare, watched)
