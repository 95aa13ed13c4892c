"""The drawn parts of a page: error by depth, histograms of tensors, coverage of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from calipers.errors import CalipersError
from calipers.reports.html import escape, in_percent, section
from calipers.reports.plot import COLOURS, draw_coverage, draw_depth, draw_tensor, new_figure
from calipers.reports.records import (
    Told,
    activations_of,
    choose_measure,
    error_of,
    number,
    place_of,
    plots_of,
    value_of,
)
from calipers.reports.sections import anchor_of, badness, coverage_table
from calipers.reports.svg import to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MOST_DRAWN", "coverage", "depth", "drawn_modules", "tensors"]

#: Most modules with histograms on a page; of more, the worst.
MOST_DRAWN = 300


def depth(reports: Mapping[str, Told]) -> str:
    """The section with the error by layer, a line for each projection, or for each report."""
    told = list(reports.values())
    measure = choose_measure(told)
    figure = new_figure(9, 2.9)
    axes = figure.add_axes((0.07, 0.15, 0.92, 0.82))
    _bare(axes)
    try:
        lines = draw_depth(axes, told, measure)
    except CalipersError:
        return ""
    for i, line in enumerate(axes.lines):
        line.set_gid(_line_class(i))
    names = lines if len(told) == 1 else list(reports)
    keys = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><g class="{_line_class(i)}">'
        f'<path d="M0 5H26"/></g></svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    picture = to_svg(figure, f"{measure.name} by layer: " + ", ".join(names))
    of = "each projection" if len(told) == 1 else "a layer's modules, the median, in each report"
    return section(
        "depth",
        "Error by depth",
        f"{measure.name.capitalize()} in percent, of {of}.",
        f'<div class="chart">{picture}</div><ul class="legend">{keys}</ul>',
    )


def _line_class(i: int) -> str:
    return f"line s{i % len(COLOURS)} d{i // len(COLOURS) % 3}"


def _bare(axes: Axes) -> None:
    """Axes for a page: a grid in place of a frame, no marks."""
    axes.set_frame_on(False)
    axes.tick_params(length=0)
    axes.grid(axis="y")
    for line in axes.get_ygridlines():
        line.set_gid("grid")


def coverage(report: Told) -> str:
    """The section on the tokens that experts saw; nothing for models without experts."""
    made = coverage_table(report)
    if not made:
        return ""
    figure = new_figure(9, 2.9)
    axes = figure.add_axes((0.08, 0.15, 0.91, 0.82))
    _bare(axes)
    draw_coverage(axes, report)
    _bare(axes)
    picture = to_svg(figure, "tokens of experts by layer: fewest, median and most")
    lead = (
        "Bars reach from the expert with the fewest tokens of a layer to the one with the most, "
        "dots are medians (logarithmic); below the dashed line an expert saw too few tokens to "
        "stand alone."
    )
    return section("experts", "Experts", lead, f'<div class="chart">{picture}</div>', made)


def drawn_modules(report: Told) -> list[Told]:
    """The modules whose histograms the page shows, in the model's order."""
    able = [module for module in report["modules"] if plots_of(module)]
    if len(able) > MOST_DRAWN:
        kept = {m["name"] for m in sorted(able, key=badness, reverse=True)[:MOST_DRAWN]}
        able = [module for module in able if module["name"] in kept]
    return able


def tensors(report: Told) -> str:
    """The section with the histograms of all modules, layer by layer."""
    modules = drawn_modules(report)
    groups: dict[str, list[Told]] = {}
    for module in modules:
        place = place_of(module["name"])
        group = "outside of layers" if place.layer is None else f"{place.stack}.{place.layer}"
        groups.setdefault(group.lstrip("."), []).append(module)
    draw = _TensorPen()
    body = "".join(_layer(group, members, draw) for group, members in groups.items())
    every = sum(1 for module in report["modules"] if plots_of(module))
    rest = f" The {MOST_DRAWN} worst of {every} modules." if every > len(modules) else ""
    keys = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><g class="{name}"><path d="{path}"/></g>'
        f"</svg>{words}</li>"
        for name, path, words in (
            ("bars", "M2 10V6H8V2H14V0H20V5H24V10z", "values, logarithm of their counts"),
            ("range", "M2 0H24V10H2z", "range that was chosen, of a typical group"),
            ("curve", "M0 1Q10 14 26 3", "error of a range that ends there, logarithm"),
        )
    )
    return section(
        "tensors",
        "Histograms and ranges",
        "A range is well chosen where the curve is lowest: narrower ranges clip more, wider ones "
        f"round more coarsely.{rest}",
        f'<ul class="legend">{keys}</ul>' if body else "",
        body,
    )


def _layer(group: str, members: Sequence[Told], draw: _TensorPen) -> str:
    errors = [(badness(module), place_of(module["name"]).projection) for module in members]
    worst, name = max(errors)
    told = f"{len(members)} modules" if len(members) > 1 else "1 module"
    told += f", worst {name} {in_percent(worst)}%" if worst >= 0 else ""
    cards = "".join(_card(module, draw) for module in members)
    return (
        f"<details><summary>{escape(group)} <span>{escape(told)}</span></summary>"
        f'<div class="cards">{cards}</div></details>\n'
    )


def _card(module: Told, draw: _TensorPen) -> str:
    name = module["name"]
    pictures = "".join(
        f"<figure>{draw(f'{base_name} of {name}', plot)}"
        f"<figcaption>{_facts(module, base_name, plot)}</figcaption></figure>"
        for base_name, plot in plots_of(module).items()
    )
    title = escape(place_of(name).projection or name)
    return f'<article id="{anchor_of(escape(name))}"><h3>{title}</h3>{pictures}</article>\n'


def _facts(module: Told, base_name: str, plot: Told) -> str:
    """What stands below a picture: the tensor with its error, then its range."""
    facts = []
    sqnr = number((activations_of(module).get(base_name) or {}).get("sqnr_db"))
    if base_name == "weight":
        sqnr = value_of(module, "sqnr_db")
        measure = choose_measure([{"modules": [module]}])
        if (error := error_of(module, measure)) is not None:
            facts.append(f"{measure.name} {in_percent(error)}%")
    if sqnr is not None:
        facts.append(f"{sqnr:.1f} dB")
    ends = [number(end) for end in plot.get("range") or ()]
    chosen = ""
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
        chosen = f"range {ends[0]:.3g} to {ends[1]:.3g}"
        if (factor := number(plot.get("chosen_factor"))) is not None:
            chosen += f", {factor:.2f} of the full one"
    return f"<b>{escape(base_name)}</b> {escape(', '.join(facts))}<span>{escape(chosen)}</span>"


class _TensorPen:
    """Draws tensors one after the other on the same axes, which takes half of the time."""

    def __init__(self) -> None:
        self._figure = new_figure(3.2, 0.95)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()

    def __call__(self, label: str, plot: Told) -> str:
        for artist in (*self._axes.patches, *self._axes.lines):
            artist.remove()
        draw_tensor(self._axes, plot)
        return to_svg(self._figure, label)
