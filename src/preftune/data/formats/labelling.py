"""What labelling tools give back: several people's judgements of the answers in a row, and votes in a file of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from preftune.data.dialogue import content, is_list, is_object
from preftune.data.faults import RowFault
from preftune.data.formats.battles import CHOICES, TIE, chosen, why
from preftune.data.formats.columns import Row, as_number, as_text, asked, by_of, objects, value, weight_of, with_input
from preftune.data.formats.example import Answer, Example, Format, Vote, judged, several
from preftune.records import By, Comparison, Content, Message

PROMPTS = ("prompt", "instruction", "question", "query", "input")
TEXTS = ("response_a", "response_b")


class Response(NamedTuple):
    """What one annotator answered to one question of a labelling tool."""

    question: str
    value: Any
    by: By


def siblings(fields: Row) -> list[str]:
    """The fields that hold the answers: the most whose names differ only in a number or a letter at the end."""
    alike: dict[str, list[str]] = {}
    for name, held in fields.items():
        stem = re.fullmatch(r"(.+?)[\W_]*(\d+|[a-zA-Z])", name)
        if stem and (isinstance(held, str) or is_list(held)) and (name[-1].isdigit() or not name[-2].isalnum()):
            alike.setdefault(stem[1].lower(), []).append(name)
    return max(alike.values(), key=len, default=[])


def _prompt(fields: Row) -> Content:
    name = next((name for name in PROMPTS if fields.get(name)), None)
    if name is None:
        what = f"no field holds the prompt: name it with columns= ({', '.join(PROMPTS)} are known)"
        raise RowFault("missing_column", what, PROMPTS[0])
    question = asked(fields, name)
    if isinstance(fields[name], str) and name != "input":
        return (Message("user", with_input(fields, question[0].content, "context")),)
    return question


def _judgements(row: Row, fields: Row, names: Sequence[str], responses: Sequence[Response]) -> Example:
    """The answers in these fields, and the responses to the first question that names them."""
    if len(names) < 2:
        what = "no two fields hold answers, such as response_1 and response_2: name them with columns="
        raise RowFault("missing_column", what)
    answers: list[Answer] = [(content(value(fields, name), name), name) for name in names]
    votes: list[Vote] = []
    question = ""
    for response in responses:
        found = _votes(response, names) if question in ("", response.question) else []
        question = response.question if found else question
        votes += found
    if not votes:
        raise RowFault("no_judgement", f"nobody has said which of {' and '.join(names)} is better")
    return several(row, _prompt(fields), answers, votes)


def _votes(response: Response, names: Sequence[str]) -> list[Vote]:
    """Empty where the value speaks of something else than these answers."""
    places = _places(names)
    held = response.value
    if is_object(held) and is_list(held.get("rank")) and is_list(held.get("value")):
        held = [{"rank": r, "value": v} for r, v in zip(held["rank"], held["value"], strict=False)]
    if is_list(held):  # a ranking: objects with ranks, or names, best first
        named = [(n.get("value"), n.get("rank")) if is_object(n) else (n, place) for place, n in enumerate(held)]
        if len(named) < 2 or not all(_plain(name) in places for name, _ in named):
            return []
        return [Vote({places[_plain(name)]: -as_number(rank, response.question) for name, rank in named}, response.by)]
    word = _plain(held) if isinstance(held, str) else ""  # a number is a rating, not the answer with that number
    if word in places:
        others = [n for n in range(len(names)) if n != places[word]]
        return [Vote({places[word]: 1.0, other: 0.0}, response.by, 1 / len(others)) for other in others]
    if len(names) == 2 and CHOICES.get(str(held).strip().lower()) == TIE:
        return [Vote({0: 0.0, 1: 0.0}, response.by)]
    return []


def _places(names: Sequence[str]) -> dict[str, int]:
    """`response_2`, `response 2`, `Response-2` and `2` all stand for the same."""
    ends = {end[0].lower(): n for n, name in enumerate(names) if (end := re.search(r"(\d+|[a-zA-Z])$", name))}
    return ends | {_plain(name): n for n, name in enumerate(names)}


def _plain(name: object) -> str:
    return re.sub(r"[\W_]+", "", str(name)).lower()


# Argilla, whose fields and questions everybody names as they like


def _argilla_1(row: Row) -> Example:
    """Columns of {user_id, value, status}, one for each question; its suggestion counts where nobody answered."""
    questions = [name for name in row if _is_answered(row, name)]
    found = [
        Response(q, held.get("value"), By(as_text(held.get("user_id")), kind="person"))
        for q in questions
        for held in objects(row, q)
        if held.get("status") in (None, "submitted")
    ]
    found += [Response(q, row.get(f"{q}-suggestion"), By(kind="model")) for q in questions if not found]
    return _judgements(row, row, siblings({n: row[n] for n in row if n not in questions}), found)


def _is_answered(row: Row, name: str) -> bool:
    held: Any = row[name]
    if is_object(held):
        return "user_id" in held and "value" in held
    return is_list(held) and bool(held) and all(is_object(item) and "value" in item and "status" in item for item in held)


def _argilla_2(row: Row) -> Example:
    """Columns `QUESTION.responses` with `.responses.users` and `.responses.status` beside it."""
    found: list[Response] = []
    for name in (n for n in row if n.endswith(".responses")):
        values, users, states = (row.get(name + end) or [] for end in ("", ".users", ".status"))
        for n, held in enumerate(values):
            if n >= len(states) or states[n] in (None, "submitted"):
                who = as_text(users[n]) if n < len(users) else ""
                found.append(Response(name.removesuffix(".responses"), held, By(who, kind="person")))
    if not found:
        suggested = [name for name in row if name.endswith(".suggestion") and row[name] is not None]
        found = [Response(n, row[n], By(as_text(row.get(f"{n}.agent")), kind="model")) for n in suggested]
    return _judgements(row, row, siblings(row), found)


def _argilla_json(row: Row) -> Example:
    fields, responses = value(row, "fields"), value(row, "responses")
    if not is_object(fields) or not is_object(responses):
        raise RowFault("wrong_type", "an object is expected", "responses" if is_object(fields) else "fields")
    found = [
        Response(question, held.get("value"), By(as_text(held.get("user_id")), kind="person"))
        for question in responses
        for held in objects(responses, question)
        if held.get("status") in (None, "submitted")
    ]
    return _judgements(row, fields, siblings(fields), found)


# Label Studio


def _label_studio(row: Row) -> Example:
    data, done = value(row, "data"), objects(row, "annotations")
    if not is_object(data):
        raise RowFault("wrong_type", "an object is expected", "data")
    names, found = siblings(data), list[Response]()
    for annotation in done:
        for result in annotation.get("result") or []:
            if annotation.get("was_cancelled") or not is_object(result) or result.get("type") != "pairwise":
                continue
            pair = str(result.get("to_name")).split(",")
            names = pair if len(pair) == 2 and all(name in data for name in pair) else names
            side = (result.get("value") or {}).get("selected")
            who = annotation.get("completed_by")
            who = who.get("email", who.get("id")) if is_object(who) else who
            by = By(as_text(who), kind="person", time=as_text(annotation.get("created_at")), side="a")
            place = {"left": 0, "right": 1}.get(str(side))
            if place is not None and len(names) == 2:
                found.append(Response(str(result.get("from_name")), names[place], by))
    return _judgements(row, data, names, found)


# Votes


def _plain_vote(row: Row) -> Example:
    """One person's choice. Without texts of its own it is about the two answers of the row with the same id, read before."""
    found = value(row, "choice")
    by = by_of(row) or By()
    verdict = chosen(found, "choice"), by if by.reason else replace(by, reason=why(found))
    if any(row.get(column) is not None for column in TEXTS):
        prompt = content(row["prompt"], "prompt") if row.get("prompt") is not None else ""
        return judged(row, prompt, TEXTS, [verdict])
    return Example(None, [], [Comparison(0, 1, verdict[0], weight_of(row), verdict[1])], id=as_text(value(row, "item")))


def _is_argilla_1(row: Row) -> bool:
    return any(_is_answered(row, name) for name in row)


def _is_argilla_2(row: Row) -> bool:
    return any(name.endswith(".responses") and f"{name}.users" in row for name in row)


LABELLING = (
    Format("argilla", "Argilla records", "comparisons", (), _argilla_2, where=_is_argilla_2,
           over=("pairs", "pairs_implicit", "question_pairs", "alpaca_pairs")),
    Format("argilla_json", "Argilla records as JSON", "comparisons", ("fields", "responses"), _argilla_json,
           where=lambda row: is_object(row.get("fields")) and is_object(row.get("responses"))),
    Format("argilla_v1", "Argilla 1 feedback", "comparisons", (), _argilla_1, where=_is_argilla_1,
           over=("pairs", "pairs_implicit", "question_pairs", "alpaca_pairs")),
    Format("label_studio", "Label Studio pairwise", "comparisons", ("data", "annotations"), _label_studio,
           where=lambda row: is_object(row.get("data")) and is_list(row.get("annotations"))),
    Format("votes", "votes", "comparisons", ("item", "annotator", "choice"), _plain_vote),
)  # fmt: skip
