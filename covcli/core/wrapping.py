"""Wrapping of text to a width, between words, and inside a long word after punctuation."""

import re

from rich.cells import cell_len


def wrapped(text: str, width: int) -> list[str]:
    """Return text as lines; a word wider than the line is broken after a punctuation mark.

    Parameters
    ----------
    text
        Words with spaces between them.
    width
        The width in cells of a terminal.

    Examples
    --------
    >>> wrapped("making attack:pgd?eps=8/255&steps=20", 20)
    ['making attack:pgd?', 'eps=8/255&steps=20']
    """
    lines = [""]
    for word in text.split(" "):
        parts = [word] if cell_len(word) <= width else re.findall(r"[^/?&:,=]*[/?&:,=]?", word)
        space = " " if lines[-1] else ""
        for part in parts:
            if lines[-1] and cell_len(lines[-1] + space + part) > width:
                lines.append(part)
            else:
                lines[-1] += space + part
            space = ""
    return lines
