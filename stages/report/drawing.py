"""Panels by matplotlib: as SVG that takes a page's own colours and fonts, and as one PNG. No screen is needed."""

import io
import re
from collections.abc import Sequence
from typing import Any

from stages.report.curves import Curve, Panel
from stages.report.text import shown

PALETTE = ("#2f6db3", "#c8622a", "#3d8f5f", "#8a5bb0", "#b8923a", "#b0486a", "#4a9aa8", "#7a7a7a")
"""Colours of curves; in SVG they are the page's variables --c0 to --c7."""
INK, FAINT = "#1f2328", "#d0d4d9"
SIZE = (3.5, 2.35)
"""Inches of a panel on a page: small, so that its text stays readable at the width of a phone."""
LINE = 0.19
"""Inches of a line of the legend."""
MOST_LABEL = 40
"""Characters of a curve's name."""
COLUMNS = 4
"""Panels beside each other in a PNG."""
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are shown as they are, dollar signs too
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}
_UNSEEN = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", re.DOTALL)
_NUMBERED = re.compile(r'<g id="[A-Za-z0-9.]+_[0-9]+">')
_FONT = re.compile(r"font-family: [^;\"]+")


def colour(number: int) -> str:
    """The colour of a curve; there are more runs than colours only where many are compared."""
    return PALETTE[number % len(PALETTE)]


def draw(axes: Any, panel: Panel, *, legend: bool = True) -> None:
    """Draw a panel into matplotlib's axes; its title is left to the caller."""
    from matplotlib.ticker import (
        FixedLocator,
        MaxNLocator,
        NullFormatter,
        PercentFormatter,
        ScalarFormatter,
        StrMethodFormatter,
    )

    handles = [_curve(axes, curve, number, panel) for number, curve in enumerate(panel.curves)]
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.doublings:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for curve in panel.curves for x in curve.x})))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if panel.logarithmic:
        axes.set_yscale("log")
        # Its own labels are formulas, which nothing here sets: they would be shown as they are written.
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    if panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if panel.right:
        other = axes.twinx()
        other.spines["right"].set_visible(True)
        other.grid(visible=False)
        other.yaxis.set_major_locator(MaxNLocator(4))
        other.set_ylabel(panel.right_label)
        handles += [_curve(other, curve, len(panel.curves) + n, panel, dashed=True) for n, curve in enumerate(panel.right)]
    if legend and len(handles) > 1:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.24, 1.0), "columnspacing": 1.2, "handlelength": 1.5}
        axes.legend(handles=handles, ncols=_columns(panel), **place)


def _columns(panel: Panel) -> int:
    """Columns of the legend, so that it is about as wide as the panel."""
    labels = [curve.label[:MOST_LABEL] for curve in (*panel.curves, *panel.right)]
    wide = sum(map(len, labels)) / len(labels) + 5  # in characters, with the line before it
    return max(1, min(len(labels), 4, int(52 / wide)))


def _curve(axes: Any, curve: Curve, number: int, panel: Panel, *, dashed: bool = False) -> Any:
    shade = colour(number if curve.colour is None else curve.colour)
    if panel.bars:
        return axes.stairs(curve.y, curve.x, fill=True, color=shade, alpha=0.55, label=shown(curve.label, MOST_LABEL))
    dots = "o" if len(curve.x) <= 12 else None
    label = shown(curve.label, MOST_LABEL)
    width = 1.4 if curve.colour is None else max(1.0, 2.6 - 0.5 * curve.colour)  # where runs agree, all are seen
    style = {
        "color": shade,
        "label": label,
        "linewidth": width,
        "marker": dots,
        "markersize": 3,
        "linestyle": "--" if dashed else "-",
    }
    if curve.errors is not None:
        return axes.errorbar(curve.x, curve.y, curve.errors, capsize=2, elinewidth=0.8, **style)
    return axes.plot(curve.x, curve.y, **style)[0]


def svg(panel: Panel, salt: str) -> str:
    """The panel as an SVG element to stand in a page; every text in it is escaped. `salt`: unlike that of others there."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": salt}):
        lines = -(-(len(panel.curves) + len(panel.right)) // _columns(panel))
        height = SIZE[1] + LINE * (lines - 1)
        figure = Figure(figsize=(SIZE[0], height))
        # Fixed margins: to have them measured takes as long again as to draw.
        low, top = 0.45, 0.16 + LINE * lines
        draw(figure.add_axes((0.2, low / height, 0.64 if panel.right else 0.77, (height - low - top) / height)), panel)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = _NUMBERED.sub("<g>", _UNSEEN.sub("", text[text.index("<svg") :]))
    text = _FONT.sub("font-family: var(--sans)", text)
    for number, shade in enumerate(PALETTE):
        text = text.replace(shade, f"var(--c{number})")
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--line)")
    return text.replace("<svg ", '<svg role="img" ', 1)


def png(rows: Sequence[tuple[str, Sequence[Panel]]], names: Sequence[str]) -> bytes:
    """Blocks of panels, each under its title, as one picture; `names` are the curves' labels by colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    blocks = [(title, panels, -(-len(panels) // COLUMNS)) for title, panels in rows]
    columns = max(min(COLUMNS, len(panels)) for _, panels, _ in blocks)
    height = sum(2.5 * lines + 0.35 for *_, lines in blocks) + 0.3 * -(-len(names) // 3) + 0.2
    buffer = io.BytesIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * columns, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
        parts = figure.subfigures(len(blocks), 1, height_ratios=[lines + 0.14 for *_, lines in blocks], squeeze=False)
        for (title, panels, lines), (part,) in zip(blocks, parts, strict=True):
            part.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
            grid = part.subplots(lines, columns, squeeze=False).flatten()
            for axes in grid[len(panels) :]:
                axes.set_visible(False)
            for axes, panel in zip(grid, panels, strict=False):
                draw(axes, panel, legend=False)
                axes.set_title(panel.title, loc="left", fontsize=9)
        handles = [Line2D([], [], color=colour(number), label=name) for number, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(names)))
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()
