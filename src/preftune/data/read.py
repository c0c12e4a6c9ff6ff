"""From sources to Groups: every row is either in a group or named by a finding, and the two add up."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

from preftune.data.dialogue import is_list, is_object
from preftune.data.faults import RowFault
from preftune.data.formats import COLUMNS, FORMATS, Example, Format, fitting, understand
from preftune.data.formats.columns import value
from preftune.data.grouping import Grouping, own_column
from preftune.data.options import DataOptions
from preftune.data.sources import Item, Rows, Stream, streams
from preftune.errors import Refusal, nearest
from preftune.records import Finding, Group, Origin, Severity

log = logging.getLogger("preftune")
SAMPLE = 100  # rows that are looked at, at most, to recognise a format
SHOWN = 5  # rows that a message names


@dataclass
class Reading:
    """What was read: rows = kept + sum(dropped). `sources` says for each file {path, format, read_as, rows, kept, dropped}, and
    `filtered` where a filter left rows out, which do not count as read. `votes`: what labels were made of, where they were.
    """

    groups: list[Group] = field(default_factory=list[Group])
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    findings: list[Finding] = field(default_factory=list[Finding])
    sources: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    votes: dict[str, Any] | None = None

    @property
    def kept(self) -> int:
        return self.rows - self.dropped.total()

    def summary(self) -> list[str]:
        """A line for each source: what it was read as, what was dropped, and what was left out of rows that were kept."""
        return [self._line(source) for source in self.sources]

    def _line(self, source: Mapping[str, Any]) -> str:
        line = f"{source['path']}: {source['rows']:,} rows" + (f" read as {source['read_as']}" if source.get("read_as") else "")
        line += f", {source['filtered']:,} more left out by the filter" if source.get("filtered") else ""
        if source["dropped"]:
            found = self._found(source, "error")
            line += f", {sum(source['dropped'].values()):,} dropped: {tally(source['dropped'], found)}"
        if notes := self._found(source, "warning"):
            line += f"; answers left out: {tally(Counter(note.code for note in notes), notes)}"
        return line

    def _found(self, source: Mapping[str, Any], severity: Severity) -> list[Finding]:
        return [f for f in self.findings if f.file == source["path"] and f.severity == severity]


def tally(dropped: Mapping[str, int], findings: Iterable[Finding]) -> str:
    """`empty_answer 4 (rows 87, 517, 926, 1104), bad_json 1 (row 3)`; rows of several files are named `file:row`."""
    rows: dict[str, dict[str, None]] = {}  # in order, each once: a row may have several judgements
    placed = [finding for finding in findings if finding.row is not None]
    several = len({finding.file for finding in placed}) > 1
    for finding in placed:
        rows.setdefault(finding.code, {})[f"{finding.file}:{finding.row}" if several else str(finding.row)] = None
    return ", ".join(f"{code} {count:,}" + _named(list(rows.get(code, ()))) for code, count in dropped.items())


def _named(rows: Sequence[str]) -> str:
    shown = ", ".join(rows[:SHOWN]) + (", ..." if len(rows) > SHOWN else "")
    return f" ({'row' if len(rows) == 1 else 'rows'} {shown})" if rows else ""


def read(source: Any) -> list[Group]:
    """Groups of a path, a hub name, a list of dicts, a datasets.Dataset, or a list of these; drops are logged."""
    reading = load(source)
    told = {finding.file for finding in reading.findings}
    for source_, line in zip(reading.sources, reading.summary(), strict=True):
        log.log(logging.WARNING if source_["path"] in told else logging.INFO, line)
    enforce(reading.rows, reading.dropped, reading.findings, strict=False, allow_drops=False)
    return reading.groups


def load(sources: Any, *, options: DataOptions | None = None) -> Reading:
    """Reads all sources. Faults of a file are refused here; faulty rows are only collected (see `enforce`)."""
    options = options or DataOptions()
    if is_list(sources) and sources and all(isinstance(item, Group) for item in sources):
        return Reading(list(sources), len(sources), sources=[_entry("groups", None, "", len(sources), Counter())])
    reading, grouping = Reading(), Grouping()
    with no_collection():
        for stream in streams(sources, options):
            take(stream, grouping, reading)
        reading.groups = grouping.groups()
    check_left(reading)
    return reading


def check_left(reading: Reading) -> None:
    """Refuses a filter that no row passes."""
    if not reading.rows:
        left_out = sum(source["filtered"] for source in reading.sources)
        raise Refusal(f"the filter leaves none of {left_out:,} rows", code="nothing_kept", key="data.filter")


@contextmanager
def no_collection() -> Generator[None]:
    """Reading makes millions of small records and no cycles: the collector would go through all of them again and again, which
    took half of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def enforce(
    rows: int, dropped: Counter[str], findings: Iterable[Finding], *, strict: bool, allow_drops: bool, part: str = ""
) -> None:
    """Refuses data of which too much was dropped: nothing kept; any row under `strict`; more than half otherwise.
    `part` says of which data, where there are several."""
    errors = [f for f in findings if f.severity == "error"]
    count, first = dropped.total(), next(iter(errors), None)
    place: dict[str, Any] = {"file": first.file, "row": first.row, "column": first.column} if first else {}
    of = f" of the {part}" if part else ""
    if strict and count:
        why = first.message if first else "a row is faulty"
        raise Refusal(f"{why} ({count:,} faulty{of} in all; data.strict=false drops them)", code="faulty_row", **place)
    told = tally(dropped, errors)
    if count >= rows:
        hint = f"; first: {first.message}" if first else ""
        raise Refusal(f"none of {rows:,} rows{of} could be used: {told}{hint}", code="nothing_kept", **place)
    if count > rows / 2 and not allow_drops:
        what = f"{count:,} of {rows:,} rows{of} were dropped: {told}; data.allow_drops=true goes on without them"
        raise Refusal(what, code="too_many_dropped", file=place.get("file"))


