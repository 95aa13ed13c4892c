"""The tables of a page: modules, heat map, observers, experts and what was left out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import geometric_mean, median
from typing import Any

from calipers.calibration.targets import kind_of
from calipers.reports.html import (
    Cell,
    Column,
    escape,
    figures,
    in_percent,
    missing,
    percent,
    plain,
    section,
    table,
)
from calipers.reports.records import (
    MEASURES,
    Told,
    activations_of,
    by_projection,
    choose_measure,
    error_of,
    number,
    value_of,
)

__all__ = [
    "MOST_ROWS",
    "anchor_of",
    "badness",
    "coverage_table",
    "heat_map",
    "left_out",
    "module_table",
    "observers",
]

#: Most modules of a table; of more, as of many experts, the worst are shown.
MOST_ROWS = 1500
#: Most lines of what was left out.
_MOST_LEFT = 200


def anchor_of(name: str) -> str:
    """Id of a module's histograms."""
    return f"m-{name}"


def badness(module: Told) -> float:
    """What modules are sorted by where not all are shown, the largest first."""
    found = [error for each in MEASURES if (error := error_of(module, each)) is not None]
    return found[0] if found else -1.0


def _of_weight(key: str) -> Callable[[Told], Cell]:
    return lambda module: percent(value_of(module, key))


def _lowest_sqnr(module: Told) -> Cell:
    found = [number(each.get("sqnr_db")) for each in activations_of(module).values()]
    return figures(
        min((each for each in found if each is not None), default=None), ".1f", unit=" dB"
    )


def _largest_move(module: Told) -> Cell:
    found = [number(each.get("moved")) for each in activations_of(module).values()]
    return percent(max((each for each in found if each is not None), default=None))


#: Columns of the table of modules, and the cell of a module; one that all modules lack is left out.
_COLUMNS: tuple[tuple[Column, Callable[[Told], Cell]], ...] = (
    (
        Column("bits", hint="of a code of the weight"),
        lambda module: figures(number(module.get("weight_bits")), ".0f"),
    ),
    (
        Column("weight error", hint="||W - Q|| / ||W||"),
        lambda module: percent(error_of(module, MEASURES[2])),
    ),
    (
        Column("output error", hint="||X (W - Q)'|| / ||X W'|| on the calibration data"),
        _of_weight("output_error"),
    ),
    (
        Column("held-out error", hint="the same on tokens that no observer saw"),
        _of_weight("held_out_error"),
    ),
    (
        Column("SQNR", hint="10 log10(||W||² / ||W - Q||²), dB"),
        lambda module: figures(value_of(module, "sqnr_db"), ".1f", unit=" dB"),
    ),
    (Column("clipped", hint="values beyond the ends of their range"), _of_weight("clipped")),
    (Column("zeros", hint="values whose code stands for 0"), _of_weight("zeros")),
    (
        Column("entropy", hint="bits of the distribution of codes"),
        lambda module: figures(value_of(module, "entropy"), ".2f", unit=" bits"),
    ),
    (
        Column("scales at top", hint="stored scales at the top of E4M3"),
        _of_weight("scales_saturated"),
    ),
    (
        Column("scales at bottom", hint="stored scales at the bottom of E4M3"),
        _of_weight("scales_underflowed"),
    ),
    (Column("activations", hint="lowest SQNR of its activations, dB"), _lowest_sqnr),
    (
        Column("scale moved", hint="of an activation, over the last quarter of the data"),
        _largest_move,
    ),
    (
        Column("tokens", hint="that the module saw"),
        lambda module: figures(number(module.get("tokens")) or None, ",.0f"),
    ),
)


