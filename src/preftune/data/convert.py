"""Groups as rows of another format: one row for each judgement, and a count of whatever has no place there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preftune.data.targets import Piece, Target, Unheld, conversation, hh_text, is_hh
from preftune.records import By, Comparison, Content, Demonstration, Group, Mark, Pairs, Ranking, Rating

_NAMES = {Comparison: "comparisons", Ranking: "rankings", Rating: "ratings", Demonstration: "demonstrations"}


@dataclass
class Conversion:
    """Rows of a target, made while they are asked for. `lost`: what it has no place for, by reason; `changed`: what stands
    there as something else; `columns`: all that its rows have; `beyond`: rows with a column that is not the format's own."""

    target: Target
    pairs: Pairs = "all"
    written: int = 0
    lost: Counter[str] = field(default_factory=Counter[str])
    changed: Counter[str] = field(default_factory=Counter[str])
    columns: set[str] = field(default_factory=set[str])
    beyond: Counter[str] = field(default_factory=Counter[str])

    def rows(self, groups: Iterable[Group]) -> Iterator[dict[str, Any]]:
        """One row for each judgement, in the order in which they were read."""
        for group in groups:
            for piece in self._pieces(group):
                try:
                    formed = self._formed(piece)
                    row, beyond = self.target.written(formed)
                except Unheld as why:
                    self.lost[str(why)] += 1
                    continue
                if formed.is_text != piece.is_text:
                    self.changed[_form_change(piece)] += 1
                self.written += 1
                self.columns.update(row)
                self.beyond.update(beyond)
                yield row

    def entry(self, file: str) -> dict[str, Any] | None:
        """What LLaMA-Factory has to know of the file. It looks up every column that is named: only those that rows have."""
        if self.target.entry is None:
            return None
        columns = {theirs: own for theirs, own in self.target.entry["columns"].items() if own in self.columns}
        return {"file_name": file, **self.target.entry, "columns": columns}

    def summary(self) -> list[str]:
        """What a person has to know beside the number of rows."""
        said = [("not held", self.lost), ("changed", self.changed), ("columns that are not the format's own", self.beyond)]
        return [f"{what}: {', '.join(f'{name} {n:,}' for name, n in held.items())}" for what, held in said if held]

    def _formed(self, piece: Piece) -> Piece:
        """The piece as text or as a conversation, whichever the target takes."""
        if piece.is_text and self.target.form == "conversation":
            return conversation(piece)
        if not piece.is_text and self.target.form == "text":
            return hh_text(piece)
        return piece

    def _pieces(self, group: Group) -> Iterator[Piece]:
        """The group's judgements as the target's kind of them."""
        named = {index for mark in group.marks for index in mark.responses}
        if not group.responses:
            self.lost["prompts without answers"] += 1
        elif len(named) < len(group.responses):
            self.lost["answers that no judgement names"] += len(group.responses) - len(named)
        if any(not response.finished for response in group.responses):
            self.lost["groups with answers that were cut"] += 1
            return
        made = {
            "comparisons": self._compared,
            "judgements": self._judged,
            "ratings": self._rated,
            "demonstrations": self._shown,
        }
        marks = made[self.target.takes](group.marks)
        for mark in marks:
            if mark.by and mark.by.votes:
                self.lost["votes that a label was made of"] += len(mark.by.votes)
                mark = replace(mark, by=replace(mark.by, votes=()))
            answers = [group.responses[index].content for index in mark.responses]
            yield _piece(group, mark, answers)

    def _judged(self, marks: Sequence[Mark]) -> Iterator[Mark]:
        for mark in marks:
            if isinstance(mark, (Comparison, Ranking)):
                yield mark
            else:
                self.lost[_NAMES[type(mark)]] += 1

    def _compared(self, marks: Sequence[Mark]) -> Iterator[Mark]:
        """Comparisons with a better answer, which comes first."""
        for mark in self._judged(marks):
            assert isinstance(mark, (Comparison, Ranking))
            if isinstance(mark, Ranking):
                self.changed["rankings to comparisons"] += 1
            for pair in map(_better_first, mark.pairs(self.pairs)):
                if pair.preference == 0.5:  # of 0.49999999999999994 the other side's is 0.5, too
                    self.lost["ties"] += 1
                else:
                    yield pair

    def _rated(self, marks: Sequence[Mark]) -> Iterator[Mark]:
        """Ratings; of a comparison one of the better and one of the worse answer."""
        for mark in marks:
            if isinstance(mark, Rating):
                yield mark
            elif isinstance(mark, Comparison) and mark.preference != 0.5:
                chosen, rejected, preference = mark.ordered
                self.changed["comparisons to ratings" if preference == 1 else "uncertain comparisons to ratings"] += 1
                by = replace(mark.by, side="") if mark.by else None
                yield Rating(chosen, True, mark.weight, by)
                yield Rating(rejected, False, mark.weight, by)
            else:
                self.lost["ties" if isinstance(mark, Comparison) else _NAMES[type(mark)]] += 1

    def _shown(self, marks: Sequence[Mark]) -> Iterator[Mark]:
        """Answers to imitate: demonstrations, and each once the winners of comparisons and rankings, and what is desirable."""
        shown: set[int] = set()
        for mark in marks:
            if isinstance(mark, Demonstration):
                shown.add(mark.response)
                yield mark
                continue
            best = _best(mark)
            if not best:
                self.lost["undesirable answers" if isinstance(mark, Rating) else "ties"] += 1
            for index in best:
                if index in shown:
                    self.lost["judgements of an answer that is shown already"] += 1
                    continue
                shown.add(index)
                self.changed[f"{_NAMES[type(mark)]} to demonstrations"] += 1
                by = replace(mark.by, side="", strength=None) if mark.by else None
                yield Demonstration(index, mark.weight, by)


def _best(mark: Comparison | Ranking | Rating) -> Sequence[int]:
    """The answers that a judgement is for."""
    if isinstance(mark, Ranking):
        return mark.tiers[0]
    if isinstance(mark, Rating):
        return (mark.response,) if mark.desirable else ()
    return (mark.ordered[0],) if mark.preference != 0.5 else ()


def _form_change(piece: Piece) -> str:
    """Text became a conversation, or the other way round. Of a dialogue that was read as text, all turns are one question."""
    if not piece.is_text:
        return "conversations to text"
    if is_hh(piece.prompt):
        return "whole HH dialogues to one question each (data.format=hh_messages reads their turns)"
    return "text to conversations"


def _better_first(pair: Comparison) -> Comparison:
    """The same comparison with the likelier winner as `a`; ties as they stand."""
    if pair.preference >= 0.5:
        return pair
    other: dict[str, Any] = {"a": "b", "b": "a", "": ""}
    by = replace(pair.by, side=other[pair.by.side]) if pair.by else None
    return Comparison(pair.b, pair.a, 1 - pair.preference, pair.weight, by, pair.origin)


def _piece(group: Group, mark: Mark, answers: Sequence[Content]) -> Piece:
    """The judgement with its own answers alone, in the order in which it names them."""
    place = {index: n for n, index in enumerate(mark.responses)}
    by = None if mark.by == By() else mark.by
    return Piece(group.prompt, tuple(answers), replace(mark.moved(place.__getitem__), by=by), group.tools, group.user_id)
