"""What a row becomes in each format, and the fault of each bad row."""

from __future__ import annotations

from typing import Any

import pytest

from preftune.data.dialogue import split_text
from preftune.data.faults import RowFault
from preftune.data.formats import FORMATS, Example, recognise, understand
from preftune.records import By, Comparison, Demonstration, Message, Rating

U, A, S, T = (lambda said, role=role: Message(role, said) for role in ("user", "assistant", "system", "tool"))


def turn(role: str, said: Any) -> dict[str, Any]:
    return {"role": role, "content": said}


def said(who: str, what: str) -> dict[str, str]:
    return {"from": who, "value": what}


def hh(*parts: str, last: str = " yes") -> str:
    return "".join(parts) + "\n\nAssistant:" + last


def taken(row: dict[str, Any], name: str = "") -> Example:
    format = FORMATS[name] if name else recognise(row)
    assert format is not None
    return understand(format, row)


QA = [turn("user", "q"), turn("assistant", "a")]
QB = [turn("user", "q"), turn("assistant", "b")]
HH = "\n\nHuman: hi"
PROMPT = (U("q"),)

# name of the format, row, prompt, answers
PAIRS = [
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b"}, "q", ("a", "b")),
    ("pairs", {"prompt": "", "chosen": "a", "rejected": "b"}, "", ("a", "b")),
    ("pairs", {"prompt": "q", "chosen": QA, "rejected": QB, "messages": QA}, PROMPT, ((A("a"),), (A("b"),))),
    ("pairs", {"prompt": "q", "chosen": QA, "rejected": "b"}, PROMPT, ((A("a"),), (A("b"),))),
    ("pairs", {"prompt": QA[:1], "chosen": "a", "rejected": turn("bot", "b")}, PROMPT, ((A("a"),), (A("b"),))),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, (S("s"), U("q")), ((A("a"),), (A("b"),))),
    (
        "pairs",  # a conversation that the answers share goes on before they part
        {"prompt": "q", "chosen": [*QA, turn("user", "r"), QA[1]], "rejected": [*QA, turn("user", "r"), QB[1]]},
        (U("q"), A("a"), U("r")),
        ((A("a"),), (A("b"),)),
    ),
    ("hh", {"chosen": hh(HH), "rejected": hh(HH, last=" no")}, hh(HH, last=""), (" yes", " no")),
    ("pairs_implicit", {"chosen": QA, "rejected": QB}, PROMPT, ((A("a"),), (A("b"),))),
    (
        "pairs_implicit",
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
        "The sky is",
        (" blue", " green"),
    ),
    (
        "llamafactory_pairs",
        {
            "conversations": [said("human", "q")],
            "chosen": said("gpt", "a"),
            "rejected": said("gpt", "b"),
            "system": "s",
        },
        (S("s"), U("q")),
        ((A("a"),), (A("b"),)),
    ),
    (
        "alpaca_pairs",
        {"instruction": "q", "input": "x", "chosen": "a", "rejected": "b", "history": [["h", "i"]]},
        (U("h"), A("i"), U("q\nx")),
        ((A("a"),), (A("b"),)),
    ),
    (
        "message_pairs",
        {
            "chosen_messages": [turn("user", [{"type": "text", "value": "q"}]), QA[1]],
            "rejected_messages": [turn("user", [{"type": "text", "text": "q"}]), {**QB[1], "loss_weight": 1.0}],
        },
        PROMPT,
        ((A("a"),), (A("b"),)),
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "answers"), PAIRS)
def test_pairs(name: str, row: dict[str, Any], prompt: Any, answers: Any) -> None:
    example = taken(row)
    assert recognise(row) is FORMATS[name]
    assert (example.prompt, tuple(content for content, _ in example.answers)) == (prompt, answers)
    assert [*example.marks] == [Comparison(0, 1)]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
