"""Which charts a report has, and their points. The page and the PNG files draw what stands here, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from preftune.report.folder import Json, mapping, number, objects, pair
from preftune.report.words import count, figure, minus, percent, plain

Point = tuple[float, float | None]  # y is None where a value was written that is not finite: the line breaks there
Kind = Literal["line", "dots"]  # training steps are lines; held-out values are dots, joined by a dashed line

MAX_POINTS = 600  # per line: more than a screen shows, few enough for a page that opens at once
SMOOTH_FROM = 60  # fewer steps than this are readable as they are

# Inks by number, for light and for dark ground: chosen, rejected, a third, text; then more, for runs beside each other.
LIGHT = ("#2a66c4", "#c9601a", "#2b8a68", "#4a4f57", "#8a4fb8", "#b8860b", "#c23a6b", "#1f8fa3")
DARK = ("#79a8f2", "#ec9a5c", "#63c29d", "#b4bac3", "#bd93e6", "#d9b44a", "#ef86ab", "#6bc7d8")
OF_RUNS = (0, 1, 2, 4, 5, 6, 7, 3)  # in this order, so that neighbours differ


@dataclass(frozen=True, slots=True)
class Series:
    key: str
    label: str
    ink: int
    kind: Kind = "line"
    part: str = ""  # series of one part stand in one chart where runs are compared


@dataclass(frozen=True, slots=True)
class Chart:
    """A row of the table: what a chart is called, what it shows (with its unit), and the metrics in it."""

    name: str
    title: str
    caption: str
    series: tuple[Series, ...]
    share: bool = False  # shown in per cent
    level: float | None = None  # a line to compare with


def _two_sides(key: str) -> tuple[Series, ...]:
    return (
        Series(f"{key}/chosen", "chosen", 0, part="chosen"),
        Series(f"{key}/rejected", "rejected", 1, part="rejected"),
        Series(f"eval/{key}/chosen", "chosen, held out", 0, "dots", "chosen"),
        Series(f"eval/{key}/rejected", "rejected, held out", 1, "dots", "rejected"),
    )


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "what training minimises",
        (Series("loss", "training", 0), Series("eval/loss", "held out", 1, "dots")),
    ),
    Chart(
        "accuracy",
        "Accuracy",
        "share of comparisons ranked right; 50 % is chance",
        (
            Series("accuracy", "training", 0),
            Series("eval/accuracy", "held out", 1, "dots"),
            Series("eval/logp_accuracy", "held out, without reference", 2, "dots", "without reference"),
        ),
        share=True,
        level=0.5,
    ),
    Chart(
        "margin",
        "Margin",
        "log-ratio of chosen minus rejected, nats, without beta",
        (Series("margin", "training", 0), Series("eval/margin", "held out", 1, "dots")),
        level=0.0,
    ),
    Chart("rewards", "Rewards", "beta times log-ratio to the reference", _two_sides("reward"), level=0.0),
    Chart("logps", "Log-probabilities", "nats, summed over the response", _two_sides("logp")),
    Chart(
        "lengths",
        "Answer length",
        "scored tokens of the responses trained on",
        _two_sides("length"),
    ),
    Chart("grad_norm", "Gradient norm", "before clipping", (Series("grad_norm", "training", 0),)),
    Chart("learning_rate", "Learning rate", "of each step", (Series("learning_rate", "training", 0),)),
    Chart("throughput", "Throughput", "tokens per second", (Series("tokens_per_s", "training", 0),)),
    Chart("memory", "Memory", "peak so far, GB", (Series("memory_gb", "training", 0),)),
)


@dataclass(frozen=True, slots=True)
class Trace:
    """One drawn line. `faint`: the raw line under its own mean. `notes` and `spread` belong to the points, one each."""

    label: str
    ink: int
    kind: Kind
    points: list[Point]
    faint: bool = False
    joined: bool = True
    notes: tuple[str, ...] = ()
    spread: tuple[tuple[float, float] | None, ...] = ()  # interval of x

    @property
    def last(self) -> float:
        return next(y for _, y in reversed(self.points) if y is not None)


@dataclass(frozen=True, slots=True)
class Axis:
    """The range drawn, and the round values marked in it."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart with its points, ready to be drawn."""

    name: str
    title: str
    caption: str
    traces: tuple[Trace, ...]
    x_label: str = "step"
    share: bool = False
    level: float | None = None

    @property
    def legend(self) -> list[tuple[Trace, str]]:
        """The lines to name, each with the last value drawn."""
        return [(t, percent(t.last) if self.share else figure(t.last)) for t in self.traces if not t.faint]

    @property
    def x_axis(self) -> Axis:
        xs = [x for t in self.traces for x, _ in t.points]
        xs += [edge for t in self.traces for pair in t.spread if pair for edge in pair]
        if self.x_label == "step":  # from 0, so that the charts of a run lie under each other
            return axis(0.0, max(xs), share=False, whole=True)
        return axis(min(xs), max(xs) + 0.12 * (max(xs) - min(xs)), share=False)  # room for the notes

    @property
    def y_axis(self) -> Axis:
        ys = [y for t in self.traces for _, y in t.points if y is not None]
        if self.level is not None:
            ys.append(self.level)
        low, high = min(ys), max(ys)
        room = (0.1 if any(t.notes for t in self.traces) else 0.04) * (high - low)
        return axis(low - room, high + room, share=self.share)


