"""The row formats that are understood: a closed table, recognised by the columns of a file.

Each format is a function from a row to an Example (one prompt, its answers, one mark), or a RowFault.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from preftune.data.dialogue import (
    Turns,
    as_turns,
    content,
    is_blank,
    is_list,
    split_answer,
    split_last,
    split_pair,
    split_text,
    text,
    turns,
)
from preftune.data.faults import RowFault
from preftune.records import By, Comparison, Content, Demonstration, Mark, Message, Rating

Row = Mapping[str, Any]
ANSWERS = ("completion", "response")
LABELS = ("label", "kto_tag")
OPTIONAL = ("system", "tools", "input", "history", "weight", "preference", "annotator", "id")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(slots=True)
class Example:
    """One row, understood. The mark's indices point into `answers`: (content, column), chosen before rejected."""

    prompt: Content
    answers: list[tuple[Content, str]]
    mark: Mark | None
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Format:
    """`needs` names the columns; a tuple in it is a choice. `where` looks at the values; without `automatic` the format
    is only used when it is named."""

    name: str
    title: str
    needs: tuple[str | tuple[str, ...], ...]
    read: Callable[[Row], Example]
    where: Callable[[Row], bool] = lambda row: True
    automatic: bool = True

    @property
    def columns(self) -> str:
        """`prompt + completion|response`"""
        return " + ".join(need if isinstance(need, str) else "|".join(need) for need in self.needs)

    def fits(self, row: Row, present: Collection[str]) -> bool:
        has = all(need in present if isinstance(need, str) else any(n in present for n in need) for need in self.needs)
        return has and self.automatic and self.where(row)


# Columns of a row


def value(row: Row, column: str) -> Any:
    found = row.get(column)
    if found is None:
        if column in row:
            raise RowFault("missing_value", "is null: fill it in or remove the row", column)
        raise RowFault("missing_column", "is missing in this row: add it, or name the file's column with columns=", column)
    return found


def one_of(row: Row, columns: tuple[str, ...]) -> str:
    """The first of these columns that holds something."""
    return next((c for c in columns if row.get(c) is not None), next((c for c in columns if c in row), columns[0]))


def number(row: Row, column: str, highest: float) -> float:
    """A number from 0 to `highest`; 1 where the row does not say. CSV holds numbers as text."""
    found = row.get(column)
    if found is None or found == "":
        return 1.0
    try:
        if isinstance(found, bool):
            raise TypeError
        read = float(found)
    except (TypeError, ValueError):
        raise RowFault("wrong_type", f"a number is expected, this is {_short(found)}", column) from None
    if not 0 <= read <= highest or math.isinf(read):
        most = "of 0 or more" if math.isinf(highest) else f"from 0 to {highest:g}"
        raise RowFault("bad_value", f"a number {most} is expected, this is {_short(found)}", column)
    return read


def truth(row: Row, column: str) -> bool:
    """True, false, 1, 0, or those words as CSV writes them."""
    found = value(row, column)
    word = str(found).strip().lower()
    if word in ("true", "1", "1.0"):
        return True
    if word in ("false", "0", "0.0"):
        return False
    raise RowFault("bad_value", f"true or false (or 1 or 0) is expected, this is {_short(found)}", column)


def tools_of(row: Row) -> tuple[Any, ...]:
    found = row.get("tools")
    if isinstance(found, str):  # LLaMA-Factory keeps the list as JSON text
        try:
            found = json.loads(found) if found.strip() else None
        except ValueError:
            raise RowFault("wrong_type", "a list of tools is expected, this text is not JSON", "tools") from None
    if found is None:
        return ()
    if not is_list(found):
        raise RowFault("wrong_type", f"a list of tools is expected, this is {_short(found)}", "tools")
    return tuple(found)


def system_of(row: Row) -> Turns:
    found = row.get("system")
    return () if found is None else as_turns(text(found, "system"), "system")


def judged(row: Row) -> dict[str, Any]:
    """What any mark may carry: its weight and who judged."""
    who = row.get("annotator")
    return {"weight": number(row, "weight", math.inf), "by": None if who is None or who == "" else By(who=str(who))}


def _short(found: object) -> str:
    shown = json.dumps(found, ensure_ascii=False, default=str)
    return shown if len(shown) <= 40 else shown[:37] + "..."


# Prompt and answers become Examples


