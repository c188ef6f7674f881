"""export: one file that says what the monitor says, refused where it does not."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLUGIN
from torch import Tensor, nn

from covcli.core import runtime
from covcli.core.choices import ExportFormat, InputForm
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.core.signals import Interrupted, Interrupts
from covcli.data.images import in_memory
from covcli.methods import make_method
from covcli.methods.state import Granularity
from covcli.models import architectures
from covcli.models.architectures import ModelSpec
from covcli.monitoring.export import OnnxFile, TorchFile, export, read_exported
from covcli.monitoring.export_config import ExportConfig
from covcli.monitoring.exported import VERDICTS, MonitorGraph, traced
from covcli.monitoring.inspect import inspect_file
from covcli.monitoring.verification import score_unit, verify
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.fit import How, fit_judge, fit_signature
from covcli.signature.guarantee import Guarantee
from covcli.signature.judge import Judge
from covcli.signature.monitor import Monitor

DOCS = Path(__file__).parents[2] / "docs"
CLASSES = ("bird", "cat", "dog", "frog")
MARGINAL = Guarantee(alpha=0.3)
pytest.importorskip("onnxruntime")


@cache
def judge_of(
    method: str, guarantee: Guarantee = MARGINAL, granularity: Granularity = "channel"
) -> Judge:
    """Watch a small network with random weights, under the classes that it predicts."""
    runpy.run_path(str(PLUGIN))
    spec = ModelSpec("tiny", len(CLASSES), (3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    with runtime.seeded(0):
        model = architectures.build(spec).on(torch.device("cpu"))
        pixels = torch.randint(256, (400, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        model.network.last.bias -= model(pixels.float() / 255).mean(0)  # type: ignore[operator, union-attr]
        labels = model(pixels.float() / 255).argmax(1)
    images = in_memory("random", pixels, labels, flips=True)
    trusted, held_out = (images.select(rows) for rows in torch.arange(400).split(200))
    how = How(make_method(method), granularity, threshold=0.0)
    signature, _, _ = fit_signature(model, trusted.named(CLASSES), how, Silent())
    return fit_judge(model, signature, held_out, Silent(), guarantee)


def drawn(count: int) -> Tensor:
    return torch.randint(
        256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )


def check(outputs: Mapping[str, np.ndarray], judge: Judge, pixels: Tensor) -> None:
    verdicts = Monitor(judge)(pixels)
    for name in ("logits", "predicted", "score", "p_value", "confidence", "untrusted"):
        expected = getattr(verdicts, name).numpy()
        assert outputs[name].dtype == expected.dtype, name
        # Rounding may move a score over one other score, but not over those that are equal to it.
        apart = 1.5 / (1 + len(judge.calibration.scores)) if name == "p_value" else 1e-4
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-4, atol=apart, err_msg=name)
    if "verdict" in outputs:
        assert [VERDICTS[code] for code in outputs["verdict"]] == verdicts.words


@pytest.mark.parametrize("method", ["src", "mrc", "mrc-paper", "gauss", "nrc", "ensemble"])
def test_the_onnx_file_says_of_any_number_of_images_what_the_monitor_says(method: str) -> None:
    judge = judge_of(method)
    file = OnnxFile(MonitorGraph(judge, "uint8"))
    for count in (1, 2, 37):
        check(file.run(drawn(count)), judge, drawn(count))


@pytest.mark.parametrize("kind", [OnnxFile, TorchFile])
@pytest.mark.parametrize(
    ("guarantee", "granularity", "form"),
    [
        (Guarantee(0.2, "by-class", 0.45), "channel", "normalised"),
        (Guarantee(0.2, "certified"), "unit", "uint8"),
    ],
)
def test_so_do_other_guarantees_granularities_inputs_and_forms(
    kind: type[OnnxFile], guarantee: Guarantee, granularity: Granularity, form: InputForm
) -> None:
    judge = judge_of("src", guarantee, granularity)
    file, pixels = kind(MonitorGraph(judge, form)), drawn(40)
    normalised = (pixels.float() / 255 - judge.model.mean) / judge.model.deviation
    outputs = file.run(pixels if form == "uint8" else normalised)
    check(outputs, judge, pixels)
    assert ("verdict" in outputs) == (guarantee.max_error is not None)


def test_what_is_no_number_is_untrusted_in_the_file_too() -> None:
    judge = judge_of("src")
    file = OnnxFile(MonitorGraph(judge, "normalised"))
    images = torch.zeros(3, 3, 32, 32)
    images[1, 0, 4, 4] = torch.nan
    assert file.run(images)["untrusted"][1]
    assert file.run(images)["score"][1] == np.inf


# Verification


def lying(judge: Judge, **changes: object) -> object:
    """Return a program that says what the monitor says, but for some outputs."""

    def program(pixels: Tensor) -> dict[str, np.ndarray]:
        verdicts = Monitor(judge)(pixels)
        said = {name: getattr(verdicts, name).clone() for name in
                ("logits", "predicted", "score", "p_value", "confidence", "untrusted")}  # fmt: skip
        for name, change in changes.items():
            said[name] = change(said)  # type: ignore[operator]
        return {name: tensor.numpy() for name, tensor in said.items()}

    return program


IMAGES = in_memory("drawn", drawn(300), None)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("logits", lambda said: said["logits"] + 0.1, "logits differ by 0.1"),
        ("logits", lambda said: said["logits"] * torch.nan, "logits differ by nan"),
        ("predicted", lambda said: (said["predicted"] + 1) % 4, "classes"),
        ("score", lambda said: said["score"] + 1, "p-value"),
        ("p_value", lambda said: said["p_value"].flip(0), "p-value"),
        ("p_value", lambda said: said["p_value"] - 1 / 151, "p-value"),
        ("confidence", lambda said: said["confidence"] ** 2, "confidence"),
        ("untrusted", lambda said: ~said["untrusted"], "verdict"),
    ],
)
def test_a_file_that_says_something_else_is_refused(name: str, change: object, reason: str) -> None:
    judge = judge_of("gauss")
    verify(judge, lying(judge), "uint8", IMAGES, Silent())  # type: ignore[arg-type]
    with pytest.raises(CovcliError, match=reason):
        verify(judge, lying(judge, **{name: change}), "uint8", IMAGES, Silent())  # type: ignore[arg-type]


def moved(judge: Judge, by: float, batches: int = 100) -> object:
    """Return a program whose first scores lie off, and whose other outputs follow from them."""
    calls: list[int] = []

    def score(said: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        return said["score"] + by * (len(calls) <= batches)

    rule = judge.rule
    return lying(
        judge,
        score=score,
        p_value=lambda said: rule.p_value(said["score"], said["predicted"]),
        confidence=lambda said: rule.confidence(said["score"], said["predicted"]),
        untrusted=lambda said: rule.untrusted(said["score"], said["predicted"]),
    )


def test_rounding_may_move_a_rank_and_nothing_more() -> None:
    judge = judge_of("gauss")
    calibrating = in_memory("again", drawn(300), None)
    unit = score_unit(judge)
    # Every score moves over its own rank: p-values change, and that is no fault of the file.
    verification = verify(judge, moved(judge, 1e-4 * unit), "uint8", calibrating, Silent())  # type: ignore[arg-type]
    assert verification.score == pytest.approx(1e-4 * unit)
    assert (verification.beyond, verification.images, verification.noise) == (0, 256, 0)
    with pytest.raises(CovcliError, match="score differs by more than"):
        verify(judge, moved(judge, 0.1 * unit), "uint8", calibrating, Silent())  # type: ignore[arg-type]
    # A neuron that rounding moves over an end of its range: rare, told, and let pass.
    once = verify(judge, moved(judge, 0.1 * unit, batches=2), "uint8", IMAGES, Silent())  # type: ignore[arg-type]
    assert once.beyond == 2


def test_noise_makes_up_for_images_that_are_too_few() -> None:
    judge = judge_of("gauss")
    few = in_memory("few", drawn(10), None)
    verification = verify(judge, lying(judge), "uint8", few, Silent())  # type: ignore[arg-type]
    assert (verification.images, verification.noise) == (256, 246)
    assert "246 of noise" in str(verification)


# Refusals


class Stubborn(nn.Module):
    """A network whose path depends on the values of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.last(self.act(x) if float(x.sum()) > -1e9 else x)


