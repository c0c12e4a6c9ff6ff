"""What a row becomes: an Example, one prompt with its answers and what was said of them; and the parts that formats are put
together from: two answers compared, one answer alone, several answers in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from preftune.data.dialogue import Turns, as_turns, content, is_blank, joined, split_answer, split_last, split_pair, turns
from preftune.data.faults import RowFault
from preftune.data.formats.columns import Row, by_of, number, system_of, tools_of, under, value, weight_of
from preftune.records import By, Comparison, Content, Demonstration, Mark, Ranking

Kind = Literal["comparisons", "ratings", "demonstrations", "prompts"]
KINDS: tuple[Kind, ...] = ("comparisons", "ratings", "demonstrations", "prompts")  # of two that fit a row, the first
Answer = tuple[Content, str]  # with the column that it stands in; one of a list has its place behind it: `answers 2`
Verdict = tuple[float, By | None]  # the probability that the first of two answers is better, and whose judgement that is


@dataclass(frozen=True, slots=True)
class Score:
    """A number for one answer, higher is better. The scores of a prompt's answers, a row each, become their ranking."""

    response: int
    value: float
    weight: float = 1.0
    by: By | None = None


@dataclass(frozen=True, slots=True)
class Vote:
    """One judgement of several answers: a number for each that it speaks of, higher is better. `share` of a row's weight."""

    scores: Mapping[int, float]
    by: By | None = None
    share: float = 1.0


@dataclass(slots=True)
class Example:
    """One row, understood. The indices of its marks point into `answers`.

    Without a prompt of its own (None) it judges the answers of the row with the same `id`, which was read before. `notes` say
    what of the row was left out.
    """

    prompt: Content | None
    answers: list[Answer]
    marks: Sequence[Mark | Score] = ()
    tools: tuple[object, ...] = ()
    id: str = ""
    notes: Sequence[RowFault] = ()


@dataclass(frozen=True)
class Format:
    """One kind of row: the columns that name it, and how a row becomes an Example.

    `needs` names the columns; a tuple in it is a choice. `where` looks at the values. `over` names formats that this one wins
    against where both fit a row. Without `automatic` it is only used when it is named.
    """

    name: str
    title: str
    kind: Kind
    needs: tuple[str | tuple[str, ...], ...]
    read: Callable[[Row], Example]
    where: Callable[[Row], bool] | None = None
    over: tuple[str, ...] = ()
    automatic: bool = True

    @property
    def columns(self) -> str:
        """`prompt + completion|response`"""
        return " + ".join(need if isinstance(need, str) else "|".join(need) for need in self.needs)

    def used(self, present: Collection[str]) -> frozenset[str]:
        """Those of its columns that are there."""
        each = ((need,) if isinstance(need, str) else need for need in self.needs)
        return frozenset(name for names in each for name in names if name in present)

    def fits(self, row: Row, present: Collection[str]) -> bool:
        has = all(need in present if isinstance(need, str) else any(n in present for n in need) for need in self.needs)
        return has and self.automatic and (self.where is None or self.where(row))

    def beats(self, other: Format, present: Collection[str]) -> bool:
        """Whether a row that fits both is this: by its kind, by name, by more columns, or by a look at the values."""
        if self.kind != other.kind:
            return KINDS.index(self.kind) < KINDS.index(other.kind)
        if other.name in self.over or self.name in other.over:
            return other.name in self.over
        mine, theirs = self.used(present), other.used(present)
        return mine > theirs or (mine == theirs and self.where is not None and other.where is None)


# Two answers


def compared(row: Row, prompt: Content, columns: tuple[str, str] = ("chosen", "rejected")) -> Example:
    """A pair, the better answer first, under a prompt of its own (or, being (), one that both answers repeat)."""
    return judged(row, prompt, columns, [(number(row, "preference", 1.0), by_of(row))])


def judged(row: Row, prompt: Content, columns: tuple[str, str], verdicts: Sequence[Verdict]) -> Example:
    """Two answers in columns of their own, and what one or several people say of them."""
    first, second = (content(value(row, column), column) for column in columns)
    return two(row, prompt, ((first, columns[0]), (second, columns[1])), verdicts)


def two(row: Row, prompt: Content, answers: tuple[Answer, Answer], verdicts: Sequence[Verdict]) -> Example:
    (first, left), (second, right) = answers
    tools, system = tools_of(row), system_of(row)
    plain = isinstance(prompt, str) and isinstance(first, str) and isinstance(second, str)
    if not plain or tools or system:  # a system prompt and tools need a conversation
        one, other = as_turns(first, "assistant"), as_turns(second, "assistant")
        refuse_blank(one, left)
        refuse_blank(other, right)
        prompt, first, second = split_pair(as_turns(prompt, "user"), (one, other), (left, right))
        prompt = under(system, prompt)
    return between(row, prompt, ((first, left), (second, right)), verdicts, tools)


def between(
    row: Row, prompt: Content, answers: tuple[Answer, Answer], verdicts: Sequence[Verdict], tools: tuple[object, ...] = ()
) -> Example:
    """The same, where prompt and answers are cut apart already."""
    (first, left), (second, right) = answers
    refuse_blank(first, left)
    refuse_blank(second, right)
    if first == second:
        raise RowFault("identical_answers", f"is the same as {left}: remove the row", right)
    if not verdicts:
        raise RowFault("no_judgement", "nobody has judged the answers: remove the row")
    weight = weight_of(row)
    marks = [Comparison(0, 1, preference, weight, by) for preference, by in verdicts]
    return Example(prompt, [*answers], marks, tools)


