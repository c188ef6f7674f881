"""Markdown: escaping of text, and tables, lists and documents."""

import re
from collections.abc import Iterable

from covcli.core.errors import one_line
from covcli.reporting.tables import Table

# Characters of emphasis, code, links, images, cells, strikethrough, mathematics and escapes.
_ACTIVE = re.compile(r"[\\`*_\[\]|~$]")
# An interval is not escaped: brackets that nothing follows are not a link.
_INTERVAL = re.compile(r"(\[[\d.]+, [\d.]+\])(?![(\[:])")
# Characters that start a heading, a list or a rule at the start of a line.
_LEADING = re.compile(r"^(?:[#+=>-]|\d+(?=[.)](?:\s|$)))")
# Addresses that a renderer links automatically.
_ADDRESS = re.compile(r":(?=//)|(?<=\bwww)\.", re.IGNORECASE)
_HTML = {"&": "&amp;", "<": "&lt;"}


def escape(text: str) -> str:
    r"""Escape text so that Markdown shows it literally: no link, image, HTML, cell or emphasis.

    Examples
    --------
    >>> print(escape("![x](http://a.b) | <b> 1.5 [1.2, 1.8]"))
    !\[x\](http\://a.b) \| &lt;b> 1.5 [1.2, 1.8]
    """
    parts = _INTERVAL.split(one_line(text))
    parts[::2] = [_ACTIVE.sub(r"\\\g<0>", part) for part in parts[::2]]
    plain = "".join(_HTML.get(character, character) for character in "".join(parts))
    plain = _ADDRESS.sub(r"\\\g<0>", plain)
    return _LEADING.sub(_behind, plain)


def _behind(first: re.Match[str]) -> str:
    """Escape a character that would start a block; for a number, the dot behind it."""
    marker = first[0]
    return f"{marker}\\" if marker.isdigit() else f"\\{marker}"


def table(content: Table) -> str:
    """Return a table's head and rows as a Markdown table."""
    lines = [_row(content.head), _rule(len(content.head)), *map(_row, content.lines)]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"


def _rule(columns: int) -> str:
    return f"| {' | '.join(['---'] * columns)} |"


def bullets(items: Iterable[str]) -> str:
    """Return a list, one item per line."""
    return "\n".join(f"- {escape(item)}" for item in items)


def document(blocks: Iterable[str]) -> str:
    """Join blocks of Markdown to a document."""
    return "\n\n".join(block for block in blocks if block) + "\n"
