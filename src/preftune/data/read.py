"""From sources to Groups: every row is either in a group or named by a finding, and the two add up."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from preftune.data.dialogue import is_list, is_object
from preftune.data.faults import RowFault
from preftune.data.formats import COLUMNS, FORMATS, Format, recognise, understand, value
from preftune.data.grouping import Grouping
from preftune.data.options import DataOptions
from preftune.data.sources import Item, Rows, Stream, streams
from preftune.errors import Refusal, nearest
from preftune.records import Finding, Group

log = logging.getLogger("preftune")
SAMPLE = 100  # rows that are looked at, at most, to recognise a format
SHOWN = 5  # rows that a message names


@dataclass
class Reading:
    """What was read: rows = kept + sum(dropped). `sources` says for each file {path, format, rows, kept, dropped}."""

    groups: list[Group] = field(default_factory=list[Group])
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    findings: list[Finding] = field(default_factory=list[Finding])
    sources: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @property
    def kept(self) -> int:
        return self.rows - self.dropped.total()

    def summary(self) -> list[str]:
        """A line for each source: what it was read as, and what was dropped."""
        return [self._line(source) for source in self.sources]

    def _line(self, source: Mapping[str, Any]) -> str:
        known = FORMATS.get(source["format"])
        line = f"{source['path']}: {source['rows']:,} rows" + (f" read as {known.title}" if known else "")
        if not source["dropped"]:
            return line
        found = [f for f in self.findings if f.file == source["path"] and f.severity == "error"]
        return f"{line}, {sum(source['dropped'].values()):,} dropped: {tally(source['dropped'], found)}"


def tally(dropped: Mapping[str, int], findings: Iterable[Finding]) -> str:
    """`empty_answer 4 (rows 87, 517, 926, 1104), bad_json 1 (row 3)`; rows of several files are named `file:row`."""
    rows: dict[str, list[str]] = {}
    placed = [finding for finding in findings if finding.row is not None]
    several = len({finding.file for finding in placed}) > 1
    for finding in placed:
        rows.setdefault(finding.code, []).append(f"{finding.file}:{finding.row}" if several else str(finding.row))
    return ", ".join(f"{code} {count:,}" + _named(rows.get(code, [])) for code, count in dropped.items())


def _named(rows: Sequence[str]) -> str:
    shown = ", ".join(rows[:SHOWN]) + (", ..." if len(rows) > SHOWN else "")
    return f" ({'row' if len(rows) == 1 else 'rows'} {shown})" if rows else ""


def read(source: Any) -> list[Group]:
    """Groups of a path, a hub name, a list of dicts, a datasets.Dataset, or a list of these; drops are logged."""
    reading = load(source)
    for source_, line in zip(reading.sources, reading.summary(), strict=True):
        log.log(logging.WARNING if source_["dropped"] else logging.INFO, line)
    enforce(reading.rows, reading.dropped, reading.findings, strict=False, allow_drops=False)
    return reading.groups


def load(sources: Any, *, options: DataOptions | None = None) -> Reading:
    """Reads all sources. Faults of a file are refused here; faulty rows are only collected (see `enforce`)."""
    options = options or DataOptions()
    if is_list(sources) and sources and all(isinstance(item, Group) for item in sources):
        return Reading(list(sources), len(sources), sources=[_entry("groups", None, len(sources), Counter())])
    reading, grouping = Reading(), Grouping()
    for stream in streams(sources, options):
        _take(stream, grouping, reading)
    reading.groups = grouping.groups()
    return reading


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


def _take(stream: Stream, grouping: Grouping, reading: Reading) -> None:
    """All rows of one stream into groups and findings."""
    columns = _checked(stream.columns)
    rows, format = _recognised(stream, columns)
    count, dropped = 0, Counter[str]()
    for number, row in rows:
        count += 1
        try:
            if isinstance(row, RowFault):
                raise row
            if isinstance(row, Group):
                grouping.add_group(row)
                continue
            assert format is not None  # it is recognised as soon as one row is an object
            example = understand(format, row)
            user_id = _user_id(row) if "id" in columns else ""
            grouping.add(example, file=stream.name, row=number, columns=columns, user_id=user_id)
        except RowFault as fault:
            dropped[fault.code] += 1
            column = columns.get(fault.column, fault.column) if fault.column else None
            reading.findings.append(Finding(fault.code, "error", fault.message, stream.name, number, column))
    if not count:
        raise Refusal("is empty: it holds no rows", code="empty", file=stream.name)
    reading.rows += count
    reading.dropped += dropped
    reading.sources.append(_entry(stream.name, format.name if format else None, count, dropped))


def _entry(path: str, format: str | None, rows: int, dropped: Counter[str]) -> dict[str, Any]:
    return {"path": path, "format": format, "rows": rows, "kept": rows - dropped.total(), "dropped": dict(dropped)}


def _checked(columns: Mapping[str, str]) -> Mapping[str, str]:
    for ours in columns:
        if ours not in COLUMNS:
            what = f"no format has a column {ours}.{nearest(ours, COLUMNS)} Known: {', '.join(sorted(COLUMNS))}"
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
            if format := recognise(row, nulls=nulls):
                return rows, format
    if sample:
        raise Refusal(_no_format(found), code="no_known_columns", file=stream.name)
    return rows, None


def _named_format(name: str) -> Format:
    if name not in FORMATS:
        what = f"there is no format {name}.{nearest(name, FORMATS)} Known: {', '.join(FORMATS)}"
        raise Refusal(what, code="unknown_format", key="data.format")
    return FORMATS[name]


def _no_format(found: Sequence[str]) -> str:
    shown = ", ".join(name if len(name) <= 30 else name[:27] + "..." for name in found[:20]) or "none"
    sets = "; ".join(dict.fromkeys(f.columns for f in FORMATS.values()))
    return f"no known set of columns. Found: {shown}. Understood: {sets}. Map your names with data.columns"


def _user_id(row: Mapping[str, Any]) -> str:
    return str(value(row, "id"))
