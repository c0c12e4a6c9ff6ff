"""How responses are cut into passes: a token budget, no pass over it unless a single item is; the same on every machine."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence

from preftune.data.render import Rendered

FINER = 32  # of so many passes that do not hold the items, one more is tried at a time; of twice as many two, and so on


def shared_batches(sequences: Sequence[Rendered], needs: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Items in passes of at most `budget` distinct tokens each, about equally large.

    Args:
        sequences: of the batch; those of one group begin with the same `start` tokens.
        needs: for each item (an example, a response) the sequences that it needs, all of one group.
        budget: tokens of one pass, a prompt counted once.

    Returns:
        Indices of items, the largest pass first; an item is never cut, and a group only where it alone is over the budget.
    """
    pieces: list[tuple[int, list[int]]] = []  # (tokens, items of one group)
    for items in _by_group(sequences, needs):
        start = sequences[needs[items[0]][0]].start
        tokens, piece, inside = start, list[int](), set[int]()
        for item in items:
            more = answer_tokens(sequences, needs[item], inside)
            if piece and tokens + more > budget:
                pieces.append((tokens, piece))
                tokens, piece, inside = start, [], set()
                more = answer_tokens(sequences, needs[item])
            tokens += more
            piece.append(item)
            inside.update(needs[item])
        pieces.append((tokens, piece))
    pieces.sort(key=lambda piece: (-piece[0], piece[1]))
    # a single item over the budget has a pass of its own, and the others are cut as if it were not there
    alone = [piece for piece in pieces if piece[0] > budget]
    rest, bins = pieces[len(alone) :], list[tuple[int, list[int]]]()
    passes = max(-(-sum(tokens for tokens, _ in rest) // budget), sum(2 * tokens > budget for tokens, _ in rest))
    while rest and max(bins := _balanced(rest, passes))[0] > budget:
        passes += max(1, passes // FINER)
    return [items for _, items in sorted([*alone, *bins], key=lambda full: (-full[0], full[1])) if items]


def answer_tokens(sequences: Sequence[Rendered], rows: Collection[int], inside: Collection[int] = ()) -> int:
    """Distinct tokens of some answers beyond their prompts, without the rows that are `inside` already. An answer that is the
    beginning of another one of these has none of its own."""
    order = sorted(set(rows), key=lambda row: (sequences[row].group, sequences[row].ids), reverse=True)
    tokens = 0
    for before, row in zip([None, *order], order, strict=False):
        own = sequences[row]
        longer = sequences[before] if before is not None else None  # in this order what begins like it comes just before it
        begins = longer is not None and longer.group == own.group and longer.ids[: len(own.ids)] == own.ids
        if not begins and row not in inside:
            tokens += len(own.ids) - own.start
    return tokens


def shares(sequences: Sequence[Rendered], needs: Sequence[Sequence[int]], processes: int) -> list[list[int]]:
    """Items of each process: groups stay whole, and the distinct tokens are about as many for each. With fewer groups than
    processes some have none."""
    if processes == 1:
        return [list(range(len(needs)))]
    pieces: list[tuple[int, list[int]]] = []
    for items in _by_group(sequences, needs):
        distinct = {row for item in items for row in needs[item]}
        pieces.append((sequences[needs[items[0]][0]].start + answer_tokens(sequences, distinct), items))
    pieces.sort(key=lambda piece: (-piece[0], piece[1]))
    return [sorted(items) for _, items in sorted(_balanced(pieces, processes), key=lambda full: (-full[0], full[1]))]


def _by_group(sequences: Sequence[Rendered], needs: Sequence[Sequence[int]]) -> Iterable[list[int]]:
    """The items of each group, in their order."""
    groups: dict[int, list[int]] = {}
    for item, rows in enumerate(needs):
        groups.setdefault(sequences[rows[0]].group, []).append(item)
    return groups.values()


def _balanced(pieces: Sequence[tuple[int, list[int]]], passes: int) -> list[tuple[int, list[int]]]:
    """Each piece, largest first, into the pass with the fewest tokens."""
    full: list[tuple[int, int, list[int]]] = [(0, n, []) for n in range(passes)]
    for tokens, items in pieces:
        load, n, inside = heapq.heappop(full)
        heapq.heappush(full, (load + tokens, n, inside + items))
    return [(load, items) for load, _, items in full]


def padded_batches(
    sequences: Sequence[Rendered], needs: Sequence[Sequence[int]], budget: int, before: int = 0
) -> list[list[int]]:
    """The same for rows that stand padded beside each other: distinct rows times the longest, with `before` virtual tokens in
    front, is at most `budget`; items of like length together, so that little is padded."""
    longest = [max(len(sequences[row].ids) for row in rows) for rows in needs]
    group = [sequences[rows[0]].group for rows in needs]
    of_group: dict[int, int] = {}
    for g, length in zip(group, longest, strict=True):
        of_group[g] = max(of_group.get(g, 0), length)
    batches: list[list[int]] = []
    inside: set[int] = set()
    for item in sorted(range(len(needs)), key=lambda n: (-of_group[group[n]], group[n], -longest[n], n)):
        together = inside | set(needs[item])
        if batches and len(together) * (before + max(len(sequences[row].ids) for row in together)) <= budget:
            batches[-1].append(item)
            inside = together
        else:
            batches.append([item])
            inside = set(needs[item])
    return batches


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows without anything in common, padded beside each other: count times the longest is at most `budget`."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
