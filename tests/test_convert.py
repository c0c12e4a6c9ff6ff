"""Groups as rows of other formats and back: what a target holds comes back the same, what it does not is counted."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import call

from preftune.data.convert import Conversion
from preftune.data.options import DataOptions
from preftune.data.read import load
from preftune.data.targets import TARGETS
from preftune.data.writers import write_rows
from preftune.errors import Refusal
from preftune.records import By, Comparison, Content, Demonstration, Group, Mark, Message, Ranking, Rating, Response

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
PAIR = {"prompt": "q", "chosen": "x", "rejected": "y"}


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def converted(groups: list[Group], to: str, path: Path, **keys: Any) -> tuple[Conversion, list[Group]]:
    """(what was counted, what is read back)."""
    conversion = Conversion(TARGETS[to], **keys)
    write_rows(path, conversion.rows(groups))
    columns = {"id": "id"} if any(group.user_id for group in groups) else {}
    reading = load(path, options=DataOptions(columns=columns, format="hh" if to == "hh" else None))
    assert (reading.rows, reading.dropped) == (conversion.written, Counter())
    return conversion, reading.groups


def judgements(groups: list[Group]) -> Counter[Any]:
    """Every judgement with its texts, however responses are ordered in a group and whichever of two comes first."""
    found: Counter[Any] = Counter()
    for group in groups:
        for mark in group.marks:
            by = mark.by or By()
            if isinstance(mark, Comparison):
                chosen, rejected, preference = mark.ordered
                if chosen != mark.a and by.side:
                    by = replace(by, side="b" if by.side == "a" else "a")
                said: Any = (content(group, chosen), content(group, rejected), preference)
            elif isinstance(mark, Ranking):
                said = tuple(frozenset(content(group, n) for n in tier) for tier in mark.tiers)
            else:
                said = (
                    type(mark).__name__,
                    content(group, mark.response),
                    mark.desirable if isinstance(mark, Rating) else None,
                )
            tools = json.dumps(group.tools, sort_keys=True)
            found[plain(group.prompt), tools, group.user_id, said, mark.weight, by] += 1
    return found


def content(group: Group, n: int) -> str:
    return plain(group.responses[n].content)


def plain(content: Content) -> str:
    return content if isinstance(content, str) else json.dumps([message.as_dict() for message in content])


# Random groups

LETTERS = "ab \n\té🙂\u2028,\"'\\:[]{}#|"
WORDS = ["", " ", "Human:", "\n\nHuman:", "\n\nAssistant:", "\r\n", "\r", "null", "1", "true", "\ufeff", "\x00"]


def said(chance: random.Random) -> str:
    """Text that is not blank, with what breaks files in it."""
    letters = "".join(chance.choice(LETTERS) for _ in range(chance.randint(0, 12)))
    return (
        letters
        + chance.choice(WORDS)
        + chance.choice("abcxyz")
        + str(chance.randint(0, 10**6))
        + chance.choice(["", " ", "\n"])
    )


def by(chance: random.Random) -> By | None:
    kind, side = chance.choice(("person", "model", "rule")), chance.choice(("a", "b"))
    return chance.choice((None, By(said(chance)), By("w", kind, said(chance), side, chance.uniform(0, 3), "why")))


def mark(chance: random.Random, count: int, kind: str) -> Mark:
    weight = chance.choice((1.0, 0.0, chance.uniform(0, 5)))
    first, second, *_ = order = chance.sample(range(count), count)
    if kind == "comparison":
        return Comparison(first, second, chance.choice((1.0, 0.0, 0.5, chance.random())), weight, by(chance))
    if kind == "ranking":
        cut = sorted(chance.sample(range(1, count), chance.randint(1, count - 1)))
        tiers = tuple(tuple(sorted(order[a:b])) for a, b in zip([0, *cut], [*cut, count], strict=True))
        return Ranking(tiers, weight, by(chance))
    return (
        Rating(first, chance.random() < 0.5, weight, by(chance))
        if kind == "rating"
        else Demonstration(first, weight, by(chance))
    )


def group(chance: random.Random, number: int, kind: str, *, chat: bool, named: bool) -> Group:
    count = chance.randint(3, 5)
    tools: tuple[Any, ...] = ()
    prompt: Content = f"{number} {said(chance)}"
    if chat:
        past = [Message(role, said(chance)) for _ in range(chance.randint(0, 2)) for role in ("user", "assistant")]
        system = [Message("system", said(chance))] if chance.random() < 0.3 else []
        prompt = (*system, *past, Message("user", prompt))
        tools = ({"name": "f", "parameters": {"n": number}},) if chance.random() < 0.2 else ()
    answers = [f"{n} {said(chance)}" for n in range(count)]
    contents: list[Content] = [(Message("assistant", answer),) if chat else answer for answer in answers]
    marks = [mark(chance, count, kind) for _ in range(chance.randint(1, 3))]
    whole = Group(prompt, tuple(Response(c) for c in contents), (), tools, f"id{number}" if named else "")
    return whole.restricted(marks, sorted({n for m in marks for n in m.responses}))


def groups(seed: int, kind: str, *, chat: bool) -> list[Group]:
    chance = random.Random(f"{seed} {kind} {chat}")
    return [group(chance, n, kind, chat=chat, named=seed == 1) for n in range(12)]


# what is made of which kind, in files that can hold it
IDENTITY = [
    *((target, "comparison", ending, chat) for target in ("pairs", "ranking") for ending in ("jsonl", "json", "parquet")
      for chat in (False, True)),
    ("pairs", "comparison", "csv", False), ("pairs", "comparison", "tsv.gz", False), ("pairs", "comparison", "jsonl.gz", True),
    ("ranking", "ranking", "jsonl", False), ("ranking", "ranking", "json.gz", True), ("ranking", "ranking", "parquet", True),
    *((target, "comparison", ending, True) for target in (
        "pairs_messages", "openrlhf", "ultrafeedback_binarized", "llamafactory_pairs", "alpaca_pairs", "swift_pairs",
    ) for ending in ("jsonl", "parquet")),
    ("ratings", "rating", "csv", False), ("ratings", "rating", "jsonl", True), ("ratings", "rating", "parquet", True),
    ("llamafactory_ratings", "rating", "json", True), ("swift_ratings", "rating", "jsonl", True),
    ("demonstrations", "demonstration", "csv", False), ("demonstrations", "demonstration", "jsonl", True),
    *((target, "demonstration", "jsonl", True) for target in ("conversations", "alpaca", "sharegpt")),
]  # fmt: skip


@pytest.mark.parametrize(("to", "kind", "ending", "chat"), IDENTITY)
@pytest.mark.parametrize("seed", [0, 1])
def test_read_write_read_is_the_identity(tmp_path: Path, to: str, kind: str, ending: str, chat: bool, seed: int) -> None:
    """Whatever a target says that it holds comes back with its texts, weight, soft label, annotator, time, side and strength;
    and of random judgements it holds all but ties, which pairs have no place for."""
    before = groups(seed, kind, chat=chat)
    conversion, after = converted(before, to, tmp_path / f"out.{ending}")
    expected = judgements(before)
    if kind == "comparison" and to != "ranking":
        ties = Counter({key: n for key, n in expected.items() if key[3][2] == 0.5})
        expected -= ties
        assert conversion.lost["ties"] == ties.total()
    assert not conversion.lost.keys() - {"ties"}
    assert judgements(after) == expected


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["comparison", "ranking"])
def test_our_own_form_keeps_order_and_places(tmp_path: Path, kind: str, seed: int) -> None:
    before = [
        replace(g, marks=g.marks[:1]).restricted(g.marks[:1], g.marks[0].responses) for g in groups(seed, kind, chat=bool(seed))
    ]
    _, after = converted(before, "ranking", tmp_path / "out.jsonl")
    assert [(g.prompt, [r.content for r in g.responses], g.tools, g.user_id) for g in after] == [
        (g.prompt, [r.content for r in g.responses], g.tools, g.user_id) for g in before
    ]
    assert [replace(m, origin=None) for g in after for m in g.marks] == [m for g in before for m in g.marks]


# Real files


def shared(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip(f"needs the shared data file {name}")
    return str(SHARED / name)


REAL = [
    ("hh_harmless/harmless-base-test.jsonl.gz", None, ("hh", "pairs", "ranking"), 2303),
    ("hh_harmless/harmless-base-test.jsonl.gz", "hh_messages",
     ("pairs", "pairs_messages", "openrlhf", "swift_pairs", "llamafactory_pairs", "ultrafeedback_binarized"), 2303),
    ("hh_harmless/harmless-base-test.jsonl.gz", "hh_messages", ("alpaca_pairs",), 2299),  # in four, one side speaks twice
    ("llamafactory_demo/dpo_en_demo.json", None, ("llamafactory_pairs", "pairs", "openrlhf", "swift_pairs", "ranking"), 300),
    ("llamafactory_demo/v1_dpo_demo.jsonl", None, ("pairs_messages", "llamafactory_pairs"), 10),
    ("llamafactory_demo/kto_en_demo.json", None, ("ratings", "llamafactory_ratings", "swift_ratings"), 300),
    ("llamafactory_demo/alpaca_en_demo.json", None, ("alpaca", "sharegpt", "conversations", "demonstrations"), 999),
    ("pandalm/testset-v1.json", None, ("ranking",), 2817),
    ("llmbar/LLMBar_Natural.json", None, ("pairs", "ranking"), 100),
]  # fmt: skip


@pytest.mark.parametrize(("name", "format", "targets", "rows"), REAL)
def test_real_files_come_back_the_same(
    tmp_path: Path, name: str, format: str | None, targets: tuple[str, ...], rows: int
) -> None:
    before = load(shared(name), options=DataOptions(format=format)).groups
    for to in targets:
        conversion, after = converted(before, to, tmp_path / f"{to}.jsonl")
        kept = judgements(before) - judgements(after)
        assert not judgements(after) - judgements(before)
        assert (to, conversion.written, kept.total()) == (to, rows, conversion.lost.total())


def test_the_shape_of_each_target(tmp_path: Path) -> None:
    """The columns that the other tools ask for, with their names for roles."""
    row = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "chosen": "x", "rejected": "y"}
    before = load([row]).groups
    q, x, y = ({"role": role, "content": said} for role, said in (("user", "q"), ("assistant", "x"), ("assistant", "y")))
    s = {"role": "system", "content": "s"}
    expected: dict[str, dict[str, Any]] = {
        "pairs": {"prompt": [s, q], "chosen": [x], "rejected": [y]},
        "openrlhf": {"chosen": [s, q, x], "rejected": [s, q, y]},
        "llamafactory_pairs": {
            "conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "x"},
            "rejected": {"from": "gpt", "value": "y"}, "system": "s",
        },
        "alpaca_pairs": {"instruction": "q", "input": "", "system": "s", "chosen": "x", "rejected": "y"},
        "swift_pairs": {"messages": [s, q, x], "rejected_response": "y"},
        "ranking": {"prompt": [s, q], "responses": [[x], [y]], "ranking": [[0], [1]]},
        "conversations": {"messages": [s, q, x]},
        "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}], "system": "s"},
        "alpaca": {"instruction": "q", "input": "", "system": "s", "output": "x"},
        "demonstrations": {"prompt": [s, q], "completion": [x]},
    }  # fmt: skip
    for to, row in expected.items():
        assert [*Conversion(TARGETS[to]).rows(before)] == [row], to
    ratings = [*Conversion(TARGETS["llamafactory_ratings"]).rows(before)]
    assert [(row["conversations"][-1]["value"], row["kto_tag"]) for row in ratings] == [("x", True), ("y", False)]
    (binarised,) = Conversion(TARGETS["ultrafeedback_binarized"]).rows(before)
    assert (binarised["prompt"], binarised["chosen"], binarised["messages"], binarised["system"]) == ("q", [q, x], [q, x], "s")
    (dialogue,) = Conversion(TARGETS["hh"]).rows(load([{**PAIR, "prompt": [q]}]).groups)
    assert dialogue == {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"}


# What is not held


def lost(rows: list[Any], to: str, **keys: Any) -> tuple[int, dict[str, int], dict[str, int]]:
    conversion = Conversion(TARGETS[to], **keys)
    number = len([*conversion.rows(load(rows).groups)])
    return number, dict(conversion.lost), dict(conversion.changed)


RANKED = {"prompt": "q", "responses": ["x", "y", "z"], "ranking": [[0], [1, 2]]}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
DIALOGUE = {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"}
CHAT = {"prompt": [{"role": "user", "content": "q"}], "chosen": [CALL], "rejected": "y"}
LOST = [
    ([{**PAIR, "preference": 0.5}, PAIR], "pairs", {}, 1, {"ties": 1}, {}),
    ([{**PAIR, "preference": math.nextafter(0.5, 0)}], "pairs", {}, 0, {"ties": 1}, {}),
    ([RANKED], "pairs", {}, 2, {"ties": 1}, {"rankings to comparisons": 1}),
    ([{**RANKED, "ranking": [0, 1, 2]}], "pairs", {"pairs": "best_vs_rest"}, 2, {}, {"rankings to comparisons": 1}),
    ([PAIR], "pairs_messages", {}, 1, {}, {"text to conversations": 1}),
    ([DIALOGUE], "pairs_messages", {}, 1, {},
     {"whole HH dialogues to one question each (data.format=hh_messages reads their turns)": 1}),
    ([DIALOGUE], "pairs", {}, 1, {}, {}),
    ([{**PAIR, "prompt": ""}], "pairs_messages", {}, 0, {"answers without a prompt": 1}, {}),
    ([PAIR], "hh", {}, 0, {"prompts that are no HH dialogues": 1}, {}),
    ([CHAT], "llamafactory_pairs", {}, 0, {"messages with tool_calls": 1}, {}),
    ([CHAT], "swift_pairs", {}, 1, {}, {}),
    ([{**CHAT, "chosen": "x\n\nAssistant: z"}], "hh", {}, 0, {"turns that an HH dialogue would cut elsewhere": 1}, {}),
    ([{"prompt": "q", "completion": "x", "label": True}], "pairs", {}, 0, {"ratings": 1}, {}),
    ([{"prompt": "q", "completion": "x", "label": False}], "demonstrations", {}, 0, {"undesirable answers": 1}, {}),
    ([{"prompt": "q", "completion": "x"}], "ratings", {}, 0, {"demonstrations": 1}, {}),
    ([PAIR], "ratings", {}, 2, {}, {"comparisons to ratings": 1}),
    ([{**PAIR, "preference": 0.75}], "ratings", {}, 2, {}, {"uncertain comparisons to ratings": 1}),
    ([RANKED], "ratings", {}, 0, {"rankings": 1}, {}),
    ([PAIR, {**PAIR, "rejected": "z"}], "demonstrations", {}, 1, {"judgements of an answer that is shown already": 1},
     {"comparisons to demonstrations": 1}),
    ([{"prompt": "q"}], "pairs", {}, 0, {"prompts without answers": 1}, {}),
    ([{"prompt": "q", "responses": ["x", "y"]}], "ranking", {}, 0, {"answers that no judgement names": 2}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "to", "keys", "number", "gone", "changed"), LOST)
def test_what_a_target_cannot_hold_is_counted(rows: Any, to: str, keys: Any, number: int, gone: Any, changed: Any) -> None:
    assert lost(rows, to, **keys) == (number, gone, changed)


def test_other_columns_are_counted() -> None:
    conversion = Conversion(TARGETS["pairs"])
    rows = [*conversion.rows(load([{**PAIR, "preference": 0.2, "annotator": "w", "side": "left"}, PAIR]).groups)]
    assert rows[0] == {"prompt": "q", "chosen": "y", "rejected": "x", "preference": 0.8, "annotator": "w", "side": "b"}
    assert list(conversion.beyond.items()) == [("annotator", 1), ("side", 1), ("preference", 1)]


@pytest.mark.parametrize(
    ("to", "first", "then"),
    [
        ("llamafactory_pairs", {"messages", "chosen", "rejected"}, {"system", "tools"}),
        ("alpaca_pairs", {"prompt", "query", "chosen", "rejected"}, {"system", "history", "tools"}),
    ],
)
def test_the_entry_names_the_columns_that_are_there(to: str, first: set[str], then: set[str]) -> None:
    """LLaMA-Factory looks up every column of the entry in every row."""
    past = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    rich = {**PAIR, "prompt": past, "tools": [{"name": "f"}]}
    for rows, expected in (([PAIR], first), ([PAIR, rich], first | then)):
        conversion = Conversion(TARGETS[to])
        names = {name for row in conversion.rows(load(rows).groups) for name in row}
        entry = conversion.entry("x.json")
        assert entry is not None
        assert (entry["file_name"], set(entry["columns"]), set(entry["columns"].values())) == ("x.json", expected, names)
    assert Conversion(TARGETS["pairs"]).entry("x.json") is None


def test_what_would_come_back_as_something_else_is_not_written() -> None:
    """A blank system message has no place where `system` is a column: reading it back, the row has none."""
    rows = [{**PAIR, "prompt": [{"role": "system", "content": " "}, {"role": "user", "content": "q"}]}]
    assert lost(rows, "llamafactory_pairs") == (0, {"would be read back as something else": 1}, {})
    assert lost(rows, "pairs") == (1, {}, {})


# Files and the command


def test_half_a_surrogate_pair_in_a_remark_is_written(tmp_path: Path) -> None:
    before = load([{**PAIR, "reason": "\ud800"}]).groups
    _, after = converted(before, "pairs", tmp_path / "out.jsonl")
    assert after[0].marks[0].by == By(reason="\ud800")


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("out.csv", {**PAIR, "prompt": [{"role": "user", "content": "q"}]}, "prompt"),
        ("out.tsv.gz", {**PAIR, "prompt": [{"role": "user", "content": "q"}]}, "prompt"),
        ("out.parquet", CHAT, "chosen"),
        ("out.parquet", [PAIR, {**PAIR, "prompt": [{"role": "user", "content": "q"}]}], "prompt"),
    ],
)
def test_a_file_that_cannot_hold_messages_is_refused(tmp_path: Path, name: str, row: Any, column: str) -> None:
    conversion = Conversion(TARGETS["pairs"])
    with pytest.raises(Refusal) as refused:
        write_rows(tmp_path / name, conversion.rows(load(row if isinstance(row, list) else [row]).groups))
    assert (refused.value.code, refused.value.column) == ("wrong_ending", column)
    assert not list(tmp_path.iterdir()), "neither the file nor what was written aside"
    assert name.endswith(".parquet") or refused.value.message.startswith(name.removeprefix("out").removesuffix(".gz"))


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl.gz", Conversion(TARGETS["pairs"]).rows(load([PAIR]).groups))
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).decode() == json.dumps(PAIR) + "\n"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("in.jsonl"), [{**PAIR, "annotator": "w"}, {**PAIR, "preference": 0.5}, {**PAIR, "chosen": ""}])
    done = call(capsys, "convert", "in.jsonl", "out.json", "to=llamafactory_pairs")
    assert done.code == 0, done.err
    assert json.loads(Path("out.json").read_text()) == [
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "x"},
         "rejected": {"from": "gpt", "value": "y"}, "annotator": "w"},
    ]  # fmt: skip
    assert "3 rows read as preference pairs with explicit prompt, 1 dropped: empty_answer 1 (row 3)" in done.err
    assert "out.json: 1 rows written as LLaMA-Factory pairs (sharegpt)" in done.err
    assert "not held: ties 1" in done.err
    assert '"formatting": "sharegpt", "ranking": true' in done.err
    refused = call(capsys, "convert", "in.jsonl", "out.json", "to=pairs")
    assert (refused.code, "overwrite=true" in refused.err) == (2, True)
    held = Path("in.jsonl").read_bytes()
    itself = call(capsys, "convert", "in.jsonl", "./in.jsonl", "to=pairs", "overwrite=true", "data.limit=1")
    assert (itself.code, "would be written over" in itself.err, Path("in.jsonl").read_bytes()) == (2, True, held)
    done = call(capsys, "convert", "in.jsonl", "out.json", "to=pairs", "overwrite=true", "data.limit=1", "--json")
    assert done.json == {
        "out": "out.json", "format": "pairs", "rows": 1, "not_held": {}, "changed": {}, "other_columns": {"annotator": 1},
        "read": {"rows": 1, "kept": 1, "dropped": {}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["in.jsonl", "to=pairs"], "usage", "two places"),
        (["in.jsonl", "out.jsonl"], "missing_key", "to=..."),
        (["in.jsonl", "out.jsonl", "to=pair"], "unknown_format", "Did you mean pairs?"),
        (["in.jsonl", "out.jsonl", "to=nectar"], "unknown_format", "can be read"),
        (["in.jsonl", "out.xlsx", "to=pairs"], "unknown_kind", ".jsonl"),
        (["in.jsonl", "out.jsonl", "to=pairs", "data=other.jsonl"], "usage", "IN"),
        (["in.jsonl", "out.jsonl", "to=demonstrations", "pairs=some"], "bad_value", "best_vs_rest"),
        (["in.jsonl", "out.jsonl", "to=hh"], "nothing_kept", "prompts that are no HH dialogues 1"),
        (["none.jsonl", "out.jsonl", "to=pairs"], "not_found", "no such file"),
    ],
)
def test_refusals_of_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("in.jsonl"), [PAIR])
    done = call(capsys, "convert", *words, "--json")
    assert (done.code, done.error["code"]) == (2, code)
    assert says in done.error["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
