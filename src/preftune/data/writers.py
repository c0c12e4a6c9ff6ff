"""Rows into a file, by its ending: JSONL, JSON, CSV, TSV (these also gzipped) or Parquet; written aside and renamed."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
from collections.abc import Callable, Iterable
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, cast

from preftune.aside import written_aside
from preftune.data.dialogue import is_list, is_object
from preftune.data.readers import kind_of
from preftune.errors import Refusal

Row = dict[str, Any]


def check_ending(path: Path) -> None:
    """Refuses a file whose ending does not say how it is written."""
    if kind_of(path) not in (*_TEXT, "parquet"):
        known = ", ".join(f".{kind}" for kind in _TEXT)
        what = f"the ending does not say how to write it: {known} (each also with .gz) or .parquet"
        raise Refusal(what, code="unknown_kind", file=str(path), key="OUT")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """The file stands in its place once it is whole."""
    with written_aside(path) as aside:
        if kind_of(path) == "parquet":
            _parquet(aside, path, rows)
        else:
            packed = path.suffix.lower() == ".gz"
            with aside.open("wb") as file:  # neither name nor time in a gzip header: the same rows give the same bytes
                binary: Any = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if packed else file
                with TextIOWrapper(binary, encoding="utf-8", newline="") as out:
                    _TEXT[kind_of(path)](out, path, rows)


def _json(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as a remark may hold it, can only stand there as an escape
        return json.dumps(row, allow_nan=False)
    return text


def _jsonl(out: TextIO, path: Path, rows: Iterable[Row]) -> None:
    for row in rows:
        out.write(_json(row) + "\n")


def _array(out: TextIO, path: Path, rows: Iterable[Row]) -> None:
    before = "[\n"
    for row in rows:
        out.write(before + _json(row))
        before = ",\n"
    out.write("\n]\n")


def _csv(out: TextIO, path: Path, rows: Iterable[Row], delimiter: str = ",") -> None:
    held = list(rows)
    names = list(dict.fromkeys(name for row in held for name in row))
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\r\n")  # of what ends a line, fields with a part are quoted
    writer.writerow(names)
    for row in held:
        if column := next((name for name, value in row.items() if is_list(value) or is_object(value)), None):
            what = f".{kind_of(path)} holds plain text, no lists and no messages: write .jsonl, .json or .parquet instead"
            raise Refusal(what, code="wrong_ending", file=str(path), column=column)
        try:
            writer.writerow([row.get(name) for name in names])
        except UnicodeEncodeError:
            what = "holds half a surrogate pair, which only JSON can write: choose .jsonl"
            raise Refusal(what, code="wrong_ending", file=str(path)) from None


def _parquet(aside: Path, path: Path, rows: Iterable[Row]) -> None:
    arrow = cast(Any, importlib.import_module("pyarrow"))
    parquet = cast(Any, importlib.import_module("pyarrow.parquet"))
    held = list(rows)
    names = list(dict.fromkeys(name for row in held for name in row))
    for row in held:
        if "tools" in row:  # of different fields in every row, where a column has the same in all
            row["tools"] = _as_json(row["tools"])
        if column := next((name for name, value in row.items() if _has_calls(value)), None):
            what = "tool calls differ in their fields, and Parquet gives all rows the same: write .jsonl instead"
            raise Refusal(what, code="wrong_ending", file=str(path), column=column)
    columns: dict[str, Any] = {}
    for name in names:
        try:
            columns[name] = arrow.array([row.get(name) for row in held])
        except (arrow.ArrowException, UnicodeEncodeError):
            what = "holds values of different kinds, such as text and messages, which Parquet cannot: write .jsonl instead"
            raise Refusal(what, code="wrong_ending", file=str(path), column=name) from None
    parquet.write_table(arrow.table(columns), aside)


def _as_json(tools: object) -> str:
    return tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)


def _has_calls(value: object) -> bool:
    """Whether messages stand there that hold more than text."""
    if not is_list(value):
        return False
    return any(_has_calls(turn) or (is_object(turn) and any(map(_nested, turn.values()))) for turn in value)


def _nested(value: object) -> bool:
    return is_list(value) or is_object(value)


_TEXT: dict[str, Callable[[TextIO, Path, Iterable[Row]], None]] = {
    "jsonl": _jsonl,
    "ndjson": _jsonl,
    "json": _array,
    "csv": _csv,
    "tsv": lambda out, path, rows: _csv(out, path, rows, "\t"),
}
