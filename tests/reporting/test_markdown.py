"""Markdown, held to a parser: whatever a name holds is shown as it is, and takes no effect."""

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from covcli.core.errors import one_line
from covcli.reporting import markdown
from covcli.reporting.tables import Table

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NAMES = st.text(st.sampled_from("ab1 ,.:/\\\\`*_{}[]()<>#+-=!|~$&;\"'\n\x1b"), max_size=24)


def shown(text: str) -> list[str]:
    """Return the text of each block as a reader sees it; any markup in it is a failure."""
    rows = []
    for token in PARSER.parse(text):
        assert token.type not in ("html_block", "heading_open", "hr", "fence", "code_block")
        if token.type == "inline":
            assert {child.type for child in token.children or []} <= {"text", "text_special"}
            rows.append("".join(child.content for child in token.children or []))
    return rows


@given(NAMES)
@example("[x](javascript:alert(1))")
@example("![x](http://a.b/c.png)")
@example("<img src=x onerror=alert(1)>")
@example("a|b")
@example("1. a")
@example("[1, 2](b)")
@example("[1, 2]: b")
@example("![1, 2][1, 2] a")
@example("&lt;b&gt;")
@example("> a")
def test_a_name_is_shown_as_it_is(name: str) -> None:
    assert shown(markdown.escape(name)) == [one_line(name)][: bool(one_line(name))]


@given(st.lists(st.lists(NAMES.map(one_line), min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_table_holds_its_cells_and_no_more(rows: list[list[str]]) -> None:
    text = markdown.table(Table("t", ["a", "b", "c"], rows))
    assert shown(text) == ["a", "b", "c", *[cell for row in rows for cell in row]]