def compared(row: Row, prompt: Content, columns: tuple[str, str] = ("chosen", "rejected")) -> Example:
    """A pair of answers to a prompt that stands in its own column (or, being (), in both answers)."""
    first, second = (content(value(row, column), column) for column in columns)
    tools, system = tools_of(row), system_of(row)
    plain = isinstance(prompt, str) and isinstance(first, str) and isinstance(second, str)
    if not plain or tools or system:  # a system prompt and tools need a conversation
        answers = as_turns(first, "assistant"), as_turns(second, "assistant")
        for answer, column in zip(answers, columns, strict=True):
            _refuse_blank(answer, column)
        prompt, first, second = split_pair(as_turns(prompt, "user"), answers, columns)
        prompt = _under(system, prompt)
    return comparison(row, prompt, ((first, columns[0]), (second, columns[1])), tools)


def comparison(
    row: Row, prompt: Content, answers: tuple[tuple[Content, str], tuple[Content, str]], tools: tuple[Any, ...] = ()
) -> Example:
    (first, _), (second, column) = answers
    for answer in answers:
        _refuse_blank(*answer)
    if first == second:
        raise RowFault("identical_answers", f"is the same as {answers[0][1]}: remove the row", column)
    mark = Comparison(0, 1, preference=number(row, "preference", 1.0), **judged(row))
    return Example(prompt, list(answers), mark, tools)


def answered(row: Row, prompt: Content, column: str) -> Example:
    """One answer to a prompt: rated where the row has a label, else a demonstration."""
    answer = content(value(row, column), column)
    tools, system = tools_of(row), system_of(row)
    if not (isinstance(prompt, str) and isinstance(answer, str)) or tools or system:
        reply = as_turns(answer, "assistant")
        _refuse_blank(reply, column)
        prompt, answer = split_answer(as_turns(prompt, "user"), reply, column)
        prompt = _under(system, prompt)
    return single(row, prompt, answer, column, tools)


def conversed(row: Row, column: str) -> Example:
    """A whole conversation: its last answer is the response."""
    prompt, answer = split_last(turns(value(row, column), column), column)
    return single(row, _under(system_of(row), prompt), answer, column, tools_of(row))


def single(row: Row, prompt: Content, answer: Content, column: str, tools: tuple[Any, ...]) -> Example:
    _refuse_blank(answer, column)
    return Example(prompt, [(answer, column)], Demonstration(0, **judged(row)), tools)


def rated(row: Row, example: Example) -> Example:
    """The same answer, judged by the row's label instead of shown as a model to follow."""
    example.mark = Rating(0, desirable=truth(row, one_of(row, LABELS)), **judged(row))
    return example


def _under(system: Turns, prompt: Turns) -> Turns:
    """A system turn inside the conversation wins over the column."""
    return prompt if prompt and prompt[0].role == "system" else system + prompt


def _refuse_blank(answer: Content, column: str) -> None:
    if is_blank(answer):
        raise RowFault("empty_answer", "the answer is blank: remove the row or fill it in", column)


# The formats


def prompt_of(row: Row) -> Content:
    return content(value(row, "prompt"), "prompt")


def alpaca_prompt(row: Row) -> Turns:
    asked, given = text(value(row, "instruction"), "instruction"), row.get("input")
    given = "" if given is None else text(given, "input")
    history = row.get("history") or ()
    past: list[Message] = []
    for exchange in history if is_list(history) else (history,):
        if not is_list(exchange) or len(exchange) != 2:
            raise RowFault("wrong_type", "a list of [question, answer] pairs is expected", "history")
        past.append(Message("user", text(exchange[0], "history")))
        past.append(Message("assistant", text(exchange[1], "history")))
    return (*past, Message("user", f"{asked}\n{given}" if given.strip() else asked))


def _implicit(row: Row) -> Example:
    first, second = value(row, "chosen"), value(row, "rejected")
    if not (isinstance(first, str) and isinstance(second, str)):
        return compared(row, ())
    for given, column in ((first, "chosen"), (second, "rejected")):
        _refuse_blank(text(given, column), column)
    if first == second:
        raise RowFault("identical_answers", "is the same as chosen: remove the row", "rejected")
    cut = split_text(first, second)
    return comparison(row, first[:cut], ((first[cut:], "chosen"), (second[cut:], "rejected")))


def _hh(row: Row) -> Example:
    halves: list[tuple[str, str]] = []
    for column in ("chosen", "rejected"):
        dialogue = text(value(row, column), column)
        cut = dialogue.rfind(ASSISTANT) + len(ASSISTANT)
        if cut < len(ASSISTANT):
            raise RowFault("bad_value", "no '\\n\\nAssistant:' turn: not an HH dialogue", column)
        halves.append((dialogue[:cut], dialogue[cut:]))
    (prompt, first), (other, second) = halves
    _refuse_blank(first, "chosen")
    _refuse_blank(second, "rejected")
    if prompt != other:
        raise RowFault("prompts_differ", "its turns before the last answer are not those of chosen: remove the row", "rejected")
    return comparison(row, prompt, ((first, "chosen"), (second, "rejected")))


