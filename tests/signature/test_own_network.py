"""Monitors of a network that a program holds: built, saved and loaded without registering it."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

from covcli import Monitor
from covcli.core.errors import CovcliError
from covcli.models.spec import IMAGENET

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 12, 3, 2)
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def colours(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randn(n, 3, 16, 16, generator=generator)
    images[torch.arange(n), labels] += 1.5
    return TensorDataset(images, labels)


@pytest.fixture(scope="module")
def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    images, labels = colours(300, 1).tensors
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net


def test_a_monitor_is_the_same_from_tensors_a_dataset_and_a_loader(network: Net) -> None:
    trusted, held_out, images = colours(300, 1), colours(120, 2), colours(20, 3).tensors[0]
    forms: list[tuple[Any, Any]] = [
        (trusted.tensors, held_out.tensors), (trusted, held_out.tensors[0]),
        (DataLoader(trusted, 32, shuffle=True), DataLoader(held_out, 50)),
    ]  # fmt: skip
    verdicts = [Monitor.build(network, *pair)(images) for pair in forms]
    assert all(torch.equal(v.score, verdicts[0].score) for v in verdicts[1:])
    with torch.no_grad():
        torch.testing.assert_close(verdicts[0].logits, network(images))


def test_it_is_saved_and_loaded_with_exactly_its_network(network: Net, tmp_path: Path) -> None:
    data = colours(300, 1), colours(120, 2)
    monitor = Monitor.build(network, *data, method="src", classes=("r", "g", "b"), alpha=0.1)
    path = monitor.save(tmp_path / "deep" / "m.safetensors")
    with pytest.raises(CovcliError, match="exists"):
        monitor.save(path)
    images = colours(30, 5).tensors[0]
    again = Monitor.load(path, network)
    assert torch.equal(again(images).score, monitor(images).score)
    assert again.judge.signature.classes == ("r", "g", "b")
    assert again.judge.rule.guarantee.alpha == 0.1
    assert Monitor.load(path, network, alpha=0.2).judge.rule.guarantee.alpha == 0.2
    again.save(path, force=True)
    with pytest.raises(CovcliError, match="another checkpoint"):
        Monitor.load(path, Net())
    weights = tmp_path / "w.pt"
    torch.save(network.state_dict(), weights)
    with pytest.raises(CovcliError, match="network of a Python program"):
        Monitor.load(weights, path)
    for wrong in (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 3, 8, 8)):
        with pytest.raises(CovcliError, match="as the loader yielded"):
            monitor(wrong)


def test_false_alarms_keep_what_is_promised_and_foreign_images_are_found(network: Net) -> None:
    monitor = Monitor.build(network, colours(600, 1), colours(800, 2), alpha=0.1)
    alarms = monitor(colours(2000, 3).tensors[0]).untrusted.double().mean()
    assert 0.06 < float(alarms) < 0.14
    foreign = 3 * torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    assert float(monitor(foreign).untrusted.double().mean()) > 0.9


def test_images_in_both_sets_only_calibrate(network: Net, caplog: pytest.LogCaptureFixture) -> None:
    whole = colours(300, 1)
    held_out = Subset(whole, range(200, 300))
    overlapping = Monitor.build(network, Subset(whole, range(250)), held_out, method="src")
    assert "50 trusted images are calibration images too" in caplog.text
    apart = Monitor.build(network, Subset(whole, range(200)), held_out, method="src")
    images = colours(20, 3).tensors[0]
    assert torch.equal(overlapping(images).score, apart(images).score)
    with pytest.raises(CovcliError, match="every trusted image is a calibration"):
        Monitor.build(network, held_out, whole, method="src")


def test_images_prepared_otherwise_than_the_signatures_are_said_once(
    network: Net, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(6)
    trusted = colours(90, 1).tensors[0].clamp(-2.0, 2.5)
    pixels = torch.rand(60, 3, 16, 16, generator=generator)
    normalised = pixels * 4.5 - 2
    data = trusted, network(trusted).argmax(1)
    path = Monitor.build(network, data, normalised, method="src").save(tmp_path / "m.safetensors")
    assert not caplog.records

    def said(*batches: Tensor) -> list[str]:
        caplog.clear()
        monitor = Monitor.load(path, network)
        for batch in batches:
            monitor(batch)
        return [record.getMessage() for record in caplog.records]

    grey = normalised[:1, :, :1, :1].expand(1, 3, 16, 16)
    assert said(normalised, 1.5 * normalised, grey) == []
    assert len(said(pixels, 255 * pixels)) == 1
    (message,) = said(normalised, 255 * pixels.round())
    assert "from 0 to 255, where the images that built the signature are from -2 to 2.5" in message
    Monitor.build(network, data, 255 * pixels, method="src")
    assert "the calibration images' values are from" in caplog.text


def test_data_that_breaks_the_promise_is_said(
    network: Net, caplog: pytest.LogCaptureFixture
) -> None:
    (images, labels), (held_out, _) = colours(300, 1).tensors, colours(120, 2).tensors

    class Augmented(Dataset[Any]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return images[i] + 0.1 * torch.rand(1), int(labels[i])

    doubtful: list[tuple[Any, Any, str]] = [
        ((images, labels), held_out, ""),
        (Augmented(), held_out, "the trusted images differ each time they are read"),
        ((images, labels), torch.cat([held_out, images[:7]]), "7 of 127 calibration images are tr"),
        ((images, labels), torch.cat([held_out] * 2), "120 of 240 calibration images are copies"),
        ((images, labels), held_out + 2, "other mean values than the trusted ones"),
    ]
    for trusted, calibration, said in doubtful:
        caplog.clear()
        Monitor.build(network, trusted, calibration, method="src")
        assert [said in record.getMessage() for record in caplog.records] == [True] * bool(said)


def test_weights_that_change_afterwards_are_noticed(network: Net) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))

    def stepped(net: Normed) -> None:
        optimizer = torch.optim.Adam(net.parameters())
        net(images).sum().backward()
        optimizer.step()

    def warmed(net: Normed) -> None:
        net.train()(images + 1)
        net.eval()

    images = colours(20, 3).tensors[0]
    changes: dict[str, Any] = {
        "an optimizer": stepped,
        "other weights": lambda net: net.load_state_dict(Normed().state_dict()),
        "statistics": warmed,
        "another precision": lambda net: net.double(),
    }
    for name, change in changes.items():
        net = Normed().eval()
        net.load_state_dict(network.state_dict(), strict=False)
        monitor = Monitor.build(net, colours(300, 1), colours(120, 2), method="src")
        before = monitor(images).score
        net.to(memory_format=torch.channels_last)  # the same weights elsewhere
        copied = copy.deepcopy(monitor)
        torch.testing.assert_close(monitor(images).score, before, msg=name)
        change(net)
        with pytest.raises(CovcliError, match="weights have changed; build the monitor again"):
            monitor(images)
        torch.testing.assert_close(copied(images).score, before, msg=name)


def test_wrapped_networks_are_their_networks(network: Net, tmp_path: Path) -> None:
    data, images = (colours(300, 1), colours(120, 2)), colours(20, 3).tensors[0]
    plain = Monitor.build(network, *data, method="src")
    wrapped = torch.compile(nn.DataParallel(network), backend="eager")
    monitor = Monitor.build(wrapped, *data, method="src")
    assert torch.equal(monitor(images).score, plain(images).score)
    path = monitor.save(tmp_path / "m.safetensors")
    for each in (network, wrapped, nn.DataParallel(network)):
        assert torch.equal(Monitor.load(path, each)(images).score, plain(images).score)
    with pytest.raises(CovcliError, match="got Net; pass the signature, then the network"):
        Monitor.load(network, path)  # type: ignore[arg-type]
    with pytest.raises(CovcliError, match=r"got Net; pass an instance of nn\.Module"):
        Monitor.load(path, Net)  # type: ignore[arg-type]


def test_probabilities_in_place_of_logits_are_said(
    network: Net, caplog: pytest.LogCaptureFixture
) -> None:
    for last, said in ((nn.Identity(), 0), (nn.Softmax(1), 1), (nn.LogSoftmax(1), 1)):
        caplog.clear()
        model = nn.Sequential(network, last)
        Monitor.build(model, colours(300, 1), colours(120, 2), method="src")
        assert caplog.text.count("returns probabilities or their logarithms") == said


def test_what_cannot_be_built_is_one_line(network: Net) -> None:
    trusted, held_out = colours(300, 1), colours(120, 2)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((network, trusted.tensors[0], held_out), {}, "has no labels"),
        ((network, trusted, colours(10, 2)), {}, "too few"),
        ((network, trusted, held_out), {"classes": ("a", "b")}, "labels from 0 to 2"),
        ((network, trusted, held_out), {"points": ["z*"]}, "matches no coverage point"),
        ((network, trusted, held_out), {"method": "srk"}, "did you mean 'src'"),
        ((Net(2), trusted, held_out), {}, "labels from 0 to 2"),
        ((network, trusted, (held_out.tensors[0], held_out.tensors[1] + 9)), {}, "on: labels from"),
        ((network, trusted, held_out), {"points": "a*"}, "points=: must be a list"),
        ((network, trusted, held_out), {"classes": "abc"}, "classes=: must be a list"),
        ((network, trusted, held_out), {"classes": ("a", "a", "b")}, "names a class twice"),
        ((network, trusted, held_out), {"granularity": "pixel"}, "unknown granularity 'pixel'"),
        ((network, trusted, held_out), {"confidence_threshold": 2}, "must be between 0 and 1"),
        ((Net, trusted, held_out), {}, "got Net; pass an instance"),
        ((Net().double(), trusted, held_out), {}, r"weights are torch.float64; convert it by"),
        ((network, [(x.permute(1, 2, 0), y) for x, y in trusted], held_out), {}, "channels come"),
    ]  # fmt: skip
    for arguments, options, said in wrong:
        with pytest.raises(CovcliError, match=said) as refused:
            Monitor.build(*arguments, **options)
        assert "\n" not in str(refused.value)


def test_networks_with_nested_outputs_and_other_channels(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(5, 8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features = F.gelu(self.conv(x)).mean((2, 3))
            return {"features": features, "logits": self.head(features)}

    torch.manual_seed(0)
    network = Nested().eval()
    images = torch.randn(300, 5, 8, 8)
    with torch.no_grad():  # both classes occur
        logits = network(images)["logits"]
        network.head.bias -= logits.median(0).values
        labels = network(images)["logits"].argmax(1)
    monitor = Monitor.build(network, (images[:200], labels[:200]), images[200:], method="mrc")
    path = monitor.save(tmp_path / "m.safetensors")
    assert torch.equal(Monitor.load(path, network)(images).predicted, labels)


def test_the_cells_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "python-api.md").read_text()
    text = page[page.index("## A network of your own program") :]
    text = text[: text.index("## The stages as functions")]
    cells = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(cells) == 4
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, "docs/python-api.md", "exec"), namespace)
    assert namespace["verdicts"].untrusted.all()
    held_out = torch.cat([images for images, _ in namespace["held_out_loader"]])
    assert float(namespace["monitor"](held_out).untrusted.double().mean()) < 0.1


def jpegs(root: Path, n: int, seed: int, classes: tuple[str, ...], size: int = 48) -> None:
    generator = np.random.default_rng(seed)
    for i in range(n):
        k = i % len(classes)
        pixels = generator.normal(90, 40, (size // 8, size // 8, 3))
        pixels[:, :, k % 3] += 100
        smooth = np.kron(np.clip(pixels, 0, 255), np.ones((8, 8, 1))).astype(np.uint8)
        folder = root / classes[k]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth).save(folder / f"{i:04d}.jpg", quality=92)


def covcli(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "covcli", *arguments], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_resnet_trained_elsewhere_gets_the_same_scores_by_command_and_by_python(
    tmp_path: Path,
) -> None:
    classes = ("blue", "green", "red")
    for name, n, seed in (("train", 150, 1), ("held-out", 90, 2), ("test", 60, 3)):
        jpegs(tmp_path / name, n, seed, classes)
    (tmp_path / "foreign" / "other").mkdir(parents=True)
    generator = np.random.default_rng(4)
    for i in range(30):
        noise = generator.integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "foreign" / "other" / f"{i:04d}.jpg", quality=92)

    # Ten lines of plain PyTorch.
    torch.manual_seed(0)
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*IMAGENET)])
    sets: dict[str, Dataset[Any]] = {
        name: ImageFolder(tmp_path / name, prepare)
        for name in ("train", "held-out", "test", "foreign")
    }
    network = resnet18(num_classes=3)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-4)
    for _ in range(2):
        for images, labels in DataLoader(sets["train"], 10, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    torch.save(network.state_dict(), tmp_path / "resnet.pt")

    signature = covcli(
        "build-signature", "resnet.pt", "--model", "torchvision:resnet18", "--preprocess",
        "resize=cover,crop=48", "--trusted", "folder:train", "--calibration", "folder:held-out",
        "--quiet", cwd=tmp_path,
    ).strip()  # fmt: skip
    covcli(
        "evaluate", "--trusted", "folder:test", "--untrusted", "folder:foreign", "--quiet",
        cwd=tmp_path,
    )  # fmt: skip
    run = (tmp_path / signature).parent
    table = pd.read_csv(run / "scores.csv.gz", compression="gzip")
    commanded = Monitor.load(run / "checkpoint.pt", tmp_path / signature)
    monitor = Monitor.build(network, sets["train"], sets["held-out"])
    for name, part in (("trusted", "test"), ("folder:foreign", "foreign")):
        rows = table[table["set"] == name].sort_values("index")
        images = torch.stack([image for image, _ in sets[part]])  # type: ignore[attr-defined]
        by_python = monitor(images)
        with_its_network = commanded(images, normalised=True)
        assert rows["predicted"].tolist() == by_python.predicted.tolist()
        for scores in (by_python.score, with_its_network.score):
            np.testing.assert_allclose(rows["score"], scores, rtol=1e-3, atol=1e-3)
    assert monitor(images).untrusted.double().mean() > 0.5
