"""The tables of the page: what stands in each cell, as text."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import PurePath
from statistics import median
from typing import Any, cast

from preftune.report.folder import Json, RunFiles, mapping, number, objects
from preftune.report.verdicts import best_run, judged
from preftune.report.words import NONE, change, count, duration, figure, interval, percent, plain


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure, with a word on where it comes from."""

    label: str
    value: str
    note: str = ""


def tiles(files: RunFiles) -> list[Tile]:
    """The key figures that the run has."""
    before, after = mapping(files.evaluation.get("before")), mapping(files.evaluation.get("after"))
    found: list[Tile] = []
    if number(after.get("logp_accuracy")) is not None:
        start = f"{percent(before['logp_accuracy'])} before" if number(before.get("logp_accuracy")) is not None else ""
        found.append(Tile("Ranked right", percent(after["logp_accuracy"]), start))
    if number(after.get("accuracy")) is not None:
        found.append(
            Tile("Against reference", percent(after["accuracy"]), interval(after.get("accuracy_interval"), share=True))
        )
    if number(after.get("perplexity")) is not None:
        start = f"{figure(before['perplexity'])} before" if number(before.get("perplexity")) is not None else ""
        found.append(Tile("Perplexity", figure(after["perplexity"]), start))
    if number(after.get("margin")) is not None:
        found.append(Tile("Margin", figure(after["margin"]), "nats, held out"))
    if number(after.get("kl")) is not None:
        found.append(Tile("KL", figure(after["kl"]), "nats per response"))
    return found + _training_tiles(files)


def _training_tiles(files: RunFiles) -> list[Tile]:
    steps = [line for line in files.metrics if "loss" in line]
    if not steps:
        return []
    seconds = number(files.environment.get("seconds"))
    found = [
        Tile("Training loss", figure(steps[-1]["loss"]), f"{figure(steps[0]['loss'])} at first"),
        Tile("Steps", f"{len(steps):,}", "" if seconds is None else f"in {duration(seconds)}"),
    ]
    tokens, pairs = (
        [v for line in steps if (v := number(line.get(key))) is not None] for key in ("tokens_per_s", "pairs_per_s")
    )
    if tokens:
        note = f"and {figure(median(pairs))} pairs" if pairs else ""
        found.append(Tile("Tokens per second", figure(median(tokens)), note))
    memory = [v for line in steps if (v := number(line.get("memory_gb"))) is not None]
    if memory:
        found.append(Tile("Peak memory", f"{figure(max(memory))} GB"))
    return found


@dataclass(frozen=True, slots=True)
class Measure:
    """A row of the held-out table."""

    key: str
    label: str
    unit: str
    share: bool = False


MEASURES = (
    Measure("logp_accuracy", "Ranked right", "share of comparisons, by log-probability alone", share=True),
    Measure("accuracy", "Ranked right against the reference", "share of comparisons, by margin", share=True),
    Measure("margin", "Margin", "nats, log-ratio of chosen minus rejected, without beta"),
    Measure("loss", "Loss", ""),
    Measure("perplexity", "Perplexity", "per token"),
    Measure("kl", "KL from the reference", "nats per sampled response"),
)


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    unit: str
    before: tuple[str, str]  # the figure and its 95 % interval, which may be empty
    after: tuple[str, str]
    change: str


def held_out(evaluation: Json) -> list[Row]:
    """The measures that stand in evaluation.json, before and after."""
    before, after = mapping(evaluation.get("before")), mapping(evaluation.get("after"))
    kind = judged(after or before)
    of_loss = "nats per token" if kind == "demonstrations" else f"mean over {kind}"
    show = {True: percent, False: figure}
    rows: list[Row] = []
    for measure in MEASURES:
        key, share = measure.key, measure.share
        if before.get(key) is None and after.get(key) is None:
            continue
        unit = of_loss if key == "loss" else measure.unit
        if key == "kl" and (samples := number(after.get("kl_samples"))) is not None:
            unit += f", {samples:,.0f} samples"
        cells = [(show[share](side.get(key)), interval(side.get(f"{key}_interval"), share=share)) for side in (before, after)]
        rows.append(Row(measure.label, unit, cells[0], cells[1], change(before.get(key), after.get(key), share=share)))
    return rows


