"""What `test_devices.py` runs in a process of its own: everything on a device as on the CPU."""

import copy
import logging
import sys
import traceback
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from simulated_device import DEVICE, on_device
from torch import Tensor, nn

from covcli import ConfidenceLoss, Monitor
from covcli.core.progress import Silent
from covcli.data.images import in_memory
from covcli.evaluation.baselines import detectors
from covcli.evaluation.baselines.adapters import FittingImages, Network
from covcli.evaluation.baselines.detectors import BASELINES
from covcli.methods import METHODS
from covcli.models.architectures import Classifier, ModelSpec

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 12),
        nn.ReLU(), nn.Linear(12, 2),
    ).eval()  # fmt: skip


def data(net: nn.Module) -> tuple[Tensor, Tensor]:
    images = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = net(images)
        net[-1].bias -= logits.mean(0)
        return images, net(images).argmax(1)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.detach().cpu(), other.detach().cpu(), rtol=1e-4, atol=1e-5)


def a_monitor(method: str) -> None:
    """Built and loaded from images on either place, it says the same."""
    net = network()
    images, labels = data(net)
    fresh, seen = torch.rand(5, 3, 8, 8), []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "signature.safetensors"
        for place in (CPU, DEVICE):
            mine = copy.deepcopy(net).to(place)
            trusted = images[:100].to(place), labels[:100].to(place)
            monitor = Monitor.build(mine, trusted, images[100:].to(place), method=method)
            path = monitor.save(path, force=True)
            for each in (monitor, Monitor.load(path, mine)):
                seen += [each(fresh), each(fresh.to(place))]
    for verdicts in seen[1:]:
        for name in ("logits", "evidence", "score", "confidence"):  # continuous, unlike p-values
            close(getattr(verdicts, name), getattr(seen[0], name))


def a_loss() -> None:
    """Its value and its gradients are the same."""
    net = network()
    images, labels = data(net)
    losses, gradients = [], []
    for place in (CPU, DEVICE):
        mine, here = copy.deepcopy(net).to(place), (images.to(place), labels.to(place))
        with ConfidenceLoss.attach(mine, weight=1.0) as loss:
            loss.refresh(here)
            mine(1.5 * here[0][:32])
            losses.append(loss.step(here[1][:32]))
        losses[-1].backward()
        gradients.append(mine[0].weight.grad)
    close(*losses)
    close(*gradients)
    assert float(losses[0]) > 0


def a_baseline(name: str) -> None:
    """It has the same scores."""
    net = network()
    images, labels = (part[:40] for part in data(net))
    given = in_memory("random", (255 * images).to(torch.uint8), labels)
    spec = ModelSpec("own", 2, (3, 8, 8), (0.0,) * 3, (1.0,) * 3)
    scores = []
    for place in (CPU, DEVICE):
        watched = Network(Classifier(spec, copy.deepcopy(net)).on(place))
        fitting = FittingImages(watched, given, labels, Silent(), given)
        detector = BASELINES.get(name).fit(fitting)
        scores += [torch.cat([detector(b).cpu() for b in watched.read(given, Silent(), "")])]
    close(*scores)


def main() -> None:
    logging.disable()
    cases = {f"method {name}": partial(a_monitor, name) for name in METHODS}
    cases["the loss"] = a_loss
    if find_spec("pytorch_ood"):
        cases |= {f"baseline {name}": partial(a_baseline, name) for name in BASELINES}
    failed = 0
    # Ten powers take seconds.
    with on_device(), patch.object(detectors, "GRAM_POLES", (1, 2)):
        for name, case in cases.items():
            said = name
            try:
                case()
            except Exception:
                failed, said = failed + 1, f"{name}:\n{traceback.format_exc()}"
            sys.stdout.write(f"{said}\n")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
