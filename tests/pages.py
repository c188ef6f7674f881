"""The documents' fenced blocks: what is a command, what is a cell, and what is not to be run.

```sh             each line a covcli command; runs with the tests
```sh slow        any shell script; runs with `make docs-check`
```sh no-run (…)  does not run, and says why
```python         a cell; the cells of a page share their names
```python file=F  the content of a file that later blocks of the page use
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / ".github").glob("*.md")),
]
_FENCE = re.compile(r"^```(\S+)?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes
    ----------
    page
        The document.
    line
        Where the block's text begins in it, from 1 on.
    language
        What the fence names first.
    told
        The rest of the fence: empty, `slow`, `no-run (why)` or `file=NAME`.
    text
        What stands in the block.
    """

    page: Path
    line: int
    language: str
    told: str
    text: str

    @property
    def place(self) -> str:
        """The document and the line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return a document's fenced blocks in their order."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, m.start(3)) + 1, m[1] or "", m[2].strip(), m[3])
        for m in _FENCE.finditer(text)
    ]


def commands(script: str) -> Iterator[list[str]]:
    """Yield the words of each line of a script, continued lines joined and remarks left out."""
    for line in re.sub(r"\\\n\s*", " ", script).splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def covcli_commands(block: Block) -> Iterator[list[str]]:
    """Yield the arguments of the block's covcli commands, wherever in a line they stand."""
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        for inner in re.findall(r'"\$\(covcli ([^)]*)\)"', line):
            yield shlex.split(inner)
        whole = re.sub(r'"\$\([^)]*\)"', "SUBSTITUTED", line)
        if match := re.match(r"\s*(?:- )?(?:run: )?(?:torchrun .* -m )?covcli (.*)", whole):
            words = shlex.split(match[1], comments=True)
            yield words[: words.index(">")] if ">" in words else words
