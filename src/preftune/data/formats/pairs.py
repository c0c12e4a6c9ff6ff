"""Pairs: one answer is called better by the name of its column."""

from __future__ import annotations

import re
from typing import Any

from preftune.data.dialogue import Turns, content, is_list, split_last, split_text, text, turns
from preftune.data.faults import RowFault
from preftune.data.formats.columns import (
    CHOSEN_SCORES,
    REJECTED_SCORES,
    Row,
    asked,
    by_of,
    number,
    one_of,
    system_of,
    tools_of,
    under,
    value,
    with_input,
)
from preftune.data.formats.example import Answer, Example, Format, between, compared, refuse_blank, two
from preftune.records import Message

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
QUESTIONS = ("question", "query", "input")
REJECTED = ("rejected_response", "rejected_messages")


def alpaca_prompt(row: Row) -> Turns:
    """Earlier exchanges, then the instruction and what it is about."""
    asked, history = text(value(row, "instruction"), "instruction"), row.get("history") or ()
    past: list[Message] = []
    for exchange in history if is_list(history) else (history,):
        if not is_list(exchange) or len(exchange) != 2:
            raise RowFault("wrong_type", "a list of [question, answer] pairs is expected", "history")
        past.append(Message("user", text(exchange[0], "history")))
        past.append(Message("assistant", text(exchange[1], "history")))
    return (*past, Message("user", with_input(row, asked, "input")))


def dialogue(said: str, column: str) -> Turns:
    """The turns of a text in the manner of HH, which opens an answer at its end."""
    opening, *parts = re.split(r"\n\n(Human|Assistant):", said)
    roles = {"Human": "user", "Assistant": "assistant"}
    found = tuple(Message(roles[who], words.strip()) for who, words in zip(parts[::2], parts[1::2], strict=True))
    if opening.strip() or len(found) < 2 or found[-1] != Message("assistant", ""):
        raise RowFault("bad_value", "is no dialogue from '\\n\\nHuman:' to '\\n\\nAssistant:'", column)
    return found[:-1]


def _verdict(row: Row) -> list[tuple[float, Any]]:
    return [(number(row, "preference", 1.0), by_of(row))]


def _explicit(row: Row) -> Example:
    return compared(row, content(value(row, "prompt"), "prompt"))


def _implicit(row: Row) -> Example:
    first, second = value(row, "chosen"), value(row, "rejected")
    if not (isinstance(first, str) and isinstance(second, str)):
        return compared(row, ())
    for given, column in ((first, "chosen"), (second, "rejected")):
        refuse_blank(text(given, column), column)
    if first == second:
        raise RowFault("identical_answers", "is the same as chosen: remove the row", "rejected")
    cut = split_text(first, second)
    answers = (first[cut:], "chosen"), (second[cut:], "rejected")
    return between(row, first[:cut], answers, _verdict(row), tools_of(row))


def _hh(row: Row) -> Example:
    halves: list[tuple[str, str]] = []
    for column in ("chosen", "rejected"):
        said = text(value(row, column), column)
        cut = said.rfind(ASSISTANT) + len(ASSISTANT)
        if cut < len(ASSISTANT):
            raise RowFault("bad_value", "no '\\n\\nAssistant:' turn: not an HH dialogue", column)
        halves.append((said[:cut], said[cut:]))
    (prompt, first), (other, second) = halves
    refuse_blank(first, "chosen")
    refuse_blank(second, "rejected")
    if prompt != other:
        raise RowFault("prompts_differ", "its turns before the last answer are not those of chosen: remove the row", "rejected")
    return between(row, prompt, ((first, "chosen"), (second, "rejected")), _verdict(row), tools_of(row))


def _hh_messages(row: Row) -> Example:
    example = _hh(row)
    assert isinstance(example.prompt, str)
    first, second = (((Message("assistant", str(said).strip()),), column) for said, column in example.answers)
    return between(row, dialogue(example.prompt, "chosen"), (first, second), _verdict(row))


def _message_pairs(row: Row) -> Example:
    for column in ("chosen_messages", "rejected_messages"):
        turns(value(row, column), column)
    return compared(row, (), ("chosen_messages", "rejected_messages"))


def _swift(row: Row) -> Example:
    """The conversation ends with the better answer; the worse one stands alone, or ends a conversation of its own."""
    column = one_of(row, REJECTED)
    prompt, chosen = split_last(turns(value(row, "messages"), "messages"), "messages")
    worse: Answer = (content(value(row, column), column), column)
    return two(row, under(system_of(row), prompt), ((chosen, "messages"), worse), _verdict(row))


def _is_hh(row: Row) -> bool:
    return any(isinstance(row.get(c), str) and row[c].startswith(HUMAN) for c in ("chosen", "rejected"))


PAIRS = (
    Format("pairs", "preference pairs with explicit prompt", "comparisons", ("prompt", "chosen", "rejected"), _explicit,
           over=("question_pairs", "alpaca_pairs")),
    Format("ultrafeedback_binarized", "binarised UltraFeedback", "comparisons",
           ("prompt", "chosen", "rejected", CHOSEN_SCORES, REJECTED_SCORES), _explicit),
    Format("ultrafeedback_argilla", "Argilla's first binarised UltraFeedback", "comparisons",
           ("instruction", "chosen_response", "rejected_response"),
           lambda row: compared(row, asked(row, "instruction"), ("chosen_response", "rejected_response"))),
    Format("rewardbench", "RewardBench", "comparisons",
           ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "subset"),
           lambda row: compared(row, asked(row, "prompt"))),
    Format("question_pairs", "preference pairs under a question", "comparisons", (QUESTIONS, "chosen", "rejected"),
           lambda row: compared(row, asked(row, one_of(row, QUESTIONS)))),
    Format("llamafactory_pairs", "LLaMA-Factory preference pairs", "comparisons", ("conversations", "chosen", "rejected"),
           lambda row: compared(row, turns(value(row, "conversations"), "conversations"))),
    Format("alpaca_pairs", "Alpaca preference pairs", "comparisons", ("instruction", "chosen", "rejected"),
           lambda row: compared(row, alpaca_prompt(row)), over=("question_pairs",)),
    Format("message_pairs", "preference pairs of whole conversations", "comparisons",
           ("chosen_messages", "rejected_messages"), _message_pairs),
    Format("swift_pairs", "ms-swift preference pairs", "comparisons", ("messages", REJECTED), _swift),
    Format("hh", "HH dialogues", "comparisons", ("chosen", "rejected"), _hh, where=_is_hh),
    Format("hh_messages", "HH dialogues as messages", "comparisons", ("chosen", "rejected"), _hh_messages, automatic=False),
    Format("pairs_implicit", "preference pairs with implicit prompt", "comparisons", ("chosen", "rejected"), _implicit),
)  # fmt: skip
