"""The check as a whole: sources in, counts and findings out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from preftune.checks.balance import COLUMNS
from preftune.checks.bias import FEW, length_bias, position_bias
from preftune.checks.codes import finding
from preftune.checks.collect import Collect, ledger_of
from preftune.checks.ledger import COMPARISON, DEMONSTRATION, JOINED, RATING, Table
from preftune.checks.repeats import Pairs, contradictions, cycles, duplicates, shared_prompts
from preftune.checks.tokens import Tokens
from preftune.data.options import DataOptions
from preftune.data.read import Part, check_left, enforce
from preftune.data.sources import Rows, streams
from preftune.errors import Refusal
from preftune.records import Finding, Group, Mark
from preftune.report.words import percent

SEVERITIES = ("error", "warning", "info")
Progress = Callable[[str, int], None]  # file, rows of it that are read


@dataclass
class Checked:
    """`report`: everything as JSON has it. `samples`: one group of each kind of judgement."""

    report: dict[str, Any]
    samples: dict[type[Mark], Group] = field(default_factory=dict[type[Mark], Group])

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [found for found in self.report["findings"] if found["severity"] == "error"]


def check(
    sources: Any,
    *,
    options: DataOptions | None = None,
    eval_sources: Any = None,
    near_duplicates: bool = False,
    columns: tuple[str, ...] = COLUMNS,
    tokens: Tokens | None = None,
    progress: Progress = lambda file, rows: None,
) -> Checked:
    """Reads every row once, keeping digests and counts of it.

    Args:
        sources: as `preftune.read` takes them. options: how they are read.
        eval_sources: held-out data, whose prompts should not be among the others.
        near_duplicates: also look for rows that are almost the same.
        columns: of the file, whose values are counted.
        tokens: what a model's tokenizer makes of the rows; None: not looked at.
        progress: called now and then.

    Raises:
        Refusal: a file that cannot be read, or is of no known format.
    """
    options = options or DataOptions()
    collect = Collect(near=near_duplicates, columns=columns, tokens=tokens)
    _read(collect, sources, options, progress)
    part = Part("", collect.reading, tokens.findings if tokens else [])
    table = collect.ledger.table()
    found = [*part.lost, *collect.findings, *_refused(part, options)]
    report: dict[str, Any] = {
        "rows": part.reading.rows,
        "kept": part.reading.rows - part.dropped.total(),
        "dropped": dict(part.dropped),
        "groups": len(np.unique(table.group)),
        "findings": [],
        "sources": part.sources(),
        "judgements": _judgements(table),
    }
    held = None
    if eval_sources:
        held = Collect(columns=columns)
        _read(held, eval_sources, options, progress)
        of = Part("held-out data", held.reading, [])
        found += [*of.lost, *held.findings, *_refused(of, options)]
        dropped = dict(of.dropped)
        report["eval_data"] = {"rows": of.reading.rows, "kept": of.reading.kept, "dropped": dropped, "sources": of.sources()}
    more, figures = _analysed(table, collect, held)
    found += more
    report |= figures
    if tokens:
        report["tokens"] = tokens.summary()
        found += tokens.problems()
    files = [source["path"] for reading in (collect.reading, held and held.reading) if reading for source in reading.sources]
    report["findings"] = [asdict(f) for f in _sorted(found, files)]
    return Checked(report, collect.samples)


def quick(groups: Sequence[Group]) -> tuple[str, list[Finding]]:
    """What can be said at once of groups that are read already: (one line, the findings behind it)."""
    table = ledger_of(groups).table()
    found, counts = _repeats(table)
    length, bias = length_bias(table)
    said = [f"{what}: {number:,}" for what, number in counts.items() if number]
    if length and length["comparisons"] - length["equal"] >= FEW:
        said.append(
            f"the longer answer wins {percent(length['without_equal'])} of comparisons of unequal length (50 % by chance)"
        )
    line = "; ".join(said) or "no row says again, or the other way round, what another says"
    return f"check: {line}", [*found, *bias]


def _read(collect: Collect, sources: Any, options: DataOptions, progress: Progress) -> None:
    with _few_collections():
        for stream in streams(sources, options):
            stream.rows = _said(stream.name, stream.rows, progress)
            collect.read(stream)
    check_left(collect.reading)
    collect.finish()


@contextmanager
def _few_collections() -> Generator[None]:
    """A row is many small objects, which go as soon as nobody has them. Python would look for cycles among them after every few
    hundred, which takes a tenth of the time and finds nothing."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _said(name: str, rows: Rows, progress: Progress) -> Rows:
    for n, item in enumerate(rows, start=1):
        if n % 1000 == 0:
            progress(name, n)
        yield item


def _refused(part: Part, options: DataOptions) -> list[Finding]:
    """What `train` would refuse of these rows as a whole."""
    try:
        enforce(
            part.reading.rows,
            part.dropped,
            part.lost,
            strict=options.strict,
            allow_drops=options.allow_drops,
            part=part.name,
        )
    except Refusal as refusal:
        return [finding(refusal.code, refusal.message, refusal.file or "")]
    return []


def _judgements(table: Table) -> dict[str, int]:
    compared = (table.kind == COMPARISON) | (table.kind == JOINED)
    found = {
        "comparisons": compared,
        "ties": compared & (table.preference == 0.5),
        "ratings": table.kind == RATING,
        "desirable": (table.kind == RATING) & (table.preference > 0.5),
        "demonstrations": table.kind == DEMONSTRATION,
    }
    return {name: int(mask.sum()) for name, mask in found.items()}


def _repeats(table: Table) -> tuple[list[Finding], dict[str, int]]:
    """(findings, how many of each kind, in words)."""
    pairs = Pairs.of(table)
    twice, circles = duplicates(table), cycles(table, pairs)
    opposed, disputed = contradictions(table, pairs)
    found = [*twice, *opposed, *circles]
    counts = {"duplicate rows": len(twice), "contradictions": len(opposed), "preference cycles": len(circles)}
    if disputed:
        what = f"{disputed:,} pairs are judged in opposite ways by different annotators: their votes belong together"
        found.append(finding("disagreement", what))
    return found, counts | {"pairs in dispute": disputed}


def _analysed(table: Table, collect: Collect, held: Collect | None) -> tuple[list[Finding], dict[str, Any]]:
    """What the rows say together."""
    found, counts = _repeats(table)
    whole = collect.ledger.table(dropped=True)
    gone = int(whole.decided.sum() - table.decided.sum())
    length, of_length = length_bias(whole, collect.unread, dropped=gone)
    texts = collect.texts.summary()
    files = [n for n, name in enumerate(table.files) if name in collect.ordered]
    position, of_position = position_bias(table, np.isin(table.file[table.row], files))
    found += [*of_length, *of_position, *collect.texts.findings(texts), *collect.balance.findings()]
    figures: dict[str, Any] = {"repeats": {name.replace(" ", "_"): number for name, number in counts.items()}}
    if collect.near:
        near = collect.near.findings(table)
        found += near
        figures["repeats"]["near_duplicates"] = len(near)
    if held:
        shared = shared_prompts(table, held.ledger.table())
        found += shared
        figures["repeats"]["shared_prompts"] = len(shared)
    balance = collect.balance.summary()
    return found, figures | {
        "length_bias": length,
        "position_bias": position,
        "texts": texts,
        "balance": balance,
    }


def _sorted(found: Sequence[Finding], files: Sequence[str]) -> list[Finding]:
    """Errors first, then warnings; of each kind what concerns the whole, then row by row."""
    order = {name: n for n, name in reversed(list(enumerate(files, start=1)))}
    return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), order.get(f.file, 0), f.row or 0))
