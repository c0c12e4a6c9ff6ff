"""Annotators and items to look at: who differs from the others, prefers a place, is too quick; where people disagree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np
from scipy.special import ndtr

from preftune.labels.agreement import wilson
from preftune.labels.votes import TIE, A, B, Bools, Floats, Votes

CHANCE = 0.05  # share of those named who may be there by chance
BREAK = 1800.0  # seconds between two votes after which the annotator was away
QUICK = 1 / 3  # of the usual time of a vote
LONG = 5000  # votes from which on their sum is as good as normal

Reason = Literal["disagrees", "first_side", "ties", "quick"]
_SAYS: dict[Reason, str] = {
    "disagrees": "differ from most others' on the same items",
    "first_side": "are for the answer that stood first",
    "ties": "are ties",
    "quick": "took less than a third of the usual time",
}


@dataclass(frozen=True, slots=True)
class Suspect:
    """One annotator to look at, and why.

    observed: how many of the annotator's `votes` are so; expected: how many would be if it voted like the others did on the
    same items; chance: the probability of a number so far off, adjusted for the many annotators that were looked at.
    """

    annotator: str
    reason: Reason
    votes: int
    observed: int
    expected: float
    chance: float

    def __str__(self) -> str:
        counts = f"{self.observed} of {self.votes} votes {_SAYS[self.reason]}"
        chance = "p < 1e-9" if self.chance < 1e-9 else f"p = {self.chance:.1g}"
        return f"{self.annotator}: {counts} ({self.expected:.1f} expected, {chance})"


@dataclass(frozen=True, slots=True)
class Contested:
    """An item on which people disagree: its numbers of votes, and at least what share of people would vote against the most
    frequent choice (lower end of the 95 % interval)."""

    item: str
    a: int
    tie: int
    b: int
    against: float


def to_look_at(votes: Votes, *, chance: float = CHANCE) -> list[Suspect]:
    """Annotators whose votes are not like those of others on the same items, the least likely by chance first; those without a
    name, who may be many, are not looked at.

    If an annotator votes as anybody who judged the item, its vote is any of the item's votes with equal probability; items are
    independent. Then the number of its votes with a property is a sum of independent yes and no, whose exact distribution (a
    normal one from 5,000 votes on) gives the probability of one so far off: few votes never look conspicuous. The properties:

    disagrees: the choice is not among the most frequent ones of the others (too often). Where only two voted, nothing says
        who is off; there the probability is the share of all such items that differ.
    ties: the vote is a tie (too often or too seldom).
    first_side: of the votes for a side, the vote is for the one that stood first, or for a where the order is not known (too
        often or too seldom).
    quick: the vote took less than a third of the median time (too often; against the share of all votes).

    Where one annotator alone judged an item (or took a side), the probability is the share over all such items.
    Of those named a share of at most `chance` is there by chance (Benjamini and Hochberg 1995, for each property).

    Source: the sum's distribution is the Poisson binomial. What is tested is ours.
    """
    latest = votes.latest()
    found: list[Suspect] = []
    for reason, hit, likely, twosided in _properties(latest):
        found += _suspects(latest, reason, hit, likely, twosided, chance)
    return sorted(found, key=lambda suspect: suspect.chance)


def contested(votes: Votes, *, at_most: int = 20) -> list[Contested]:
    """The items where most people disagree with the most frequent choice, by the lower end of the interval of their share."""
    numbers = votes.latest().numbers()
    n = numbers.sum(1)
    low, _ = wilson(n - numbers.max(1, initial=0), n)
    worst = [i for i in np.argsort(-low, kind="stable")[:at_most].tolist() if low[i] > 0]
    return [Contested(votes.items[i], *(int(numbers[i, k]) for k in (A, TIE, B)), against=float(low[i])) for i in worst]


def seconds(votes: Votes) -> Floats:
    """[V] how long each vote took: since the annotator's vote before, shared by votes of the same time (one page); NaN for
    first votes, after a break of half an hour, and where a time is missing or cannot be read (ISO 8601 or seconds)."""
    time = np.array([_stamp(vote.by.time) for vote in votes.records], dtype=np.float64)
    order = np.lexsort((time, votes.annotator))
    who, when = votes.annotator[order], time[order]
    new = np.ones(len(votes), dtype=bool)
    new[1:] = (who[1:] != who[:-1]) | (when[1:] != when[:-1])
    page = np.cumsum(new) - 1
    start, owner = when[new], who[new]
    gap = np.full(len(start), np.nan)
    gap[1:] = np.where(owner[1:] == owner[:-1], start[1:] - start[:-1], np.nan)
    gap[gap > BREAK] = np.nan
    found = np.empty(len(votes))
    found[order] = (gap / np.bincount(page))[page] if len(votes) else gap
    return found


def _stamp(text: str) -> float:
    text = text.strip()
    try:
        return float(text)
    except ValueError:
        pass
    try:
        when = datetime.fromisoformat(text.removesuffix("UTC").rstrip())
    except ValueError:
        return np.nan
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _properties(votes: Votes) -> Iterator[tuple[Reason, Floats, Floats, bool]]:
    """(reason, [V] 1 where the vote has the property, [V] how likely one of the item's has it, whether too seldom counts too);
    NaN where the property says nothing."""
    numbers = votes.numbers()
    n = numbers.sum(1)
    rest = np.stack([np.delete(numbers, k, 1).max(1, initial=0) for k in range(3)], 1)  # the most frequent of the other two
    minority = (numbers - 1 < rest) & (numbers > 0)
    differs = minority[votes.item, votes.choice].astype(np.float64)
    count, many = n[votes.item], np.maximum(n, 1)
    likely = ((numbers * minority).sum(1) / many)[votes.item]
    yield "disagrees", np.where(count > 1, differs, np.nan), _pooled(differs, likely, count == 2), False
    tie = (votes.choice == TIE).astype(np.float64)
    yield "ties", tie, _pooled(tie, numbers[votes.item, TIE] / count, count == 1), True
    place = np.where(votes.side < 0, B, A)
    first = (votes.choice == place).astype(np.float64)
    decided = n[votes.item] - numbers[votes.item, TIE]
    likely = _pooled(first, numbers[votes.item, place] / np.maximum(decided, 1), (tie == 0) & (decided == 1))
    yield "first_side", np.where(tie == 0, first, np.nan), likely, True
    took = seconds(votes)
    if (timed := ~np.isnan(took)).any():
        quick = np.where(timed, took < QUICK * np.median(took[timed]), np.nan)
        yield "quick", quick, np.full(len(votes), float(np.nanmean(quick))), False


def _pooled(hit: Floats, likely: Floats, where: Bools) -> Floats:
    """`likely`, and the share of hits where the item itself tells nothing."""
    return np.where(where, hit[where].mean() if where.any() else 0.0, likely)


def _suspects(votes: Votes, reason: Reason, hit: Floats, likely: Floats, twosided: bool, chance: float) -> list[Suspect]:
    named = np.array([bool(who) for who in votes.annotators], dtype=bool)
    counted = np.flatnonzero(~np.isnan(hit) & named[votes.annotator])
    order = counted[np.argsort(votes.annotator[counted], kind="stable")]
    who, starts = np.unique(votes.annotator[order], return_index=True)
    observed = np.add.reduceat(hit[order], starts).astype(np.int64) if len(who) else np.empty(0, dtype=np.int64)
    parts = np.split(likely[order], starts[1:])
    tails = [_tails(int(k), p) for k, p in zip(observed, parts, strict=True)] if len(who) else []
    raw = np.array([min(1.0, 2 * min(upper, lower)) if twosided else upper for lower, upper in tails])
    adjusted = _benjamini_hochberg(raw)
    return [
        Suspect(votes.annotators[who[i]], reason, len(parts[i]), int(observed[i]), float(parts[i].sum()), float(adjusted[i]))
        for i in np.flatnonzero(adjusted <= chance)
    ]


def _tails(observed: int, likely: Floats) -> tuple[float, float]:
    """P(sum <= observed) and P(sum >= observed) of independent yes with these probabilities."""
    if len(likely) > LONG:
        mean, deviation = likely.sum(), max(float(likely @ (1 - likely)) ** 0.5, 1e-9)
        lower, upper = ndtr(np.array([observed + 0.5 - mean, mean - observed + 0.5]) / deviation).tolist()
        return lower, upper
    mass = np.zeros(len(likely) + 1)
    mass[0] = 1
    for n, p in enumerate(likely.tolist(), 1):
        mass[1 : n + 1] = mass[1 : n + 1] * (1 - p) + mass[:n] * p
        mass[0] *= 1 - p
    return float(mass[: observed + 1].sum()), float(mass[observed:].sum())


def _benjamini_hochberg(p: Floats) -> Floats:
    """The smallest rate of false findings at which each would still be one."""
    order = np.argsort(p)[::-1]
    found = np.empty(len(p))
    found[order] = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1)).clip(max=1)
    return found
