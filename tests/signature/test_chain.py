"""The chain in one graph: exported, it says of any number of images what the monitor says."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda, on_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data.images import in_memory
from covcli.methods import METHODS, make_method
from covcli.models import architectures
from covcli.models.architectures import ModelSpec
from covcli.signature.chain import Chain
from covcli.signature.fit import How, fit_judge, fit_signature
from covcli.signature.guarantee import Guarantee, make_rule
from covcli.signature.judge import Judge
from covcli.signature.monitor import Monitor

SIZES = {"vgg11": 32, "resnet18": 16, "tiny": 32}
CLASSES = ("bird", "cat", "dog", "frog")
MARGINAL = Guarantee(alpha=0.3)


@cache
def judge_of(network: str, method: str, guarantee: Guarantee = MARGINAL) -> Judge:
    """Watch a network with random weights, under the classes that it predicts."""
    size = SIZES[network]
    spec = ModelSpec(network, len(CLASSES), (3, size, size), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    with runtime.seeded(0):
        model = architectures.build(spec).on(torch.device("cpu"))
        pixels = torch.randint(256, (64, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        labels = model(pixels.float() / 255).argmax(1)
    images = in_memory("random", pixels, labels, flips=True)
    trusted, held_out = (images.select(rows) for rows in torch.arange(64).split(32))
    how = How(make_method(method), threshold=0.0)
    signature, _, _ = fit_signature(model, trusted.named(CLASSES), how, Silent())
    return fit_judge(model, signature, held_out, Silent(), guarantee)


def traced(judge: Judge) -> torch.export.ExportedProgram:
    example = torch.zeros(2, *judge.model.spec.shape)
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    return torch.export.export(Chain(judge), (example,), dynamic_shapes=(batch,))


@cache
def exported(network: str, method: str) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return traced(judge_of(network, method))


def images_for(judge: Judge, count: int) -> Tensor:
    return torch.rand(
        count, *judge.model.spec.shape, generator=torch.Generator().manual_seed(count)
    )


def check(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        np.testing.assert_allclose(
            actual[name].detach().numpy(), tensor.numpy(), rtol=1e-5, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize(
    ("network", "method"),
    [("vgg11", "src"), ("vgg11", "gauss"), ("vgg11", "ensemble"), ("resnet18", "mrc"),
     ("resnet18", "nrc")],
)  # fmt: skip
def test_the_exported_chain_says_what_the_monitor_says(network: str, method: str) -> None:
    judge = judge_of(network, method)
    monitor, program = Monitor(judge), exported(network, method).module()
    for count in (1, 5):
        images = images_for(judge, count)
        check(program(images), vars(monitor(images)))


def guaranteed_by_class(judge: Judge) -> Judge:
    """Return a judge with another rule, as random images are all predicted as one class."""
    predicted = torch.arange(40) % len(CLASSES)
    scores = judge.calibration.scores.mean() + torch.arange(40.0).double().sin()
    guarantee = Guarantee(alpha=0.3, mode="by-class")
    return replace(judge, rule=make_rule(scores, predicted, len(CLASSES), guarantee))


def judges() -> dict[str, Callable[[], Judge]]:
    """Return a judge of every registered method, and of every kind of rule."""
    every = {name: partial(judge_of, "tiny", name) for name in METHODS}
    bounded = partial(judge_of, "tiny", "src", Guarantee(alpha=0.3, max_error=0.5))
    return {**every, "by class": lambda: guaranteed_by_class(every["src"]()), "bounded": bounded}


@pytest.mark.parametrize("case", judges())
def test_the_chain_of_every_method_compiles_in_one_graph(case: str) -> None:
    judge = judges()[case]()
    if judge.signature.method.contributions:
        return  # see test_a_method_that_takes_gradients_is_refused
    torch.compiler.reset()
    compiled = torch.compile(Chain(judge), fullgraph=True, backend="eager", dynamic=True)
    monitor = Monitor(judge)
    with torch.no_grad():
        for count in (5, 3):
            images = images_for(judge, count)
            check(compiled(images), vars(monitor(images)))


@pytest.mark.parametrize("case", judges())
def test_a_call_waits_for_its_device_once(case: str) -> None:
    """A chain does not wait at all. Gradients need a real device, so there neurons are given."""
    judge = judges()[case]()
    judge.warm_up()
    neurons = torch.rand(6, sum(judge.signature.sizes))
    with fake_cuda() as device:
        moved, *given = device.moved((judge, torch.rand(6, len(CLASSES)), neurons))
        images, copies = device.moved(images_for(judge, 6)), device.copies
        assert not on_cuda(vars(moved(*given)))
        assert copies.back == 1
        if not judge.signature.method.contributions:
            monitor, before = Monitor(moved), copies.back
            for count, normalised in enumerate((False, True), 1):
                # The results are on the CPU then, where a fake tensor has no value either.
                with pytest.raises(DataDependentOutputException):
                    monitor(images, normalised=normalised)
                assert copies.back == before + count
            chain, before = Chain(moved), copies.back
            assert on_cuda(chain(images))
            assert copies.back == before


def test_errors_are_bounded_in_the_graph_too() -> None:
    judge = judge_of("vgg11", "src", Guarantee(alpha=0.3, max_error=0.5))
    images = images_for(judge, 6)
    expected = vars(Monitor(judge)(images))
    check(traced(judge).module()(images), expected)  # traced with gradients on


def test_what_is_no_number_is_untrusted() -> None:
    judge = judge_of("vgg11", "ensemble")
    whole, broken = images_for(judge, 3), images_for(judge, 3)
    broken[1, 0, 0, 0] = torch.nan
    whole_chain = Chain(judge)
    with torch.no_grad():
        for read in (whole_chain, exported("vgg11", "ensemble").module()):
            partial, others = read(broken), read(whole)
            check({k: v[::2] for k, v in partial.items()}, {k: v[::2] for k, v in others.items()})
            assert bool(partial["untrusted"][1])
            assert float(partial["score"][1]) == torch.inf
            assert float(partial["confidence"][1]) == 0
            fewest = 1 / (1 + len(judge.calibration.scores))
            assert float(partial["p_value"][1]) == pytest.approx(fewest)
            assert not bool(partial["unsure"][1])


def test_a_saved_program_needs_no_covcli(tmp_path: Path) -> None:
    judge = judge_of("vgg11", "src")
    torch.export.save(exported("vgg11", "src"), tmp_path / "chain.pt2")
    images = images_for(judge, 4)
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch; sys.modules['covcli'] = None\n"
        "program = torch.export.load(sys.argv[1] + '/chain.pt2').module()\n"
        "torch.save(program(torch.load(sys.argv[1] + '/images.pt')), sys.argv[1] + '/found.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    check(torch.load(tmp_path / "found.pt"), vars(Monitor(judge)(images)))


def test_a_method_that_takes_gradients_is_refused() -> None:
    with pytest.raises(CovcliError, match="gradients"):
        Chain(judge_of("vgg11", "nac"))
