"""Options take their defaults and their bounds from the configuration dataclasses."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from annotated_types import Interval
from test_cli import call

from covcli.cli import app
from covcli.commands.options import CommonOptions, PointsOptions
from covcli.core.errors import CovcliError, ExitCode
from covcli.evaluation.config import EvaluationConfig
from covcli.monitoring.config import CheckConfig
from covcli.monitoring.export_config import ExportConfig
from covcli.signature.config import MergeConfig, SignatureConfig
from covcli.training.config import TrainConfig

CONFIGS: dict[str, Any] = {
    "train": TrainConfig, "build-signature": SignatureConfig, "merge-signatures": MergeConfig,
    "evaluate": EvaluationConfig, "check": CheckConfig, "export": ExportConfig,
}  # fmt: skip
# With the options that are no fields of a configuration.
BOUNDED: list[tuple[str, Any]] = [
    *CONFIGS.items(), ("points", PointsOptions), ("evaluate", CommonOptions),
]  # fmt: skip
NEEDED = {
    "points": ["--model", "vgg11"],
    "train": [], "build-signature": ["c.pt"], "merge-signatures": ["a", "b", "--output", "c"],
    "evaluate": ["--untrusted", "photos"], "check": ["photos"], "export": [],
}  # fmt: skip


def intervals(hint: Any) -> list[Interval]:
    own = [entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Interval)]
    return own + [entry for part in get_args(hint) for entry in intervals(part)]


def is_whole(hint: Any) -> bool:
    return hint is int or any(map(is_whole, get_args(hint)))


def outside() -> list[tuple[str, Any, str, float]]:
    """Return for each bound of each configuration a value beyond it."""
    values = []
    for command, config in BOUNDED:
        for name, hint in get_type_hints(config, include_extras=True).items():
            step = 1 if is_whole(hint) else 1e-6
            for interval in intervals(hint):
                values += [
                    (command, config, name, end + by if step == 1 else float(end + by))
                    for end, by in (
                        (interval.ge, -step), (interval.gt, 0), (interval.le, step),
                        (interval.lt, 0),
                    )
                    if end is not None
                ]  # fmt: skip
                values += [(command, config, name, math.nan)] if step < 1 else []
    return values


def test_every_option_has_the_default_of_its_field() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    compared = 0
    for name, config in CONFIGS.items():
        options = {option.name: option.default for option in commands[name].params}
        for field in dataclasses.fields(config):
            if field.name in options and field.default is not dataclasses.MISSING:
                default = None if field.default == () else field.default
                assert options[field.name] == default, (name, field.name)
                compared += 1
    assert compared > 50


def test_every_whole_number_has_a_lower_and_an_upper_bound() -> None:
    counted = 0
    for _, config in BOUNDED:
        for name, hint in get_type_hints(config, include_extras=True).items():
            if is_whole(hint):
                (interval,) = intervals(hint)
                assert interval.ge is not None, name
                assert interval.le is not None or interval.lt is not None, name
                counted += 1
    assert counted > 10


@pytest.mark.parametrize(("command", "config", "name", "value"), outside())
def test_a_value_out_of_bounds_is_refused_alike_by_command_and_library(
    command: str, config: Any, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    option = f"--{name.replace('_', '-')}"
    code, out, err = call(capsys, command, *NEEDED[command], option, str(value))
    assert (code, out) == (ExitCode.BAD_INPUT, "")
    assert err.startswith(f"error: {option} {value}: must be ")
    assert err.count("\n") == 1
    needed = {
        field.name: () if "tuple" in str(field.type) else Path("x")
        for field in dataclasses.fields(config)
        if field.default is dataclasses.MISSING
    }
    with pytest.raises(CovcliError) as caught:
        config(**needed, **{name: value})
    assert f"error: {caught.value}\n" == err


def test_the_documents_list_every_exit_code() -> None:
    page = Path(__file__).parents[1] / "docs" / "pipelines.md"
    table = re.search(r"\| exit code.*?\n\n", page.read_text(), re.DOTALL)
    assert table is not None
    rows = re.findall(r"^\| ([\d, ]+) \|", table[0], re.MULTILINE)
    assert [int(code) for row in rows for code in row.split(",")] == list(ExitCode)
