"""`plot`: figures of a report, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from calipers._words import check_choice
from calipers.errors import CalipersError
from calipers.reports.records import (
    MEASURES,
    Measure,
    Told,
    by_projection,
    choose_measure,
    error_of,
    number,
    pick_module,
    plots_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "Kind", "draw_coverage", "draw_depth", "draw_tensor", "new_figure", "plot"]

Kind = Literal["depth", "heatmap", "module", "coverage"]

#: Okabe and Ito's colours, told apart by all kinds of colour vision; yellow is too pale for a line.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6e6e6e")
#: With the dashes no two of 21 lines are the same.
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)))


def plot(
    report: Told, kind: Kind = "depth", module: str | None = None, measure: str | None = None
) -> Figure:
    """A figure of a report.

    Args:
        report: As `CalibrationReport.to_dict` or `read_report` gives it.
        kind: "depth", the error of each projection by layer; "heatmap", the same as a matrix;
            "module", the histograms of one module's tensors with their ranges and the error of
            other ranges; "coverage", the tokens that experts saw, by layer.
        module: Name of the module, for "module" alone.
        measure: "held_out_error", "output_error" or "error" (of the weight); None for the first
            of them that the report has. For "depth" and "heatmap".

    Returns:
        A matplotlib Figure that pyplot does not know: `figure.savefig(path)` writes it, and a
        notebook shows it.

    Raises:
        CalipersError: matplotlib is not installed; an unknown kind, module or measure; nothing
            to draw.
    """
    check_choice("kind", kind, Kind)
    if (module is not None) != (kind == "module"):
        raise CalipersError(
            f"module: expected a name with kind='module' and none otherwise, got {module!r} "
            f"with kind={kind!r}"
        )
    chosen = _measure(report, measure)
    if kind == "module":
        assert module is not None
        return _module(pick_module(report["modules"], module))
    if kind == "coverage":
        figure = new_figure(7, 3.2)
        draw_coverage(_axes(figure), report)
        return figure
    return _depth(report, chosen) if kind == "depth" else _heatmap(report, chosen)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, for no window.

    Raises:
        CalipersError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CalipersError(
            "plots need matplotlib, which is not installed: pip install 'calipers[plot]'"
        ) from None
    return Figure((width, height), layout=None)


def _axes(figure: Figure) -> Axes:
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _measure(report: Told, key: str | None) -> Measure:
    if key is None:
        return choose_measure([report])
    for measure in MEASURES:
        if measure.key == key:
            return measure
    known = ", ".join(each.key for each in MEASURES)
    raise CalipersError(f"measure must be one of {known}, got {key!r}")


def _depth(report: Told, measure: Measure) -> Figure:
    figure = new_figure(8, 3.6)
    axes = _axes(figure)
    if draw_depth(axes, [report], measure):
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    return figure


def draw_depth(axes: Axes, reports: Sequence[Told], measure: Measure) -> list[str]:
    """Draw the error by layer: of one report a line for each projection, else one for each report.

    Args:
        axes: Where to draw.
        reports: At least one. Of several the line is the median of a layer's modules.
        measure: Which error; shown in percent.

    Returns:
        The names of the lines, in the order of colours and dashes (`s0`, `s1` ... as gid); those
        of several reports are their numbers.

    Raises:
        CalipersError: No module has the error and a numbered layer.
    """
    lines = _projection_lines(reports[0], measure)
    if len(reports) > 1:
        lines = {str(i): _median_line(each, measure) for i, each in enumerate(reports)}
    if not any(lines.values()):
        raise CalipersError(f"there is no {measure.name} of numbered layers to draw")
    for i, (name, line) in enumerate(lines.items()):
        dashes = DASHES[i // len(COLOURS) % len(DASHES)]
        axes.plot(
            list(line),
            [100 * value for value in line.values()],
            color=COLOURS[i % len(COLOURS)],
            linestyle=dashes,
            label=name,
            gid=f"s{i}",
        )
    axes.set(xlabel="layer", ylabel=f"{measure.name}, %")
    axes.set_ylim(bottom=0)
    _count_layers(axes)
    return list(lines)


def _count_layers(axes: Axes) -> None:
    """Whole numbers below the axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _projection_lines(report: Told, measure: Measure) -> dict[str, dict[int, float]]:
    stacks = by_projection(report, lambda module: error_of(module, measure))
    many = len(stacks) > 1
    return {
        f"{stack}.*.{name}" if many else name: line
        for stack, projections in stacks.items()
        for name, line in projections.items()
    }


def _median_line(report: Told, measure: Measure) -> dict[int, float]:
    layers: dict[int, list[float]] = {}
    for line in _projection_lines(report, measure).values():
        for layer, value in line.items():
            layers.setdefault(layer, []).append(value)
    return {layer: median(values) for layer, values in sorted(layers.items())}


