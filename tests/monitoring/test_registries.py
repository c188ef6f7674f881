"""list: the registries as they are, with the parameters that specifications take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from covcli.attacks.attacks import ATTACKS, make_attack
from covcli.core.choices import REGISTRIES
from covcli.core.specs import parse
from covcli.data.datasets import DATASETS
from covcli.data.images import ImageSet, in_memory
from covcli.data.registry import Request
from covcli.evaluation.baselines.detectors import BASELINES
from covcli.methods import METHODS, make_method
from covcli.models.registry import MODELS
from covcli.monitoring.registries import Registered, list_registered
from covcli.reporting.sections import SECTIONS

HERE = Path(__file__).parents[1]


NO_WIDTH = {name: value for name, value in os.environ.items() if name != "COLUMNS"}


def covcli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "covcli", *arguments],
        capture_output=True, text=True, env={**NO_WIDTH, **environment},
    )  # fmt: skip


def entries(kind: str) -> dict[str, Registered]:
    return {entry.name: entry for entry in list_registered([kind]).entries}  # type: ignore[list-item]


@pytest.mark.usefixtures("_shipped")
def test_every_registry_is_listed_whole_and_every_entry_says_what_it_is() -> None:
    for kind, registry in {
        "models": MODELS, "datasets": DATASETS, "methods": METHODS, "attacks": ATTACKS,
        "baselines": BASELINES, "sections": SECTIONS,
    }.items():  # fmt: skip
        assert set(registry) <= set(entries(kind)), kind
    listed = list_registered().entries
    assert [kind for kind in REGISTRIES if kind not in {e.kind for e in listed}] == []
    for entry in listed:
        assert entry.name == "tiny" or entry.summary, entry
        assert "\n" not in entry.summary


def test_the_parameters_are_those_that_specifications_take() -> None:
    for name, entry in entries("methods").items():
        parameters = "&".join(f"{key}={value}" for key, value in entry.parameters.items())
        assert make_method(f"{name}?{parameters}" if parameters else name) == make_method(name)
    for name, entry in entries("attacks").items():
        given = {k: v for k, v in entry.parameters.items() if v is not None}
        parameters = "&".join(f"{key}={value}" for key, value in given.items())
        make_attack(parse(f"attack:{name}?{parameters}"))
    assert entries("attacks")["pgd"].parameters["eps"] == 8 / 255
    assert {"limit", "labels-from"} <= entries("datasets")["npz"].parameters.keys()
    assert "of" in entries("datasets")["corrupt"].parameters


def test_a_data_set_of_a_plugin_is_listed_and_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def mine(request: Request) -> ImageSet:
        """My own images."""
        loaded.append(request)
        return in_memory("mine", [], None)

    monkeypatch.setitem(DATASETS._entries, "mine", mine)
    assert entries("datasets")["mine"].summary == "My own images."
    assert loaded == []


def test_the_command_prints_a_line_each_or_one_document() -> None:
    done = covcli("list", "methods")  # into a pipe, which has no width
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert "sections=10" in next(line for line in lines if line.startswith("mrc "))
    plugin = str(HERE / "tiny_model.py")
    done = covcli("list", "--json", "--plugin", plugin, FORCE_COLOR="1")
    entries = json.loads(done.stdout)["entries"]
    assert ("models", "tiny") in {(entry["kind"], entry["name"]) for entry in entries}
    assert {entry["kind"] for entry in entries} == set(REGISTRIES)
    done = covcli("list", "modles")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "'models'" in done.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m covcli list | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
