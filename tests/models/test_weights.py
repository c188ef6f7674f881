"""Weights that were trained elsewhere: every layout in which they are saved, and what is refused.

The truth is always the network that was saved: a loaded one must answer alike.
"""

import argparse
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.weights_only import load_weights_only
from covcli.models import MODELS, checkpoint, model
from covcli.models.weights import Foreign

State = dict[str, Tensor]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))


class Norms(nn.Module):
    """A head that does not stand last, and the layers whose buffers make state dicts differ."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(16, classes)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU()
        )
        self.tail = nn.PReLU(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.body(x).mean((2, 3))))


class Normed(nn.Module):
    """A layer whose weight torch now holds in another form than before 2.0."""

    def __init__(self, classes: int, old: bool = False) -> None:
        super().__init__()
        norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        self.conv = norm(nn.Conv2d(3, 8, 3))
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    if "norms" not in MODELS:
        model("norms")(lambda classes, pretrained: Norms(classes))
        model("normed")(lambda classes, pretrained: Normed(classes))


@pytest.fixture(scope="module")
def saved() -> Norms:
    torch.manual_seed(3)
    network = Norms(4)
    for _ in range(5):  # moves the running statistics
        network(torch.rand(8, 3, 32, 32))
    return network.eval()


def prefixed(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {p + name: t for p in prefixes for name, t in state.items()}


def beside(**more: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda state: {"state_dict": state, "epoch": 3, **more}


def inside(state: State) -> State:
    """As DataParallel of a part and torch.compile of another leave the names."""
    return {
        name.replace("body.", "body.module.").replace("tail.", "tail._orig_mod."): tensor
        for name, tensor in state.items()
    }


def lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 1, "pytorch-lightning_version": "2.5.0",
        "state_dict": {**prefixed("model.")(state), "criterion.weight": torch.ones(4)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
        "hyper_parameters": {"lr": 0.1}, "callbacks": {"best": {"score": torch.tensor(0.9)}},
    }  # fmt: skip


def timm(state: State) -> dict[str, Any]:
    return {
        "arch": "norms", "epoch": 3, "version": 2, "state_dict": state, "metric": np.float64(0.9),
        "args": argparse.Namespace(model="norms", output=Path("out")), "optimizer": {"state": {}},
    }  # fmt: skip


LAYOUTS: dict[str, Callable[[State], Mapping[str, Any]]] = {
    "plain": dict,
    "ordered": OrderedDict,
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("_orig_mod.module."),
    "within": inside,
    "lightning": lightning,
    "timm": timm,
    "network": prefixed("network."),
    "net": prefixed("net."),
    "backbone": prefixed("backbone."),
    "another prefix": prefixed("my_classifier."),
    "tutorial": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "torchvision": lambda s: {"model": s, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    "nested": lambda s: {"model": {"state_dict": prefixed("module.")(s)}},
    "NumPy": lambda s: {"net": s, "acc": np.float32(0.9), "confusion": np.eye(3, dtype=np.int64)},
    "SWA": lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.")(s)},
    "before 0.4.1": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "profiled": lambda s: {**s, "body.total_ops": torch.ones(1), "total_params": torch.ones(1)},
    "auxiliary": lambda s: {**s, "aux1.conv.weight": torch.ones(3), "loss.weight": torch.ones(4)},
}


def assert_alike(path: Path, network: nn.Module, name: str = "norms") -> None:
    mean, deviation = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    loaded = checkpoint.load(path, Foreign(name, (mean, deviation))).model
    means, deviations = (torch.tensor(s).view(1, 3, 1, 1) for s in (mean, deviation))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), network((IMAGES - means) / deviations))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_wherever_they_lie(layout: str, saved: Norms, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(LAYOUTS[layout](dict(saved.state_dict())), path)
    assert_alike(path, saved)


@pytest.mark.parametrize("layout", ["plain", "timm", "NumPy"])
def test_files_from_before_archives_are_read(layout: str, saved: Norms, tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    content = LAYOUTS[layout](dict(saved.state_dict()))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert_alike(path, saved)
    for end in range(0, path.stat().st_size, 997):  # cut anywhere, it is refused
        (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:end])
        with pytest.raises(CovcliError):
            checkpoint.load(tmp_path / "cut.pth", "norms")


def test_safetensors_are_read_whatever_their_name_and_order(saved: Norms, tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.bin"):
        path = tmp_path / name
        state = {k: v.contiguous() for k, v in saved.state_dict().items()}
        safetensors.torch.save_file(prefixed("model.")(state), path)
        assert_alike(path, saved)


def test_weights_of_half_precision_keep_their_values(saved: Norms, tmp_path: Path) -> None:
    path = tmp_path / "bf16.pt"
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in saved.state_dict().items()}
    torch.save(half, path)
    loaded = checkpoint.load(path, "norms").model.network.state_dict()
    assert all(torch.equal(loaded[k], v.to(loaded[k].dtype)) for k, v in half.items())


def test_weights_that_torch_converts_are_converted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        old = Normed(3, old=True).eval()
    torch.save(old.state_dict(), tmp_path / "w.pt")
    assert {"conv.weight_g", "conv.weight_v"} <= old.state_dict().keys()
    mean, deviation = (0.5,) * 3, (0.5,) * 3
    loaded = checkpoint.load(tmp_path / "w.pt", Foreign("normed", (mean, deviation))).model
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), old((IMAGES - 0.5) / 0.5))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda plain, mean: {"state_dict": plain, "state_dict_ema": mean}, "state_dict_ema"),
        (lambda plain, mean: {"model": plain, "model_ema": {"n_averaged": torch.tensor(2),
                                                            **prefixed("module.")(mean)}},
         "model_ema"),
        (lambda plain, mean: {"net": plain, "ema": mean}, "ema"),
        (lambda plain, mean: {"state_dict": {**prefixed("model.")(plain),
                                             **prefixed("ema_model.")(mean)}}, "ema_model"),
    ],
)  # fmt: skip
def test_averaged_weights_come_first_and_it_is_said(
    place: Callable[[State, State], Any],
    said: str,
    saved: Norms,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mean = {k: v.clone() for k, v in saved.state_dict().items()}
    plain = {k: v + 1 for k, v in mean.items()}
    torch.save(place(plain, mean), tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        assert_alike(tmp_path / "w.pt", saved)
    assert f"averaged weights {said}" in caplog.text or f".{said}, not" in caplog.text


def test_of_a_teacher_and_a_student_the_student_is_taken_and_of_equals_none(
    saved: Norms, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = dict(saved.state_dict())
    other = {k: v + 1 for k, v in mine.items()}
    torch.save({**prefixed("teacher.")(other), **prefixed("student.")(mine)}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        assert_alike(tmp_path / "w.pt", saved)
    assert "teacher" in caplog.text
    torch.save({"one": mine, "two": other}, tmp_path / "w.pt")
    with pytest.raises(CovcliError, match="several sets of weights that fit: one, two"):
        checkpoint.load(tmp_path / "w.pt", "norms")
    torch.save({"one": mine, "two": mine}, tmp_path / "w.pt")
    assert_alike(tmp_path / "w.pt", saved)


def test_what_is_left_out_is_said_and_what_could_matter_is_refused(
    saved: Norms, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = dict(saved.state_dict())
    torch.save({**state, "aux1.weight": torch.ones(2)}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        assert_alike(tmp_path / "w.pt", saved)
    assert "ignores weights that the network does not have: aux1" in caplog.text
    torch.save({**state, "body.5.weight": torch.ones(2)}, tmp_path / "w.pt")  # one more layer
    with pytest.raises(CovcliError, match=r"unexpected: body\.5\.weight"):
        checkpoint.load(tmp_path / "w.pt", "norms")


def test_a_misfit_names_three_of_each_kind_and_the_nearest_architecture(tmp_path: Path) -> None:
    network = torchvision.models.resnet34(num_classes=5)
    state = {k: v for k, v in network.state_dict().items() if "fc.bias" not in k}
    torch.save(prefixed("module.")(state), tmp_path / "w.pt")
    with pytest.raises(CovcliError) as refused:
        checkpoint.load(tmp_path / "w.pt", "torchvision:resnet18")
    text = str(refused.value)
    assert "missing: fc.bias; " in text
    kept = ("layer1.2.", "layer2.2.", "layer2.3.", "layer3.2.", "layer3.3.", "layer3.4.",
            "layer3.5.", "layer4.2.")  # fmt: skip
    more = sum(name.startswith(kept) for name in state) - 3
    assert (
        f"unexpected: layer1.2.conv1.weight, layer1.2.bn1.weight, layer1.2.bn1.bias and {more}"
        in text
    )
    assert "nearest architecture is torchvision:resnet34, with 100% of the shapes" in text
    state["fc.bias"] = torch.zeros(5)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CovcliError, match=r"another shape: conv1.weight \(64, 1, 7, 7\) instead"):
        checkpoint.load(tmp_path / "w.pt", "torchvision:resnet34")
    with pytest.raises(CovcliError, match=r"bare state dict.*nearest architecture is torchvision"):
        checkpoint.load(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("vit_tiny_patch16_224", "torchvision:resnet18"), ("convnextv2_atto", "vgg11"),
     ("mobilenetv4_conv_small", "timm:mobilenetv4_conv_medium"), ("resnet26", "resnet18")],
)  # fmt: skip
def test_the_nearest_of_timm_is_named(name: str, wrong: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model(name, num_classes=7).state_dict()
    torch.save({"model": prefixed("backbone.")(state)}, tmp_path / "w.pt")
    with pytest.raises(CovcliError, match=rf"nearest architecture is timm:{name}, with 100%"):
        checkpoint.load(tmp_path / "w.pt", wrong)


def test_of_architectures_that_none_fits_the_most_alike_is_named(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(num_classes=4)
    network.conv1, network.fc = nn.Conv2d(6, 64, 5), nn.Sequential(nn.Linear(512, 9))
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(CovcliError, match=r"nearest architecture is \S*resnet18, with 9\d% of"):
        checkpoint.load(tmp_path / "w.pt", "vgg11")


@pytest.mark.parametrize(
    ("name", "classes"),
    [("resnet18", 3), ("vgg11_bn", 6), ("mobilenet_v3_small", 9), ("densenet121", 2),
     ("squeezenet1_1", 7), ("convnext_tiny", 4), ("regnet_y_400mf", 5), ("mnasnet0_5", 3),
     ("shufflenet_v2_x0_5", 2)],
)  # fmt: skip
def test_the_classes_of_any_network_are_counted_in_any_order(
    name: str, classes: int, tmp_path: Path
) -> None:
    network = torchvision.models.get_model(name, num_classes=classes)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    loaded = checkpoint.load(path, f"torchvision:{name}").model
    assert loaded.spec.classes == classes
    weights = loaded.network.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in network.state_dict().items())


def test_googlenets_auxiliary_heads_are_left_out(tmp_path: Path) -> None:
    network = torchvision.models.googlenet(num_classes=3, init_weights=False, aux_logits=True)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    loaded = checkpoint.load(tmp_path / "w.pt", "torchvision:googlenet").model
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        network.eval().transform_input = True  # as torchvision loads its own weights
        mean, deviation = (torch.tensor(s).view(1, 3, 1, 1) for s in
                           ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
        expected = network((images - mean) / deviation)
    torch.testing.assert_close(loaded.eval()(images), expected)


class Whole(nn.Linear):
    pass


@pytest.mark.parametrize("new", [True, False])
def test_whole_networks_and_programs_are_refused_by_name(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "w.pt"
    torch.save(Whole(2, 3), path, _use_new_zipfile_serialization=new)
    with pytest.raises(CovcliError, match=r"holds a .*Whole; save the network's state_dict"):
        load_weights_only(path)
    traced = torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2))
    traced.save(path)
    with pytest.raises(CovcliError, match="a program of TorchScript; save the network's state_d"):
        load_weights_only(path)


def test_a_checkpoint_is_not_told_otherwise(run: Path) -> None:
    path = run / "checkpoint.pt"
    assert not checkpoint.load(path, Foreign("tiny")).bare
    for told in (Foreign("vgg11"), Foreign(statistics=((0.5,) * 3, (0.5,) * 3)),
                 Foreign(preprocess="crop=32"), Foreign(logits="0")):  # fmt: skip
        with pytest.raises(CovcliError, match=str(path)):
            checkpoint.load(path, told)
