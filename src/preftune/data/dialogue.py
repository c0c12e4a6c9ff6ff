"""Conversations in the shapes that public data has them, as tuples of Message.

Read: {role, content} and {from, value} turns, content as text or as a list of text parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from preftune.data.faults import RowFault
from preftune.records import Content, Message

Turns = tuple[Message, ...]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# Only what templates ask for: an id or a score beside a turn would make equal prompts differ.
TEMPLATE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))


def text(value: object, column: str) -> str:
    """The value as text that a tokenizer can take."""
    if not isinstance(value, str):
        raise RowFault("wrong_type", f"text is expected, this is {_kind(value)}", column)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowFault("bad_value", "holds half a surrogate pair: mend the \\u escape", column) from None
    return value


def content(value: object, column: str) -> Content:
    """Text as it stands; one message or a list of them as turns."""
    if isinstance(value, str):
        return text(value, column)
    if is_object(value):
        return (message(value, column),)
    if is_list(value):
        return tuple(message(turn, column) for turn in value)
    raise RowFault("wrong_type", f"text or messages are expected, this is {_kind(value)}", column)


def turns(value: object, column: str) -> Turns:
    """A list of messages, not empty."""
    read = content(value, column)
    if isinstance(read, str):
        raise RowFault("wrong_type", "a list of messages is expected, this is text", column)
    if not read:
        raise RowFault("missing_value", "the list of messages is empty", column)
    return read


def message(turn: object, column: str) -> Message:
    if not is_object(turn):
        raise RowFault("wrong_type", f"a message with role and content is expected, this is {_kind(turn)}", column)
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise RowFault("wrong_type", f"unknown role {said!r}: known are {', '.join(ROLES)}", column)
    extra = {key: turn[key] for key in TEMPLATE_KEYS if turn.get(key) is not None} if len(turn) > 2 else {}
    value = turn.get("content", turn.get("value"))
    if value is None:
        if not extra.get("tool_calls"):
            raise RowFault("missing_value", f"a {role} message has no content", column)
        value = ""
    return Message(role, _parts(value, column) if is_list(value) else text(value, column), extra)


def _parts(parts: Sequence[Any], column: str) -> str:
    """The joined text of [{type: text, text: ...}, ...]."""
    joined: list[str] = []
    for part in parts:
        kind = part.get("type") if is_object(part) else None
        if kind != "text":
            raise RowFault(
                "unsupported_content", f"a part of type {kind!r}: only text is read yet, no images or sounds", column
            )
        value = part.get("text")
        joined.append(text(part.get("value") if value is None else value, column))
    return "".join(joined)


def as_turns(value: Content, role: str) -> Turns:
    """Text becomes one message of this role; blank text none."""
    if isinstance(value, str):
        return (Message(role, value),) if value.strip() else ()
    return value


def is_blank(answer: Content) -> bool:
    """Nothing is said, and no tool is called."""
    if isinstance(answer, str):
        return not answer.strip()
    return not any(m.content.strip() or m.extra.get("tool_calls") for m in answer if m.role == "assistant")


def split_last(conversation: Turns, column: str) -> tuple[Turns, Turns]:
    """(everything before, the assistant's last run of turns with the tools' replies in it)."""
    last = conversation[-1].role
    if last != "assistant":
        raise RowFault("bad_value", f"ends with a {last} turn: the last one must be the assistant's answer", column)
    start = len(conversation)
    while start and conversation[start - 1].role in ("assistant", "tool"):
        start -= 1
    while conversation[start].role != "assistant":
        start += 1
    if start == 0:
        raise RowFault("bad_value", "nothing stands before the assistant's answer: give a user turn", column)
    return conversation[:start], conversation[start:]


def split_answer(prompt: Turns, answer: Turns, column: str) -> tuple[Turns, Turns]:
    """(prompt, answer) of one answer that may repeat the prompt, or bring further turns of the user."""
    whole = joined(prompt, answer, column)
    if any(m.role == "user" for m in whole[len(prompt) :]) or not prompt:
        return split_last(whole, column)
    return prompt, whole[len(prompt) :]


def split_pair(prompt: Turns, answers: tuple[Turns, Turns], columns: tuple[str, str]) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected). Answers may repeat the prompt; where they bring turns of the user (or no prompt is
    given), all turns that both share are the prompt."""
    first, second = (joined(prompt, answer, column) for answer, column in zip(answers, columns, strict=True))
    if first == second:
        raise RowFault("identical_answers", f"is the same as {columns[0]}: remove the row", columns[1])
    cut = len(prompt)
    if not cut or any(m.role not in ("assistant", "tool") for m in first[cut:] + second[cut:]):
        shortest = min(len(first), len(second))
        cut = next((i for i in range(shortest) if first[i] != second[i]), shortest)
    for rest in (first[cut:], second[cut:]):
        if not cut or not rest or rest[0].role != "assistant":
            why = f"does not go on from the same turns as {columns[0]}, each with an assistant's: remove the row"
            raise RowFault("prompts_differ", why, columns[1])
    return first[:cut], first[cut:], second[cut:]


def joined(prompt: Turns, answer: Turns, column: str) -> Turns:
    """Prompt and answer as one conversation, whether or not the answer repeats the prompt."""
    if not answer:
        raise RowFault("empty_answer", "the answer is blank: remove the row or fill it in", column)
    if answer[: len(prompt)] == prompt:
        return answer
    if answer[0].role != "assistant":
        raise RowFault("prompts_differ", f"begins with a {answer[0].role} turn that is not the prompt's", column)
    return prompt + answer


def split_text(first: str, second: str) -> int:
    """Length of the shared prompt of two texts: their common prefix, cut back so that the word in which they differ
    belongs whole, with the whitespace before it, to the answers, and neither answer is blank."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # bisection, since slices compare faster than characters in a loop
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first.startswith(second[:middle]) else (low, middle - 1)
    if not (first[low : low + 1].isspace() and second[low : low + 1].isspace()):
        low = _word_start(first, low)
    cut = len(first[:low].rstrip())
    while cut and not (first[cut:].strip() and second[cut:].strip()):
        cut = len(first[: _word_start(first, cut)].rstrip())
    return cut


def _word_start(line: str, at: int) -> int:
    while at and not line[at - 1].isspace():
        at -= 1
    return at


def _kind(value: object) -> str:
    kinds = (
        ("true or false", bool),
        ("null", type(None)),
        ("a number", (int, float)),
        ("an object", dict),
        ("a list", list),
    )
    name = type(value).__name__
    return next((said for said, types in kinds if isinstance(value, types)), "text" if name == "str" else f"a {name}")
