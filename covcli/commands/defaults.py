"""The output of `covcli config`: the default of every option, and its source."""

import contextlib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

from covcli.commands.configuration import Commands, Configuration, shown
from covcli.core import settings

# The words that Typer reads as a flag's value.
FLAGS = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True)
FLAGS |= dict.fromkeys(("0", "false", "f", "no", "n", "off"), False)


@dataclass(frozen=True)
class Setting:
    """The default of one option.

    Attributes
    ----------
    command, option
        The command, and the option's long name.
    value
        A plain value; the text of a variable if it cannot be parsed.
    source
        The environment variable, the file, "default", or "required" without a default.
    """

    command: str
    option: str
    value: Any
    source: str


@dataclass(frozen=True)
class Settings:
    """The output of `config`: the source of every default.

    Attributes
    ----------
    file
        The file of settings; None without one.
    trusted
        Whether the user has consented to all its settings.
    settings
        The settings of each command, in the order of its help.
    gates
        The gates of the file, in the notation of `--fail-under` and `--fail-over`.
    """

    file: str | None
    trusted: bool
    settings: list[Setting]
    gates: list[str]

    @property
    def toml(self) -> str:
        """The settings in the form of a file, with the source of each."""
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
    """Return the default of every option with its source.

    Parameters
    ----------
    commands
        The options of each requested command.
    defaults
        Their own defaults, by Typer's name; `...` for no default.
    configuration
        The settings of the file.
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
    """Return the value of a variable in the option's type; its text if that is impossible."""
    if hint is bool:
        return FLAGS.get(text.strip().lower(), text)
    if get_origin(hint) is tuple:  # paths are separated like those of PATH, as Typer does it
        return text.split(os.pathsep if get_args(hint)[0] is Path else None)
    with contextlib.suppress(ValueError):  # includes TOML's errors
        return settings.conform(hint, tomllib.loads(f"value = {text}")["value"])
    return text


def _as_plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def unknown_variables(commands: Commands) -> list[str]:
    """Return a warning for each variable `COVCLI_…` that sets no option, with the nearest name."""
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
