"""Rows of a file, one at a time, each with its number: JSONL, JSON, CSV, TSV, Parquet, lines of text; also gzipped.

A row that cannot be read is yielded as a RowFault. What is wrong with the file itself is refused, with its place.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from preftune.data.dialogue import is_object
from preftune.data.faults import RowFault
from preftune.errors import Refusal

Numbered = tuple[int, dict[str, Any] | RowFault]
ROW_KEYS = ("data", "train", "rows", "examples", "instances", "validation", "test")
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
CHUNK = 1 << 18
LONGEST = 1 << 25  # bytes of one row: a file of which one is longer is no rows, or has lost a quote or a line end


@dataclass
class Place:
    """The last row that was read whole, so that a fault of the file can name the next."""

    row: int = 0


class NotUtf8(Exception):
    """A byte that is no UTF-8, at this offset (after unpacking)."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


class BrokenFile(Exception):
    """The structure of a file does not hold, at a row where one can be named."""

    def __init__(self, code: str, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.row = code, message, row


def kind_of(path: Path) -> str:
    """`jsonl` for `pairs.jsonl.gz`; an empty text where the suffix is none that we know."""
    suffixes = [s.lower().lstrip(".") for s in path.suffixes]
    if suffixes[-1:] == ["gz"]:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    return kind if kind in TEXT_READERS or (kind == "parquet" and path.suffix.lower() != ".gz") else ""


def read_rows(path: Path, name: str) -> Iterator[Numbered]:
    """(row number, row or fault) of a data file. `name` is what messages call it."""
    place = Place()
    try:
        kind = kind_of(path) or _sniff(path, name)
        if kind == "parquet":
            yield from _parquet(path, place)
            return
        with _opened(path) as stream:
            yield from TEXT_READERS[kind](stream, place)
    except NotUtf8 as e:
        what = f"is not UTF-8 at byte {e.offset:,}: save it as UTF-8"
        raise Refusal(what, code="not_utf8", file=name, row=place.row + 1) from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        what = f"the gzip data is cut short or damaged after row {place.row:,}: fetch the file again"
        raise Refusal(what, code="bad_gzip", file=name) from None
    except BrokenFile as e:
        raise Refusal(e.message, code=e.code, file=name, row=e.row) from None
    except OSError as e:
        raise Refusal(f"cannot be read: {e.strerror or e}", code="unreadable", file=name) from None


def _opened(path: Path) -> BinaryIO:
    if path.suffix.lower() != ".gz":
        return path.open("rb")
    with path.open("rb") as stream:
        if not GZIP.startswith(stream.read(len(GZIP))):
            raise BrokenFile("bad_gzip", "is not gzip data, though its name says so: drop the ending .gz, or compress it")
    return cast(BinaryIO, gzip.open(path, "rb"))


def _sniff(path: Path, name: str) -> str:
    """An unknown suffix: JSON is recognised by its first character, everything else is refused."""
    try:
        with _opened(path) as stream:
            start = stream.read(4096).removeprefix(BOM).lstrip()
    except (OSError, EOFError, zlib.error):
        start = b"?"
    if start[:1] in (b"[", b"{"):
        return "json"
    if not start:
        raise Refusal("is empty", code="empty", file=name)
    known = ", ".join(f".{kind}" for kind in (*TEXT_READERS, "parquet"))
    what = f"is of no known kind: give a file ending in {known}, all but the last also with .gz"
    raise Refusal(what, code="unknown_kind", file=name)


def _lines(stream: BinaryIO, place: Place) -> Iterator[str]:
    """Decoded lines with their ends. Only \\n ends a line, whatever else Unicode counts as one."""
    offset = 0
    while line := stream.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise _too_long(place.row + 1)
        start = len(BOM) if offset == 0 and line.startswith(BOM) else 0
        try:
            yield line[start:].decode()
        except UnicodeDecodeError as e:
            raise NotUtf8(offset + start + e.start) from None
        offset += len(line)


def _too_long(row: int) -> BrokenFile:
    what = f"is longer than {LONGEST / 2**20:.3g} MiB: end each row with a line end, or give a JSON array the ending .json"
    return BrokenFile("row_too_long", what, row)


def _object(value: object) -> dict[str, Any] | RowFault:
    if is_object(value):
        return value
    return RowFault("not_an_object", 'the row must be an object with named columns, such as {"prompt": ...}')


def _jsonl(stream: BinaryIO, place: Place) -> Iterator[Numbered]:
    for number, line in enumerate(_lines(stream, place), start=1):
        if line.strip():
            try:
                row = _object(json.loads(line))
            except (ValueError, RecursionError) as e:
                at = f" at character {e.pos + 1}" if isinstance(e, json.JSONDecodeError) else ""
                row = RowFault("bad_json", f"the line is not JSON ({_why(e)}{at}): mend or remove it")
            yield number, row
        place.row = number


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        ended = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        return "it ends too early" if ended else error.msg
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number has too many digits" if "digits" in str(error) else str(error)  # Python's own words are for programmers


def _text(stream: BinaryIO, place: Place) -> Iterator[Numbered]:
    for number, line in enumerate(_lines(stream, place), start=1):
        if line.strip():
            yield number, {"prompt": line.rstrip("\r\n")}
        place.row = number


def _csv(stream: BinaryIO, place: Place, delimiter: str = ",") -> Iterator[Numbered]:
    csv.field_size_limit(LONGEST)  # the module's own limit of 131,072 characters is less than some answers have
    records = csv.reader(_lines(stream, place), delimiter=delimiter, strict=True)
    try:
        header = next(records, None)
        if header is None:
            return
        names = [name.strip() for name in header]
        twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
        if not any(names):
            raise BrokenFile("no_header", "the first record must name the columns")
        if twice:
            raise BrokenFile("bad_header", f"the header names column {twice[0]!r} twice: rename one")
        for fields in records:
            if not fields:  # a blank line between records
                continue
            number = place.row + 1
            if len(fields) == len(names):
                yield number, dict(zip(names, fields, strict=True))
            else:
                what = f"has {len(fields)} fields, the header {len(names)}: put text that holds the separator in quotes"
                yield number, RowFault("wrong_fields", what)
            place.row = number
    except csv.Error as e:
        what = f"the quoting does not hold ({e}): double the quotes inside text"
        raise BrokenFile("bad_csv", what, place.row + 1) from None


def _parquet(path: Path, place: Place) -> Iterator[Numbered]:
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    place.row += 1
                    yield place.row, row
    except (arrow.ArrowException, OSError) as e:
        raise BrokenFile("bad_parquet", f"is no whole Parquet file: {str(e).splitlines()[0]}") from None


# JSON


class JsonScanner:
    """A JSON text read value by value, with no more of it in memory than the value at hand."""

    def __init__(self, stream: BinaryIO) -> None:
        self.text: str = ""
        self.at: int = 0
        self._stream = stream
        self._pending: bytes = b""
        self._offset: int = 0  # of the pending bytes, in the file
        self._fault: NotUtf8 | None = None
        self._decode = json.JSONDecoder().raw_decode

    def fill(self) -> bool:
        """Read on, at least as much again as is waiting; false at the end of the file."""
        if self._fault:  # what stood before the faulty byte was good, and has been used up
            raise self._fault
        chunk = self._stream.read(max(CHUNK, len(self.text) - self.at))
        if not chunk and not self._pending:
            return False
        if self._offset == 0 and not self._pending and chunk.startswith(BOM):
            chunk, self._offset = chunk[len(BOM) :], len(BOM)
        data = self._pending + chunk
        try:
            stop = len(data)
            fresh = data.decode()
        except UnicodeDecodeError as e:
            stop = e.start
            fresh = data[:stop].decode()
            if not chunk or e.end < len(data) or "unexpected end" not in e.reason:
                self._fault = NotUtf8(self._offset + stop)
        self.text, self.at = self.text[self.at :] + fresh, 0
        self._pending, self._offset = data[stop:], self._offset + stop
        return True

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.fill():
                return ""

    def take(self, character: str) -> bool:
        """Step over this character if it is the next."""
        found = self.peek() == character
        self.at += found
        return found

    def holds_rows(self) -> bool:
        """Whether a list of objects (or an empty list) begins here."""
        self.peek()
        if len(self.text) - self.at < 64:
            self.fill()
        return re.compile(r"\[\s*[\]{]").match(self.text, self.at) is not None

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, stop = self._decode(self.text, self.at)
                if self.text[stop - 1] not in "0123456789" or stop < len(self.text) or not self.fill():  # a number may go on
                    if stop - self.at > LONGEST:
                        raise _value_too_long()
                    self.at = stop
                    return value
            except json.JSONDecodeError as e:
                cut = e.pos >= len(self.text) - 16 or e.msg.startswith("Unterminated string")
                if cut and len(self.text) - self.at > LONGEST:
                    raise _value_too_long() from None
                if not cut or not self.fill():
                    raise


def _value_too_long() -> BrokenFile:
    return BrokenFile("row_too_long", f"a value is longer than {LONGEST / 2**20:.3g} MiB: has it lost its end?")


def _json(stream: BinaryIO, place: Place) -> Iterator[Numbered]:
    """An array of rows, an object that holds one under a key such as `data`, or in truth JSON lines."""
    scan = JsonScanner(stream)
    first = scan.peek()
    if first == "[":
        yield from _elements(scan, place)
        if scan.peek():
            raise BrokenFile("bad_json", f"text follows the end of the array, after element {place.row}: remove it")
    elif first == "{":
        yield from _object_file(scan, stream, place)
    elif first:
        raise BrokenFile("bad_json", "is not JSON rows: it must begin with [ or {")


def _elements(scan: JsonScanner, place: Place) -> Iterator[Numbered]:
    scan.take("[")
    if scan.take("]"):
        return
    while True:
        number = place.row + 1
        try:
            row = _object(scan.value())
        except BrokenFile as e:
            e.row = number
            raise
        except (ValueError, RecursionError) as e:
            raise BrokenFile("bad_json", f"element {number} of the array is broken ({_why(e)}): mend it", number) from None
        yield number, row
        place.row = number
        if scan.take("]"):
            return
        if not scan.take(","):
            why = "a comma is missing" if scan.peek() else "the file ends without the closing ]"
            raise BrokenFile("bad_json", f"the array breaks after element {number}: {why}", number)


def _object_file(scan: JsonScanner, stream: BinaryIO, place: Place) -> Iterator[Numbered]:
    head: dict[str, Any] = {}
    rows_key = ""
    try:
        scan.take("{")
        while not scan.take("}"):
            key = scan.value()
            if not scan.take(":"):
                raise ValueError("a colon is missing")
            if key in ROW_KEYS and scan.holds_rows():
                if rows_key:
                    what = f"holds several lists of rows ({rows_key}, {key}): put each in a file of its own"
                    raise BrokenFile("several_lists", what)
                rows_key = key
                yield from _elements(scan, place)
            else:
                head[key] = scan.value()
            if not scan.take(",") and scan.peek() != "}":
                raise ValueError("a comma is missing")
    except (ValueError, RecursionError) as e:
        if rows_key:
            raise BrokenFile("bad_json", f"the object breaks after its list of rows ({_why(e)})") from None
    except NotUtf8:
        if rows_key:
            raise
    else:
        if rows_key:
            return
        if not scan.peek():  # one object alone is one row
            yield 1, head
            return
    stream.seek(0)
    yield from _jsonl(stream, place)


TEXT_READERS: dict[str, Callable[[BinaryIO, Place], Iterator[Numbered]]] = {
    "jsonl": _jsonl,
    "ndjson": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": lambda stream, place: _csv(stream, place, "\t"),
    "txt": _text,
}
