"""The row formats that are written: how one judgement stands in each, or why it cannot.

A Piece is one prompt with the answers of one judgement. Every row is read back by the format that it is written in before it
counts as written: what would come back as something else is not held.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from preftune.data.dialogue import Turns, as_turns
from preftune.data.formats import FORMATS, RowFault, understand
from preftune.data.formats.pairs import ASSISTANT, HUMAN
from preftune.records import By, Comparison, Content, Demonstration, Message, Ranking, Rating, digest

Row = dict[str, Any]
SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}


class Unheld(Exception):
    """Why a format has no place for this."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One judgement with the prompt and the answers that it is of; its indices point into `answers`."""

    prompt: Content
    answers: tuple[Content, ...]
    mark: Comparison | Ranking | Rating | Demonstration
    tools: tuple[Any, ...] = ()
    id: str = ""

    @property
    def is_text(self) -> bool:
        return isinstance(self.prompt, str)


@dataclass(frozen=True)
class Target:
    """One format that is written. `takes` is what its rows hold: a better and a worse answer, any judgement of several, a
    rating, an answer to imitate. `reads_as` names the format that reads it back; `form` is what its prompts and answers are.
    `entry` is what LLaMA-Factory's dataset_info.json needs, with all columns that its rows may have."""

    name: str
    title: str
    takes: Literal["comparisons", "judgements", "ratings", "demonstrations"]
    reads_as: str
    row: Callable[[Piece], Row]
    form: Literal["either", "conversation", "text"] = "either"
    entry: Mapping[str, Any] | None = None

    def written(self, piece: Piece) -> tuple[Row, list[str]]:
        """(row, columns beyond those of the format). Raises Unheld where the format has no place for the piece."""
        row = self.row(piece)
        own = {*row}
        row |= {name: held for name, held in _said(piece.mark).items() if name not in row}
        if piece.tools:
            row["tools"] = [*piece.tools] if self.entry is None else json.dumps(piece.tools, ensure_ascii=False)
        if piece.id:
            row["id"] = piece.id
        try:
            example = understand(FORMATS[self.reads_as], row)
        except RowFault as fault:
            raise Unheld(f"{fault.code} when read back") from None
        same = example.prompt == piece.prompt and tuple(content for content, _ in example.answers) == piece.answers
        if not same or example.tools != piece.tools or [*example.marks] != [replace(piece.mark, origin=None)]:
            raise Unheld("would be read back as something else")
        return row, [name for name in row if name not in own and name != "tools"]


def _said(mark: Comparison | Ranking | Rating | Demonstration) -> Row:
    """What is said of a judgement beside the answers, in the columns that any row may have."""
    by = mark.by or By()
    found = {"annotator": by.who, "annotator_kind": by.kind, "time": by.time, "side": by.side, "strength": by.strength}
    row: Row = {name: held for name, held in (found | {"reason": by.reason}).items() if held not in ("", None)}
    if isinstance(mark, Comparison) and mark.preference not in (0.0, 0.5, 1.0):
        row["preference"] = mark.preference
    if mark.weight != 1:
        row["weight"] = mark.weight
    return row


# Parts of a row


def plain(content: Content) -> str | list[Row]:
    return content if isinstance(content, str) else [message.as_dict() for message in content]


def turns(content: Content) -> Turns:
    assert not isinstance(content, str), "a target of conversations is given conversations"
    return content


def words(content: Content) -> str:
    """The text of an answer that is one plain message."""
    message, *more = turns(content)
    if more:
        raise Unheld("answers of several messages")
    return _bare(message).content


def _bare(message: Message) -> Message:
    if message.extra:
        raise Unheld(f"messages with {', '.join(message.extra)}")
    return message


def _apart(prompt: Content) -> tuple[str | None, Turns]:
    """(the system message, the turns after it)."""
    first, *rest = turns(prompt) or (Message("user", ""),)
    return (first.content, tuple(rest)) if first.role == "system" else (None, turns(prompt))


def _system(system: str | None) -> Row:
    return {} if system is None else {"system": system}


def _sharegpt(conversation: Turns) -> list[Row]:
    return [{"from": SHAREGPT[_bare(message).role], "value": message.content} for message in conversation]


