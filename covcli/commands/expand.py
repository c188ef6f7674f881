"""Commands whose parameters are dataclasses: each field becomes an option.

A command names its settings, `def train(config: TrainConfig, common: CommonOptions)`, and Typer
gets one parameter a field. A table by dataclass and field has the help, the panel and the names;
the type, the default, the choices and the bounds are the field's own.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo, OptionInfo

from covcli.commands import stacked
from covcli.commands.configuration import Settable
from covcli.core import consent, output, settings
from covcli.core.errors import CovcliError, is_memory_error

# The panels of a command's help, in their order.
WHAT, NETWORK, IMAGES = "What to do", "Network", "Images"
GUARANTEE, MACHINE, OUTPUT = "Guarantee", "Machine", "Output"
METAVARS: dict[object, str] = {bool: "", int: "N", float: "X", Path: "PATH", str: "TEXT"}
LONGEST_CHOICE = 20  # characters; the help text must list longer choices
ASKS_FOR_HELP = "covcli.help"  # of a context's notes
PANELS = [WHAT, NETWORK, IMAGES, GUARANTEE, MACHINE, OUTPUT]


@dataclass(frozen=True)
class Help:
    """How a field is shown on the command line.

    Attributes
    ----------
    help
        One sentence; the bounds of the field are added to it.
    panel
        Its panel in the help; "" for an argument, which has no name.
    names
        Its names, if `--field-name` is not the only one.
    metavar
        The placeholder of its value, if its type is not clear enough.
    parser
        Parses the given text.
    completes
        Returns the completions of a word for the shell.
    """

    help: str
    panel: str = ""
    names: tuple[str, ...] = ()
    metavar: str = ""
    parser: Callable[[str], Any] | None = None
    completes: Callable[[str], list[str]] | None = None


OptionTable: TypeAlias = Mapping[type, Mapping[str, Help]]


class Command(TyperCommand):
    """A command that writes to stdout through `core.output` only.

    The environment sets its options too: `COVCLI_EVALUATE_ALPHA`, and `COVCLI_ALPHA` for every
    command that has such an option.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        for option in options_of(self).values():
            shown = next(entry for entry in self.params if entry.name == option.parameter)
            shown.envvar = option.variables(str(name))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; an error names the command, which Typer may omit."""
        is_empty = any(word == "" or (word[:2] == "--" and word[-1] == "=") for word in args)
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise
        if is_empty:
            self._refuse_empty_paths(ctx)
        return rest

    def _refuse_empty_paths(self, ctx: Any) -> None:
        """Raise a CovcliError for an empty path, as of an unset variable: it means no folder."""
        for option in self.params:
            value = ctx.params.get(str(option.name))
            if Path() in (value if isinstance(value, list | tuple) else [value]):
                raise CovcliError("an empty path", where=option.opts[0])

    def invoke(self, ctx: Any) -> Any:
        """Run the command; output of libraries goes to stderr.

        The advice in an error contains only options of this command.
        """
        try:
            self._check_file_values(ctx)
            with output.apart(), _memory_errors_worded():
                return super().invoke(ctx)
        except SystemExit as end:  # from a plugin: an unfinished command must not exit with 0
            raise RuntimeError(f"something called exit({end.code})") from end
        except CovcliError as error:
            error.advise([name for option in self.params for name in option.opts])
            raise

    def _check_file_values(self, ctx: Any) -> None:
        """Raise a CovcliError if a value from a file needs the user's consent and lacks it."""
        consent.ask_on_terminals()
        for option in self.params:
            source = ctx.get_parameter_source(option.name)
            if source is not None and source.name == "DEFAULT_MAP":
                ctx.obj.allow(option.name, long_name(option), ctx.params[option.name])

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option --help, in a panel like the others."""
        option: Any = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel, option.metavar = OUTPUT, ""
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help without the --no-… forms of flags."""
        from rich.console import Console

        for option in self.params:
            option.secondary_opts = []
        if (width := Console().width) < stacked.NARROWEST:
            formatter.write(stacked.stacked(self, ctx, width))
        else:
            super().format_help(ctx, formatter)


@contextmanager
def _memory_errors_worded() -> Iterator[None]:
    """Raise a CovcliError where memory is exhausted, whatever a library raises there."""
    try:
        yield
    except CovcliError:
        raise
    except Exception as error:
        if not is_memory_error(error):
            raise
        raise CovcliError(
            "memory exhausted", fix="try a smaller --batch-size, or try another --device"
        ) from error


class Group(TyperGroup):
    """The group of all commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, and record whether help is requested."""
        ctx.meta[ASKS_FOR_HELP] = not args or bool({*ctx.help_option_names} & {*args})
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> Any:
        """Return the options; flags default to False, because for None Typer imports pydantic."""
        params = super().get_params(ctx)
        for flag in params:
            if flag.default is None and getattr(flag, "is_flag", False):
                flag.default = False
            if getattr(flag, "is_flag", False):
                flag.metavar = ""
        return params