def by_row(findings: Sequence[Finding]) -> Counter[str]:
    """How many rows fell away, by code: a row with several findings counts once, a mark without a row for itself."""
    first: dict[tuple[str, int | None, int], str] = {}
    for n, finding in enumerate(f for f in findings if f.severity == "error"):
        first.setdefault((finding.file, finding.row, n if finding.row is None else 0), finding.code)
    return Counter(first.values())


def say_drops(findings: Sequence[Finding], part: str = "") -> None:
    """What rendering dropped, after what reading dropped was said."""
    if by_row(findings):
        more = f"{by_row(findings).total():,} more rows" + (f" of the {part}" if part else "")
        log.warning(f"{more} dropped: {tally(by_row(findings), findings)}")


@dataclass
class Part:
    """Rows that are counted together, and what was found in them: while reading, then while rendering."""

    name: str
    reading: Reading
    findings: list[Finding]

    @property
    def dropped(self) -> Counter[str]:
        return self.reading.dropped + by_row(self.findings)

    @property
    def lost(self) -> list[Finding]:
        return [*self.reading.findings, *self.findings]

    def sources(self) -> list[dict[str, Any]]:
        """What was read of each source, less what fell away since."""
        alone = len(self.reading.sources) == 1
        found: list[dict[str, Any]] = []
        for source in self.reading.sources:
            more = by_row([f for f in self.findings if alone or f.file == source["path"]])
            dropped = Counter(source["dropped"]) + more
            found.append({**source, "kept": source["kept"] - more.total(), "dropped": dict(dropped)})
        return found


@dataclass
class Opened:
    """One stream, understood: its format (None only where no row is an object), and its rows, of which some are faulty."""

    format: Format | None
    rows: Iterator[tuple[int, Example | Group | RowFault]]


def opened(stream: Stream) -> Opened:
    """Recognises the format of a stream; refuses one that is not known, or that could be several."""
    columns = _checked(stream.columns)
    rows, format = _recognised(stream, columns)
    return Opened(format, _understood(rows, format, named="id" in columns))


def _understood(rows: Rows, format: Format | None, *, named: bool) -> Iterator[tuple[int, Example | Group | RowFault]]:
    """`named`: the rows' own `id` is that of their prompt."""
    for number, row in rows:
        if isinstance(row, (RowFault, Group)):
            yield number, row
            continue
        assert format is not None  # it is recognised as soon as one row is an object
        try:
            example = understand(format, row)
            if named:
                example.id = str(value(row, "id"))
        except RowFault as fault:
            yield number, fault
        else:
            yield number, example


class Collector(Protocol):
    """What takes understood rows in: `Grouping`, or what keeps less of them. A row that cannot be taken raises a RowFault."""

    def add(self, example: Example, *, file: str, row: int, columns: Mapping[str, str]) -> None: ...

    def add_group(self, group: Group) -> None: ...

    def rank_scores(self) -> Iterable[tuple[Origin, RowFault] | int]: ...


