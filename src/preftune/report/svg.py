"""A chart as inline SVG. Colours and type come from the page's CSS, so that the picture follows light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from preftune.report.curves import Axis, Plot, Point, Trace
from preftune.report.words import figure, percent, plain

WIDTH, HEIGHT = 400, 232  # about the width of a card, so that text keeps its size on a wide and on a narrow screen
TOP, RIGHT, BOTTOM = 8, 18, 36


def draw(plot: Plot) -> str:
    """The `<svg>` of a plot: grid, ticks, lines, dots; with a title and a description for those who cannot see it."""
    frame = _frame(plot)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{plot.name}-title {plot.name}-desc">',
        f'<title id="{plot.name}-title">{escape(plot.title)}</title>',
        f'<desc id="{plot.name}-desc">{escape(describe(plot))}</desc>',
        *_grid(plot, frame),
        *(part for trace in plot.traces for part in _trace(trace, frame)),
        "</svg>",
    ]
    return "".join(parts)


def values(plots: Sequence[Plot]) -> str:
    """What page.js shows under the pointer, as JSON: of each chart over steps its frame, its ranges, and to five digits the
    points of each line of its legend."""
    charts = {plot.name: _values(plot) for plot in plots if plot.x_label == "step"}
    return json.dumps(charts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _values(plot: Plot) -> dict[str, Any]:
    frame = _frame(plot)
    drawn = [(trace.ink, [(x, y) for x, y in trace.points if y is not None]) for trace, _ in plot.legend]
    return {
        "frame": [round(frame.left, 1), TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
        "x": [frame.x_axis.low, frame.x_axis.high],
        "y": [frame.y_axis.low, frame.y_axis.high],
        "share": plot.share,
        "lines": [
            {"ink": ink, "x": [int(x) for x, _ in points], "y": [float(f"{y:.5g}") for _, y in points]} for ink, points in drawn
        ],
    }


def describe(plot: Plot) -> str:
    """The chart in words: where each line begins and ends."""
    show = percent if plot.share else figure
    sentences: list[str] = []
    for trace in plot.traces:
        drawn = [(x, y) for x, y in trace.points if y is not None]
        if not trace.faint:
            (x0, y0), (x1, y1) = drawn[0], drawn[-1]
            sentences.append(f"{trace.label}: from {show(y0)} at {plain(x0)} to {show(y1)} at {plain(x1)}")
    return f"{plot.caption}. {'; '.join(sentences)}. Horizontal axis: {plot.x_label}."


class _Frame:
    """Where values lie in the picture."""

    def __init__(self, left: float, x_axis: Axis, y_axis: Axis) -> None:
        self.left, self.x_axis, self.y_axis = left, x_axis, y_axis

    def x(self, value: float) -> float:
        share = (value - self.x_axis.low) / (self.x_axis.high - self.x_axis.low)
        return round(self.left + share * (WIDTH - RIGHT - self.left), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_axis.low) / (self.y_axis.high - self.y_axis.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)


def _frame(plot: Plot) -> _Frame:
    """The left edge leaves room for the longest tick."""
    y_axis = plot.y_axis
    return _Frame(16 + 6.2 * max((len(text) for _, text in y_axis.ticks), default=1), plot.x_axis, y_axis)


def _grid(plot: Plot, frame: _Frame) -> list[str]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts: list[str] = []
    for value, text in frame.y_axis.ticks:
        y = frame.y(value)
        parts.append(f'<path class="gridline" d="M{frame.left:.1f} {y}H{right}"/>')
        parts.append(f'<text x="{frame.left - 7:.1f}" y="{y + 3.8:.1f}" text-anchor="end">{text}</text>')
    for value, text in frame.x_axis.ticks:
        x = frame.x(value)
        parts.append(f'<path class="axis" d="M{x} {floor}v4"/>')
        parts.append(f'<text x="{x}" y="{floor + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {floor}H{right}"/>')
    middle = (frame.left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(plot.x_label)}</text>')
    if plot.level is not None:
        parts.append(f'<path class="level" d="M{frame.left:.1f} {frame.y(plot.level)}H{right}"/>')
    return parts


def _trace(trace: Trace, frame: _Frame) -> list[str]:
    ink = f"ink{trace.ink}"
    parts: list[str] = []
    if trace.joined:
        look = "raw" if trace.faint else "dashed" if trace.kind == "dots" else "line"
        parts.append(f'<path class="{look} {ink}" d="{_path(trace.points, frame)}"/>')
    for span, (_, y) in zip(trace.spread, trace.points, strict=False):
        if span and y is not None:
            parts.append(f'<path class="spread {ink}" d="M{frame.x(span[0])} {frame.y(y)}H{frame.x(span[1])}"/>')
    if trace.kind == "dots":
        size, radius = ("", 3.2) if len(trace.points) <= 40 else (" small", 1.4)
        dots = [(frame.x(x), frame.y(y)) for x, y in trace.points if y is not None]
        parts += [f'<circle class="dot{size} {ink}" cx="{x}" cy="{y}" r="{radius}"/>' for x, y in dots]
    for note, (x, y) in zip(trace.notes, trace.points, strict=False):
        if note and y is not None:
            parts.append(_note(note, frame.x(x), frame.y(y)))
    return parts


def _note(text: str, x: float, y: float) -> str:
    """A word under a point: right of it, where a rising line does not pass, unless it would leave the picture."""
    fits = x + 8 + 6.2 * len(text) < WIDTH
    place = f'x="{x + 8 if fits else x - 8:.1f}" y="{y + 14:.1f}" text-anchor="{"start" if fits else "end"}"'
    return f'<text class="note" {place}>{escape(text)}</text>'


def _path(points: list[Point], frame: _Frame) -> str:
    """Path data; a gap starts a new piece, and a piece of one point gets a zero-length stroke, so that it is seen."""
    pieces: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{frame.x(x)} {frame.y(y)}")
    return "".join(f"M{'L'.join(piece)}{'h0' if len(piece) == 1 else ''}" for piece in pieces if piece)
