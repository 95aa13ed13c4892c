"""`to_svg`: a matplotlib figure as a small `<svg>` that takes its colours from the page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["to_svg"]

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
#: matplotlib's own gids, "axes_1": all others are ours, and become classes.
_OWN = re.compile(r"^([a-zA-Z]+_\d+|m[0-9a-f]+|p[0-9a-f]+)$")
_NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
#: Of a style these say how a thing looks, which is the page's to say; the rest is kept.
_LOOKS = re.compile(r"\s*(font[^:]*|opacity|stroke-linejoin|stroke-linecap)\s*:")


def to_svg(figure: Figure, label: str) -> str:
    """A figure as one `<svg>` element without a prolog.

    Args:
        figure: gids of its artists become classes; these take their colours from the style sheet
            of the page. Clips are left out.
        label: What it shows, for who does not see it.

    Returns:
        The element, coordinates to a tenth of a point.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "calipers", "path.simplify": True}
    with matplotlib.rc_context(settings):
        FigureCanvasSVG(figure).print_svg(text, metadata=dict.fromkeys(("Date", "Creator")))
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", text.getvalue()))
    box = root.get("viewBox", "")
    parts = "".join(_element(each, None) for each in root)
    name = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg viewBox="{_short(box)}" role="img" aria-label="{name}">{parts}</svg>'


def _element(element: ElementTree.Element, known: str | None) -> str:
    """One element and what is in it; `known` is the class that it is drawn by, if any."""
    tag = element.tag.removeprefix(_SVG)
    name = element.get("id", "")
    if tag in ("metadata", "style", "clipPath") or name == "patch_1":
        return ""
    ours = name if tag == "g" and name and not _OWN.match(name) else None
    inner = "".join(_element(each, ours or known) for each in element)
    if tag in ("g", "defs"):
        if not inner:
            return ""
        if tag == "defs":
            return f"<defs>{inner}</defs>"
        return f'<g class="{ours}">{inner}</g>' if ours else inner
    if tag == "text":
        return _text(element)
    attributes = _attributes(element, known)
    return f"<{tag}{attributes}/>" if not inner else f"<{tag}{attributes}>{inner}</{tag}>"


def _attributes(element: ElementTree.Element, known: str | None) -> str:
    kept = []
    for key, value in element.attrib.items():
        if key == "d":
            kept.append(f' d="{_path(value)}"')
        elif key == _LINK:
            kept.append(f' href="{value}"')
        elif key == "id":
            kept.append(f' id="{value}"')
        elif key in ("x", "y", "width", "height"):
            kept.append(f' {key}="{_short(value)}"')
        elif key == "style" and known is None and (style := _style(value)):
            kept.append(f' style="{style}"')
    return "".join(kept)


def _style(value: str) -> str:
    rules = [rule.strip() for rule in value.split(";") if not _LOOKS.match(rule)]
    return ";".join(rules).replace(": ", ":").replace("#000000", "currentColor")


def _text(element: ElementTree.Element) -> str:
    place = ""
    style = element.get("style", "")
    anchor = re.search(r"text-anchor: (\w+)", style)
    turn = re.search(r"rotate\((-?[\d.]+)", element.get("transform", ""))
    if turn and float(turn[1]):
        place = f' transform="{_short(element.get("transform", ""))}"'
    for key in ("x", "y"):
        place += f' {key}="{_short(element.get(key, "0"))}"'
    if anchor and anchor[1] != "start":
        place += f' text-anchor="{anchor[1]}"'
    inner = (element.text or "").replace("&", "&amp;").replace("<", "&lt;")
    return f"<text{place}>{inner}</text>"


def _short(text: str) -> str:
    return _NUMBER.sub(lambda found: f"{round(float(found[0]), 1):g}", text)


def _path(text: str) -> str:
    """A path to a tenth of a point; lines along an axis by one number, relative to the last."""
    found, x, y = [], 0.0, 0.0
    for command, rest in re.findall(r"([A-Za-z])([^A-Za-z]*)", text):
        numbers = [round(float(each), 1) for each in rest.split()]
        if command == "L" and len(numbers) == 2:
            dx, dy = round(numbers[0] - x, 1), round(numbers[1] - y, 1)
            x, y = numbers
            if dx and dy:
                found.append(f"l{dx:g} {dy:g}")
            elif dx or dy:
                found.append(f"h{dx:g}" if dx else f"v{dy:g}")
            continue
        if len(numbers) >= 2:
            x, y = numbers[-2:]
        found.append(
            command.lower() if not numbers else command + " ".join(f"{n:g}" for n in numbers)
        )
    return "".join(found).replace(" -", "-")
