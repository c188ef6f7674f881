"""What `covcli config` prints: the default of every option, and where it comes from."""

import contextlib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from covcli.commands.configuration import Commands, Configuration, shown
from covcli.core import settings


@dataclass(frozen=True)
class Setting:
    """The default of one option.

    Attributes
    ----------
    command, option
        The command, and the option's long name.
    value
        A plain value; text where the environment has no other.
    source
        The environment's variable, the file, "default", or "required" where there is no default.
    """

    command: str
    option: str
    value: Any
    source: str


@dataclass(frozen=True)
class Settings:
    """What `config` prints: where every default comes from.

    Attributes
    ----------
    file
        The file of settings; None where there is none.
    trusted
        Whether the user has said that it may be followed in all.
    settings
        Of each command, in the order of its help.
    gates
        Those of the file, as `--fail-under` and `--fail-over` take them.
    """

    file: str | None
    trusted: bool
    settings: list[Setting]
    gates: list[str]

    @property
    def toml(self) -> str:
        """The settings as a file has them, with where each comes from."""
        lines = ["# Precedence: option, environment, covcli.toml or pyproject.toml, default."]
        command = ""
        for entry in self.settings:
            if entry.command != command:
                command = entry.command
                lines += ["", f"[{command}]"]
            if entry.value is None:
                lines.append(f"# {entry.option} =  # {entry.source}")
            else:
                lines.append(f"{entry.option} = {shown(entry.value)}  # {entry.source}")
        return (
            "\n".join([*lines, *(f"# gate of {self.file}: {gate}" for gate in self.gates)]) + "\n"
        )


def describe(
    commands: Commands, defaults: Mapping[str, Mapping[str, Any]], configuration: Configuration
) -> Settings:
    """Return where the default of every option comes from.

    Parameters
    ----------
    commands
        The options of each command that is asked for.
    defaults
        Their own defaults, by Typer's name; `...` where there is none.
    configuration
        What the file sets.
    """
    entries = []
    for command, options in commands.items():
        for option in options.values():
            variable = next((v for v in option.variables(command) if os.environ.get(v)), None)
            value, source = defaults[command][option.parameter], "default"
            if value is ...:
                value, source = None, "required"
            if option.parameter in (of_file := configuration.values.get(command, {})):
                value, source = of_file[option.parameter], str(configuration.file)
            if variable is not None:
                value, source = _read(os.environ[variable], option.hint), variable
            entries.append(Setting(command, option.name, _as_plain(value), source))
    gates = [*configuration.under, *configuration.over]
    file = None if configuration.file is None else str(configuration.file)
    return Settings(file, configuration.trusted, entries, gates)


def _read(text: str, hint: Any) -> Any:
    """Return what a variable says, as the type that it is read as."""
    with contextlib.suppress(ValueError):  # TOML's errors are such too
        return settings.conform(hint, tomllib.loads(f"value = {text}")["value"])
    return text


def _as_plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def unknown_variables(commands: Commands) -> list[str]:
    """Say of each variable `COVCLI_…` that sets no option which it may have been meant to be."""
    known = {
        variable
        for command, options in commands.items()
        for option in options.values()
        for variable in option.variables(command)
    }
    warnings = []
    for variable in sorted(os.environ):
        if variable.startswith("COVCLI_") and variable not in known:
            near = get_close_matches(variable, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.append(f"{variable} sets no option{hint}")
    return warnings
