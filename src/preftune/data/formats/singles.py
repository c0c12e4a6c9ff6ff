"""One answer: judged alone, shown as a model to follow, or no answer at all."""

from __future__ import annotations

from preftune.data.dialogue import as_turns, content, text
from preftune.data.faults import RowFault
from preftune.data.formats.columns import (
    ANSWERS,
    LABELS,
    Row,
    asked,
    by_of,
    measured,
    one_of,
    system_of,
    tools_of,
    truth,
    under,
    value,
    weight_of,
)
from preftune.data.formats.example import Example, Format, answered, conversed, single
from preftune.data.formats.pairs import alpaca_prompt
from preftune.records import Rating

CONVERSATIONS = ("messages", "conversations")


def rated(row: Row, example: Example) -> Example:
    """The same answer, judged by the row's label instead of shown as a model to follow."""
    example.marks = [Rating(0, truth(row, one_of(row, LABELS)), weight_of(row), by_of(row))]
    return example


def _answered(row: Row) -> Example:
    return answered(row, content(value(row, "prompt"), "prompt"), one_of(row, ANSWERS))


def _conversed(row: Row) -> Example:
    return conversed(row, one_of(row, CONVERSATIONS))


def _halos(row: Row) -> Example:
    """A reward beside the label says how strongly."""
    return rated({**row, "strength": measured(row.get("reward"))}, _answered(row))


def _alpaca(row: Row) -> Example:
    return answered(row, alpaca_prompt(row), "output")


def _input(row: Row) -> Example:
    return answered(row, asked(row, "input"), "output")


def _prompts(row: Row) -> Example:
    prompt, tools, system = content(value(row, "prompt"), "prompt"), tools_of(row), system_of(row)
    if not isinstance(prompt, str) or tools or system:
        prompt = under(system, as_turns(prompt, "user"))
    if not prompt:
        raise RowFault("missing_value", "the prompt is empty: fill it in or remove the row", "prompt")
    return Example(prompt, [], tools=tools)


def _no_answers(row: Row) -> bool:
    """Prompts alone: a file with half of a pair is more likely a slip than a list of prompts."""
    return row.keys().isdisjoint(("chosen", "rejected", *ANSWERS, *LABELS))


SINGLES = (
    Format("ratings", "ratings of answers", "ratings", ("prompt", ANSWERS, LABELS), lambda row: rated(row, _answered(row))),
    Format("halos_ratings", "HALOs binary feedback", "ratings", ("prompt", "output", "label", "type"), _halos,
           where=lambda row: row.get("type") == "binary_feedback"),
    Format("alpaca_ratings", "Alpaca ratings", "ratings", ("instruction", "output", LABELS),
           lambda row: rated(row, _alpaca(row)), over=("input_ratings",)),
    Format("input_ratings", "OpenRLHF ratings", "ratings", ("input", "output", LABELS), lambda row: rated(row, _input(row))),
    Format("conversation_ratings", "ratings of conversations", "ratings", (CONVERSATIONS, LABELS),
           lambda row: rated(row, _conversed(row))),
    Format("demonstrations", "demonstrations with prompt", "demonstrations", ("prompt", ANSWERS), _answered),
    Format("alpaca", "Alpaca demonstrations", "demonstrations", ("instruction", "output"), _alpaca,
           over=("input_demonstrations",)),
    Format("alpaca_eval_outputs", "AlpacaEval outputs", "demonstrations", ("instruction", "output", "generator"), _alpaca),
    Format("input_demonstrations", "OpenRLHF demonstrations", "demonstrations", ("input", "output"), _input),
    Format("conversations", "demonstrations as conversations", "demonstrations", (CONVERSATIONS,), _conversed),
    Format("text", "text", "demonstrations", ("text",), lambda row: single(row, "", text(value(row, "text"), "text"), "text"),
           where=lambda row: row.keys().isdisjoint(LABELS)),
    Format("prompts", "prompts", "prompts", ("prompt",), _prompts, where=_no_answers),
)  # fmt: skip