def module_table(report: Told, drawn: Callable[[str], bool]) -> str:
    """The section with a row for each module.

    Args:
        report: The report.
        drawn: Whether the page has histograms of a module of that name, to link to.
    """
    modules = list(report["modules"])
    rest = len(modules) - MOST_ROWS
    if rest > 0:
        modules = sorted(modules, key=badness, reverse=True)[:MOST_ROWS]
    cells = [[get(module) for module in modules] for _, get in _COLUMNS]
    known = [any(cell.value is not None for cell in column) for column in cells]
    columns = [column for (column, _), kept in zip(_COLUMNS, known, strict=True) if kept]
    kept_cells = [column for column, kept in zip(cells, known, strict=True) if kept]
    names = [module["name"] for module in modules]
    notes = [_note(module) for module in modules]
    rows = []
    for i, module in enumerate(modules):
        name = escape(module["name"])
        link = f'<a href="#{anchor_of(name)}">{name}</a>' if drawn(module["name"]) else name
        row = [Cell(link), *(column[i] for column in kept_cells)]
        rows.append([*row, plain(notes[i])] if any(notes) else row)
    heads = [Column("module", False), *columns, *([Column("notes", False)] if any(notes) else [])]
    caption = f"{len(rows):,} modules in the model's order"
    if rest > 0:
        caption = f"the {len(rows):,} worst modules; the file has {rest:,} more"
    lead = (
        '<span class="js-only">A click on a head sorts: numbers begin with the largest.</span> '
        + ("Names lead to the histograms." if any(map(drawn, names)) else "")
    )
    return (
        section("modules", "Modules", lead, table(heads, rows, caption, name="modules-table"))
        if rows
        else ""
    )


def _note(module: Told) -> str:
    notes = []
    if module.get("fallback"):
        notes.append(f"fallback: {', '.join(module['fallback'])}")
    if module.get("states"):
        notes.append(f"states {', '.join(module['states'])}")
    if share := number(module.get("shared")):
        notes.append(f"{share:.0%} of statistics from all experts")
    return "; ".join(notes)


def heat_map(report: Told) -> str:
    """The section with the error of each projection in each layer, as coloured numbers."""
    measure = choose_measure([report])
    stacks = by_projection(report, lambda module: error_of(module, measure))
    values = [v for stack in stacks.values() for line in stack.values() for v in line.values()]
    if not values:
        return ""
    paint = _Ramp(min(values), max(values))
    tables = "".join(_heat_table(stack, lines, paint) for stack, lines in stacks.items())
    lead = (
        f"{measure.name.capitalize()} in percent, by layer (down) and projection (across); experts "
        "of a layer share a cell, which has their median."
    )
    return section("heat", "Where it is bad", lead, paint.legend(), tables)


def _heat_table(stack: str, lines: dict[str, dict[int, float]], paint: _Ramp) -> str:
    layers = sorted({layer for line in lines.values() for layer in line})
    rows = []
    for layer in layers:
        row = [Cell(str(layer), layer)]
        for line in lines.values():
            value = line.get(layer)
            row.append(missing() if value is None else paint.cell(value))
        rows.append(row)
    columns = [Column("layer"), *(Column(name) for name in lines)]
    made = table(columns, rows, f"{escape(stack)}.*", sortable=True)
    return made.replace('class="sortable"', 'class="sortable heat"')


class _Ramp:
    """Matplotlib's cividis, even to the eye and safe for all kinds of colour vision."""

    def __init__(self, low: float, high: float) -> None:
        from matplotlib import colormaps

        self.low, self.high = low, high
        self._map = colormaps["cividis"]

    def cell(self, value: float) -> Cell:
        """A number on its colour, black or white, whichever is easier to read on it."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        rgb = self._map(share)[:3]
        # relative luminance of WCAG 2; 0.179 is where black and white contrast alike
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        ink = "#000" if luminance > 0.179 else "#fff"
        return Cell(in_percent(value), value, f"background:{_hex(rgb)};color:{ink}")

    def legend(self) -> str:
        """The ramp with the numbers of its ends."""
        stops = ",".join(_hex(self._map(i / 8)[:3]) for i in range(9))
        return (
            f'<p class="ramp">{in_percent(self.low)}%<i style="background:linear-gradient(90deg,'
            f'{stops})"></i>{in_percent(self.high)}%</p>'
        )


def _hex(rgb: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


def observers(report: Told) -> str:
    """The section that compares observers of the same tensors, where several looked at them."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, bool, bool]]]] = {}
    for module in report["modules"]:
        for base_name, rows in (module.get("shadows") or {}).items():
            judged = [row for row in rows if number(row.get("error")) is not None]
            best = min(judged, key=lambda row: row["error"], default=None)
            kind = found.setdefault((kind_of(module["name"]), base_name), defaultdict(list))
            for row in judged:
                kind[row["observer"]].append((row["error"], row is best, bool(row.get("chosen"))))
    names = list(dict.fromkeys(name for kind in found.values() for name in kind))
    if not names:
        return ""
    rows = [_observer_row(f"{name}, {base}", kind, names) for (name, base), kind in found.items()]
    columns = [Column("tensors", False), Column("modules"), *(Column(name) for name in names)]
    total = [_observer_total(name, [kind[name] for kind in found.values()]) for name in names]
    heads = [
        Column("observer", False),
        Column("mean error"),
        Column("best on"),
        Column("chosen on"),
    ]
    return section(
        "observers",
        "Observers side by side",
        "Each saw the same tensors in the same pass. Errors are of what a layer computes (of the "
        "values themselves for activations), relative; geometric means. ✓ marks the smallest.",
        table(heads, total, "all tensors"),
        table(columns, rows, "by kind of module"),
    )


