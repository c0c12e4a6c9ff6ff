"""Rows against each other: said twice, said the other way round, said in a circle, and held out although trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from preftune.checks.codes import finding
from preftune.checks.ledger import JOINED, Bools, Ints, Keys, Table, mix
from preftune.records import Finding


@dataclass(frozen=True, slots=True)
class Pairs:
    """The decided comparisons, P of them: what is compared, in which direction, and where.

    pair: [P] digest of group and both answers. first: [P] whether the answer of the smaller digest won. mark: [P] indices in
    the table; row, who: [P].
    """

    pair: Keys
    first: Bools
    mark: Ints
    row: Ints
    who: Keys
    group: Keys
    winner: Keys
    loser: Keys

    @classmethod
    def of(cls, table: Table) -> Pairs:
        mark = np.flatnonzero(table.decided)
        row, a, b = table.row[mark], table.a[mark], table.b[mark]
        a_wins = table.preference[mark] > 0.5
        group = table.group[row]
        winner, loser = np.where(a_wins, a, b), np.where(a_wins, b, a)
        pair = mix(group, np.minimum(a, b), np.maximum(a, b))
        return cls(pair, winner < loser, mark, row, table.who[mark], group, winner, loser)


def duplicates(table: Table) -> list[Finding]:
    """Rows with the prompt, answers, judgements and annotators of an earlier row, in whatever order the columns are."""
    found: list[Finding] = []
    keys = _row_keys(table)
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    for row in np.flatnonzero(first[place] != np.arange(len(keys))).tolist():
        where, before = table.place(row), table.places([int(first[place[row]])], row)
        what = f"says the same as {before}, of the same answers: remove one, or it counts twice"
        found.append(finding("duplicate_row", what, where.file, where.row))
    return found


def _row_keys(table: Table) -> Keys:
    swap = table.compared & (
        (table.preference < 0.5) | ((table.preference == 0.5) & (table.a > table.b))
    )  # the winner first; of a tie the smaller digest
    a, b = np.where(swap, table.b, table.a), np.where(swap, table.a, table.b)
    sure = np.where(swap, 1 - table.preference, table.preference).astype(np.float32).view(np.uint32)
    own = table.kind != JOINED  # what was made of several rows is no row's own
    total = np.zeros(len(table.number), np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(total, table.row[own], mix(table.kind, a, b, sure, table.who)[own])
    return mix(table.group, total)


def contradictions(table: Table, pairs: Pairs) -> tuple[list[Finding], int]:
    """(a finding for each row that turns an earlier one round, pairs on which different annotators disagree)."""
    found: list[Finding] = []
    by_judge = mix(pairs.pair, pairs.who)
    opposed = np.isin(by_judge, _both_ways(by_judge, pairs.first))
    first: dict[int, int] = {}
    for n in np.flatnonzero(opposed).tolist():
        before = first.setdefault(int(by_judge[n]), n)
        row, earlier = int(pairs.row[n]), int(pairs.row[before])
        if pairs.first[n] != pairs.first[before] and row != earlier:
            where = table.place(row)
            what = f"prefers the answer that {table.places([earlier], row)} says is the worse one: keep one of them"
            found.append(finding("contradiction", what, where.file, where.row))
    disputed = np.setdiff1d(_both_ways(pairs.pair, pairs.first), pairs.pair[opposed])
    return found, len(disputed)


def _both_ways(keys: Keys, first: Bools) -> Keys:
    """Keys under which both directions stand."""
    return np.intersect1d(keys[first], keys[~first])


def cycles(table: Table, pairs: Pairs) -> list[Finding]:
    """One finding for each knot of answers in which preferences go round, at the last of its rows. Of a pair judged several
    times the majority counts."""
    found: list[Finding] = []
    for rows in _knots(pairs):
        last = rows[-1]
        where = table.place(last)
        others = [row for row in rows if row != last]
        what = f"closes a circle with {table.places(others, last)}, each answer better than the next: look at them together"
        found.append(finding("preference_cycle", what, where.file, where.row))
    return found


def _knots(pairs: Pairs) -> Iterator[list[int]]:
    """Rows whose comparisons lie in one strongly connected part of the answers."""
    groups, place, count = np.unique(pairs.group, return_inverse=True, return_counts=True)
    some = np.flatnonzero(count[place] >= 3)
    if not len(some) or not len(groups):
        return
    keys, start, which = np.unique(pairs.pair[some], return_index=True, return_inverse=True)
    net = np.bincount(which, np.where(pairs.first[some], 1, -1), len(keys))
    lead, at = net != 0, some[start]
    winner, loser = (mix(pairs.group[at], side[at]) for side in (pairs.winner, pairs.loser))
    low, high = (np.where(pairs.first[at], one, other) for one, other in ((winner, loser), (loser, winner)))
    nodes, ends = np.unique(np.concatenate([np.where(net > 0, low, high), np.where(net > 0, high, low)]), return_inverse=True)
    source, target = ends[: len(at)], ends[len(at) :]
    graph = coo_array((np.ones(int(lead.sum())), (source[lead], target[lead])), shape=(len(nodes), len(nodes)))
    _, part = connected_components(graph, directed=True, connection="strong")
    inside = lead & (part[source] == part[target])
    rows: dict[int, list[int]] = {}
    for n in np.flatnonzero(inside[which]).tolist():
        rows.setdefault(int(part[source[which[n]]]), []).append(int(pairs.row[some[n]]))
    yield from (sorted(set(own)) for own in rows.values())


def shared_prompts(train: Table, held: Table) -> list[Finding]:
    """Rows of the held-out data whose prompt is trained on; rows without a prompt do not count."""
    found: list[Finding] = []
    known, first = np.unique(train.prompt, return_index=True)
    for row in np.flatnonzero(np.isin(held.prompt, known) & (held.prompt != 0)).tolist():
        where = held.place(row)
        at = train.place(int(first[np.searchsorted(known, held.prompt[row])]))
        what = f"its prompt is trained on, in {at.file}:{at.row}: take it out of one of them"
        found.append(finding("shared_prompt", what, where.file, where.row))
    return found