# One answer


def answered(row: Row, prompt: Content, column: str) -> Example:
    """One answer to a prompt: a demonstration, as long as nothing more is said of it."""
    answer = content(value(row, column), column)
    tools, system = tools_of(row), system_of(row)
    if not (isinstance(prompt, str) and isinstance(answer, str)) or tools or system:
        reply = as_turns(answer, "assistant")
        refuse_blank(reply, column)
        prompt, answer = split_answer(as_turns(prompt, "user"), reply, column)
        prompt = under(system, prompt)
    return single(row, prompt, answer, column, tools)


def conversed(row: Row, column: str) -> Example:
    """A whole conversation: its last answer is the response."""
    prompt, answer = split_last(turns(value(row, column), column), column)
    return single(row, under(system_of(row), prompt), answer, column, tools_of(row))


def single(row: Row, prompt: Content, answer: Content, column: str, tools: tuple[object, ...] = ()) -> Example:
    refuse_blank(answer, column)
    return Example(prompt, [(answer, column)], [Demonstration(0, weight_of(row), by_of(row))], tools)


# Several answers


def ranked(row: Row, prompt: Content, answers: Sequence[Answer], scores: Sequence[float], by: By | None = None) -> Example:
    """Several answers with a number each, higher is better."""
    return several(row, prompt, answers, [Vote(dict(enumerate(scores)), by)])


def several(row: Row, prompt: Content, answers: Sequence[Answer], votes: Sequence[Vote]) -> Example:
    """Several answers, and judgements of them. Blank answers are left out; of equal ones the mean of their numbers counts."""
    prompt, answers, tools = beneath(row, prompt, answers)
    kept, place, notes = _distinct(answers)
    weight = weight_of(row)
    marks: list[Mark] = []
    for vote in votes:
        scores: dict[int, list[float]] = {}
        for n, score in vote.scores.items():
            if n in place:
                scores.setdefault(place[n], []).append(score)
        if len(scores) > 1:
            marks.append(ordered([(n, fmean(held)) for n, held in sorted(scores.items())], weight * vote.share, vote.by))
    if not marks:
        code, column = (notes[0].code, notes[0].column) if notes else ("no_judgement", None)
        raise RowFault(code, "leaves nothing to compare: no judgement of two different answers", column)
    return Example(prompt, kept, marks, tools, notes=notes)


def beneath(row: Row, prompt: Content, answers: Sequence[Answer]) -> tuple[Content, Sequence[Answer], tuple[object, ...]]:
    """(prompt, answers, tools): plain text, or all of it one conversation as soon as a part of it is."""
    tools, system = tools_of(row), system_of(row)
    if isinstance(prompt, str) and all(isinstance(said, str) for said, _ in answers) and not tools and not system:
        return prompt, answers, ()
    base = as_turns(prompt, "user")
    replies = [(_reply(base, as_turns(said, "assistant"), column), column) for said, column in answers]
    return under(system, base), replies, tools


def ordered(scores: Sequence[tuple[int, float]], weight: float = 1.0, by: By | None = None) -> Comparison | Ranking:
    """The judgement that numbers amount to: (index of an answer, number; higher is better), of two answers or more."""
    if len(scores) == 2:
        (a, first), (b, second) = scores
        return Comparison(a, b, 1.0 if first > second else 0.0 if first < second else 0.5, weight, by)
    levels = sorted({score for _, score in scores}, reverse=True)
    return Ranking(tuple(tuple(n for n, score in scores if score == level) for level in levels), weight, by)


def _reply(prompt: Turns, answer: Turns, column: str) -> Content:
    """An answer without the prompt that it may repeat; a blank one as it is."""
    if not answer:
        return ""
    rest = joined(prompt, answer, column)[len(prompt) :]
    if not rest or rest[0].role != "assistant" or any(message.role == "user" for message in rest):
        raise RowFault("prompts_differ", "is not one answer to the prompt: remove the row", column)
    return rest


def _distinct(answers: Sequence[Answer]) -> tuple[list[Answer], dict[int, int], list[RowFault]]:
    """(different answers, the place of each answer among them, what was left out)."""
    kept: list[Answer] = []
    place: dict[int, int] = {}
    known: dict[str, int] = {}
    notes: list[RowFault] = []
    for n, (said, column) in enumerate(answers):
        if is_blank(said):
            notes.append(RowFault("empty_answer", "the answer is blank: the row is read without it", column))
            continue
        place[n] = known.setdefault(said if isinstance(said, str) else repr(said), len(kept))
        if place[n] < len(kept):
            what = f"is the same as {kept[place[n]][1]}: taken once, with the mean of their scores or ranks"
            notes.append(RowFault("identical_answers", what, column))
        else:
            kept.append((said, column))
    return kept, place, notes


def refuse_blank(answer: Content, column: str) -> None:
    if is_blank(answer):
        raise RowFault("empty_answer", "the answer is blank: remove the row or fill it in", column)