def _mean(errors: Sequence[float]) -> float:
    """Geometric mean of the square roots of squared errors."""
    return math.sqrt(geometric_mean(errors)) if errors and min(errors) > 0 else 0.0


def _observer_total(name: str, kinds: Sequence[list[tuple[float, bool, bool]]]) -> list[Cell]:
    every = [each for kind in kinds for each in kind]
    counts = [sum(each[i] for each in every) for i in (1, 2)]
    mean = _mean([error for error, _, _ in every])
    return [plain(name), percent(mean), *(figures(float(n), ".0f") for n in counts)]


def _observer_row(
    name: str, kind: dict[str, list[tuple[float, bool, bool]]], names: Sequence[str]
) -> list[Cell]:
    means = {each: _mean([e for e, _, _ in kind[each]]) for each in names if kind.get(each)}
    least = min(means.values())
    cells = []
    for each in names:
        cell = percent(means.get(each))
        best = len(means) > 1 and means.get(each) == least
        cells.append(Cell(cell.html, cell.value, classes="best" if best else ""))
    count = max(len(kind[each]) for each in means)
    return [plain(name), figures(float(count), ".0f"), *cells]


def coverage_table(report: Told) -> str:
    """A table of the tokens that experts saw, by layer; nothing for models without experts."""
    rows = []
    for each in report.get("coverage") or ():
        counts, enough = list(each["tokens"].values()), each["enough"]
        few = [name for name, count in each["tokens"].items() if count < enough]
        told = ", ".join(f"{n.rpartition('.')[2]} ({each['tokens'][n]})" for n in few[:12])
        told += f" and {len(few) - 12} more" if len(few) > 12 else ""
        numbers = (len(counts), min(counts), median(counts), max(counts), len(few), counts.count(0))
        cells = [figures(float(value), ",.0f") for value in numbers]
        few_cell = Cell(escape(told) or "none", classes="wrap")
        rows.append([plain(each["name"]), *cells, few_cell])
    if not rows:
        return ""
    numbers_of = ("experts", "fewest", "median", "most", "few", "none")
    heads = [Column("layer", False), *map(Column, numbers_of), Column("those with few", False)]
    return table(heads, rows, "tokens that experts saw")


def left_out(report: Told) -> str:
    """The section of what was not quantized, and why; kinds of modules in one line each."""
    kinds: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for each in report.get("left_alone") or ():
        reason = str(each.get("reason") or "")
        kinds[kind_of(each["name"]), str(each.get("kind") or ""), reason].append(each)
    rows = []
    for (name, kind, reason), members in list(kinds.items())[:_MOST_LEFT]:
        weights = sum(number(each.get("weights")) or 0 for each in members)
        share = sum(number(each.get("share")) or 0 for each in members)
        shown = members[0]["name"] if len(members) == 1 else name
        numbers = [figures(float(len(members)), ",.0f"), figures(weights, ",.0f"), percent(share)]
        rows.append([plain(shown), plain(kind), plain(reason), *numbers])
    if not rows:
        return ""
    heads = [
        Column("module", False),
        Column("class", False),
        Column("why", False),
        Column("modules"),
        Column("weights"),
        Column("share", hint="of the projection weights; output heads do not count"),
    ]
    lead = "Modules with projection weights that stay as they were."
    return section("left", "Left unquantized", lead, table(heads, rows, "by kind and reason"))
