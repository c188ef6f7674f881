"""Weights that were trained elsewhere: every layout in which they are saved, and what is refused.

The truth is always the network that was saved: a loaded one must answer alike.
"""

import argparse
import gzip
import json
import logging
import pickle
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


class Tied(nn.Module):
    """Two layers that share their weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, classes)
        self.one, self.two = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(torch.relu(self.one(self.stem(x)))).mean((2, 3)))


def test_shared_tensors_that_safetensors_stores_once_are_found(tmp_path: Path) -> None:
    if "tied" not in MODELS:
        model("tied")(lambda classes, pretrained: Tied(classes))
    network = Tied(5).eval()
    safetensors.torch.save_model(network, str(tmp_path / "w.safetensors"))
    assert len(safetensors.torch.load_file(tmp_path / "w.safetensors")) == 7  # of 8 names
    assert_alike(tmp_path / "w.safetensors", network, "tied")


def test_weights_in_several_files_are_read_from_their_index(saved: Norms, tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in saved.state_dict().items()}
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part, name in zip(parts, names, strict=True):
        safetensors.torch.save_file(part, tmp_path / name)
    weight_map = {key: name for part, name in zip(parts, names, strict=True) for key in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_alike(index, saved)
    with pytest.raises(
        CovcliError, match=r"name the index of all parts, .*model\.safetensors\.ind"
    ):
        checkpoint.load(tmp_path / names[0], "norms")
    with pytest.raises(CovcliError, match=f"but a folder; name a file in it: {names[0]}"):
        checkpoint.load(tmp_path, "norms")
    index.write_text(json.dumps({"weight_map": {**weight_map, "more": names[0]}}))
    with pytest.raises(CovcliError, match="lacks 'more'"):
        checkpoint.load(index, "norms")
    (tmp_path / "below").mkdir()
    index.replace(tmp_path / "below" / index.name)
    for outside in ("../" + names[0], str(tmp_path / names[0]), "..", index.name):
        (tmp_path / "below" / index.name).write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(CovcliError, match="no index of files beside it"):
            checkpoint.load(tmp_path / "below" / index.name, "norms")


# What is saved or downloaded in place of weights, and the words that tell the user.
NO_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid x", "Git LFS; .*git lfs pull"),
    "page": (b"\n <!DOCTYPE HTML><head>", "a web page; download the file itself"),
    "error": (b'{"error": "rate limit"}', "a JSON document"),
    "denied": (b"<?xml version='1.0'?><Error>", "an XML document"),
    "empty": (b"", "empty; download"),
    "zeros": (bytes(4000), "full of zeros"),
    "gzip": (gzip.compress(b"weights"), "gzip; unpack it"),
    "tar": (bytes(b"x".ljust(257, b"\0") + b"ustar"), "a tar archive; unpack it"),
    "zip": (b"PK\3\4cut short", "a ZIP archive that is cut short"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.0", "an ONNX graph; save the state_dict"),
    "keras": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "pickle": (pickle.dumps({"w": 1}), "a pickle; save the state_dict"),
    "image": (b"\x89PNG\r\n\x1a\n", "an image"),
}


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_given_in_place_of_weights_is_named(kind: str, ending: str, tmp_path: Path) -> None:
    content, words = NO_WEIGHTS[kind]
    path = tmp_path / f"w{ending}"
    path.write_bytes(content)
    with pytest.raises(CovcliError, match=f"is not a PyTorch checkpoint: it is .*{words}"):
        load_weights_only(path)


def test_what_a_file_holds_in_place_of_weights_is_named(tmp_path: Path) -> None:
    path, network = tmp_path / "w.pt", Norms(4)
    optimizer = torch.optim.Adam(network.parameters())
    network(IMAGES).sum().backward()
    optimizer.step()
    state = network.state_dict()
    renamed = {name.replace("head.", "head.1."): tensor for name, tensor in state.items()}
    empty = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in state.items()}
    held = {
        "the state of an optimizer": optimizer.state_dict(),
        "holds a tuple": (state, 3),
        "holds a list": list(network.parameters()),
        "without values": empty,
        "sparse": {**state, "head.weight": state["head.weight"].to_sparse()},
        "the shapes fit: save them under the names": renamed,
        "NaN": {**state, "head.bias": torch.full((4,), torch.nan, dtype=torch.float8_e4m3fn)},
    }
    for words, content in held.items():
        torch.save(content, path)
        with pytest.raises(CovcliError, match=words):
            checkpoint.load(path, "norms")


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