def _heatmap(report: Told, measure: Measure) -> Figure:
    lines = _projection_lines(report, measure)
    layers = sorted({layer for line in lines.values() for layer in line})
    if not layers:
        raise CalipersError(f"there is no {measure.name} of numbered layers to draw")
    values = [[100 * line.get(layer, math.nan) for line in lines.values()] for layer in layers]
    figure = new_figure(2 + 0.9 * len(lines), 1.5 + 0.22 * len(layers))
    axes = _axes(figure)
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(lines)), list(lines), rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    known = [value for row in values for value in row if not math.isnan(value)]
    middle = (min(known) + max(known)) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):
                colour = "black" if value > middle else "white"
                axes.text(x, y, f"{value:.3g}", ha="center", va="center", color=colour, size=7)
    figure.colorbar(image, ax=axes, label=f"{measure.name}, %")
    return figure


def _module(module: Told) -> Figure:
    plots = plots_of(module)
    if not plots:
        raise CalipersError(f"{module['name']}: its record has no histogram to draw")
    figure = new_figure(6, 2.4 * len(plots))
    figure.set_layout_engine("constrained")
    for i, (base_name, told) in enumerate(plots.items()):
        axes = figure.add_subplot(len(plots), 1, i + 1)
        draw_tensor(axes, told)
        axes.set_title(f"{module['name']}, {base_name}", fontsize="medium", loc="left")
        axes.set(xlabel="value", yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize="small", loc="upper right")
    return figure


def draw_tensor(axes: Axes, told: Told) -> None:
    """Draw the histogram of a tensor, the range that was chosen and the error of other ranges.

    Bars are log(1 + count), the line is the logarithm of the error of a range that ends there;
    each over its own extent, from 0 to 1.

    Args:
        axes: Where to draw. gids: "bars", "range", "curve", "chosen".
        told: One of a module's "plots", `plots_of`.
    """
    bins = told["histogram"]
    heights = [math.log1p(count) for count in bins["counts"]]
    low, high = bins["low"], bins["high"]
    edges = [low + (high - low) * i / len(heights) for i in range(len(heights) + 1)]
    top = max(heights) or 1.0
    ends = [number(end) for end in told.get("range") or ()]
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
        axes.axvspan(
            ends[0], ends[1], color="#009e73", alpha=0.18, lw=0, gid="range", label="range"
        )
    axes.stairs(
        [height / top for height in heights],
        edges,
        fill=True,
        color="#7f8fa3",
        gid="bars",
        label="values (log of counts)",
    )
    line = _curve(told, ends, high)
    if line is not None:
        axes.plot(
            *line, color="#d55e00", lw=1.5, gid="curve", label="error of a range to here (log)"
        )
    shown = [low, high, *(end for end in ends if end is not None), *(line[0] if line else ())]
    axes.set_xlim(min(shown), max(shown))
    axes.set_ylim(0, 1.05)


def _curve(
    told: Told, ends: Sequence[float | None], high: float
) -> tuple[list[float], list[float]] | None:
    """Where ranges end and the logarithm of their errors, over its extent."""
    curve: Any = told.get("curve") or {}
    pairs = [
        (factor, math.log(error))
        for factor, error in zip(curve.get("factor", ()), curve.get("error", ()), strict=False)
        if number(factor) is not None and (number(error) or 0) > 0
    ]
    if len(pairs) < 2:
        return None
    chosen = number(told.get("chosen_factor"))
    end = ends[1] if len(ends) == 2 and ends[1] else None
    full = end / chosen if end and chosen else high
    low, top = min(y for _, y in pairs), max(y for _, y in pairs)
    return [x * full for x, _ in pairs], [(y - low) / (top - low or 1.0) for _, y in pairs]


def draw_coverage(axes: Axes, report: Told) -> None:
    """Draw fewest, median and most tokens of a layer's experts, and what is enough.

    Args:
        axes: Where to draw. gids: "spread", "median", "enough".
        report: With "coverage".

    Raises:
        CalipersError: No experts were counted.
    """
    rows = report.get("coverage") or []
    if not rows:
        raise CalipersError("no experts were counted: the report has no coverage to draw")
    counts = [sorted(row["tokens"].values()) for row in rows]
    at = range(len(rows))
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lows, highs = [each[0] for each in counts], [each[-1] for each in counts]
    axes.vlines(at, lows, highs, color=COLOURS[0], lw=4, alpha=0.5, gid="spread")
    axes.plot(at, [median(each) for each in counts], "o", color=COLOURS[0], ms=4, gid="median")
    axes.axhline(rows[0]["enough"], color=COLOURS[1], ls="--", lw=1, gid="enough")
    axes.set(xlabel="layer of experts", ylabel="tokens of an expert")
    axes.set_ylim(bottom=0)
    _count_layers(axes)
