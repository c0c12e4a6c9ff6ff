"""Held-out data, by the hash of the prompt: the same rows on every machine, in any order, in any file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from preftune.records import Group, Mark, digest

SHARE, AT_MOST = 0.05, 1000


def split(groups: Sequence[Group], *, share: float = SHARE, at_most: int = AT_MOST) -> tuple[list[Group], list[Group]]:
    """(training, held-out) groups: `share` of the prompts, at most `at_most`, those with the smallest hashes.

    Texts without a prompt all stand in one group; they are held out one by one, by the hash of their response.
    """
    train: list[Group] = []
    held: list[tuple[float, Group]] = []
    for group in groups:
        if group.prompt in ("", ()):
            rest, out = _split_marks(group, share, at_most)
            train += rest
            held += [(0.0, g) for g in out]
            continue
        place = _place(digest(group.prompt, group.tools))
        if place < share:
            held.append((place, group))
        else:
            train.append(group)
    kept = {id(group) for _, group in sorted(held, key=lambda pair: pair[0])[:at_most]}
    return train + [g for _, g in held if id(g) not in kept], [g for _, g in held if id(g) in kept]


def _place(identity: str) -> float:
    """A number in [0, 1) from a digest, hashed once more so that ids a user made up spread evenly too."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64


def _split_marks(group: Group, share: float, at_most: int) -> tuple[list[Group], list[Group]]:
    places = {m: _place(group.responses[m.responses[0]].id) for m in group.marks}
    out = set(sorted((m for m in group.marks if places[m] < share), key=places.__getitem__)[:at_most])
    parts = [[m for m in group.marks if m not in out], [m for m in group.marks if m in out]]
    train, held = ([subset(group, marks)] if marks else [] for marks in parts)
    return train, held


def subset(group: Group, marks: Sequence[Mark]) -> Group:
    """The group with these marks alone, and the responses they need."""
    needed = sorted({i for mark in marks for i in mark.responses})
    place = {old: new for new, old in enumerate(needed)}
    return replace(
        group,
        responses=tuple(group.responses[i] for i in needed),
        marks=tuple(m.moved(place.__getitem__) for m in marks),
    )