# name of the format, row, prompt, the one answer, label (None: a demonstration)
SINGLES = [
    ("demonstrations", {"prompt": "q", "completion": "a"}, "q", "a", None),
    ("demonstrations", {"prompt": "q", "response": QA[1:]}, PROMPT, (A("a"),), None),
    ("conversations", {"messages": [*QA, turn("user", "r"), QB[1]]}, (U("q"), A("a"), U("r")), (A("b"),), None),
    ("conversations", {"conversations": [said("human", "q"), said("gpt", "a")]}, PROMPT, (A("a"),), None),
    (
        "conversations",
        {"messages": [QA[0], CALL, turn("tool", "7"), QA[1]]},
        PROMPT,
        (Message("assistant", "", {"tool_calls": [{"name": "f"}]}), T("7"), A("a")),
        None,
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, PROMPT, (A("a"),), None),
    ("text", {"text": "a"}, "", "a", None),
    ("ratings", {"prompt": "q", "completion": "a", "label": True}, "q", "a", True),
    ("ratings", {"prompt": "q", "response": "a", "kto_tag": 0}, "q", "a", False),
    ("ratings", {"prompt": "q", "completion": "a", "label": "False"}, "q", "a", False),
    ("conversation_ratings", {"messages": QA, "label": False}, PROMPT, (A("a"),), False),
    ("alpaca_ratings", {"instruction": "q", "output": "a", "kto_tag": True}, PROMPT, (A("a"),), True),
]


@pytest.mark.parametrize(("name", "row", "prompt", "answer", "label"), SINGLES)
def test_singles(name: str, row: dict[str, Any], prompt: Any, answer: Any, label: bool | None) -> None:
    example = taken(row)
    assert recognise(row) is FORMATS[name]
    assert (example.prompt, example.answers[0][0], len(example.answers)) == (prompt, answer, 1)
    assert [*example.marks] == [Demonstration(0) if label is None else Rating(0, desirable=label)]


@pytest.mark.parametrize(("held", "prompt"), [("q", "q"), ([turn("human", "q")], PROMPT)])
def test_prompts_alone_have_no_marks(held: Any, prompt: Any) -> None:
    example = taken({"prompt": held, "source": "x"})
    assert (example.prompt, example.answers, [*example.marks]) == (prompt, [], [])


def test_hh_messages_only_when_named() -> None:
    row = {
        "chosen": hh(HH, "\n\nAssistant: ho", "\n\nHuman: so"),
        "rejected": hh(HH, "\n\nAssistant: ho", "\n\nHuman: so", last=" no "),
    }
    example = taken(row, "hh_messages")
    assert recognise(row) is FORMATS["hh"]
    assert example.prompt == (U("hi"), A("ho"), U("so"))
    assert [content for content, _ in example.answers] == [(A("yes"),), (A("no"),)]