def test_networks_and_methods_that_cannot_be_exported_are_refused_with_the_reason() -> None:
    judge = judge_of("src")
    stubborn = architectures.Classifier(judge.model.spec, Stubborn())
    pixels = drawn(40)
    labels = stubborn(pixels.float() / 255).argmax(1)
    images = in_memory("random", pixels, labels, CLASSES)
    signature, _, _ = fit_signature(
        stubborn, images, How(make_method("src"), threshold=0.0), Silent()
    )
    other = fit_judge(stubborn, signature, images, Silent(), MARGINAL)
    with pytest.raises(CovcliError, match="torch cannot export this network") as caught:
        traced(MonitorGraph(other, "uint8"))
    assert "\n" not in str(caught.value)
    low = replace(judge, model=architectures.Classifier(judge.model.spec, judge.model.network))
    low.model.precision = "bfloat16"
    with pytest.raises(CovcliError, match="--format torch"):
        OnnxFile(MonitorGraph(low, "uint8"))


def test_without_its_packages_onnx_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CovcliError, match=r"pip install 'covcli\[onnx\]'"):
        OnnxFile(MonitorGraph(judge_of("src"), "uint8"))


# The function and the command


def test_a_torch_file_opens_without_covcli(run: Path, tmp_path: Path) -> None:
    result = export(ExportConfig(tmp_path / "monitor.pt2", runs=run.parent))
    assert read_exported(result.path) == result.monitor
    assert inspect_file(result.path).exported == result.monitor
    script = (
        "import sys, torch; sys.modules['covcli'] = None\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "print(len(program(torch.zeros(5, 3, 32, 32, dtype=torch.uint8))))\n"
    )
    command = [sys.executable, "-c", script, str(result.path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "6\n"


def covcli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "covcli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_command_and_the_example_of_the_documentation(run: Path) -> None:
    home = run.parent.parent
    plugin = ["--plugin", str(PLUGIN)]
    done = covcli("export", "--output", "monitor.onnx", "--max-error", "0.3", *plugin, cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "monitor.onnx\n"
    assert "256 images through file and monitor: largest differences logits" in done.stderr
    monitor = read_exported(home / "monitor.onnx")
    assert monitor.classes == tuple("0123456789")
    assert (monitor.alpha, monitor.max_error, monitor.verdicts) == (0.05, 0.3, VERDICTS)
    assert monitor.verification.images == 256
    inspection = inspect_file(home / "monitor.onnx")
    assert (inspection.kind, inspection.exported) == ("exported monitor", monitor)

    written = (home / "monitor.onnx").read_bytes()
    done = covcli("export", "--output", "monitor.onnx", *plugin, cwd=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert "exists; pass --force" in done.stderr
    assert (home / "monitor.onnx").read_bytes() == written
    done = covcli("export", "--format", "torch", "--json", "--quiet", *plugin, cwd=home)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["path"] == "runs/tiny/monitor.pt2"

    # The example that docs/export.md shows, with neither covcli nor torch.
    text = (DOCS / "export.md").read_text()
    example = re.search(r"```python\n(import json\n.*?)```", text, re.DOTALL)
    assert example is not None
    assert len(example[1].strip().splitlines()) <= 15
    blocked = "import sys; sys.modules['covcli'] = sys.modules['torch'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + example[1]], cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert re.match(r"\d (un)?trusted \(p = [01]\.\d{3}\)", done.stdout)


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_signal_waits_until_the_tracer_is_done(
    form: ExportFormat, run: Path, interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of a signal handler inside the tracer may abort the process."""
    forward, whole = MonitorGraph.forward, []

    def signalled(graph: MonitorGraph, images: Tensor) -> tuple[Tensor, ...]:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        whole.append(forward(graph, images))
        return whole[-1]

    monkeypatch.setattr(MonitorGraph, "forward", signalled)
    before = set(run.iterdir())
    with pytest.raises(Interrupted) as caught:
        export(ExportConfig(format=form, runs=run.parent), Silent(), interrupts)
    assert caught.value.code == 143
    assert whole
    assert set(run.iterdir()) == before


def test_bad_input_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    build_signature(SignatureConfig(run / "checkpoint.pt", method="nac"))
    before = {path.name for path in run.iterdir()}
    for changes, reason in (
        ({"method": "nac"}, "gradients"),
        ({"method": "src"}, "holds no signature"),
        ({"calibration": "npz:/no/such"}, "no such file"),
        ({"alpha": 1e-6}, "too few"),
        ({"output": tmp_path / "a.PT2", "format": "onnx"}, "ends as a file of torch"),
        ({"output": tmp_path / "a.pt"}, "ends as a file of no format; known: .onnx, .pt2"),
    ):
        config = ExportConfig(**{"runs": run.parent, "method": "mrc", **changes})  # type: ignore[arg-type]
        with pytest.raises(CovcliError, match=reason):
            export(config)
    assert {path.name for path in run.iterdir()} == before
    assert not list(tmp_path.glob("a.*"))
    with pytest.raises(CovcliError, match="no exported monitor"):
        read_exported(run / "signature-mrc.safetensors")