def take(stream: Stream, grouping: Collector, reading: Reading) -> None:
    """All rows of one stream into groups, and their counts and findings into the reading."""
    source, columns = opened(stream), stream.columns
    count, dropped, shape = 0, Counter[str](), _Shape()

    def found(fault: RowFault, row: int, severity: Severity = "error") -> None:
        column = own_column(fault.column, columns) if fault.column else None
        reading.findings.append(Finding(fault.code, severity, fault.message, stream.name, row, column))
        if severity == "error":
            dropped[fault.code] += 1

    for number, row in source.rows:
        count += 1
        if isinstance(row, RowFault):
            found(row, number)
        elif isinstance(row, Group):
            grouping.add_group(row)
        else:
            try:
                grouping.add(row, file=stream.name, row=number, columns=columns)
            except RowFault as fault:
                found(fault, number)
                continue
            shape.add(len(row.answers), len(row.marks))
            for note in row.notes:
                found(note, number, "warning")
    for joined in grouping.rank_scores():
        if isinstance(joined, int):
            shape.add(joined, 1)
        else:
            found(joined[1], joined[0].row)
    if not count and not stream.filtered:
        raise Refusal("is empty: it holds no rows", code="empty", file=stream.name)
    reading.rows += count
    reading.dropped += dropped
    title = source.format.title + str(shape) if source.format else ""
    entry = _entry(stream.name, source.format.name if source.format else None, title, count, dropped)
    reading.sources.append(entry | ({"filtered": stream.filtered} if stream.filtered else {}))


@dataclass
class _Shape:
    """How many answers and judgements the rows have, where that is not plain from the format."""

    answers: set[int] = field(default_factory=set[int])
    marks: set[int] = field(default_factory=set[int])

    def add(self, answers: int, marks: int) -> None:
        self.answers.add(answers)
        self.marks.add(marks)

    def __str__(self) -> str:
        said = f", {_range(self.answers)} answers a prompt" if max(self.answers, default=0) > 2 else ""
        return said + (f", {_range(self.marks)} judgements a row" if max(self.marks, default=0) > 1 else "")


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _entry(path: str, format: str | None, read_as: str, rows: int, dropped: Counter[str]) -> dict[str, Any]:
    kept = rows - dropped.total()
    return {"path": path, "format": format, "read_as": read_as, "rows": rows, "kept": kept, "dropped": dict(dropped)}


def _checked(columns: Mapping[str, str]) -> Mapping[str, str]:
    for ours in columns:
        if ours not in COLUMNS:
            more = nearest(ours, COLUMNS) or " `preftune convert --help` lists the columns of every format"
            what = f"no format has a column {ours}.{more}"
            raise Refusal(what, code="unknown_column", key="data.columns")
    return columns


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Iterator[tuple[int, Item]]:
    """Rows under our column names. A column that got another name is no longer there under its own."""
    for number, row in rows:
        if is_object(row):
            new = {name: held for name, held in row.items() if name not in columns and name not in columns.values()}
            yield number, new | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        else:
            yield number, row


def _recognised(stream: Stream, columns: Mapping[str, str]) -> tuple[Rows, Format | None]:
    """The rows, all of them, and their format; None only where no row is an object."""
    source = iter(_renamed(stream.rows, columns) if columns else stream.rows)
    head: list[tuple[int, Item]] = []
    sample: list[dict[str, Any]] = []
    while not sample and (more := list(islice(source, SAMPLE))):
        head += more
        sample = [row for _, row in more if is_object(row)]
    rows = chain(head, source)
    found = list(dict.fromkeys(name for row in sample for name in row))
    for ours, theirs in columns.items():
        if sample and ours not in found:
            what = f"there is no column {theirs} to read as {ours}.{nearest(theirs, found)} Found: {', '.join(found)}"
            raise Refusal(what, code="unknown_column", file=stream.name, key="data.columns")
    if stream.format is not None:
        return rows, _named_format(stream.format)
    for nulls in (False, True):
        for row in sample:
            if formats := fitting(row, nulls=nulls):
                return rows, _only(formats, stream.name)
    if sample:
        raise Refusal(_no_format(found), code="no_known_columns", file=stream.name)
    return rows, None


def _named_format(name: str) -> Format:
    if name not in FORMATS:
        what = f"there is no format {name}.{nearest(name, FORMATS)} Known: {', '.join(FORMATS)}"
        raise Refusal(what, code="unknown_format", key="data.format")
    return FORMATS[name]


def _only(formats: Sequence[Format], name: str) -> Format:
    if len(formats) > 1:
        names = " or ".join(f"{format.name} ({format.columns})" for format in formats)
        what = f"could be read as {names}: say which, such as data.format={formats[0].name}"
        raise Refusal(what, code="ambiguous_format", file=name, key="data.format")
    return formats[0]


def _no_format(found: Sequence[str]) -> str:
    """The columns that were found, and the formats that lack least."""
    shown = ", ".join(name if len(name) <= 30 else name[:27] + "..." for name in found[:20]) or "none"
    present = set(found)
    lacking = {format: len(format.needs) - len(format.used(present)) for format in FORMATS.values() if format.used(present)}
    near = sorted(lacking, key=lambda format: lacking[format])[:3] or [FORMATS["pairs"]]
    sets = "; ".join(f"{format.name} ({format.columns})" for format in near)
    what = (
        f"no known set of columns. Found: {shown}. Nearest: {sets}. Map your names with data.columns; preftune convert --help"
    )
    return what + " lists all formats"