def _alpaca(prompt: Content) -> Row:
    """The last question as instruction, the exchanges before it as history."""
    system, said = _apart(prompt)
    if [message.role for message in said] != ["user", "assistant"] * (len(said) // 2) + ["user"]:
        raise Unheld("prompts that are not questions and answers in turn")
    *past, last = (_bare(message).content for message in said)
    history = [[*exchange] for exchange in zip(past[::2], past[1::2], strict=True)]
    return {"instruction": last, "input": "", **({"history": history} if history else {}), **_system(system)}


# The formats


def _pair(piece: Piece) -> Row:
    chosen, rejected = piece.answers
    return {"prompt": plain(piece.prompt), "chosen": plain(chosen), "rejected": plain(rejected)}


def _openrlhf(piece: Piece) -> Row:
    for answer in piece.answers:
        words(answer)
    chosen, rejected = (plain(turns(piece.prompt) + turns(answer)) for answer in piece.answers)
    return {"chosen": chosen, "rejected": rejected}


def is_hh(prompt: Content) -> bool:
    """Whether the prompt is the text of an HH dialogue."""
    return isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT)


def _hh(piece: Piece) -> Row:
    assert isinstance(piece.prompt, str)
    if not is_hh(piece.prompt):
        raise Unheld("prompts that are no HH dialogues")
    chosen, rejected = (f"{piece.prompt}{answer}" for answer in piece.answers)
    return {"chosen": chosen, "rejected": rejected}


def _ultrafeedback(piece: Piece) -> Row:
    """Of the scores only the difference is known: that of the rejected answer is written as 0."""
    system, said = _apart(piece.prompt)
    if not said or said[0].role != "user":
        raise Unheld("prompts that do not begin with a user's turn")
    chosen, rejected = (plain(said + turns(answer)) for answer in piece.answers)
    strength = piece.mark.by.strength if piece.mark.by else None
    row: Row = {"prompt": said[0].content, "prompt_id": digest(piece.prompt, piece.tools), **_system(system)}
    row |= {"chosen": chosen, "rejected": rejected, "messages": chosen}
    return row | {"score_chosen": strength, "score_rejected": None if strength is None else 0.0}


def _llamafactory_pair(piece: Piece) -> Row:
    system, said = _apart(piece.prompt)
    chosen, rejected = ({"from": "gpt", "value": words(answer)} for answer in piece.answers)
    return {"conversations": _sharegpt(said), "chosen": chosen, "rejected": rejected, **_system(system)}


def _alpaca_pair(piece: Piece) -> Row:
    chosen, rejected = map(words, piece.answers)
    return {**_alpaca(piece.prompt), "chosen": chosen, "rejected": rejected}


def _swift_pair(piece: Piece) -> Row:
    chosen, rejected = map(turns, piece.answers)
    row: Row = {"messages": plain(turns(piece.prompt) + chosen)}
    if len(rejected) == 1 and not rejected[0].extra:
        return row | {"rejected_response": rejected[0].content}
    return row | {"rejected_messages": plain(turns(piece.prompt) + rejected)}


def _one(piece: Piece) -> Row:
    return {"prompt": plain(piece.prompt), "completion": plain(piece.answers[0])}


def _messages(piece: Piece) -> Row:
    return {"messages": plain(turns(piece.prompt) + turns(piece.answers[0]))}


def _conversations(piece: Piece) -> Row:
    system, said = _apart(piece.prompt)
    return {"conversations": _sharegpt(said + turns(piece.answers[0])), **_system(system)}


def _labelled(row: Callable[[Piece], Row], column: str) -> Callable[[Piece], Row]:
    def written(piece: Piece) -> Row:
        assert isinstance(piece.mark, Rating)
        return row(piece) | {column: piece.mark.desirable}

    return written


def _ranking(piece: Piece) -> Row:
    mark, soft = piece.mark, dict[str, float]()
    if isinstance(mark, Comparison):
        tiers = ((0, 1),) if mark.preference == 0.5 else ((0,), (1,)) if mark.preference > 0.5 else ((1,), (0,))
        soft = {} if mark.preference in (0.0, 0.5, 1.0) else {"preference": mark.preference}
    else:
        assert isinstance(mark, Ranking)
        tiers = mark.tiers
    answers = [plain(answer) for answer in piece.answers]
    return {"prompt": plain(piece.prompt), "responses": answers, "ranking": [[*tier] for tier in tiers], **soft}


_SHAREGPT_COLUMNS = {"messages": "conversations", "system": "system", "tools": "tools"}
_ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "system": "system", "history": "history", "tools": "tools"}
_PAIR_COLUMNS = {"chosen": "chosen", "rejected": "rejected"}

