"""The plot of output error by observer and format, as SVG text."""

from __future__ import annotations

from html import escape

from benchmarks.results import Table

__all__ = ["draw"]

#: Observers of the plot from light to dark, and their colours (readable on light and dark pages).
SERIES = {
    "llmcompressor memoryless_minmax": "#b0b7bf",
    "llmcompressor memoryless_mse": "#8a939c",
    "llmcompressor imatrix_mse": "#5f6a74",
    "optimal mse": "#8fd0c9",
    "optimal imatrix": "#26a69a",
    "optimal imatrix negative_scales": "#00796b",
    "optimal hessian": "#f0a35e",
    "optimal hessian negative_scales": "#d9702b",
}
BAR, GAP, HEIGHT, TOP, LEFT = 12, 22, 220, 62, 44


def draw(table: Table) -> str:
    """Grouped bars of the output errors by observer and format, as the table has them."""
    (_, observer, _), *formats = table.columns
    kinds = [key for _, key, _ in formats]
    ratio = {(k, row[observer]): row[k] for row in table.rows for k in kinds if row.get(k)}
    shown = [name for name in SERIES if any(ratio.get((kind, name)) for kind in kinds)]
    highest = max(ratio[key] for key in ratio if key[1] in shown)
    scale = HEIGHT / (highest * 1.05)
    group = BAR * len(shown) + GAP
    width, bottom = LEFT + group * len(kinds) + 8, TOP + HEIGHT
    parts = []
    for i in range(int(highest / 0.25) + 1):
        y = bottom - i * 0.25 * scale
        dash = "" if i == 4 else ' stroke-dasharray="2 3"'
        parts.append(f'<path d="M{LEFT} {y:.1f}H{width}" stroke="#888" stroke-width=".6"{dash}/>')
        parts.append(text(LEFT - 6, y + 4, f"{i * 0.25:.2f}", "end"))
    for k, kind in enumerate(kinds):
        x = LEFT + GAP / 2 + k * group
        for i, name in enumerate(shown):
            value = ratio.get((kind, name))
            if value is None:
                continue
            size = value * scale
            title = f"<title>{escape(kind)}, {escape(name)}: {value:.2f}</title>"
            parts.append(
                f'<rect x="{x + i * BAR:.1f}" y="{bottom - size:.1f}" width="{BAR - 1}" '
                f'height="{size:.1f}" fill="{SERIES[name]}">{title}</rect>'
            )
        parts.append(text(x + BAR * len(shown) / 2, bottom + 16, kind, "middle"))
    column = max(190, (width - LEFT) // 4)
    for i, name in enumerate(shown):
        x, y = LEFT + (i // 2) * column, 14 + (i % 2) * 18
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{SERIES[name]}"/>')
        parts.append(text(x + 15, y, name, "start"))
    width = max(width, LEFT + (len(shown) + 1) // 2 * column)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 26}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{bottom + 26}" fill="#fff"/>\n' + "\n".join(parts) + "\n"
        "</svg>\n"
    )


def text(x: float, y: float, label: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(label)}</text>'
    )
