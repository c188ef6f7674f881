"""Charts as inline SVG: small, sharp, and in the page's colours.

A page with a strict Content-Security-Policy allows no style attributes, and two charts on a page
must not share an id. So matplotlib's SVG is rewritten: styles become attributes, ids are prefixed
with the chart's name or removed, and colours come from the page's theme.
"""

import io
import re
import xml.etree.ElementTree as ET

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from covcli.reporting.pictures import COLOURS, GRID, QUIET, TEXT

SPACE = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
DROPPED = {f"{SPACE}{name}" for name in ("metadata", "style")}
# Elements with text; the font family is that of the page.
TEXTS = {"text", "tspan"}
KEPT_STYLES = {
    "fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap",
    "stroke-linejoin", "stroke-opacity", "fill-opacity", "opacity", "font-size", "font-weight",
    "text-anchor",
}  # fmt: skip
COORDINATES = {"d", "points", "x", "y", "width", "height", "transform"}
THEME = {
    **{colour: f"var(--series-{k})" for k, colour in enumerate(COLOURS)},
    TEXT: "currentColor", QUIET: "var(--quiet)", GRID: "var(--grid)",
}  # fmt: skip
_NUMBER = re.compile(r"-?\d+\.\d+")
_FONT = re.compile(r"(?:(?P<weight>bold) )?(?P<size>[\d.]+px)")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def inline(figure: Figure, name: str, seen: str) -> Markup:
    """Return a figure as an inline SVG element.

    Parameters
    ----------
    figure
        The figure.
    name
        The chart's name, unique on the page.
    seen
        The alternative text.
    """
    buffer = io.StringIO()
    options = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(options):
        figure.savefig(
            buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None}
        )
    root = ET.fromstring(buffer.getvalue())
    names = {target: f"{name}-{k}" for k, target in enumerate(sorted(_targets(root)))}
    _rewrite(root, names)
    width = float(root.get("viewBox", "0 0 480 0").split()[2])
    root.attrib = {
        "viewBox": root.get("viewBox", ""), "width": f"{width * 4 / 3:.0f}", "class": "chart",
        "role": "img", "aria-label": seen,
    }  # fmt: skip
    return Markup(ET.tostring(root, encoding="unicode", short_empty_elements=False))


def _targets(root: ET.Element) -> set[str]:
    """Return the ids that are referenced."""
    targets = set()
    for element in root.iter():
        for key, value in element.items():
            if key == LINK and value.startswith("#"):
                targets.add(value[1:])
            targets.update(_REFERENCE.findall(value))
    return targets


def _rewrite(element: ET.Element, names: dict[str, str]) -> None:
    """Rewrite an element and its children."""
    element.tag = element.tag.removeprefix(SPACE)
    element.attrib = dict(_attributes(element, names))
    for child in [child for child in element if child.tag in DROPPED]:
        element.remove(child)
    for child in element:
        _rewrite(child, names)
    for child in [child for child in element if child.tag in ("g", "defs") and not len(child)]:
        element.remove(child)
    if element.tag not in TEXTS:
        element.text = None
    element.tail = None


def _attributes(element: ET.Element, names: dict[str, str]) -> list[tuple[str, str]]:
    """Return an element's attributes for the page."""
    attributes = []
    for key, value in element.items():
        if key == "style":
            attributes += _styles(value, names)
        elif key == LINK:
            attributes.append(("href", f"#{names[value[1:]]}" if value.startswith("#") else value))
        elif key == "id":
            attributes += [("id", names[value])] if value in names else []
        elif key in COORDINATES:
            attributes.append((key, _NUMBER.sub(_rounded, value)))
        else:
            attributes.append((key, _named(value, names)))
    return attributes


def _styles(text: str, names: dict[str, str]) -> list[tuple[str, str]]:
    """Return the declarations of a style attribute as attributes."""
    attributes = []
    for declaration in filter(None, map(str.strip, text.split(";"))):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" and (font := _FONT.search(value)):
            attributes.append(("font-size", font["size"]))
            attributes += [("font-weight", font["weight"])] if font["weight"] else []
        elif key == "clip-path":
            attributes.append((key, _named(value, names)))
        elif key in KEPT_STYLES:
            attributes.append((key, THEME.get(value.lower(), value)))
    return attributes


def _named(value: str, names: dict[str, str]) -> str:
    return _REFERENCE.sub(lambda match: f"url(#{names[match[1]]})", value)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")
