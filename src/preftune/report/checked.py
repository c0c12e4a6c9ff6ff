"""The report of a check in words: what was found, by kind, and its figures; for the terminal and for a page of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.report.folder import Json, mapping, number, objects
from preftune.report.page import filled, put
from preftune.report.tables import data_summary
from preftune.report.words import count, duration, figure, interval, percent

SHOWN = 5  # rows of a kind that are named where it is short
MAX_ROWS = 50_000  # row numbers on the page
SEEN, FEW = 0.005, 3  # of the answers: a share, and a number


@dataclass(frozen=True, slots=True)
class Kind:
    """Findings of one code: how many, where, and the message of the first."""

    severity: str
    code: str
    findings: int
    message: str
    places: list[str]  # `row 3`, or `file:3` where there are several files; empty for what concerns the whole

    @property
    def where(self) -> str:
        """The first rows."""
        rest = len(self.places) - SHOWN
        return ", ".join(self.places[:SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


@dataclass(frozen=True, slots=True)
class Line:
    """A figure, and a word on it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    note: str
    lines: list[Line]


def kinds(report: Json) -> list[Kind]:
    """Findings by severity and code, in the order of the report."""
    findings = objects(report.get("findings"))
    files = {str(found.get("file")) for found in findings if found.get("row") is not None}
    held: dict[tuple[str, str], list[Json]] = {}
    for found in findings:
        held.setdefault((str(found["severity"]), str(found["code"])), []).append(found)
    result: list[Kind] = []
    for (severity, code), own in held.items():
        places = [_place(found, several=len(files) > 1) for found in own if found.get("row") is not None]
        result.append(Kind(severity, code, len(own), _message(own[0]), places))
    return result


def _place(found: Json, *, several: bool) -> str:
    return f"{Path(str(found['file'])).name}:{found['row']}" if several else str(found["row"])


def _message(found: Json) -> str:
    column = f"{found['column']}: " if found.get("column") else ""
    return f"{column}{found['message']}"


def verdict(report: Json) -> str:
    """What the check comes to, in one sentence."""
    findings = objects(report.get("findings"))
    counts = {name: sum(found["severity"] == name for found in findings) for name in ("error", "warning")}
    rows, kept = report["rows"], report["kept"]
    read = f"{rows:,} rows read, {kept:,} kept"
    if not any(counts.values()):
        return f"{read}; nothing stands in the way of training."
    said = " and ".join(count(n, f"{name}s") for name, n in counts.items() if n)
    return f"{read}; {said}."


def sections(report: Json) -> list[Section]:
    """All figures, those that the data has."""
    found = [_judgements(report), _bias(report), _answers(report), _tokens(report), _cut(report), _run(report)]
    return [section for section in found if section.lines]


def _judgements(report: Json) -> Section:
    counts, repeats = mapping(report.get("judgements")), mapping(report.get("repeats"))
    lines = [Line("prompts", figure(report.get("groups")))]
    lines += [Line(name, figure(n)) for name, n in counts.items() if n]
    lines += [Line(name.replace("_", " "), figure(n)) for name, n in repeats.items()]
    if held := mapping(report.get("eval_data")):
        lines.append(Line("held-out rows", figure(held.get("rows")), f"{figure(held.get('kept'))} kept"))
    return Section("Rows and judgements", "Rows are compared by prompt, answers, judgement and annotator.", lines)


def _bias(report: Json) -> Section:
    length, position = mapping(report.get("length_bias")), mapping(report.get("position_bias"))
    lines: list[Line] = []
    if length:
        lines.append(
            _share(length, "longer_preferred", f"longer preferred, of {figure(length['comparisons'])}", length["chance"])
        )
        lines.append(_share(length, "without_equal", f"without {figure(length['equal'])} of equal length", 0.5))
        lines.append(Line("median characters", f"{figure(length['better'])} of better", f"{figure(length['worse'])} of worse"))
    if position:
        what = "answer shown first" if position["by"] == "shown first" else position["by"]
        lines.append(_share(position, "first_preferred", f"{what} preferred, of {figure(position['comparisons'])}", 0.5))
    dropped = f"; {length['dropped']:,} of the comparisons stand in dropped rows" if length.get("dropped") else ""
    note = f"Lengths in characters; 95 % intervals, whole prompts drawn again{dropped}."
    return Section("What the labels favour", note, lines)


def _share(held: Json, key: str, label: str, chance: Any) -> Line:
    between = interval(held.get(f"{key}_interval"), share=True)
    return Line(label, percent(held.get(key)), ", ".join(filter(None, [between, f"{percent(chance)} by chance"])))


def _answers(report: Json) -> Section:
    texts = mapping(report.get("texts"))
    least = max([SEEN, *(FEW / n for n in mapping(texts.get("answers")).values())])
    lines = [_sides("refuse to answer", mapping(texts.get("refusals")))] if texts.get("refusals") else []
    for name, label in (("phrases", "say"), ("beginnings", "begin with")):
        said = [(text, mapping(shares)) for text, shares in mapping(texts.get(name)).items()]
        lines += [_sides(f"{label} “{text}”", shares) for text, shares in said if max(shares.values()) >= least][:SHOWN]
    note = f"Shares of the answers of each side, from {percent(least)} on; refusals and phrases are English."
    return Section("Refusals and set phrases", note, lines)


