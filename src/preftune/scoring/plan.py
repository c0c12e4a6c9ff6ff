"""How responses are cut into passes: a token budget, no pass over it unless a single item is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in micro-batches whose padded size (count x longest) is at most `budget`; longest first, so the pass that
    needs most memory comes first; deterministic."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pack_examples(examples: Sequence[Sequence[int]], lengths: Mapping[int, int], budget: int) -> list[list[int]]:
    """The same for examples that need several responses each, where a response needed twice in a pass counts once.

    Args:
        examples: the responses (keys of `lengths`) that each example needs; neighbours that share responses stand
            together already.
        lengths: tokens of each response, by index.
        budget: padded tokens of one pass.

    Returns:
        Indices of examples, in micro-batches; an example is never cut.
    """
    batches: list[list[int]] = []
    inside: set[int] = set()
    for n, needs in enumerate(examples):
        together = inside | set(needs)
        if batches and len(together) * max(lengths[i] for i in together) <= budget:
            batches[-1].append(n)
            inside = together
        else:
            batches.append([n])
            inside = set(needs)
    return batches
