"""Votes made up for tests: written down by hand, or of annotators with known habits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from preftune.labels.votes import Votes
from preftune.records import By, Vote


def vote(item: str, who: str, choice: Any, **more: Any) -> Vote:
    """A vote; `side` and others of By by name."""
    weight = more.pop("weight", 1.0)
    return Vote(item, choice, By(who=who, **more), weight)


def table(rows: dict[str, str], who: str = "klmnopqrst") -> list[Vote]:
    """{"i": "ab="}: annotator k says a of i, l says b, m a tie; a dot is no vote."""
    names = {"a": "a", "b": "b", "=": "tie"}
    return [vote(item, w, names[c]) for item, said in rows.items() for w, c in zip(who, said, strict=False) if c != "."]


class Crowd:
    """Items with a true better side, and annotators who say it with their own probability, the other side otherwise; a share of
    all votes are ties."""

    def __init__(self, right: Sequence[float], *, items: int = 300, each: int = 5, ties: float = 0.1, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.truth = draw.choice(["a", "b"], items)
        self.votes: list[Vote] = []
        for n, truth in enumerate(self.truth):
            for w in draw.choice(len(right), each, replace=False):
                other = "b" if truth == "a" else "a"
                said = "tie" if draw.random() < ties else truth if draw.random() < right[w] else other
                self.votes.append(vote(f"i{n}", f"w{w}", said))
        self.table = Votes.of(self.votes)

    def accuracy(self, preference: Any) -> float:
        places = {item: n for n, item in enumerate(self.table.items)}
        p = np.array([preference[places[f"i{n}"]] for n in range(len(self.truth))])
        return float(np.where(p == 0.5, 0.5, (p > 0.5) == (self.truth == "a")).mean())
