"""Bad files: one clear line and exit code 2, in little memory; and random ones, with nothing uncaught."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import PAIRS, call

from preftune.checks.check import check
from preftune.data.readers import TEXT_READERS, BrokenFile, Place
from preftune.errors import Refusal

GOOD = b"".join(json.dumps(row).encode() + b"\n" for row in PAIRS[:4])
CSV = b"prompt,chosen,rejected\nA cat, sang, left\n"
SMALL = 1 << 16  # what a row may hold in these tests


@pytest.fixture(autouse=True)
def _short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.data.readers.LONGEST", SMALL)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


CASES: dict[str, tuple[str, bytes, str]] = {
    "broken UTF-8": ("a.jsonl", GOOD + b'{"prompt": "\xff\xfe"}\n', "not_utf8"),
    "a row longer than rows are": ("a.jsonl", GOOD + b'{"prompt": "' + b"x" * SMALL + b'"}\n', "row_too_long"),
    "no line end at all": ("a.txt", b"x" * 5 * SMALL, "row_too_long"),
    "a JSON text that is never closed": ("a.json", b'[{"prompt": "' + b"x" * 600_000, "row_too_long"),
    "a JSON row longer than rows are": ("a.json", b'[{"prompt": "' + b"x" * SMALL + b'"}]', "row_too_long"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD * 50)[:-20], "bad_gzip"),
    "no gzip": ("a.jsonl.gz", GOOD, "bad_gzip"),
    "0 bytes": ("a.jsonl", b"", "empty"),
    "only blank lines": ("a.jsonl", b"\n\n  \n", "empty"),
    "a quote that is never closed": ("a.csv", CSV + b'"A dog, sang, left\n' + b"more, of, it\n" * 10_000, "bad_csv"),
    "10,000 columns": ("a.csv", b",".join(b"c%d" % n for n in range(10_000)) + b"\n1" + b",1" * 9_999, "no_known_columns"),
    "no header": ("a.csv", b"\n", "no_header"),
    "an unknown ending": ("a.bin", b"\x00\x01", "unknown_kind"),
    "no Parquet": ("a.parquet", b"PAR1 and so on", "bad_parquet"),
    "rows of nothing": ("a.jsonl", b'{"a": null}\n', "no_known_columns"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_bad_file_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, code = CASES[name]
    path = tmp_path / file
    path.write_bytes(content)
    answer = call(capsys, "check", str(path), "--json")
    assert answer.code == 2 and answer.error["code"] == code, answer.err
    assert answer.error["file"] == str(path)
    said = answer.err.strip().splitlines()
    assert said[-1].startswith("preftune: ") and len(said[-1]) < 1000 and "Traceback" not in answer.err


def test_what_is_read_of_a_long_row_is_bounded() -> None:
    stream = io.BytesIO(GOOD + b"x" * 100 * SMALL)
    with pytest.raises(BrokenFile, match="longer than"):
        list(TEXT_READERS["jsonl"](stream, Place()))
    assert stream.tell() <= len(GOOD) + SMALL + 1


PLACES = [("folder", "not_found"), ("gone.jsonl", "not_found"), ("~/gone.csv", "not_found"), ("data", "not_found")]


@pytest.mark.parametrize(("place", "code"), PLACES)
def test_a_place_without_data_is_one_line(
    place: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    answer = call(capsys, "check", place, "--json")
    assert answer.code == 2 and answer.error["code"] == code


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n"),
        b"\n" + GOOD.rstrip(b"\n"),
    ],
)
def test_what_is_odd_and_readable_is_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert check(str(path)).report["kept"] == 4


def test_nested_nulls_are_faults_of_their_rows() -> None:
    odd: list[Any] = [None, [None], {"a": None}, [{"role": None}], [{"role": "user", "content": None}], [[[]]], {}, 1.5]
    rows = [{**PAIRS[n], "chosen": value} for n, value in enumerate(odd)]
    report = check([PAIRS[20], *rows]).report
    assert report["kept"] == 1 and [f["row"] for f in report["findings"] if f["row"]] == list(range(2, len(odd) + 2))


# -- random -----------------------------------------------------------------------------------------------------------------

KEYS = re.findall(
    r"\w+",
    "prompt chosen rejected messages label response responses ranking item annotator choice id instruction output completions "
    "conversations text score preference weight tools system category fields data annotations response1 response2 annotator1 "
    "labels history",
)
LETTERS = [*range(32, 127), 0, 10, 0xD800, 0x1F600, 0x202E]


def anything(draw: random.Random, depth: int = 0) -> Any:
    simple: list[Callable[[], Any]] = [
        lambda: None,
        lambda: draw.random() < 0.5,
        lambda: draw.choice([0, 1, 2, -1, 1e308, draw.randint(-(10**20), 10**20)]),
        lambda: "".join(chr(draw.choice(LETTERS)) for _ in range(draw.randint(0, 12))),
        lambda: draw.choice(["", " ", "a", "\n\nHuman: q\n\nAssistant: a", "user", "assistant", "b", "tie"]),
    ]
    if depth < 4 and draw.random() < 0.45:
        if draw.random() < 0.5:
            return [anything(draw, depth + 1) for _ in range(draw.randint(0, 3))]
        keys = draw.sample(["role", "content", "from", "value", "text", "type", "rank", "response", *KEYS], draw.randint(0, 4))
        return {key: anything(draw, depth + 1) for key in keys}
    return draw.choice(simple)()


def random_file(draw: random.Random) -> tuple[str, bytes]:
    """Rows of known columns with anything in them, torn, in some file; or bytes."""
    columns = draw.sample(KEYS, draw.randint(1, 6)) + draw.choice([[], ["prompt", "chosen", "rejected"]])
    rows = [PAIRS[n] if draw.random() < 0.4 else {c: anything(draw) for c in columns} for n in range(draw.randint(0, 8))]
    ending = draw.choice(["jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz", "csv.gz"])
    content = json.dumps(rows).encode() if ending == "json" else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if draw.random() < 0.2:
        content = bytes(draw.choices([*b'{}[]",:\n\r\t \\u0 a\xc3\xa9"'], k=draw.randint(0, 300)))
    for _ in range(draw.choice([0, 0, 1, 3])):  # torn
        at = draw.randint(0, len(content))
        content = content[:at] + bytes(draw.choices(range(256), k=draw.randint(0, 3))) + content[at + draw.randint(0, 5) :]
    if ending.endswith("gz") and draw.random() < 0.8:
        content = gzip.compress(content)[: -draw.choice([1, 4, 9]) if draw.random() < 0.3 else None]
    return f"a.{ending}", content


@pytest.mark.parametrize("seed", range(4))
def test_random_files_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    read = 0
    for n in range(150):
        name, content = random_file(draw)
        path = tmp_path / f"{n}-{name}"
        path.write_bytes(content)
        try:
            report = check(str(path), near_duplicates=True).report
        except Refusal as refusal:
            assert refusal.message and refusal.code and "\n" not in str(refusal)
            continue
        read += 1
        assert report["rows"] == report["kept"] + sum(report["dropped"].values())
        json.dumps(report, allow_nan=False).encode("utf-8", "backslashreplace")
    assert read > 20, "most of them refused at the door would test nothing"