def _hh_messages(row: Row) -> Example:
    example = _hh(row)
    assert isinstance(example.prompt, str)
    opening, *parts = re.split(r"\n\n(Human|Assistant):", example.prompt)[:-2]  # the last two open the answer
    roles = {"Human": "user", "Assistant": "assistant"}
    prompt = tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))
    if opening.strip() or not prompt:
        raise RowFault("bad_value", "does not begin with '\\n\\nHuman:': not an HH dialogue", "chosen")
    first, second = (((Message("assistant", str(answer).strip()),), column) for answer, column in example.answers)
    return comparison(row, prompt, (first, second))


def _message_pairs(row: Row) -> Example:
    for column in ("chosen_messages", "rejected_messages"):
        turns(value(row, column), column)
    return compared(row, (), ("chosen_messages", "rejected_messages"))


def _conversation(row: Row) -> Example:
    return conversed(row, one_of(row, ("messages", "conversations")))


def _answered(row: Row) -> Example:
    return answered(row, prompt_of(row), one_of(row, ANSWERS))


def _alpaca(row: Row) -> Example:
    return answered(row, alpaca_prompt(row), "output")


def _text(row: Row) -> Example:
    return single(row, "", text(value(row, "text"), "text"), "text", ())


def _prompts(row: Row) -> Example:
    prompt, tools, system = prompt_of(row), tools_of(row), system_of(row)
    if not isinstance(prompt, str) or tools or system:
        prompt = _under(system, as_turns(prompt, "user"))
    if not prompt:
        raise RowFault("missing_value", "the prompt is empty: fill it in or remove the row", "prompt")
    return Example(prompt, [], None, tools)


def _is_hh(row: Row) -> bool:
    return any(isinstance(row.get(c), str) and row[c].startswith(HUMAN) for c in ("chosen", "rejected"))


def _no_answers(row: Row) -> bool:
    """Prompts alone: a file with half of a pair is more likely a slip than a list of prompts."""
    return not row.keys() & {"chosen", "rejected", *ANSWERS, *LABELS, "output"}


_TABLE = (
    Format("pairs", "preference pairs with explicit prompt", ("prompt", "chosen", "rejected"),
           lambda row: compared(row, prompt_of(row))),
    Format("llamafactory_pairs", "LLaMA-Factory preference pairs", ("conversations", "chosen", "rejected"),
           lambda row: compared(row, turns(value(row, "conversations"), "conversations"))),
    Format("alpaca_pairs", "Alpaca preference pairs", ("instruction", "chosen", "rejected"),
           lambda row: compared(row, alpaca_prompt(row))),
    Format("message_pairs", "preference pairs of whole conversations", ("chosen_messages", "rejected_messages"),
           _message_pairs),
    Format("hh", "HH dialogues", ("chosen", "rejected"), _hh, where=_is_hh),
    Format("hh_messages", "HH dialogues as messages", ("chosen", "rejected"), _hh_messages, automatic=False),
    Format("pairs_implicit", "preference pairs with implicit prompt", ("chosen", "rejected"), _implicit),
    Format("ratings", "ratings of answers", ("prompt", ANSWERS, LABELS), lambda row: rated(row, _answered(row))),
    Format("alpaca_ratings", "Alpaca ratings", ("instruction", "output", LABELS), lambda row: rated(row, _alpaca(row))),
    Format("conversation_ratings", "ratings of conversations", (("messages", "conversations"), LABELS),
           lambda row: rated(row, _conversation(row))),
    Format("demonstrations", "demonstrations with prompt", ("prompt", ANSWERS), _answered),
    Format("alpaca", "Alpaca demonstrations", ("instruction", "output"), _alpaca),
    Format("conversations", "demonstrations as conversations", (("messages", "conversations"),), _conversation),
    Format("prompts", "prompts", ("prompt",), _prompts, where=_no_answers),
    Format("text", "text", ("text",), _text, where=lambda row: not row.keys() & {*LABELS}),
)  # fmt: skip
FORMATS = {f.name: f for f in _TABLE}
COLUMNS = {c for f in _TABLE for need in f.needs for c in ([need] if isinstance(need, str) else need)} | {*OPTIONAL}


def recognise(row: Row, *, nulls: bool = False) -> Format | None:
    """The first format of the table that has its columns in this row; with `nulls`, columns that hold null count."""
    present = [name for name, held in row.items() if nulls or held is not None]
    return next((f for f in _TABLE if f.fits(row, present)), None)


def understand(format: Format, row: Row) -> Example:
    """One row as an Example. Rows with pictures or sounds are not read yet, whatever their format."""
    for column in MEDIA:
        if row.get(column) not in (None, "", []):
            raise RowFault("unsupported_content", "images and sounds are not read yet: remove the row", column)
    return format.read(row)
