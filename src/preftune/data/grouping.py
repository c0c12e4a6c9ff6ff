"""Examples become Groups: rows with one prompt are one group, equal answers one response."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from preftune.data.faults import RowFault
from preftune.data.formats import Example, Score
from preftune.data.formats.example import ordered
from preftune.records import By, Comparison, Content, Group, Mark, Origin, Response


def content_key(content: Content) -> Hashable:
    """Equal for equal contents, and cheaper than a digest."""
    if isinstance(content, str):
        return content
    return tuple((m.role, m.content, _json(m.extra) if m.extra else "") for m in content)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@dataclass(slots=True)
class _Draft:
    prompt: Content
    tools: tuple[Any, ...]
    user_id: str
    indices: dict[Hashable, int] = field(default_factory=dict[Hashable, int])
    answers: list[tuple[Content, bool, list[Origin]]] = field(default_factory=list[tuple[Content, bool, list[Origin]]])
    marks: list[Mark] = field(default_factory=list[Mark])
    scores: list[tuple[Score, Origin]] = field(default_factory=list[tuple[Score, Origin]])

    def place(self, content: Content, finished: bool, origins: Sequence[Origin]) -> int:
        """Index of this answer in the group; a new one goes to the end. The same words, cut off there, are another answer."""
        key = content_key(content) if finished else (content_key(content), False)
        index = self.indices.setdefault(key, len(self.answers))
        if index == len(self.answers):
            self.answers.append((content, finished, [*origins]))
        else:
            self.answers[index][2].extend(origins)
        return index

    def group(self) -> Group:
        responses = tuple([Response(content, tuple(origins), finished) for content, finished, origins in self.answers])
        return Group(self.prompt, responses, tuple(self.marks), self.tools, self.user_id)


class Grouping:
    """Collects examples into groups, in order of first appearance."""

    def __init__(self) -> None:
        self._drafts: dict[Hashable, _Draft] = {}
        self._ids: dict[str, Hashable] = {}
        self._scored: dict[Hashable, None] = {}  # in order

    def add(self, example: Example, *, file: str, row: int, columns: Mapping[str, str]) -> None:
        """`columns`: our names to the file's own, which the origins name."""
        if example.prompt is None:
            self._add_vote(example, Origin(file, row, columns.get("choice", "choice")))
            return
        key = self._key(example.prompt, example.tools, example.id)
        draft = self._drafts[key]
        where: list[int] = []
        origin: Origin | None = None
        for content, column in example.answers:
            place = Origin(file, row, own_column(column, columns))
            where.append(draft.place(content, True, (place,)))
            origin = origin or place
        for mark in example.marks:
            if isinstance(mark, Score):
                assert origin is not None  # a score has its answer
                draft.scores.append((replace(mark, response=where[mark.response]), origin))
                self._scored[key] = None
            else:
                draft.marks.append(_placed(mark, where, origin))

    def add_group(self, group: Group) -> None:
        """A group that was read before joins the rows that share its prompt."""
        draft = self._drafts[self._key(group.prompt, group.tools, group.user_id)]
        where = [draft.place(r.content, r.finished, r.origins) for r in group.responses]
        draft.marks.extend(_placed(mark, where, mark.origin) for mark in group.marks)

    def _add_vote(self, vote: Example, origin: Origin) -> None:
        """A judgement of the two answers of an item that was read before."""
        draft = self._drafts.get(self._ids.get(vote.id))
        if draft is None or len(draft.answers) != 2:
            found = "no answers were read for it" if draft is None else f"it has {len(draft.answers)} answers instead of two"
            what = f"item {vote.id}: {found}: add columns response_a and response_b, or read the pairs first, with their id"
            raise RowFault("unknown_item", what, "item")
        draft.marks.extend(replace(mark, origin=origin) for mark in vote.marks if isinstance(mark, Comparison))

    def rank_scores(self) -> Iterator[tuple[Origin, RowFault] | int]:
        """The scores that were added since the last time become rankings, one of each judge: yields how many answers each
        ranks, and every score that stands alone."""
        for key in self._scored:
            draft, alone = self._drafts[key], 0
            judges: dict[str, list[tuple[Score, Origin]]] = {}
            for score, origin in draft.scores:
                judges.setdefault(score.by.who if score.by else "", []).append((score, origin))
            for scores in judges.values():
                if mark := _joined(scores):
                    draft.marks.append(mark)
                    yield len(mark.responses)
                    continue
                alone += 1
                what = "is the only answer of its prompt that has a score: nothing to compare it with"
                yield from ((origin, RowFault("no_judgement", what)) for _, origin in scores)
            draft.scores = []
            if alone and not draft.marks:
                del self._drafts[key]
        self._scored.clear()

    def _key(self, prompt: Content, tools: tuple[Any, ...], user_id: str) -> Hashable:
        """Where the draft of this prompt stands; a new one is begun."""
        key = content_key(prompt)
        if tools or user_id:
            key = (key, _json(tools), user_id)
        if key not in self._drafts:
            if user_id and self._ids.setdefault(user_id, key) != key:
                raise RowFault("bad_value", f"id {user_id} already stands for another prompt: give each its own", "id")
            self._drafts[key] = _Draft(prompt, tools, user_id)
        return key

    def groups(self) -> list[Group]:
        return [draft.group() for draft in self._drafts.values()]


def own_column(column: str, columns: Mapping[str, str]) -> str:
    """The file's name for one of ours; of a list, with the place of the answer in it: `responses 2`."""
    if not columns or column in columns:
        return columns.get(column, column)
    name, _, place = column.rpartition(" ")
    return f"{columns[name]} {place}" if name in columns and place.isdigit() else column


def _placed(mark: Mark, where: Sequence[int], origin: Origin | None) -> Mark:
    """The mark with its indices looked up in `where`."""
    if isinstance(mark, Comparison):  # by far the most, and `replace` takes its time
        return Comparison(where[mark.a], where[mark.b], mark.preference, mark.weight, mark.by, origin)
    return replace(mark.moved(where.__getitem__), origin=origin)


def _joined(scores: Sequence[tuple[Score, Origin]]) -> Mark | None:
    """One judge's scores as one judgement, at the place of the first; None where they are of a single answer."""
    values: dict[int, list[float]] = {}
    for score, _ in scores:
        values.setdefault(score.response, []).append(score.value)
    if len(values) < 2:
        return None
    first, origin = scores[0]
    means = [(index, fmean(held)) for index, held in values.items()]
    by = first.by
    if len(means) == 2:  # of more answers the differences have no place in a ranking
        by = replace(by or By(), strength=abs(means[0][1] - means[1][1]))
    return replace(ordered(means, fmean(score.weight for score, _ in scores), by), origin=origin)
