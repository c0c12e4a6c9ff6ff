"""Several answers to a prompt, by scores, by ranks or by name: a row becomes one ranking, or with two answers a comparison."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from preftune.data.dialogue import Turns, content, is_list, is_object, text
from preftune.data.faults import RowFault
from preftune.data.formats.columns import (
    ANSWERS,
    Row,
    as_number,
    as_text,
    asked,
    by_of,
    holds_objects,
    holds_texts,
    measured,
    number,
    objects,
    one_of,
    short,
    unpacked,
    value,
    weight_of,
)
from preftune.data.formats.example import Answer, Example, Format, Score, answered, beneath, ranked, refuse_blank
from preftune.data.formats.pairs import dialogue
from preftune.records import By, Comparison, Content, Message

PROMPTS = ("instruction", "prompt")
JUDGEMENTS = ("ranking", "scores", "ranks")
SCORES = ("score", "rating", "reward")
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
MODEL = By(kind="model")


def listed(row: Row, column: str) -> list[Answer]:
    """A list of answers; each is named by its place: `responses 2`."""
    found = unpacked(value(row, column), column)
    if not is_list(found):
        raise RowFault("wrong_type", f"a list of answers is expected, this is {short(found)}", column)
    return [(content(said, column), f"{column} {n}") for n, said in enumerate(found, start=1)]


def numbers(row: Row, column: str, answers: Sequence[Answer]) -> list[float]:
    found = unpacked(value(row, column), column)
    if not is_list(found) or len(found) != len(answers):
        raise RowFault("wrong_type", f"a list with a number for each of the {len(answers)} answers is expected", column)
    return [as_number(item, column) for item in found]


def entries(row: Row, column: str, said: str) -> list[tuple[Answer, dict[str, Any]]]:
    """The answers of a list of objects, which hold them under this key, each with its object."""
    found: list[tuple[Answer, dict[str, Any]]] = []
    for n, entry in enumerate(objects(row, column), start=1):
        place = f"{column} {n}"
        if entry.get(said) is None:
            raise RowFault("missing_value", f"has no {said}", place)
        found.append(((content(entry[said], place), place), entry))
    return found


# The formats


def _ultrafeedback(row: Row, scores: tuple[str, ...]) -> Example:
    """Ranked by the first of these numbers that two answers have; an answer without it is left out."""
    held = entries(row, "completions", "response")
    for key in scores:
        rated = [(answer, score) for answer, entry in held if (score := _rating(entry, key)) is not None]
        if len(rated) > 1:
            break
    else:
        raise RowFault("no_judgement", "fewer than two answers with a rating: nothing to compare", "completions")
    answers = [answer for answer, _ in rated]
    example = ranked(row, asked(row, "instruction"), answers, [score for _, score in rated], MODEL)
    left_out = [place for (said, place), _ in held if (said, place) not in answers]
    why = "the answer has no rating: the row is read without it"
    example.notes = [*(RowFault("no_judgement", why, place) for place in left_out), *example.notes]
    return example


def _rating(entry: dict[str, Any], key: str) -> float | None:
    """A number of an UltraFeedback answer; `annotations`: the mean of its ratings, of which some are "N/A"."""
    if key != "annotations":
        return measured(entry.get(key))
    held: Any = entry.get(key)
    aspects = [aspect.get("Rating") for aspect in held.values() if is_object(aspect)] if is_object(held) else []
    ratings = [rating for aspect in aspects if (rating := measured(aspect)) is not None]
    return fmean(ratings) if ratings else None


def _dialogue(row: Row) -> Turns:
    return dialogue(text(value(row, "prompt"), "prompt").rstrip(" "), "prompt")


def _by_rank(row: Row, prompt: Content, column: str, said: str, by: By | None) -> Example:
    """Answers with a rank each, 0 or 1 for the best."""
    held = entries(row, column, said)
    ranks = [-as_number(entry.get("rank"), place) for (_, place), entry in held]
    return ranked(row, prompt, [answer for answer, _ in held], ranks, by)


def _right_and_wrong(row: Row) -> Example:
    right, wrong = listed(row, "chosen"), listed(row, "rejected")
    return ranked(row, asked(row, "prompt"), [*right, *wrong], [1.0] * len(right) + [0.0] * len(wrong))


def _ranking(row: Row) -> Example:
    """Our own form: `ranking` holds places in `responses`, from 0, best first; a list within it is a tie. Of two responses
    `preference` is the probability that the first is better."""
    prompt, answers = content(value(row, "prompt"), "prompt"), listed(row, "responses")
    column = one_of(row, JUDGEMENTS)
    if column == "ranking":
        place = {n: place for place, tier in enumerate(_tiers(row, len(answers))) for n in tier}
        scores = [-float(place[n]) for n in range(len(answers))]
    else:
        scores = numbers(row, column, answers)
        scores = [-rank for rank in scores] if column == "ranks" else scores
    example = ranked(row, prompt, answers, scores, by_of(row))
    mark = example.marks[0]
    if isinstance(mark, Comparison) and row.get("preference") not in (None, ""):
        example.marks = [replace(mark, preference=number(row, "preference", 1.0))]
    return _with_id(row, example)


def _tiers(row: Row, count: int) -> list[list[int]]:
    found = unpacked(value(row, "ranking"), "ranking")
    tiers: list[list[Any]] = [list(tier) if is_list(tier) else [tier] for tier in found] if is_list(found) else []
    if sorted(str(n) for tier in tiers for n in tier) != sorted(map(str, range(count))):
        what = f"each place from 0 to {count - 1} is expected once, best first, as in [1, [0, 2]]; this is {short(found)}"
        raise RowFault("bad_value", what, "ranking")
    return [[int(n) for n in tier] for tier in tiers]


def _responses(row: Row) -> Example:
    """The same form before anybody has judged it."""
    answers = listed(row, "responses")
    for answer in answers:
        refuse_blank(*answer)
    prompt, answers, tools = beneath(row, content(value(row, "prompt"), "prompt"), answers)
    return _with_id(row, Example(prompt, [*answers], tools=tools))


def _with_id(row: Row, example: Example) -> Example:
    example.id = as_text(row.get("id"))
    return example


def _distilabel(row: Row) -> Example:
    answers = listed(row, "generations")
    return ranked(row, asked(row, one_of(row, PROMPTS)), answers, numbers(row, "ratings", answers), MODEL)


def steered(prompt: str) -> Turns:
    """The turns of a HelpSteer prompt, which writes `<extra_id_1>Assistant` and `<extra_id_1>User` between them."""
    first, *rest = re.split(r"\n?<extra_id_1>(User|Assistant)\n?", prompt)
    roles = {"User": "user", "Assistant": "assistant"}
    found = [Message(roles[who], words) for who, words in zip(rest[::2], rest[1::2], strict=True)]
    if not first.strip():
        raise RowFault("missing_value", "the prompt is empty: fill it in or remove the row", "prompt")
    return (Message("user", first), *found)


def _scored(row: Row, prompt: Content, column: str, score: str) -> Example:
    """One answer with its score: the answers of its prompt stand in other rows."""
    example = answered(row, prompt, column)
    example.marks = [Score(0, as_number(value(row, score), score), weight_of(row), by_of(row))]
    return example


RANKED = (
    Format("ultrafeedback", "UltraFeedback", "comparisons", ("instruction", "completions"),
           lambda row: _ultrafeedback(row, ("fine-grained_score", "annotations", "overall_score")),
           where=lambda row: holds_objects(row, "completions", "response")),
    Format("ultrafeedback_overall", "UltraFeedback by its overall score", "comparisons", ("instruction", "completions"),
           lambda row: _ultrafeedback(row, ("overall_score",)), automatic=False),
    Format("nectar", "Nectar", "comparisons", ("prompt", "answers"),
           lambda row: _by_rank(row, _dialogue(row), "answers", "answer", MODEL),
           where=lambda row: holds_objects(row, "answers", "answer", "rank")),
    Format("nemo", "NeMo ranked completions", "comparisons", ("context", "completions"),
           lambda row: _by_rank(row, asked(row, "context"), "completions", "completion", by_of(row)),
           where=lambda row: holds_objects(row, "completions", "completion", "rank")),
    Format("distilabel", "distilabel generations with ratings", "comparisons", (PROMPTS, "generations", "ratings"),
           _distilabel, where=lambda row: row.get("chosen") is None),
    Format("rewardbench2", "RewardBench 2, right and wrong answers", "comparisons", ("prompt", "chosen", "rejected"),
           _right_and_wrong, where=lambda row: holds_texts(row, "chosen") and holds_texts(row, "rejected")),
    Format("helpsteer", "HelpSteer, ranked by helpfulness", "comparisons", ("prompt", "response", *ATTRIBUTES),
           lambda row: _scored(row, steered(text(value(row, "prompt"), "prompt")), "response", "helpfulness")),
    Format("halos_scores", "HALOs scalar feedback", "comparisons", ("prompt", "output", "reward", "type"),
           lambda row: _scored(row, content(value(row, "prompt"), "prompt"), "output", "reward"),
           where=lambda row: row.get("type") == "scalar_feedback"),
    Format("scores", "answers with a score each", "comparisons", ("prompt", ANSWERS, SCORES),
           lambda row: _scored(row, content(value(row, "prompt"), "prompt"), one_of(row, ANSWERS), one_of(row, SCORES)),
           automatic=False),
    Format("ranking", "rankings", "comparisons", ("prompt", "responses", JUDGEMENTS), _ranking),
    Format("responses", "answers that nobody has judged", "prompts", ("prompt", "responses"), _responses),
)  # fmt: skip