def test_marks_carry_weight_preference_and_annotator() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "weight": "2", "preference": 0.25, "annotator": 7, "id": 1}
    assert taken(row).marks[0] == Comparison(0, 1, preference=0.25, weight=2.0, by=By(who="7"))
    assert taken({**row, "weight": "", "preference": None, "annotator": ""}).marks[0] == Comparison(0, 1)


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_make_a_conversation(tools: Any) -> None:
    example = taken({"prompt": "q", "chosen": "a", "rejected": "b", "tools": tools})
    assert (example.prompt, example.tools) == (PROMPT, ({"name": "f"},))


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
FAULTS = [
    ("missing_column", "rejected", "pairs", {"prompt": "q", "chosen": "a"}),
    ("missing_value", "chosen", "pairs", {**PAIR, "chosen": None}),
    ("missing_value", "chosen", "pairs", {**PAIR, "chosen": turn("assistant", None)}),
    ("wrong_type", "prompt", "pairs", {**PAIR, "prompt": 3}),
    ("wrong_type", "rejected", "pairs", {**PAIR, "rejected": [turn("narrator", "b")]}),
    ("wrong_type", "rejected", "pairs", {**PAIR, "rejected": ["b"]}),
    ("wrong_type", "weight", "pairs", {**PAIR, "weight": "much"}),
    ("wrong_type", "weight", "pairs", {**PAIR, "weight": True}),
    ("wrong_type", "tools", "pairs", {**PAIR, "tools": "f("}),
    ("wrong_type", "history", "alpaca", {"instruction": "q", "output": "a", "history": "h"}),
    ("bad_value", "weight", "pairs", {**PAIR, "weight": -1}),
    ("bad_value", "weight", "pairs", {**PAIR, "weight": float("nan")}),
    ("bad_value", "preference", "pairs", {**PAIR, "preference": 1.5}),
    ("bad_value", "label", "ratings", {"prompt": "q", "completion": "a", "label": 5}),
    ("bad_value", "chosen", "pairs", {**PAIR, "chosen": "\ud800"}),
    ("bad_value", "chosen", "hh", {"chosen": "a", "rejected": "b"}),
    ("bad_value", "messages", "conversations", {"messages": QA[:1]}),
    ("bad_value", "messages", "conversations", {"messages": QA[1:]}),
    ("empty_answer", "chosen", "pairs", {**PAIR, "chosen": " \n"}),
    ("empty_answer", "rejected", "pairs", {**PAIR, "rejected": []}),
    ("empty_answer", "rejected", "pairs", {**PAIR, "rejected": turn("assistant", " ")}),
    ("empty_answer", "chosen", "hh", {"chosen": hh(HH, last=" "), "rejected": hh(HH)}),
    ("empty_answer", "rejected", "pairs_implicit", {"chosen": "a", "rejected": ""}),
    ("empty_answer", "text", "text", {"text": ""}),
    ("identical_answers", "rejected", "pairs", {**PAIR, "rejected": "a"}),
    ("identical_answers", "rejected", "pairs_implicit", {"chosen": QA, "rejected": QA}),
    ("identical_answers", "rejected", "hh", {"chosen": hh(HH), "rejected": hh(HH)}),
    ("prompts_differ", "rejected", "hh", {"chosen": hh(HH), "rejected": hh(HH, " you")}),
    ("prompts_differ", "rejected", "pairs_implicit", {"chosen": QA, "rejected": [turn("user", "r"), QB[1]]}),
    ("prompts_differ", "rejected", "pairs_implicit", {"chosen": QA, "rejected": [*QA, *QB]}),
    ("prompts_differ", "chosen", "pairs", {**PAIR, "prompt": "other", "chosen": QA}),
    ("unsupported_content", "images", "pairs", {**PAIR, "images": ["1.jpg"]}),
    ("unsupported_content", "chosen", "pairs", {**PAIR, "chosen": [turn("assistant", [{"type": "image"}])]}),
]


@pytest.mark.parametrize(("code", "column", "name", "row"), FAULTS)
def test_faults_name_their_column(code: str, column: str, name: str, row: dict[str, Any]) -> None:
    with pytest.raises(RowFault) as caught:
        taken(row, name)
    assert (caught.value.code, caught.value.column) == (code, column)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("first", "second", "prompt"),
    [
        ("blue ", "green", ""),
        ("The sky is blue", "The sky is green", "The sky is"),
        ("It is blue", "It is black", "It is"),  # not within a word
        ("Well. Yes", "Well.\nNo", "Well."),  # they part in the whitespace
        ("a b", "a b c", "a"),  # neither answer is empty
        ("a b", "a bc", "a"),
        ("a ", "a b", ""),  # nor blank
        ("a  \n b", "a  \n c", "a"),
        ("x", "xy", ""),
    ],
)
def test_split_text(first: str, second: str, prompt: str) -> None:
    assert first[: split_text(first, second)] == prompt
    assert split_text(second, first) == split_text(first, second)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "q", "chosen": "a"}, None),  # half a pair is no list of prompts
        ({"text": "t", "label": 1}, None),
        ({"a": 1}, None),
        ({"prompt": "q", "chosen": None, "rejected": None, "completion": "a"}, "demonstrations"),
        ({"chosen": None, "rejected": hh(HH)}, None),
        ({"chosen": "", "rejected": hh(HH)}, "hh"),
    ],
)
def test_recognise(row: dict[str, Any], name: str | None) -> None:
    found = recognise(row)
    assert (found.name if found else None) == name