def plots(metrics: Sequence[Json]) -> list[Plot]:
    """The charts that have data, in the order of the table. `metrics`: the objects of metrics.jsonl."""
    window = smoothing(metrics)
    found: list[Plot] = []
    for chart in CHARTS:
        traces: list[Trace] = []
        for series in chart.series:
            points = points_of(metrics, series.key)
            if all(y is None for _, y in points):
                continue
            if series.kind == "line" and window > 1:
                traces.append(Trace(series.label, series.ink, series.kind, downsample(points), faint=True))
                points = running_mean(points, window)
            traces.append(Trace(series.label, series.ink, series.kind, downsample(points)))
        if traces:
            traces.sort(key=lambda trace: not trace.faint)  # no raw line may cover another's mean
            found.append(Plot(chart.name, chart.title, chart.caption, tuple(traces), share=chart.share, level=chart.level))
    return found


def compared(runs: Sequence[tuple[str, Sequence[Json]]]) -> list[Plot]:
    """The charts of several runs, (name, metrics): an ink for each run, a chart for each side, means without the raw lines."""
    found: list[Plot] = []
    for chart in CHARTS:
        for part in dict.fromkeys(series.part for series in chart.series):
            traces: list[Trace] = []
            for ink, (name, metrics) in zip(cycle(OF_RUNS), runs, strict=False):
                for series in (series for series in chart.series if series.part == part):
                    points = points_of(metrics, series.key)
                    if all(y is None for _, y in points):
                        continue
                    if series.kind == "line":
                        points = running_mean(points, smoothing(metrics))
                    label = f"{name}, held out" if series.kind == "dots" else name
                    traces.append(Trace(label, ink, series.kind, downsample(points)))
            if traces:
                name, title = (
                    (f"{chart.name}-{part}".replace(" ", "-"), f"{chart.title}, {part}") if part else (chart.name, chart.title)
                )
                found.append(Plot(name, title, chart.caption, tuple(traces), share=chart.share, level=chart.level))
    return found


def reward_kl(demo: Json) -> Plot | None:
    """Mean reward against KL from base (nats per response): base at 0, a point per beta. Nothing joins them:
    they are runs of their own, and a line would claim what lies between."""
    runs = [
        run for run in objects(demo.get("runs")) if number(run.get("kl")) is not None and number(run.get("reward")) is not None
    ]
    runs.sort(key=lambda run: float(run["kl"]))
    if not runs:
        return None
    base = number(mapping(demo.get("base")).get("reward"))
    points: list[Point] = [(float(run["kl"]), float(run["reward"])) for run in runs]
    aligned = Trace(
        "aligned, by beta",
        0,
        "dots",
        points if base is None else [(0.0, base), *points],
        joined=False,
        notes=(*(() if base is None else ("",)), *(f"β {plain(run.get('beta'))}" for run in runs)),
        spread=(*(() if base is None else (None,)), *(pair(run.get("kl_interval")) for run in runs)),
    )
    start = () if base is None else (Trace("base", 3, "dots", [(0.0, base)], joined=False, notes=("base",)),)
    caption = "mean reward of sampled answers against KL from the base model"
    return Plot("reward_kl", "Reward against KL", caption, (aligned, *start), x_label="KL, nats per response")


def points_of(metrics: Sequence[Json], key: str) -> list[Point]:
    """(step, value) of the lines that hold the key; the value is None where it is not a finite number."""
    steps = ((number(line.get("step")), line) for line in metrics)
    return [(step, number(line[key])) for step, line in steps if step is not None and key in line]


def not_finite(metrics: Sequence[Json]) -> list[str]:
    """A remark for each charted metric that holds values that are not finite: gaps in a curve must not go unsaid."""
    remarks: list[str] = []
    for key in [series.key for chart in CHARTS for series in chart.series]:
        gaps = [step for step, value in points_of(metrics, key) if value is None]
        if gaps:
            remarks.append(f"{key} is not a finite number on {count(len(gaps), 'lines')}, first at step {gaps[0]:,.0f}.")
    return remarks


def smoothing(metrics: Sequence[Json]) -> int:
    """Over how many steps the strong lines are means: a thirtieth of the run; 1 (no smoothing) for a short one."""
    steps = sum("loss" in line for line in metrics)
    return 1 if steps < SMOOTH_FROM else max(5, steps // 30) | 1  # odd, so that the window has a middle


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """The mean over `window` neighbouring lines, centred; shorter at the ends. Gaps stay gaps and count for nothing."""
    total, number_of = [0.0], [0]
    for _, y in points:
        total.append(total[-1] + (y or 0.0))
        number_of.append(number_of[-1] + (y is not None))
    half, last = window // 2, len(points)
    means: list[Point] = []
    for i, (x, y) in enumerate(points):
        low, high = max(0, i - half), min(last, i + half + 1)
        means.append((x, None if y is None else (total[high] - total[low]) / (number_of[high] - number_of[low])))
    return means


def downsample(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """About `limit` points: the lowest and the highest of each stretch, a gap where it holds one, and both ends."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        inside = range(start, min(start + stretch, len(points)))
        values = [(y, i) for i in inside if (y := points[i][1]) is not None]
        if values:
            kept |= {min(values)[1], max(values)[1]}
        kept |= set([i for i in inside if points[i][1] is None][:1])
    return [points[i] for i in sorted(kept)]


def axis(low: float, high: float, *, share: bool, whole: bool = False) -> Axis:
    """A range with about five round ticks (1, 2 or 5 times a power of ten) inside. A flat range is opened up."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = 1.0 if whole else abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 6)
    if whole:
        step = max(step, 1.0)
    decimals = max(0, -math.floor(math.log10(step * (100 if share else 1)) + 1e-9))
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, tuple((tick, _tick(tick, decimals, share)) for tick in ticks))


def _tick(value: float, decimals: int, share: bool) -> str:
    value = value or 0.0  # no minus before a zero
    if share:
        return minus(f"{value * 100:.{decimals}f} %")
    extreme = decimals > 5 or abs(value) >= 1e7
    return minus(f"{value:.3g}" if extreme else f"{value:,.{decimals}f}")
