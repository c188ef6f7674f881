"""The documents: their commands and cells run, their links lead somewhere, the README is short."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_check import write_images
from pages import PAGES, ROOT, Block, blocks, commands, covcli_commands
from test_cli import call

from covcli.attacks import ATTACKS
from covcli.core.specs import Registry
from covcli.data import DATASETS
from covcli.methods import METHODS
from covcli.models import MODELS
from covcli.models import checkpoint as checkpoints
from covcli.reporting.sections import SECTIONS

EVERY = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"sh", "python", "yaml", "toml", "json", "text"}
TOLD = re.compile(r"|slow|no-run \(.+\)|file=[\w.]+")


@contextmanager
def own_registries() -> Iterator[None]:
    """Forget afterwards what a plugin has registered: the next command reads it again."""
    registries: tuple[Registry[Any], ...] = (ATTACKS, DATASETS, METHODS, MODELS, SECTIONS)
    before = [dict(registry._entries) for registry in registries]
    try:
        yield
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry._entries = entries


def run_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a covcli command in this process, its stdout into a file where `>` says so."""
    target = Path(words.pop()) if len(words) > 1 and words[-2] == ">" else None
    name, *arguments = words[:-1] if target else words
    assert name == "covcli", f"{name}: mark the block `slow`, or say why it does not run"
    with own_registries():
        code, out, err = call(capsys, *arguments)
    assert code == 0, err
    if target:
        target.write_text(out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_where_the_demo_ends(
    page: Path,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = [block for block in blocks(page) if block.told == "" or "file=" in block.told]
    shutil.copytree(demo, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in mine:
        if "file=" in block.told:
            Path(block.told.removeprefix("file=")).write_text(block.text)
        elif block.language == "python":
            with own_registries():
                exec(compile("\n" * (block.line - 1) + block.text, block.place, "exec"), names)
        elif block.language == "sh":
            for words in commands(block.text):
                run_line(words, capsys)


@pytest.mark.parametrize("name", ["README.md", "docs/getting-started.md", "docs/pipelines.md"])
def test_the_lines_for_weights_and_folders_of_ones_own_run(
    name: str,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A small network stands in for the ResNet."""
    monkeypatch.chdir(tmp_path)
    for folder, spec in (("photos", "digits?limit=900"), ("held-out", "digits?offset=900")):
        write_images(f"{spec}&shuffle=0", tmp_path / folder, True, 4)
    write_images("digits?split=test&limit=200", tmp_path / "test", True, 4)
    write_images("photos?limit=60", tmp_path / "strange", False, 4)
    model = checkpoints.load(demo / "runs" / "demo" / "checkpoint.pt").model
    torch.save(model.network.state_dict(), "weights.pt")
    shell = [block for block in blocks(ROOT / name) if block.language == "sh"]
    (block,) = [b for b in shell if "weights.pt" in b.text and "DATA" not in b.text]
    for words in commands(block.text.replace("--model resnet18", "--model tiny")):
        run_line(words, capsys)
    assert (tmp_path / "runs" / "latest" / "report.html").is_file()


@pytest.mark.parametrize("block", EVERY, ids=lambda block: block.place)
def test_a_block_says_what_it_is_and_names_real_options(block: Block) -> None:
    assert block.language in LANGUAGES, block.place
    assert TOLD.fullmatch(block.told), block.place
    if block.language not in ("sh", "yaml"):
        return
    from typer.main import get_command

    from covcli.cli import app

    known = get_command(app)
    for arguments in covcli_commands(block):
        name, *rest = arguments
        command = known.commands[name]  # type: ignore[attr-defined]
        try:
            command.make_context(name, list(rest))
        except Exception as error:  # what is missing may stand in a file of settings
            if type(error).__name__ not in ("MissingParameter", "Exit"):
                raise


def anchors(page: Path) -> set[str]:
    """Return the names by which GitHub links a document's headings."""
    outside = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    outside = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", outside):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not heading or heading in anchors(other), target


def test_every_page_is_in_the_index_and_opens_with_an_example() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.name in ("README.md", "changelog.md"):
            continue
        assert f"({page.name})" in index
        before, _, _ = page.read_text().partition("\n## ")
        assert "\n```" in before, page.name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1500
