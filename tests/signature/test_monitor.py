"""The monitor: what it takes, and what it leaves on the network."""

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.methods import METHODS, make_method
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier, ModelSpec
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.fit import How, fit_judge, fit_signature
from covcli.signature.monitor import Monitor
from covcli.training.train import TrainResult


@pytest.fixture
def monitor(run: Path) -> Monitor:
    return Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors", alpha=0.1)


def pixels(images: int, size: int = 32) -> torch.Tensor:
    """Return digits as bytes, three equal channels."""
    digits = datasets.load(f"digits?limit={images}", "test")
    return digits.batch(torch.arange(images), (3, size, size))


def test_the_monitor_takes_bytes_of_any_size_and_floats_of_its_own(run: Path) -> None:
    monitor = Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors", alpha=0.1)
    digits = datasets.load("digits?limit=40", "test")
    small = digits.source.read(digits.rows, (1, 8, 8))
    adapted = digits.batch(torch.arange(40), (3, 32, 32))
    verdicts = [monitor(small), monitor(adapted), monitor(adapted.float() / 255)]
    for other in verdicts[1:]:
        assert torch.equal(verdicts[0].score, other.score)
    first = verdicts[0]
    assert torch.equal(first.untrusted, first.p_value <= 0.1)
    assert torch.equal(first.untrusted, first.confidence < 0.5)
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


@pytest.mark.parametrize("name", list(METHODS))
def test_an_image_gets_its_score_whatever_images_are_beside_it(
    name: str, trained: TrainResult
) -> None:
    """The black margin of digits gives many neurons one value, which is an end of their range."""
    model = checkpoints.load(trained.checkpoint).model
    images, held_out = (datasets.load("digits?limit=300", split) for split in ("train", "test"))
    signature, _, _ = fit_signature(model, images, How(make_method(name)), Silent())
    monitor = Monitor(fit_judge(model, signature, held_out, Silent()))
    some = pixels(40)
    single = torch.cat([monitor(image[None]).score for image in some])
    for size in (40, 7):
        together = torch.cat([monitor(part).score for part in some.split(size)])
        torch.testing.assert_close(together, single, rtol=0, atol=1e-3)


