"""Help for narrow terminals: each parameter's text is below its names, not in a column."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NARROWEST = 72  # columns that panels need


def stacked(command: Any, context: Any, width: int) -> str:
    """Return the help of a command, each parameter's text below its names.

    Parameters
    ----------
    command, context
        Typer's command and context.
    width
        In characters.
    """
    lines = ["", *_wrapped(command.get_usage(context), width, " "), ""]
    lines += _wrapped(command.help or "", width, " ")
    panels: dict[str, list[Any]] = {}
    for parameter in command.get_params(context):
        panels.setdefault(parameter.rich_help_panel or "Arguments", []).append(parameter)
    for title, parameters in panels.items():
        lines += ["", f" {title}"]
        for parameter in parameters:
            lines += _parameter(parameter, context, width)
    lines += ["", *(line for t in command.epilog.splitlines() for line in _wrapped(t, width, " "))]
    return "\n".join(lines) + "\n"


def _parameter(parameter: Any, context: Any, width: int) -> Iterator[str]:
    names = parameter.opts if parameter.param_type_name == "option" else [parameter.name]
    yield f"  {', '.join(names)} {parameter.metavar or ''}".rstrip()
    default = context.lookup_default(parameter.name)
    default = parameter.default if default is None else default
    note = f"default: {default}" if isinstance(default, (int, float, str, Path)) else ""
    note = "required" if parameter.required else note
    empty = default is False or default == "" or not note
    yield from _wrapped(f"{parameter.help}{'' if empty else f' [{note}]'}", width, " " * 6)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