def _sides(label: str, shares: Json) -> Line:
    """The better side's share is the figure, the others stand beside it."""
    names = {"better": " of better", "worse": " of worse", "other": " of others" if len(shares) > 1 else ""}
    first, *more = [f"{percent(share)}{names[side]}" for side, share in shares.items()]
    return Line(label, first, ", ".join(more))


def _tokens(report: Json) -> Section:
    held = mapping(report.get("tokens"))
    lines: list[Line] = []
    for name, label in (("prompt", "prompt"), ("response", "answer"), ("row", "prompt and longest answer")):
        if quantiles := mapping(held.get(name)):
            lines.append(
                Line(label, figure(quantiles["median"]), ", ".join(f"{n} {figure(v)}" for n, v in list(quantiles.items())[1:]))
            )
    if held.get("one_by_one"):
        lines.append(
            Line(
                "tokens of an epoch",
                figure(held["shared"]),
                f"{percent(held['saved'])} fewer than with a prompt copy per answer",
            )
        )
    return Section("Tokens", "Median, then the share of rows that is below.", lines)


def _cut(report: Json) -> Section:
    held = mapping(report.get("tokens"))
    if not held:
        return Section("", "", [])
    limit = (
        f"{figure(held.get('over'))} of {figure(held.get('rows'))} rows are over max_length {figure(held.get('max_length'))}."
    )
    names = {
        "tokens": "tokens cut",
        "only_difference": "rows without their only difference",
        "last_turn": "rows without their last question",
    }
    lines: list[Line] = []
    for way, each in mapping(held.get("cut")).items():
        if counts := mapping(each):
            more = ", ".join(f"{figure(counts[key])} {label}" for key, label in names.items() if counts.get(key))
            lines.append(Line(way, f"{figure(counts.get('dropped', 0))} rows dropped", more))
    return Section("What max_length cuts, by data.too_long", limit, lines or [Line("cut", "nothing")])


def _run(report: Json) -> Section:
    held = mapping(report.get("run"))
    if not held:
        return Section("", "", [])
    lines = [
        Line("steps", figure(held.get("steps")), f"of {figure(held.get('batch_size'))}, one epoch of {held.get('method')}")
    ]
    memory, free, seconds = (number(held.get(key)) for key in ("memory_gb", "free_gb", "seconds"))
    if memory is not None:
        lines.append(Line("memory", f"{figure(memory)} GB", f"{figure(free)} GB free here" if free is not None else ""))
    if seconds is not None:
        lines.append(Line("time", duration(seconds), "at half the rate of one matrix product on this machine"))
    return Section("A run on it", "Estimated, as in preftune train dry_run=true.", lines)


@dataclass(frozen=True, slots=True)
class Answer:
    """A response drawn token by token: (text, whether it is trained on)."""

    column: str
    tokens: list[tuple[str, bool]]


def drawn(report: Json) -> list[tuple[str, list[Answer]]]:
    """(file:row, its answers)."""
    return [
        (
            f"{Path(str(row['file'])).name}:{row['row']}",
            [Answer(str(r["column"]), r["tokens"]) for r in objects(row.get("responses"))],
        )
        for row in objects(mapping(report.get("tokens")).get("drawn"))
    ]


@dataclass(frozen=True, slots=True)
class Shares:
    """A table of values and how many rows have them."""

    title: str
    note: str
    rows: list[tuple[str, str, float]]


def balance(report: Json) -> list[Shares]:
    """Rows by columns, and prompts by words."""
    found: list[Shares] = []
    for column, said in mapping(report.get("balance")).items():
        held = mapping(said)
        note = f"{count(int(held['values']), 'values')} in {figure(held['rows'])} rows"
        found.append(Shares(f"By {column}", note, [(v, percent(s), s) for v, s in mapping(held.get("shares")).items()]))
    texts = mapping(report.get("texts"))
    if words := mapping(texts.get("words")):
        found.append(
            Shares(
                "By words of the prompt",
                f"{figure(texts.get('prompts'))} prompts; the last message of each",
                [(w, percent(s), s) for w, s in words.items()],
            )
        )
    return found


def render(report: Json, name: str) -> str:
    """The page as text."""
    return filled(
        "check.html",
        name=name,
        verdict=verdict(report),
        kinds=kinds(report),
        max_rows=MAX_ROWS,
        data=data_summary(report),
        sections=sections(report),
        balance=balance(report),
        drawn=drawn(report),
    )


def write(report: Json, path: Path, name: str) -> Path:
    """One file that opens anywhere; it needs no network and no script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path, render(report, name).encode("utf-8", "replace"))
    return path
