"""Filters: what passes, what is refused and where, and what is counted of the rows that were left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import PAIRS, call, write_model, write_rows

from preftune.config import resolve
from preftune.data.faults import RowFault
from preftune.data.filters import BadFilter, parse
from preftune.data.options import DataOptions
from preftune.data.read import load
from preftune.errors import Refusal
from preftune.keys import ScoreKeys, TrainKeys

ROW: dict[str, Any] = {
    "score": 4.5, "votes": "12", "lang": "en", "note": "it's fine", "flag": True, "word": "False", "none": None, "empty": "",
    "tags": ["law", "art"], "metadata": {"lang": "de", "deep": {"n": 3}}, 
    "turns": [{"role": "user", "content": "why is it so?"}], "parts": {"content": [{"type": "text", "text": "so it is"}]},
    "a b": 1, "metadata.own": "x", "id": 7,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("score >= 4.5", True), ("score > 4.5", False), ("score < 4.5", False), ("score <= 4.5", True), ("score = 4.5", True),
        ("score == 45e-1", True), ("score != 4.5", False), ("votes > 9", True), ("votes = 12", True), ('votes = "12"', True),
        ("lang = en", True), ("lang = 'en'", True), ("lang != de", True), ('note = "it\'s fine"', True),
        (r"note = 'it\'s fine'", True), ("lang >= ee", True), ("lang < de", False),
        ("flag = true", True), ("flag = false", False), ("word = false", True), ("flag != TRUE", False), ("flag = 1", False),
        ("none = null", True), ("none != null", False), ("none = 0", False), ("none != 0", True), ("none < 1", False),
        ("lang = null", False), ("empty = ''", True), ("empty = null", False), ("empty < 1", False), ("none >= 0", False),
        ("none contains x", False), ("none not contains x", True), ("none in [a]", False), ("none not in [a]", True),
        ("none in [a, null]", True),
        ("lang in [de, en]", True), ("lang not in [de, en]", False), ("id in [7]", True), ("id in [8, 9]", False),
        ("id = '7'", True), ("id = 70", False),
        ("note contains fine", True), ("note not contains fine", False), ("tags contains law", True),
        ("tags contains la", False), ("parts contains it", True), ("parts contains type", False),
        ("turns contains why", True), ("turns contains user", False), ("turns contains because", False),
        ("votes contains 12", True),
        ("metadata.lang = de", True), ("metadata.deep.n > 2", True), ("metadata.own = x", True), ("metadata.lang.x = 1", False),
        ("`a b` = 1", True), ("score > 4 and lang = de", False), ("score > 4 or lang = de", True),
        ("lang = de or score > 4 and id = 8", False), ("(lang = de or score > 4) and id = 7", True),
        ("lang = de and score > 4 or id = 7", True), ("lang = de and (score > 4 or id = 7)", False),
        ("score>4 and(lang=en)", True), ("score > 4 AND NOT_A = null", True),
    ],
)  # fmt: skip
def test_what_passes(text: str, passes: bool) -> None:
    assert parse(text).keeps(ROW) is passes


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("score ~ 3", 7, "= != < <= > >= in, not in, contains or not contains is expected, found ~"),
        ("score >= ", 9, "a value is expected: a number, true, false, null or a text, found the end"),
        ("score >= 4 && lang = en", 12, "and, or, or the end is expected"),
        ("score 4", 7, "is expected, found 4"),
        (">= 4", 1, "the name of a column is expected (between ` ` if it is no plain word), found >="),
        ("score > 4 and", 14, "the name of a column is expected"),
        ("score > 4 and and lang = en", 15, "found and"),
        ("note = it is", 11, "(a text of several words stands in quotes), found is"),
        ("note = 'open", 8, "this quote is never closed"),
        ("`open = 1", 1, "this quote is never closed"),
        ("score ! 4", 7, "! means nothing here"),
        ("lang in en", 9, "[ is expected, found en"),
        ("lang in [en, de", 16, "] is expected, found the end"),
        ("lang in []", 10, "a value is expected"),
        ("lang not = en", 6, "found not"),
        ("(score > 4", 11, ") is expected, found the end"),
        ("score > 4)", 10, "found )"),
        ("score > true", 9, "> needs a number or a text, found true"),
        ("score < null", 9, "< needs a number or a text"),
        ("", 1, "the name of a column is expected"),
        ("__import__('os').system('x')", 11, "is expected, found ("),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_place(text: str, at: int, says: str) -> None:
    with pytest.raises(BadFilter) as bad:
        parse(text)
    assert f"{text}: character {at}: " in str(bad.value)
    assert says in str(bad.value)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("x > 3", {"x": "many"}),
        ("x > 3", {"x": [4]}),
        ("x > '3'", {"x": 4}),
        ("x contains a", {"x": 4}),
        ("x > 3", {"x": True}),
    ],
)
def test_what_cannot_be_compared_is_a_fault_of_the_row(text: str, row: dict[str, Any]) -> None:
    with pytest.raises(RowFault) as fault:
        parse(text).keeps(row)
    assert (fault.value.code, fault.value.column) == ("wrong_type", "x")


def scored(tmp_path: Path, *scores: Any, name: str = "p.jsonl") -> str:
    rows = ({**PAIRS[n], "quality": score} for n, score in enumerate(scores))
    return str(write_rows(tmp_path / name, rows))


def test_rows_left_out_are_counted_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    path = scored(tmp_path, 1, 5, "bad", 4, None, 9)
    reading = load(path, options=DataOptions(filter="quality >= 4"))
    assert [mark.origin.row for group in reading.groups for mark in group.marks if mark.origin] == [2, 4, 6]
    assert (reading.rows, reading.kept, reading.dropped) == (4, 3, {"wrong_type": 1})
    assert [(f.code, f.row, f.column) for f in reading.findings] == [("wrong_type", 3, "quality")]
    assert reading.sources[0]["filtered"] == 2
    assert (
        ": 4 rows read as preference pairs with explicit prompt, 2 more left out by the filter, 1 dropped"
        in reading.summary()[0]
    )


def test_a_limit_counts_what_the_filter_keeps_and_a_source_has_its_own_filter(tmp_path: Path) -> None:
    first, second = scored(tmp_path, 1, 5, 6, 7), scored(tmp_path, 1, 5, 6, 7, name="q.jsonl")
    sources = [{"path": first, "limit": 2}, {"path": second, "filter": "quality = 1"}]
    reading = load(sources, options=DataOptions(filter="quality > 4"))
    assert [s["rows"] for s in reading.sources] == [2, 1]
    assert {mark.origin.row for group in reading.groups for mark in group.marks if mark.origin} == {1, 2, 3}


def test_a_column_that_no_row_has_is_refused_and_one_that_some_have_is_not(tmp_path: Path) -> None:
    path = scored(tmp_path, 1, 5)
    with pytest.raises(Refusal) as refused:
        load(path, options=DataOptions(filter="qualiti > 4"))
    assert (refused.value.code, refused.value.file, refused.value.key) == ("unknown_column", path, "data.filter")
    assert "no row has a column qualiti. Did you mean quality? Found: prompt, chosen, rejected, quality" in str(refused.value)
    write_rows(tmp_path / "q.jsonl", [PAIRS[7], {**PAIRS[8], "rare": 1}])
    reading = load(str(tmp_path), options=DataOptions(filter="rare = null and quality != 5"))
    assert [s["rows"] for s in reading.sources] == [1, 1]


def test_a_filter_that_leaves_nothing_is_refused_and_one_that_leaves_nothing_of_one_file_is_not(tmp_path: Path) -> None:
    path = scored(tmp_path, 1, 5)
    with pytest.raises(Refusal, match="the filter leaves none of 2 rows") as refused:
        load(path, options=DataOptions(filter="quality > 9"))
    assert refused.value.code == "nothing_kept"
    other = scored(tmp_path, 10, name="q.jsonl")
    assert [s["rows"] for s in load([path, other], options=DataOptions(filter="quality > 9")).sources] == [0, 1]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data=d", "data.filter=quality ~ 4"], "data.filter"),
        (["data={path: d, filter: quality ~ 4}"], "data.sources.0.filter"),
        (["data=d", "eval_data={path: e, filter: quality ~ 4}"], "eval_data.0.filter"),
    ],
)
def test_a_bad_filter_is_refused_as_a_key(words: list[str], key: str) -> None:
    with pytest.raises(Refusal) as refused:
        resolve(TrainKeys, ["model=m", *words])
    assert (refused.value.code, refused.value.key) == ("bad_filter", key)
    assert refused.value.message.startswith("quality ~ 4: character 9: ")


def test_the_short_form_of_a_source_takes_its_filter() -> None:
    keys = resolve(ScoreKeys, ["model=m", "out=o", "data={path: d, filter: quality > 4}"])
    assert keys.data.sources[0].filter == "quality > 4"


def test_score_reads_the_rows_that_the_filter_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = scored(tmp_path, 1, 5, 3, 8), write_model(tmp_path / "m", positions=128)
    answer = call(
        capsys, "score", f"model={model}", f"data={path}", "data.filter=quality > 4", f"out={tmp_path / 'o.jsonl'}", "--json"
    )
    assert (answer.code, answer.json["groups"], answer.json["responses"]) == (0, 2, 4)
    assert "2 more left out by the filter" in answer.err
