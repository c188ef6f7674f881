"""Defaults from covcli.toml, or from [tool.covcli] in pyproject.toml, of the current folder.

Precedence: the command line, then `COVCLI_…` in the environment, then the file, then covcli's own
default. Another person may have written the file. A value that could run code, overwrite results or
reach outside the folder therefore needs the user's consent, see `needs_word`.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from covcli.core import consent, settings
from covcli.core.errors import CovcliError, in_words
from covcli.core.opening import exists, open_regular, real

NAMES = ("covcli.toml", "pyproject.toml")
LARGEST = 1 << 20  # bytes; a file of settings is far smaller
GATE_OPTIONS = ("fail-under", "fail-over")
# Settings that name images, and those that always need the user's consent.
IMAGES = {"trusted", "untrusted", "calibration"}
PATHS = {"resume"}  # it may also be the name of a run
GRAVE = {"plugin": "runs code", "force": "overwrites results"}
WORD = "read the file, and say `covcli config --trust`, or give the option yourself"


@dataclass(frozen=True)
class Settable:
    """An option that a file may set.

    Attributes
    ----------
    name
        Its long name without dashes, `batch-size`.
    parameter
        Its name in Typer, `batch_size`.
    hint
        The type and bounds of its value.
    """

    name: str
    parameter: str
    hint: Any

    def variables(self, command: str) -> list[str]:
        """Return its environment variables, the most specific first."""
        names = [f"{command}-{self.name}", self.name]
        return [f"COVCLI_{name.upper().replace('-', '_')}" for name in names]


Commands = Mapping[str, Mapping[str, Settable]]


@dataclass(frozen=True)
class Configuration:
    """The settings of a file.

    Attributes
    ----------
    file
        The file; None without one.
    digest
        The digest of its content.
    values
        For each command the values of its options, by Typer's name.
    under, over
        The gates, in the notation of `--fail-under` and `--fail-over`.
    """

    file: Path | None = None
    digest: str = ""
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    under: tuple[str, ...] = ()
    over: tuple[str, ...] = ()

    @property
    def trusted(self) -> bool:
        """Whether the user has consented to all settings of this file in its present content."""
        from covcli.core import state

        if self.file is None or (folder := state.folder()) is None:
            return False
        try:
            seal = (folder / "configurations" / _key(self.file)).read_text()
        except (OSError, UnicodeDecodeError):
            return False
        return state.holds(seal, *self._words)

    def trust(self) -> None:
        """Record that the user trusts this file's present content; a change revokes it."""
        from covcli.core import state

        if self.file is None:
            raise CovcliError(f"no {NAMES[0]} and no {NAMES[1]} with [tool.covcli] here")
        if (folder := state.folder()) is None or not (seal := state.seal(*self._words)):
            raise CovcliError("there is no folder that only you can write", where="--trust")
        place = folder / "configurations"
        place.mkdir(mode=0o700, exist_ok=True)
        (place / _key(self.file)).write_text(seal)

    @property
    def _words(self) -> tuple[str, ...]:
        assert self.file is not None
        return ("configuration", str(self.file.resolve()), self.digest)

    def allow(self, parameter: str, name: str, value: Any) -> None:
        """Raise a CovcliError if a value of the file needs the user's consent and lacks it."""
        if (reason := needs_word(parameter, value)) is None or self.trusted:
            return
        question = f"{self.file} sets {name} = {shown(value)}, which {reason}. Follow it?"
        if not consent.agrees(question):
            raise CovcliError(f"{name} = {shown(value)}: {reason}", where=self.file, fix=WORD)


def _key(file: Path) -> str:
    return _digest(str(file.resolve()).encode(errors="surrogateescape"))


def _digest(content: bytes) -> str:
    import hashlib  # not for a command's help, which has no file to read

    return hashlib.sha256(content).hexdigest()


def needs_word(parameter: str, value: Any) -> str | None:
    """Return why a value from a file needs the user's consent; None if it does not.

    Parameters
    ----------
    parameter
        The option's name in Typer.
    value
        The value in the file.

    Examples
    --------
    >>> needs_word("plugin", ("mine.py",)), needs_word("seed", 3)
    ('runs code', None)
    >>> needs_word("untrusted", ["mnist", "folder:photos"])
    >>> needs_word("untrusted", ["folder:/home/me/photos"])
    'reaches outside this folder'
    """
    if parameter in GRAVE:
        return GRAVE[parameter] if value else None
    values = value if isinstance(value, (list, tuple)) else [value]
    if parameter in IMAGES:
        outside = any(_names_outside(text) for text in values)
    else:
        paths = [Path(e) for e in values if isinstance(e, Path) or parameter in PATHS]
        outside = any(_is_outside(path) for path in paths)
    return "reaches outside this folder" if outside else None


def _names_outside(text: str) -> bool:
    """Return whether any part of a specification is a path that leads out of this folder."""
    for part in text.replace("?", ":").replace("&", ":").replace("=", ":").split(":"):
        if part.startswith(("/", "~", "\\")) or ".." in Path(part).parts or "%" in part:
            return True
        if exists(Path(part)) and _is_outside(Path(part)):
            return True
    return False


def _is_outside(path: Path) -> bool:
    """Return whether a path leads out of the current folder, links followed."""
    return not real(path).is_relative_to(real(Path.cwd()))