def answer_length(samples: list[Json]) -> Row | None:
    """The mean length of the model's own answers, where it was kept."""
    lengths = [(number(row.get("tokens_before")), number(row.get("tokens_after"))) for row in samples]
    both = [(before, after) for before, after in lengths if before is not None and after is not None]
    if not both:
        return None
    before, after = (sum(side) / len(both) for side in zip(*both, strict=True))
    unit = f"tokens, mean of {count(len(both), 'sampled answers')}"
    return Row("Answer length", unit, (figure(before), ""), (figure(after), ""), change(before, after))


def held_out_size(evaluation: Json) -> str:
    """How much was held out: "112 comparisons of 98 prompts"."""
    side = mapping(evaluation.get("after")) or mapping(evaluation.get("before"))
    counts = [(number(side.get(name)), name) for name in ("comparisons", "rankings", "ratings", "demonstrations", "prompts")]
    return " of ".join(count(int(number_of), name) for number_of, name in counts if number_of)


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One beta of a demo; each cell a figure and its interval or starting value. `page`: the run's own, where there are
    several."""

    beta: str
    best: bool
    cells: list[tuple[str, str]]
    page: str


def demo_table(demo: Json) -> tuple[list[str], list[DemoRow]]:
    """The column names (without beta's) and a row per beta."""
    runs, best = objects(demo.get("runs")), best_run(demo)
    scorers = list(dict.fromkeys(name for run in runs for name in mapping(run.get("win_rate"))))
    columns = [f"Win rate, {name}" for name in scorers] + ["Reward", "KL, nats", "Distinct bigrams"]
    base = mapping(demo.get("base"))
    rows: list[DemoRow] = []
    for run in runs:
        rates = [mapping(mapping(run.get("win_rate")).get(name)) for name in scorers]
        cells = [(percent(rate.get("win_rate")), interval(rate.get("win_rate_interval"), share=True)) for rate in rates]
        cells.append((figure(run.get("reward")), _base(base.get("reward"))))
        cells.append((figure(run.get("kl")), interval(run.get("kl_interval"))))
        cells.append((figure(run.get("distinct_2")), _base(base.get("distinct_2"))))
        beta = number(run.get("beta"))
        page = f"beta-{beta:g}/report.html" if beta is not None and len(runs) > 1 else ""
        rows.append(DemoRow(plain(run.get("beta")), len(runs) > 1 and run is best, cells, page))
    return columns, rows


def _base(value: object) -> str:
    return "" if value is None else f"base {figure(value)}"


MAX_FINDINGS = 20


@dataclass(frozen=True, slots=True)
class Data:
    """The data summary: counts in words, and the three tables."""

    summary: str
    split: str
    dropped: list[tuple[str, str, str]]  # code, rows, share
    sources: list[tuple[str, str, str, str]]  # file, format, rows, kept
    findings: list[tuple[str, str, str, str]]  # severity, code, place, message
    more_findings: int
    every_row: list[tuple[str, str]]  # file and code, all its row numbers


MAX_ROWS = 50_000  # row numbers on the page, about 300 kB; data.json has them all


def data_summary(data: Json) -> Data:
    """data.json as the page shows it; absent counts are dashes."""
    rows, kept = number(data.get("rows")), number(data.get("kept"))
    summary = f"{figure(data.get('rows'))} rows read, {figure(data.get('kept'))} kept"
    summary += f" ({percent(kept / rows)})" if rows and kept is not None else ""
    summary += f", {figure(data['groups'])} prompts" if number(data.get("groups")) is not None else ""
    split = [
        f"{figure(side.get('examples'))} examples of {figure(side.get('groups'))} prompts {use}"
        for use, side in (("for training", mapping(data.get("train"))), ("held out", mapping(data.get("eval"))))
        if side
    ]
    dropped = sorted(mapping(data.get("dropped")).items(), key=lambda item: -(number(item[1]) or 0))
    findings = objects(data.get("findings"))
    return Data(
        summary + ".",
        "; ".join(split),
        [(code, figure(lost), percent((number(lost) or 0) / rows) if rows else NONE) for code, lost in dropped],
        [
            (
                _name(_text(source.get("path"))),
                _text(source.get("format")),
                figure(source.get("rows")),
                figure(source.get("kept")),
            )
            for source in objects(data.get("sources"))
        ],
        [
            (_text(found.get("severity")), _text(found.get("code")), _place(found), _text(found.get("message")))
            for found in findings[:MAX_FINDINGS]
        ],
        max(0, len(findings) - MAX_FINDINGS),
        _every_row(findings),
    )


def _every_row(findings: list[Json]) -> list[tuple[str, str]]:
    """The rows that fell away, by file and code, each list in the order read."""
    rows: dict[str, list[str]] = {}
    for found in [f for f in findings if f.get("row") is not None][:MAX_ROWS]:
        place = f"{_name(_text(found.get('file')))}, {_text(found.get('code'))}"
        rows.setdefault(place, []).append(_text(found["row"]))
    return [(place, ", ".join(numbers)) for place, numbers in rows.items()]


def _name(path: str) -> str:
    """A file by its last name (config.yaml has the whole path); a hub name as it is."""
    return PurePath(path).name if PurePath(path).is_absolute() else path


def _place(finding: Json) -> str:
    """file:row, column"""
    place = _name(_text(finding.get("file")))
    place += f":{finding['row']}" if finding.get("row") is not None else ""
    return f"{place}, {finding['column']}" if finding.get("column") else place


MAX_SAMPLES, MAX_TEXT = 20, 6000  # answers, and characters of each text


@dataclass(frozen=True, slots=True)
class Sample:
    """changed: share of the words that differ. longer: by how much the answer got longer, in tokens where they are known, else
    in characters."""

    prompt: str
    answers: list[tuple[str, str]]  # heading, text
    changed: float
    longer: float
    said: str


def samples(files: RunFiles) -> list[Sample]:
    """Prompts with their answers before and after (a demo's own: of its best run), and the chosen one where known."""
    rows = files.samples or objects(best_run(files.demo).get("samples"))
    found: list[Sample] = []
    for row in rows[:MAX_SAMPLES]:
        named = (
            ("Before", row.get("before")),
            ("After", row.get("after")),
            ("Chosen in the data", row.get("chosen")),
        )
        answers = [(name, _text(value)) for name, value in named if value is not None]
        found.append(Sample(_text(row.get("prompt")), answers, *_changed(row)))
    return found


def _changed(row: Json) -> tuple[float, float, str]:
    """(share of words that differ, tokens or characters more, both in words) of an answer after training."""
    before, after = (_text(row.get(side)) for side in ("before", "after"))
    same = SequenceMatcher(None, before.split(), after.split(), autojunk=False).ratio()
    tokens = [number(row.get(f"tokens_{side}")) for side in ("before", "after")]
    if tokens[0] is None or tokens[1] is None:
        return round(1 - same, 3), len(after) - len(before), f"{percent(1 - same)} of the words changed"
    told = f"{tokens[0]:,.0f} to {tokens[1]:,.0f} tokens, {percent(1 - same)} of the words changed"
    return round(1 - same, 3), tokens[1] - tokens[0], told


def warned(lines: list[Json]) -> list[tuple[str, str]]:
    """(step, what it showed) of warnings.jsonl."""
    return [(plain(line.get("step")), _text(line.get("message"))) for line in lines]


def environment(values: Json, prefix: str = "") -> list[tuple[str, str]]:
    """The environment as rows, nested names joined by dots."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += environment(mapping(cast(object, value)), f"{prefix}{name}.")
        elif not prefix and name == "seconds" and (seconds := number(value)) is not None:
            rows.append((name, f"{seconds:,.1f} ({duration(seconds)})"))
        else:
            rows.append((prefix + name, _text(value)))
    return rows


def _text(value: Any) -> str:
    """Any JSON value as text: messages as "role: content", other lists by commas. A text cut for length says so."""
    if isinstance(value, list):
        items = cast(list[Any], value)
        turns = all("content" in mapping(item) for item in items) and bool(items)
        joined = [f"{item.get('role', '')}: {item['content']}" if turns else _text(item) for item in items]
        value = "\n\n".join(joined) if turns else ", ".join(joined)
    text = "" if value is None else str(value)
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]} … (cut after {MAX_TEXT:,} of {len(text):,} characters)"