class App(typer.Typer):
    """An application whose commands may take dataclasses.

    Parameters
    ----------
    table
        How the fields of dataclasses are shown.
    settings
        As for `typer.Typer`.
    """

    def __init__(self, table: OptionTable, **settings: Any) -> None:
        super().__init__(cls=Group, **settings)
        self._table = table

    def command(  # type: ignore[override]
        self, name: str | None = None, *, examples: str = "", **settings: Any
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Return a decorator that adds a command; its help ends with the examples."""
        if lines := examples.strip().splitlines():
            settings["epilog"] = "\n".join(["Examples:", *(f"$ {line.strip()}" for line in lines)])
        add = super().command(name, cls=Command, **settings)

        def decorate(command: Callable[..., None]) -> Callable[..., None]:
            add(expanded(command, self._table))
            return command

        return decorate


def expanded(command: Callable[..., None], table: OptionTable) -> Callable[..., None]:
    """Return a function for Typer, with a parameter for each field of a dataclass.

    A field that is not in the table is not an option, and keeps its default.

    Parameters
    ----------
    command
        A function; each parameter is a dataclass of the table, or an option of Typer.
    table
        How the fields are shown.

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class Config:
    ...     epochs: int = 3
    ...     internal: bool = False
    >>> def show(config: Config) -> None:
    ...     print(config)
    >>> function = expanded(show, {Config: {"epochs": Help("Number of epochs.", WHAT)}})
    >>> list(inspect.signature(function).parameters)
    ['epochs']
    >>> function(epochs=4)
    Config(epochs=4, internal=False)
    """
    kinds: dict[str, type] = {}
    hints: dict[str, Any] = {}  # with their bounds, to validate the values of a file
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind = parameter.annotation
        if isinstance(kind, type) and is_dataclass(kind):
            kinds[name] = kind
            hints |= get_type_hints(kind, include_extras=True)
            parameters += _parameters(kind, table[kind])
        else:
            hints[name] = get_args(kind)[0] if get_origin(kind) is Annotated else kind
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        for name, kind in kinds.items():
            given = {key: values.pop(key) for key in table[kind]}
            settled = {key: _settled(value) for key, value in given.items() if value is not None}
            values[name] = kind(**settled)
        command(**values)

    parameters.sort(key=_place)
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__module__ = command.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    run.hints = hints  # type: ignore[attr-defined]
    return run


def _parameters(kind: type, table: Mapping[str, Help]) -> list[inspect.Parameter]:
    """Return Typer's parameter for each field in the table."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field),
            annotation=_annotation(kind, field, hints[field.name], table[field.name]),
        )
        for field in fields(kind)
        if field.name in table
    ]  # fmt: skip


def long_name(option: Any) -> str:
    """Return the first long name of an option without dashes, `batch-size`."""
    return str(next(name for name in option.opts if name.startswith("--"))).removeprefix("--")


def options_of(command: Any) -> dict[str, Settable]:
    """Return the options of a command that a file may set, by their long names."""
    hints = command.callback.hints
    return {
        long_name(option): Settable(long_name(option), option.name, hints[option.name])
        for option in command.params
        if option.param_type_name == "option"
    }


def defaults_of(command: Any) -> dict[str, Any]:
    """Return the defaults of a command's options by Typer's names; `...` for no default."""
    return {option.name: ... if option.required else option.default for option in command.params}


def _default(field: "Field[Any]") -> Any:
    if field.default is MISSING:
        return inspect.Parameter.empty
    return None if field.default == () else field.default


def _annotation(kind: type, field: "Field[Any]", hint: Any, shown: Help) -> Any:
    """Return a field's annotation for Typer."""
    plain = _plain(hint)
    if get_origin(plain) is list and field.default == ():
        plain = plain | None
    if not shown.panel:
        return Annotated[plain, typer.Argument(help=shown.help)]
    bounds = settings.bounds(kind, field.name)
    name = f"--{field.name.replace('_', '-')}"
    names = shown.names if any(n.startswith("--") for n in shown.names) else (name, *shown.names)
    if plain is bool:
        names = (f"{names[0]}/--no-{names[0].removeprefix('--')}", *names[1:])
    option = typer.Option(
        *names, parser=shown.parser, rich_help_panel=shown.panel, show_envvar=False,
        metavar=shown.metavar or _metavar(plain), autocompletion=shown.completes,
        help=f"{shown.help.removesuffix('.')}, {bounds}." if bounds else shown.help,
    )  # fmt: skip
    return Annotated[plain, option]


def _metavar(hint: Any) -> str:
    """Return the placeholder of a value of a type in the help."""
    if get_origin(hint) is Literal:
        choices = "|".join(map(str, get_args(hint)))
        return choices if len(choices) <= LONGEST_CHOICE else "CHOICE"
    inner = [part for part in get_args(hint) if part is not type(None)]
    return _metavar(inner[0]) if inner else METAVARS.get(hint, "TEXT")


def _plain(hint: Any) -> Any:
    """Return a type for Typer: without bounds, and a list for a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _plain(inner[0])
    if origin in (Union, UnionType):
        return Union[tuple(_plain(part) for part in inner)]  # noqa: UP007 - their number varies
    if origin is tuple:
        return list[_plain(inner[0])]  # type: ignore[misc]
    return hint


def _settled(value: Any) -> Any:
    """Return a given value in the form for a dataclass."""
    return tuple(value) if isinstance(value, list) else value


def _place(parameter: inspect.Parameter) -> int:
    """Return the position of a parameter: arguments first, then panel by panel."""
    for entry in get_args(parameter.annotation)[1:]:
        if isinstance(entry, ArgumentInfo):
            return -1
        if isinstance(entry, OptionInfo) and entry.rich_help_panel in PANELS:
            return PANELS.index(entry.rich_help_panel)
    return len(PANELS)