def load(commands: Commands) -> Configuration:
    """Read the file of the current folder, and check every name, type and bound in it.

    Parameters
    ----------
    commands
        The options of each command, by their long names.

    Raises
    ------
    CovcliError
        If there are two files, or the file is not TOML, has an unknown key or an invalid value. The
        message names the file, the key and the nearest name.
    """
    files = list(_files())
    if len(files) > 1:
        raise CovcliError(f"{NAMES[0]} and {NAMES[1]} both hold settings", fix="keep one")
    if not files:
        return Configuration()
    file, content, table = files[0]
    values = _Reader(file, commands).read(table)
    under, over = _gates(file, table.get("gates", []))
    return Configuration(file, _digest(content), values, under, over)


def _files() -> Iterator[tuple[Path, bytes, dict[str, Any]]]:
    """Yield each file that holds settings, its content and the table with them."""
    for name in NAMES:
        file = Path(name)
        try:
            with open_regular(file) as opened:
                content = opened.read(LARGEST + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CovcliError(f"cannot be read ({error.strerror})", where=file) from None
        if name != NAMES[0] and b"covcli" not in content:
            continue  # a project without settings of covcli; its file is not validated
        table: Any = _parsed(file, content)
        if name != NAMES[0]:
            tool = table.get("tool")
            table = tool.get("covcli") if isinstance(tool, dict) else None
        if table is None:
            continue
        if not isinstance(table, dict):
            raise CovcliError("tool.covcli must be a table", where=file)
        yield file, content, table


def _parsed(file: Path, content: bytes) -> dict[str, Any]:
    if len(content) > LARGEST:
        raise CovcliError("is larger than a megabyte", where=file)
    try:
        return tomllib.loads(content.decode("utf-8-sig"))  # some editors mark UTF-8
    except UnicodeDecodeError:
        raise CovcliError("is not UTF-8", where=file) from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise CovcliError(f"is not TOML: {error}", where=file) from None


@dataclass(frozen=True)
class _Reader:
    """Reads the table of one file."""

    file: Path
    commands: Commands

    def read(self, table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the values for each command; a command's own table overrides the common keys."""
        values: dict[str, dict[str, Any]] = {name: {} for name in self.commands}
        tables = {key: value for key, value in table.items() if key in self.commands}
        for key, value in table.items():
            if key in tables or key == "gates":
                continue
            users = [name for name, options in self.commands.items() if _name(key) in options]
            if not users:
                known = {*tables, *self.commands, "gates"}
                known |= {option for options in self.commands.values() for option in options}
                raise self._unknown(key, "no command or option", known)
            for name in users:
                self._set(values[name], self.commands[name][_name(key)], key, value)
        for command, entries in tables.items():
            if not isinstance(entries, dict):
                raise CovcliError(f"{command} must be a table", where=self.file)
            given: dict[str, Any] = {}
            for key, value in entries.items():
                options = self.commands[command]
                if _name(key) not in options:
                    raise self._unknown(f"{command}.{key}", f"no option of {command}", {*options})
                self._set(given, options[_name(key)], f"{command}.{key}", value)
            values[command] |= given
        return values

    def _set(self, values: dict[str, Any], option: Settable, key: str, value: Any) -> None:
        if option.parameter in values:
            raise CovcliError(f"{key} is set twice, once with _ for -", where=self.file)
        try:
            settled = settings.conform(option.hint, value)
            if isinstance(settled, Path) and settled.parts[:1] == ("~",):
                raise ValueError("in a file ~ is no folder of yours: write the whole path")
        except ValueError as error:
            raise CovcliError(f"{key} = {shown(value)}: {error}", where=self.file) from None
        values[option.parameter] = settled

    def _unknown(self, key: str, what: str, known: set[str]) -> CovcliError:
        near = get_close_matches(_name(key.rpartition(".")[2]), sorted(known), n=1)
        fix = f"did you mean {near[0]!r}?" if near else "`covcli config` lists them"
        return CovcliError(f"{key} is {what}", where=self.file, fix=fix)


def _name(key: str) -> str:
    return key.replace("_", "-")


def _gates(file: Path, entries: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the gates of a file in the notation of `--fail-under` and of `--fail-over`."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CovcliError("gates must be tables, each below [[gates]]", where=file)
    texts: dict[str, list[str]] = {option: [] for option in GATE_OPTIONS}
    for number, entry in enumerate(entries, 1):
        where = f"{file}: gate {number}"
        given = {_name(key): value for key, value in entry.items()}
        for key in given.keys() - {"metric", "set", *GATE_OPTIONS}:
            raise CovcliError(
                f"unknown key {key!r}; known: metric, set, fail-under, fail-over", where=where
            )
        bounds = [key for key in GATE_OPTIONS if key in given]
        if len(bounds) != 1 or "metric" not in given:
            raise CovcliError("needs metric, and either fail-under or fail-over", where=where)
        bound = given[bounds[0]]
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            raise CovcliError(f"{bounds[0]} = {shown(bound)}: must be a number", where=where)
        for key in ("metric", "set"):
            if not isinstance(given.get(key, ""), str):
                raise CovcliError(f"{key} = {shown(given[key])}: must be a string", where=where)
        of = f"{given['set']}:" if "set" in given else ""
        texts[bounds[0]].append(f"{of}{given['metric']}={bound}")
    return tuple(texts["fail-under"]), tuple(texts["fail-over"])


def shown(value: Any) -> str:
    """Return a value in TOML's notation."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, (int, float, date, time)):
        return in_words(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {shown(entry)}' for key, entry in value.items())}}}"
    text = json.dumps(str(value), ensure_ascii=False)
    return "".join(c if c.isprintable() else rf"\U{ord(c):08x}" for c in text)
