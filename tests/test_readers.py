"""Files: rows and their numbers, faults of rows, refusals of files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from preftune.data import readers
from preftune.data.faults import RowFault
from preftune.data.readers import read_rows
from preftune.errors import Refusal


def rows_of(path: Path, content: str | bytes, *, packed: bool = False) -> list[tuple[int, Any]]:
    """(number, row or the code of its fault)."""
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if packed else data)
    return [(number, row.code if isinstance(row, RowFault) else row) for number, row in read_rows(path, path.name)]


def refused(path: Path, content: str | bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        rows_of(path, content)
    assert caught.value.file == path.name
    assert "\n" not in str(caught.value)
    return caught.value


A, B = {"a": 1}, {"a": "é,\u2028"}
FILES = [
    ("jsonl", '{"a": 1}\n\n{"a": "é,\u2028"}', [(1, A), (3, B)]),
    ("jsonl", '\ufeff{"a": 1}\r\n[1]\n{"a": \n', [(1, A), (2, "not_an_object"), (3, "bad_json")]),
    ("ndjson", '{"a": 1}', [(1, A)]),
    ("json", '[{"a": 1},\n 5, {"a": "é,\u2028"}]\n', [(1, A), (2, "not_an_object"), (3, B)]),
    ("json", '\ufeff [ ] ', []),
    ("json", '{"a": 1}\n{"a": \n{"a": "é,\u2028"}', [(1, A), (2, "bad_json"), (3, B)]),  # in truth JSON lines
    ("json", '{\n "a": 1\n}', [(1, A)]),
    ("json", '{"version": [2], "data": [{"a": 1}, {"a": "é,\u2028"}], "n": 2}', [(1, A), (2, B)]),
    ("json", '{"data": ["x"]}', [(1, {"data": ["x"]})]),  # a row with a column of that name
    ("odd", '[{"a": 1}]', [(1, A)]),
    ("csv", 'a,b\n1,"x\ny"\n\n2\n', [(1, {"a": "1", "b": "x\ny"}), (2, "wrong_fields")]),
    ("csv", 'a\n"say ""hi"""\n', [(1, {"a": 'say "hi"'})]),
    ("tsv", "\ufeffa\tb\r\n1\tx, y\r\n", [(1, {"a": "1", "b": "x, y"})]),
    ("txt", "one\n\n two\r\n", [(1, {"prompt": "one"}), (3, {"prompt": " two"})]),
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("suffix", "content", "expected"), FILES)
def test_rows(tmp_path: Path, suffix: str, content: str, expected: Any, packed: bool) -> None:
    name = f"rows.{suffix}.gz" if packed else f"rows.{suffix}"
    assert rows_of(tmp_path / name, content, packed=packed) == expected


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_json_is_the_same_however_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(readers, "CHUNK", chunk)
    values = [{"a": 'é🙂\\n"]', "b": [1.5e3, None, True, {"c": -12}]}, {}, {"a": "x" * 100}, 12345]
    expected = [(1, values[0]), (2, {}), (3, values[2]), (4, "not_an_object")]
    for ascii in (True, False):
        assert rows_of(tmp_path / "a.json", json.dumps(values, ensure_ascii=ascii, indent=1)) == expected
        assert rows_of(tmp_path / "b.json", json.dumps({"v": 1, "rows": values}, ensure_ascii=ascii)) == expected


def test_long_csv_fields(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", "a\n" + "x" * 200_000) == [(1, {"a": "x" * 200_000})]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    rows = [{"prompt": "q", "chosen": [{"role": "user", "content": None}]}] * 1001
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(read_rows(tmp_path / "a.parquet", "a.parquet"))
    assert (found[0], found[-1]) == ((1, rows[0]), (1001, rows[0]))
    assert refused(tmp_path / "b.parquet", b"PAR1 not at all").code == "bad_parquet"


BAD = b'{"a": "\xff"}'
REFUSED = [
    ("a.jsonl", b'{"a": 1}\n\n' + BAD, "not_utf8", 3, "byte 17"),
    ("a.jsonl", b"\xef\xbb\xbf" + BAD, "not_utf8", 1, "byte 10"),
    ("a.json", b'[{"a": 1}, ' + BAD + b"]", "not_utf8", 2, "byte 18"),
    ("a.json", b"\xef\xbb\xbf[" + BAD, "not_utf8", 1, "byte 11"),
    ("a.json", b'[{"a": "\xc3', "not_utf8", 1, "byte 8"),
    ("a.csv", b"a\n1\n\xff\n", "not_utf8", 2, "byte 4"),
    ("a.json", '[{"a": 1} {"a": 2}]', "bad_json", 1, "comma"),
    ("a.json", '[{"a": 1}, {"a" 2}, {}]', "bad_json", 2, "element 2"),
    ("a.json", '[{"a": 1}, {"a": "x', "bad_json", 2, "too early"),
    ("a.json", '[{"a": 1}', "bad_json", 1, "closing"),
    ("a.json", "[{}] x", "bad_json", None, "follows"),
    ("a.json", '{"data": [{"a": 1}', "bad_json", 1, "closing"),
    ("a.json", '{"data": [{"a": 1}] "x"', "bad_json", None, "comma"),
    ("a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "several_lists", None, "train, test"),
    ("a.json", "hello", "bad_json", None, "begin with"),
    ("a.csv", ",\n1,2\n", "no_header", None, "columns"),
    ("a.csv", "a,b,a\n1,2,3\n", "bad_header", None, "'a' twice"),
    ("a.csv", 'a,b\n1,2\n3,"x\n', "bad_csv", 2, "quot"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "bad_gzip", None, "after row"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:1], "bad_gzip", None, "cut short"),
    ("a.jsonl.gz", b'{"a": 1}', "bad_gzip", None, "is not gzip data, though its name says so"),
    ("a.odd.gz", b'{"a": 1}', "bad_gzip", None, "drop the ending .gz, or compress it"),
    ("a.jsonl.gz", b"{", "bad_gzip", None, "is not gzip data"),
    ("a.docx", "PK", "unknown_kind", None, ".jsonl"),
    ("a.docx", " \n", "empty", None, "empty"),
]


@pytest.mark.parametrize(("name", "content", "code", "row", "words"), REFUSED)
def test_refusals(tmp_path: Path, name: str, content: str | bytes, code: str, row: int | None, words: str) -> None:
    refusal = refused(tmp_path / name, content)
    assert (refusal.code, refusal.row) == (code, row)
    assert words in refusal.message


def test_rows_before_a_fault_are_given_first(tmp_path: Path) -> None:
    """The file is streamed: nothing is held back until its end."""
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a"')
    rows = read_rows(path, "a.json")
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(Refusal):
        next(rows)