_TABLE = (
    Target("pairs", "TRL pairs, text or messages as they are", "comparisons", "pairs", _pair),
    Target("pairs_messages", "TRL pairs of messages", "comparisons", "pairs", _pair, "conversation"),
    Target("openrlhf", "OpenRLHF pairs: whole conversations", "comparisons", "pairs_implicit", _openrlhf, "conversation"),
    Target("hh", "HH dialogues", "comparisons", "hh", _hh, "text"),
    Target("ultrafeedback_binarized", "binarised UltraFeedback", "comparisons", "ultrafeedback_binarized", _ultrafeedback,
           "conversation"),
    Target("llamafactory_pairs", "LLaMA-Factory pairs (sharegpt)", "comparisons", "llamafactory_pairs", _llamafactory_pair,
           "conversation", {"formatting": "sharegpt", "ranking": True, "columns": _SHAREGPT_COLUMNS | _PAIR_COLUMNS}),
    Target("alpaca_pairs", "LLaMA-Factory pairs (alpaca)", "comparisons", "alpaca_pairs", _alpaca_pair, "conversation",
           {"ranking": True, "columns": _ALPACA_COLUMNS | _PAIR_COLUMNS}),
    Target("swift_pairs", "ms-swift pairs", "comparisons", "swift_pairs", _swift_pair, "conversation"),
    Target("ranking", "rankings and comparisons, ties too", "judgements", "ranking", _ranking),
    Target("ratings", "TRL unpaired preferences", "ratings", "ratings", _labelled(_one, "label")),
    Target("llamafactory_ratings", "LLaMA-Factory KTO rows (sharegpt)", "ratings", "conversation_ratings",
           _labelled(_conversations, "kto_tag"), "conversation",
           {"formatting": "sharegpt", "columns": _SHAREGPT_COLUMNS | {"kto_tag": "kto_tag"}}),
    Target("swift_ratings", "ms-swift KTO rows", "ratings", "conversation_ratings", _labelled(_messages, "label"),
           "conversation"),
    Target("demonstrations", "TRL prompt and completion", "demonstrations", "demonstrations", _one),
    Target("conversations", "messages, as TRL and ms-swift train on them", "demonstrations", "conversations", _messages,
           "conversation"),
    Target("alpaca", "LLaMA-Factory demonstrations (alpaca)", "demonstrations", "alpaca",
           lambda piece: _alpaca(piece.prompt) | {"output": words(piece.answers[0])}, "conversation",
           {"columns": _ALPACA_COLUMNS | {"response": "output"}}),
    Target("sharegpt", "LLaMA-Factory demonstrations (sharegpt)", "demonstrations", "conversations", _conversations,
           "conversation", {"formatting": "sharegpt", "columns": _SHAREGPT_COLUMNS}),
)  # fmt: skip
TARGETS = {target.name: target for target in _TABLE}


def listing() -> str:
    """All formats, written and read, a line each."""
    width = max(map(len, (*FORMATS, *TARGETS)))
    written = [f"  {target.name:<{width}}  {target.title}" for target in TARGETS.values()]
    read = [f"  {f.name:<{width}}  {f.title}: {f.columns or 'fields and questions of any name'}" for f in FORMATS.values()]
    return "\n".join(["\b\nWritten, to=", *written, "", "\b\nRead, data.format= (mostly seen from the columns)", *read])


def conversation(piece: Piece) -> Piece:
    """Plain text as one question and its answers."""
    prompt, answers = as_turns(piece.prompt, "user"), tuple(as_turns(answer, "assistant") for answer in piece.answers)
    if not prompt:
        raise Unheld("answers without a prompt")
    return replace(piece, prompt=prompt, answers=answers)


def hh_text(piece: Piece) -> Piece:
    """A conversation as an HH dialogue: what reads it back as messages has to find the same ones."""
    heads = {"user": HUMAN, "assistant": ASSISTANT}
    said: list[str] = []
    for message in turns(piece.prompt):
        if message.role not in heads:
            raise Unheld(f"{message.role} turns")
        said.append(f"{heads[message.role]} {_bare(message).content}")
    text = replace(piece, prompt="".join(said) + ASSISTANT, answers=tuple(f" {words(answer)}" for answer in piece.answers))
    try:
        back = understand(FORMATS["hh_messages"], _hh(text))
    except RowFault:
        back = None
    if back is None or (back.prompt, tuple(said for said, _ in back.answers)) != (piece.prompt, piece.answers):
        raise Unheld("turns that an HH dialogue would cut elsewhere")
    return text
