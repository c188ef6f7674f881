"""Logits among what a network returns."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.models import MODELS, checkpoint, model
from covcli.models.architectures import CIFAR10, Classifier, ModelSpec
from covcli.models.logits import find_logits
from covcli.models.weights import Foreign
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.monitor import Monitor
from covcli.training.train import train

B, K = 2, 10
LOGITS, FEATURES = torch.arange(B * K).view(B, K).float(), torch.ones(B, 64)
OTHER = torch.zeros(B, K)
Pair = namedtuple("Pair", "logits aux")


@dataclass
class Output:
    features: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True)
class Slotted:
    features: Tensor
    scores: Tensor


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As of transformers: a dictionary whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


@pytest.mark.parametrize(
    "output",
    [
        LOGITS, (LOGITS,), [LOGITS, FEATURES], (FEATURES, LOGITS), {"out": LOGITS, "f": FEATURES},
        {"logits": LOGITS, "probabilities": OTHER}, Pair(LOGITS, OTHER), Output(FEATURES, LOGITS),
        Slotted(FEATURES, LOGITS), {"x": Slotted(FEATURES, LOGITS)},
        ModelOutput(loss=torch.tensor(0.0), logits=LOGITS, hidden_states=(FEATURES, OTHER)),
        (FEATURES, {"heads": [LOGITS, torch.ones(B, 3)]}), (LOGITS, None, 3), (LOGITS, LOGITS),
        {"a": {"logits": LOGITS}, "b": OTHER}, LOGITS[:, :, None, None],
    ],
)  # fmt: skip
def test_logits_are_found_where_one_tensor_can_be_them(output: Any) -> None:
    assert torch.equal(find_logits(output, B, K), LOGITS)


@pytest.mark.parametrize(
    ("output", "fix"),
    [
        ((LOGITS, OTHER), "name one, as --logits 0"),
        ({"main": LOGITS, "aux": OTHER}, "name one, as --logits main"),
        ({"a": {"logits": LOGITS}, "b": {"logits": OTHER}}, r"as --logits a\.logits"),
        ((FEATURES, torch.ones(B, 3)), r"it returns 0 \(2, 64\), 1 \(2, 3\)"),
        ("text", "it returns no tensor"),
        (FEATURES, r"a tensor of shape \(2, 64\), not logits of shape \(2, 10\)"),
        (torch.ones(B, K, 4, 4), r"\(2, 10, 4, 4\)"),
    ],
)
def test_otherwise_one_line_says_what_to_name(output: Any, fix: str) -> None:
    with pytest.raises(CovcliError, match=fix) as refused:
        find_logits(output, B, K)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("output", "name"),
    [((OTHER, LOGITS), "1"), ({"a": (OTHER, LOGITS)}, "a.1"), (Pair(OTHER, LOGITS), "aux")],
)
def test_what_was_named_is_taken(output: Any, name: str) -> None:
    assert find_logits(output, B, K, name) is LOGITS
    with pytest.raises(CovcliError, match="returns no 'else'"):
        find_logits(output, B, K, "else")


class Several(nn.Module):
    """In training an auxiliary head beside the other, as GoogLeNet; always the same features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head, self.side = nn.Linear(32, classes), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        body = self.body(x)
        return body, self.side(body), self.head(body)


@pytest.fixture(autouse=True)
def _registered() -> None:
    if "several" not in MODELS:
        model("several")(lambda classes, pretrained: Several(classes))


def test_a_named_output_is_trained_recorded_and_monitored(tmp_path: Path) -> None:
    told = tiny_config(tmp_path, model="several", epochs=1)
    with pytest.raises(CovcliError, match="could be the logits: 1, 2"):
        train(told, Silent())
    result = train(tiny_config(tmp_path, model="several", epochs=4, logits="2"), Silent())
    loaded = checkpoint.load(result.checkpoint).model
    assert loaded.spec.logits == "2"
    assert result.epochs[-1].held_out_accuracy > 0.5
    signed = build_signature(SignatureConfig(result.checkpoint, method="src"), Silent())
    monitor = Monitor.load(result.checkpoint, signed.path)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = loaded.network((images - loaded.mean) / loaded.deviation)[2]
    torch.testing.assert_close(monitor(images).logits, expected)


def test_weights_trained_elsewhere_keep_the_named_output(tmp_path: Path) -> None:
    network = Several(4)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    loaded = checkpoint.load(tmp_path / "w.pt", Foreign("several", logits="1")).model
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = network((images - loaded.mean) / loaded.deviation)[1]
        assert torch.equal(loaded(images), expected)
    again = ModelSpec.from_dict(loaded.spec.as_dict(), "x")
    assert torch.equal(Classifier(again, network)(images), expected)


def test_specifications_of_earlier_files_are_read() -> None:
    old = {"name": "vgg11", "classes": 3, "shape": [3, 32, 32], "mean": list(CIFAR10[0]),
           "deviation": list(CIFAR10[1]), "pretrained": False}  # fmt: skip
    assert ModelSpec.from_dict(old, "x") == ModelSpec("vgg11", 3, (3, 32, 32), *CIFAR10)
    for wrong in ({"preprocess": 3}, {"preprocess": {"resize": -1, "interpolation": "bilinear"}},
                  {"preprocess": {"resize": 8, "interpolation": "x"}}):  # fmt: skip
        with pytest.raises(CovcliError, match="malformed model entry"):
            ModelSpec.from_dict({**old, **wrong}, "x")
