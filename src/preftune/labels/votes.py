"""Votes as arrays: who said what of which pair, with indices for ids, so that a hundred thousand are a moment's work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import compress
from typing import Self

import numpy as np
from numpy.typing import NDArray

from preftune.errors import Refusal
from preftune.records import Vote

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CHOICES = ("a", "tie", "b")  # 0, 1, 2: in their order, so that 2 - choice is the same vote with the sides exchanged
A, TIE, B = range(3)
_SIDES = {"a": 1, "": 0, "b": -1}


@dataclass(frozen=True, slots=True)
class Votes:
    """V votes by W annotators on I items.

    records: [V] the votes as they were given.
    items, annotators: [I], [W] their ids, in order of first appearance; votes without a name share the annotator "".
    item, annotator: [V] indices of them.
    choice: [V] 0 a is better, 1 neither, 2 b is better.
    side: [V] 1 a stood first, -1 b did, 0 not known.
    weight: [V] how often the vote counts, greater than 0.
    answers: [I, 2] indices of the answers a and b; items that share an answer say something about each other.
    """

    records: tuple[Vote, ...]
    items: tuple[str, ...]
    annotators: tuple[str, ...]
    item: Ints
    annotator: Ints
    choice: Ints
    side: Ints
    weight: Floats
    answers: Ints

    @classmethod
    def of(cls, votes: Iterable[Vote], answers: Mapping[str, tuple[str, str]] | None = None) -> Self:
        """Votes from records.

        Args:
            votes: in any order; of their By, `who` and `side` are used here.
            answers: ids of the two answers of an item; an item that is not in it has two of its own.

        Raises:
            Refusal: a choice that is none of a, tie and b; a weight that is not greater than 0; an item with one answer twice.
        """
        records = tuple(votes)
        items, annotators, known = dict[str, int](), dict[str, int](), dict[str | tuple[str, str], int]()
        for vote in records:
            _check(vote)
            items.setdefault(vote.item, len(items))
            annotators.setdefault(vote.by.who, len(annotators))
        pairs: list[list[int]] = []
        for item in items:
            a, b = (answers or {}).get(item) or ((item, "a"), (item, "b"))
            if a == b:
                raise Refusal(f"item {item!r}: both its answers are {a!r}: give it two", code="bad_vote")
            pairs.append([known.setdefault(answer, len(known)) for answer in (a, b)])
        return cls(
            records,
            tuple(items),
            tuple(annotators),
            np.array([items[vote.item] for vote in records], dtype=np.int64),
            np.array([annotators[vote.by.who] for vote in records], dtype=np.int64),
            np.array([CHOICES.index(vote.choice) for vote in records], dtype=np.int64),
            np.array([_SIDES[vote.by.side] for vote in records], dtype=np.int64),
            np.array([vote.weight for vote in records], dtype=np.float64),
            np.array(pairs, dtype=np.int64).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_answers(self) -> int:
        return int(self.answers.max(initial=-1)) + 1

    def where(self, keep: Bools) -> Self:
        """The votes where `keep` [V] is True; items and annotators keep their indices, those without a vote too."""
        return replace(
            self,
            records=tuple(compress(self.records, keep.tolist())),
            **{name: getattr(self, name)[keep] for name in ("item", "annotator", "choice", "side", "weight")},
        )

    def latest(self) -> Self:
        """One vote per annotator and item, the last one given; votes without a name are all kept, as different people's."""
        named = np.array([bool(who) for who in self.annotators], dtype=bool)[self.annotator]
        keys = self.item * len(self.annotators) + self.annotator
        _, last = np.unique(keys[::-1], return_index=True)
        keep = ~named
        keep[len(self) - 1 - last] = True
        return self.where(keep)

    def counts(self) -> Floats:
        """[I, 3] the sum of weights for a, tie and b."""
        return tally(self.item * 3 + self.choice, len(self.items) * 3, self.weight).reshape(-1, 3)

    def numbers(self) -> Ints:
        """[I, 3] how many votes said a, tie and b."""
        return np.bincount(self.item * 3 + self.choice, minlength=len(self.items) * 3).reshape(-1, 3)


def tally(index: Ints, size: int, weight: Floats) -> Floats:
    """[size] the sum of the weights at each index."""
    return np.bincount(index, weight, size).astype(np.float64)  # without a single index, bincount gives integers


def _check(vote: Vote) -> None:
    place = f"item {vote.item!r}" + (f", annotator {vote.by.who!r}" if vote.by.who else "")
    problem = ""
    if vote.choice not in CHOICES:
        problem = f"the choice is {vote.choice!r}: write a, b or tie"
    elif vote.by.side not in _SIDES:
        problem = f"the side that stood first is {vote.by.side!r}: write a or b, or leave it out"
    elif not 0 < vote.weight < math.inf:
        problem = f"the weight is {vote.weight}: give a number greater than 0, or leave the vote out"
    if problem:
        at = vote.origin
        file, row, column = (at.file, at.row, at.column) if at else (None, None, None)
        raise Refusal(f"{place}: {problem}", code="bad_vote", file=file, row=row, column=column)
