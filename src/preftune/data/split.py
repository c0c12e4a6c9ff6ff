"""Held-out data, by the hash of the prompt: the same rows on every machine, in any order, in any file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from preftune.records import Group, Mark, digest

SHARE, AT_MOST = 0.05, 1000


def split(groups: Sequence[Group], *, share: float = SHARE, at_most: int = AT_MOST) -> tuple[list[Group], list[Group]]:
    """(training, held-out) groups: `share` of the prompts, at most `at_most`, those with the smallest hashes.

    Rows without a prompt all stand in one group. They are held out one by one, by the hash of their answer; comparisons
    together with all that share an answer with them, directly or through others, so that no answer stands on both sides.
    """
    parts = [(place, n, marks) for n, group in enumerate(groups) for place, marks in _parts(group)]
    chosen = sorted((part for part in parts if part[0] < share), key=lambda part: part[0])[:at_most]
    out: dict[int, set[int]] = {}
    for _, n, marks in chosen:
        out.setdefault(n, set()).update(marks)
    train: list[Group] = []
    held: list[Group] = []
    for n, group in enumerate(groups):
        if n not in out:
            train.append(group)
        elif len(out[n]) == len(group.marks):
            held.append(group)
        else:
            train.append(_subset(group, [m for i, m in enumerate(group.marks) if i not in out[n]]))
            held.append(_subset(group, [m for i, m in enumerate(group.marks) if i in out[n]]))
    return train, held


def _parts(group: Group) -> list[tuple[float, Sequence[int]]]:
    """(place, indices of marks) of what has to stay together: the whole group, or without a prompt its components."""
    if group.prompt not in ("", ()):
        return [(_place(digest(group.prompt, group.tools)), range(len(group.marks)))]
    ids = [response.id for response in group.responses]
    return [(_place(min(ids[i] for n in part for i in group.marks[n].responses)), part) for part in _components(group)]


def _place(identity: str) -> float:
    """A number in [0, 1) from a digest, hashed once more: ids a user made up spread evenly then, and the least of many."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64


def _components(group: Group) -> list[list[int]]:
    """Indices of marks, those together that share responses, directly or through other marks."""
    above = list(range(len(group.responses)))

    def root(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]  # halves the path, so that long chains stay short
            i = above[i]
        return i

    for mark in group.marks:
        for other in mark.responses[1:]:
            above[root(other)] = root(mark.responses[0])
    found: dict[int, list[int]] = {}
    for n, mark in enumerate(group.marks):
        found.setdefault(root(mark.responses[0]), []).append(n)
    return list(found.values())


def _subset(group: Group, marks: Sequence[Mark]) -> Group:
    """The group with these marks alone, and the responses they need."""
    return group.restricted(marks, sorted({i for mark in marks for i in mark.responses}))
