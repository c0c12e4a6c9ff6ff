"""The same charts as PNG files, drawn by matplotlib: for slides, papers and chats."""

from __future__ import annotations

import io
from typing import Any

from preftune.report.curves import LIGHT, Plot, Trace

TEXT, GRID = "#3c4047", "#e3e4e6"


def draw(plot: Plot) -> bytes:
    """The PNG file (1,080 x 660 pixels) of a plot, on white."""
    # Imported here, since it takes a second; the Figure class, since pyplot keeps figures in global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # inches
    axes = figure.add_subplot()
    _axes(axes, plot)
    for trace in plot.traces:
        _trace(axes, trace)
    if len(plot.legend) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=TEXT)
    buffer = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(buffer)
    return buffer.getvalue()


def _axes(axes: Any, plot: Plot) -> None:
    x_axis, y_axis = plot.x_axis, plot.y_axis
    axes.set_title(f"{plot.title}\n", loc="left", fontsize=12, fontweight="bold", color=TEXT)
    axes.text(0, 1.025, plot.caption, transform=axes.transAxes, fontsize=9, color=TEXT)
    axes.set_xlabel(plot.x_label, fontsize=9, color=TEXT)
    across = 0.01 * (x_axis.high - x_axis.low)  # so that a dot at the edge is drawn whole
    axes.set_xlim(x_axis.low - across, x_axis.high + across)
    axes.set_ylim(y_axis.low, y_axis.high)
    axes.set_xticks([value for value, _ in x_axis.ticks], [text for _, text in x_axis.ticks])
    axes.set_yticks([value for value, _ in y_axis.ticks], [text for _, text in y_axis.ticks])
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=TEXT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9a9ea5")
    if plot.level is not None:
        axes.axhline(plot.level, color="#9a9ea5", linewidth=1, linestyle=(0, (2, 3)))


def _trace(axes: Any, trace: Trace) -> None:
    xs = [x for x, _ in trace.points]
    ys = [float("nan") if y is None else y for _, y in trace.points]
    ink, dots = LIGHT[trace.ink], trace.kind == "dots"
    few = len(xs) <= 40 and (dots or len(xs) == 1)
    axes.plot(
        xs,
        ys,
        color=ink,
        alpha=0.25 if trace.faint else 1.0,
        linewidth=0.8 if trace.faint or dots else 1.8,
        linestyle=("none" if not trace.joined else "--" if dots else "-"),
        marker="o" if few else "." if dots else "none",
        markersize=5 if few else 3,
        label="_" if trace.faint else trace.label,  # matplotlib leaves names with an underscore out of the legend
    )
    for span, y in zip(trace.spread, ys, strict=False):
        if span:
            axes.plot(span, (y, y), color=ink, alpha=0.45, linewidth=1.4, label="_")
    for note, x, y in zip(trace.notes, xs, ys, strict=False):
        axes.annotate(note, (x, y), xytext=(7, -13), textcoords="offset points", fontsize=9, color=TEXT)
