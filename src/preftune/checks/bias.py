"""What the labels favour besides quality: the longer answer, or the one that was shown first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from preftune.checks.codes import finding
from preftune.checks.ledger import Bools, Ints, Keys, Table
from preftune.evaluation.intervals import share_interval
from preftune.records import Finding
from preftune.report.words import percent

FEW = 30  # comparisons: of fewer, nothing can be said
FAR = 0.1  # from chance: a bias that training will learn, and worth a warning


def length_bias(
    table: Table, unread: Sequence[tuple[int, int]] = (), dropped: int = 0
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """How often the longer of two answers is the better one, in characters.

    Args:
        table: all rows; labels of those that cannot be used are labels all the same.
        unread: lengths of (better, worse) in rows that are not in it, since they could not be read.
        dropped: comparisons of the table that stand in dropped rows.

    Returns:
        `comparisons` that say which answer is better, `dropped` of them in dropped rows, `equal` in length;
        `longer_preferred` of all, its `_interval`, what it would be by `chance`; the same `without_equal`, by chance 0.5; the
        median lengths `better` and `worse`. None where nothing is compared.
    """
    decided = table.decided
    a_wins = table.preference[decided] > 0.5
    a, b = table.size_a[decided], table.size_b[decided]
    other = np.array(unread, dtype=np.int64).reshape(-1, 2)
    better = np.concatenate([np.where(a_wins, a, b), other[:, 0]])
    worse = np.concatenate([np.where(a_wins, b, a), other[:, 1]])
    if not len(better):
        return None, []
    groups = _numbers(table.group[table.row[decided]])
    prompt = np.concatenate([groups, groups.max(initial=-1) + 1 + np.arange(len(other))])
    longer, unequal = better > worse, better != worse
    chance = float(unequal.mean() / 2)
    result: dict[str, Any] = {
        "comparisons": len(better),
        "dropped": dropped + len(other),
        "equal": int((~unequal).sum()),
        **_share("longer_preferred", longer, np.ones_like(longer), prompt),
        "chance": chance,
        **_share("without_equal", longer, unequal, prompt),
        "better": float(np.median(better)),
        "worse": float(np.median(worse)),
    }
    share, ends = result["without_equal"], result["without_equal_interval"]
    if share is None or unequal.sum() < FEW or ends[0] <= 0.5 <= ends[1]:
        return result, []
    side, methods = ("longer", "simpo or r_dpo") if share > 0.5 else ("shorter", "simpo")  # r_dpo itself prefers shorter ones
    wins = f"{percent(max(share, 1 - share))} of {int(unequal.sum()):,} comparisons of unequal length"
    what = (
        f"the {side} answer wins {wins}, 50 % by chance: the model will learn to write {side}; compare lengths "
        f"before and after, or train with method={methods}"
    )
    return result, [finding("length_bias", what, mild=abs(share - 0.5) < FAR)]


def position_bias(table: Table, ordered: Bools) -> tuple[dict[str, Any] | None, list[Finding]]:
    """How often the answer that was shown first is the better one; where rows do not say which it was, the first column.

    Args:
        ordered: [M] judgements whose columns do not say which answer is better.
    """
    known = table.side != 0
    used = table.decided & (known | ordered)
    if not used.any():
        return None, []
    first = (table.preference > 0.5) == (table.side >= 0)
    prompt = _numbers(table.group[table.row])
    result: dict[str, Any] = {
        "comparisons": int(used.sum()),
        "by": "shown first"
        if known[used].all()
        else "first column"
        if not known[used].any()
        else "shown first or first column",
        **_share("first_preferred", first[used], np.ones(int(used.sum()), bool), prompt[used]),
    }
    share, ends = result["first_preferred"], result["first_preferred_interval"]
    if used.sum() < FEW or ends[0] <= 0.5 <= ends[1]:
        return result, []
    side = "first" if share > 0.5 else "second"
    wins = f"{percent(max(share, 1 - share))} of {result['comparisons']:,} comparisons ({result['by']})"
    what = f"the {side} answer wins {wins}, 50 % by chance: have both orders judged, or shown in random order"
    return result, [finding("position_bias", what, mild=abs(share - 0.5) < FAR)]


def _share(name: str, good: Bools, of: Bools, prompt: Ints) -> dict[str, Any]:
    size = int(prompt.max(initial=-1)) + 1
    found = share_interval(np.bincount(prompt, good & of, size), np.bincount(prompt, of, size))
    return {name: found and found[0], f"{name}_interval": found and list(found[1])}


def _numbers(keys: Keys) -> Ints:
    """Digests as numbers from 0."""
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)