def batches() -> list[torch.Tensor]:
    """Return batches of digits and of noise, many of the same size."""
    chance = np.random.default_rng(0)
    sizes = [8, 8, 3, 8] * 6
    noise = [chance.integers(0, 256, (n, 3, 32, 32), np.uint8) for n in sizes]
    digits = pixels(8)
    return [
        digits[:n].roll(i, 3) if i % 2 else torch.from_numpy(noise[i]) for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("method", "granularity"), [("ensemble", "channel"), ("src", "unit"), ("nac", "channel")]
)
def test_threads_on_one_monitor_and_on_its_network_do_not_disturb_each_other(
    method: str, granularity: str, trained: TrainResult, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    build_signature(
        SignatureConfig(trained.checkpoint, method, granularity=granularity, output=path), Silent()
    )
    monitor = Monitor.load(trained.checkpoint, path)
    given = batches()
    alone = [monitor(batch) for batch in given]

    def judged(i: int) -> bool:
        verdicts = monitor(given[i])
        same = [torch.equal(vars(verdicts)[name], value) for name, value in vars(alone[i]).items()]
        return all(same)

    def direct(i: int) -> bool:
        with torch.no_grad():
            return torch.equal(monitor.model(given[i].float().div(255)), alone[i].logits)

    with ThreadPoolExecutor(6) as pool:
        order = list(range(len(given))) * 4
        calls = [pool.submit(work, i) for i in order for work in (judged, judged, direct)]
    assert all(call.result() for call in calls)


def normalising_network() -> Classifier:
    """Return a network with random weights that would keep statistics in training."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(),
        nn.Linear(8 * 15 * 15, 10),
    )  # fmt: skip
    return Classifier(ModelSpec("x", 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3), network)


@pytest.mark.parametrize("by", ["the monitor", "another monitor", "the network"])
def test_a_pass_within_a_pass_is_refused_and_does_not_pass_for_it(
    monitor: Monitor, by: str
) -> None:
    """A hook of the program runs the same network on as many other images."""
    images, others = pixels(4), pixels(4).flip(1)
    expected = monitor(images).score
    again = {
        "the monitor": lambda: monitor(others),
        "another monitor": lambda: Monitor(monitor.judge, monitor.record)(others),
        "the network": lambda: monitor.model(others.float() / 255),
    }[by]
    busy = []

    def hook(*_: object) -> None:
        if not busy:
            busy.append(1)
            again()

    handle = next(monitor.model.network.children()).register_forward_hook(hook)
    with pytest.raises(CovcliError, match="is run again within its own pass"):
        monitor(images)
    handle.remove()
    assert torch.equal(monitor(images).score, expected)


def test_a_pass_that_was_broken_off_leaves_nothing(monitor: Monitor) -> None:
    """Ctrl-C in a notebook; torch calls no hook for it."""
    expected = monitor(pixels(4)).score

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = list(monitor.model.network.modules())[-1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        monitor(pixels(4))
    handle.remove()
    monitor.model(pixels(2).float() / 255)
    assert torch.equal(monitor(pixels(4)).score, expected)


def test_a_network_that_is_set_to_training_is_refused_and_its_statistics_stay() -> None:
    model, digits = normalising_network(), datasets.load("digits?limit=100", "test")
    signature, *_ = fit_signature(model, digits, How(make_method("src"), threshold=0.0), Silent())
    monitor = Monitor(fit_judge(model, signature, digits, Silent()))
    images = pixels(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score = monitor(images).score
    for part in (model, *model.network):
        part.train()
        with pytest.raises(CovcliError, match="training"):
            monitor(images)
        model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(monitor(images).score, score)
    during = model.network.register_forward_hook(lambda *_: model.train() and None)
    with during, pytest.raises(CovcliError, match="training"):
        monitor(images)


Images = torch.Tensor | np.ndarray
NORMAL: dict[str, Callable[[torch.Tensor], Images]] = {
    "array": lambda x: x.numpy(),
    "array backwards": lambda x: x.flip(3).numpy()[..., ::-1],
    "array read only": lambda x: np.frombuffer(x.numpy().tobytes(), np.uint8).reshape(x.shape),
    "channels last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "grey": lambda x: x[:, :1],
    "grey and opaque": lambda x: torch.cat([x[:, :1], torch.full_like(x[:, :1], 255)], 1),
    "colour and opaque": lambda x: torch.cat([x, torch.full_like(x[:, :1], 255)], 1),
    "every second of twice as many": lambda x: x.repeat_interleave(2, 0)[::2],
    "float32": lambda x: x / 255,
    "with a gradient": lambda x: (x / 255).requires_grad_(),
    "float64": lambda x: x.double() / 255,
    "float64 array": lambda x: (x.double() / 255).numpy(),
    "big-endian array": lambda x: (x.double() / 255).numpy().astype(">f4"),
}


@pytest.mark.parametrize("kind", NORMAL)
def test_images_of_every_documented_kind_get_the_verdicts_of_plain_bytes(
    kind: str, monitor: Monitor
) -> None:
    images = pixels(20)
    expected = monitor(images)
    verdicts = monitor(NORMAL[kind](images))
    for name, value in vars(expected).items():
        torch.testing.assert_close(vars(verdicts)[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_of_half_precision_are_taken_for_what_they_are(
    dtype: torch.dtype, monitor: Monitor
) -> None:
    images = (pixels(20) / 255).to(dtype)
    assert torch.equal(monitor(images).score, monitor(images.float()).score)


def test_normalised_floats_skip_the_networks_own_normalisation(monitor: Monitor) -> None:
    images = pixels(20) / 255
    normalised = (images - monitor.model.mean) / monitor.model.deviation
    verdicts, expected = monitor(normalised, normalised=True), monitor(images)
    for name, value in vars(expected).items():
        assert torch.equal(vars(verdicts)[name], value)


BAD: dict[str, tuple[str, Callable[[torch.Tensor], object]]] = {
    "floats to 255": ("from 0 to 255.*divide", lambda x: x.float()),
    "float16 to 255": ("from 0 to 255.*divide", lambda x: x.half()),
    "normalised": ("from -.*normalised=True", lambda x: (x / 255 - 0.45) / 0.25),
    "slightly beyond": (r"to 1\.01", lambda x: x / 255 * 1.01),
    "NaN": ("NaN", lambda x: torch.full(x.shape, torch.nan)),
    "infinite": ("infinity", lambda x: x / torch.zeros(())),
    "one image": (r"image\[None\]", lambda x: x[0]),
    "five dimensions": ("shape", lambda x: x[None]),
    "a number": ("shape", lambda x: x[0, 0, 0, 0]),
    "no image": ("at least one", lambda x: x[:0]),
    "no rows": ("shape", lambda x: x[:, :, :0]),
    "no channel": ("shape", lambda x: x[:, :0]),
    "five channels": ("5 channels", lambda x: x[:, [0] * 5]),
    "channels last": ("channels come second", lambda x: x.permute(0, 2, 3, 1)),
    "array, channels last": ("come second", lambda x: x.permute(0, 2, 3, 1).numpy()),
    "floats of another size": ("float32 of shape", lambda x: x[:, :, :8, :8] / 255),
    "grey floats": ("float32 of shape", lambda x: x[:, :1] / 255),
    "int64": ("int64", lambda x: x.long()),
    "int8": ("int8", lambda x: x.to(torch.int8)),
    "uint16 array": ("uint16", lambda x: x.numpy().astype(np.uint16)),
    "bool": ("bool", lambda x: x > 127),
    "complex": ("complex", lambda x: x / 255 + 0j),
    "complex array": ("complex", lambda x: x.numpy() + 0j),
    "objects": ("object", lambda x: x.numpy().astype(object)),
    "longdouble": ("dense", lambda x: (x.numpy() / 255).astype(np.longdouble)),
    "list": ("list", lambda x: x.tolist()),
    "nothing": ("NoneType", lambda x: None),
    "path": ("str", lambda x: "photo.png"),
    "sparse": ("dense", lambda x: (x / 255).to_sparse()),
    "meta": ("dense", lambda x: (x / 255).to("meta")),
    "nested": ("dense", lambda x: torch.nested.nested_tensor([*(x / 255)])),
    "masked": ("masked", lambda x: np.ma.masked_less(x.numpy(), 128)),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_a_monitor_does_not_take_is_refused_in_one_line(kind: str, monitor: Monitor) -> None:
    match, change = BAD[kind]
    with pytest.raises(CovcliError, match=match) as caught:
        monitor(change(pixels(4)))  # type: ignore[arg-type]
    assert "Monitor" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("uint8", lambda x: x),
        ("as the network does", lambda x: x.float()),
        ("as the network does", lambda x: (x / 255 - 0.9) / 0.01),
        ("NaN", lambda x: x * torch.nan),
    ],
)
def test_what_cannot_have_been_normalised_is_refused(
    match: str, change: Callable[[torch.Tensor], torch.Tensor], monitor: Monitor
) -> None:
    with pytest.raises(CovcliError, match=match):
        monitor(change(pixels(4)), normalised=True)


def test_autocast_around_a_call_changes_no_score(trained: TrainResult, tmp_path: Path) -> None:
    path = tmp_path / "s"
    build_signature(SignatureConfig(trained.checkpoint, "gauss", output=path), Silent())
    monitor, images = Monitor.load(trained.checkpoint, path), pixels(20)
    expected = monitor(images).score
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(monitor(images).score, expected)
