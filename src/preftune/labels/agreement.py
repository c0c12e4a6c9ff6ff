"""How far annotators agree: raw agreement, Krippendorff's alpha, Fleiss' and Cohen's kappa, each with an interval.

All but Cohen's kappa are functions of `counts` [U, K]: how many of a unit's values are of each of K categories, in their order
where they have one. Units with fewer than two values say nothing about agreement and do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from preftune.labels.votes import TIE, Floats, Ints, Votes

RESAMPLES = 2000
Z = 1.959964  # of a 95 % interval


class Estimate(NamedTuple):
    """A figure and its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the last vote of each annotator on each item; `repeated` counts the earlier ones, which do not count here.

    items: those with two votes or more. strength: alpha (ordinal) of strengths, -strength where b is better and 0 for a tie;
    None unless every vote has one. The intervals are of a bootstrap over items.
    """

    items: int
    votes: int
    repeated: int
    raw: Estimate
    alpha_nominal: Estimate
    alpha_ordinal: Estimate
    fleiss: Estimate
    strength: Estimate | None


def agreement(votes: Votes, *, seed: int = 0) -> Agreement:
    """How far the annotators agree, with intervals from 2,000 resamples of the items."""
    latest = votes.latest()
    counts = latest.numbers()
    paired = counts.sum(1) >= 2
    strengths = _strengths(latest)

    def ordinal(counts: Ints, times: Ints) -> Floats:
        return krippendorff_alpha(counts, "ordinal", times)

    def nominal(counts: Ints, times: Ints) -> Floats:
        return krippendorff_alpha(counts, "nominal", times)

    return Agreement(
        int(paired.sum()),
        int(counts[paired].sum()),
        len(votes) - len(latest),
        bootstrap(raw_agreement, counts, seed),
        bootstrap(nominal, counts, seed),
        bootstrap(ordinal, counts, seed),
        bootstrap(fleiss_kappa, counts, seed),
        None if strengths is None else bootstrap(ordinal, strengths, seed),
    )


def raw_agreement(counts: ArrayLike, times: ArrayLike | None = None) -> Floats:
    """Share of a unit's pairs of values that are equal, sum over k of n_k (n_k - 1) / (n (n - 1)), averaged over the units.

    Args:
        counts: [U, K].
        times: [..., U] how often each unit counts; None: once.
    """
    units, times = _units(counts, times)
    with np.errstate(invalid="ignore"):
        return (times @ _equal(units)) / times.sum(-1)


def fleiss_kappa(counts: ArrayLike, times: ArrayLike | None = None) -> Floats:
    """(P - P_e) / (1 - P_e), with P the raw agreement and P_e = sum over k of the squared share of category k in all values.

    Source: Fleiss 1971, Psychological Bulletin 76(5). His units have equal numbers of values; here they need not, and a
    category's share is its share in all values of units with two or more. Arguments as in raw_agreement.
    """
    units, times = _units(counts, times)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = times @ units
        chance = ((shares / shares.sum(-1, keepdims=True)) ** 2).sum(-1)
        return ((times @ _equal(units)) / times.sum(-1) - chance) / (1 - chance)


def krippendorff_alpha(
    counts: ArrayLike, level: Literal["nominal", "ordinal"] = "nominal", times: ArrayLike | None = None
) -> Floats:
    """1 - D_o / D_e: the disagreement inside units over the disagreement of all values drawn together. Missing values: any.

    With coincidences o_ck = sum over units of the ordered pairs of values c, k / (n_u - 1), their sums n_c and n:
    alpha = 1 - (n - 1) * sum o_ck d_ck / sum n_c n_k d_ck, d = 1 for c != k (nominal) or the square of
    sum of n_g over g from c to k, less (n_c + n_k) / 2 (ordinal).

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability. NaN where all values are of one category: there is
    nothing to disagree about. Arguments as in raw_agreement.
    """
    units, times = _units(counts, times)
    n = units.sum(1)
    kinds = units.shape[1]
    ordered = units[:, :, None] * units[:, None, :] - units[:, :, None] * np.eye(kinds)
    seen = (times @ (ordered / (n - 1)[:, None, None]).reshape(len(units), kinds**2)).reshape(*times.shape[:-1], kinds, kinds)
    each = seen.sum(-1)
    below = np.cumsum(each, -1) - each / 2  # values up to the middle of a category
    apart = (below[..., :, None] - below[..., None, :]) ** 2 if level == "ordinal" else 1 - np.eye(kinds)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = (each[..., :, None] * each[..., None, :] * apart).sum((-1, -2))
        return 1 - (each.sum(-1) - 1) * (seen * apart).sum((-1, -2)) / expected


def cohen_kappa(tables: ArrayLike) -> Floats:
    """(p_o - p_e) / (1 - p_e) of tables [..., K, K], how often the one said c where the other said k. NaN where p_e = 1.

    Source: Cohen 1960, Educational and Psychological Measurement 20(1).
    """
    table = np.asarray(tables, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        table = table / table.sum((-1, -2), keepdims=True)
        chance = (table.sum(-1) * table.sum(-2)).sum(-1)
        return (np.trace(table, axis1=-2, axis2=-1) - chance) / (1 - chance)


def pair_tables(votes: Votes) -> tuple[Ints, Ints]:
    """Every two annotators who voted on the same items: ([P, 2] their indices, the smaller first, [P, 3, 3] what they said).

    Of each annotator's last votes; votes without a name are left out. Time and memory grow with the pairs of votes on an item.
    """
    latest = votes.latest()
    named = latest.where(np.array([bool(who) for who in votes.annotators], dtype=bool)[latest.annotator])
    order = np.lexsort((named.annotator, named.item))
    item, who, choice = named.item[order], named.annotator[order], named.choice[order]
    keys, cells = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for step in range(1, int(np.bincount(item).max(initial=1))):
        same = np.flatnonzero(item[step:] == item[:-step])
        keys.append(who[same] * len(votes.annotators) + who[same + step])
        cells.append(choice[same] * 3 + choice[same + step])
    pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
    tables = np.bincount(place * 9 + np.concatenate(cells), minlength=len(pairs) * 9).reshape(-1, 3, 3)
    return np.stack(np.divmod(pairs, max(1, len(votes.annotators))), 1), tables


def wilson(hits: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    """The 95 % interval of a share hits / n: Wilson 1927, JASA 22. n = 0: all of [0, 1]."""
    hits, n = np.asarray(hits, dtype=np.float64), np.asarray(n, dtype=np.float64)
    middle, half = hits + Z**2 / 2, Z * np.sqrt(hits * (1 - hits / np.maximum(n, 1)) + Z**2 / 4)
    return ((middle - half) / (n + Z**2)).clip(0, 1), ((middle + half) / (n + Z**2)).clip(0, 1)


def bootstrap(statistic: Callable[[Ints, Ints], Floats], counts: Ints, seed: int = 0) -> Estimate:
    """statistic(counts [U, K], times [..., U]) and its percentiles when the units that count are drawn again, 2,000 times."""
    kinds, many = np.unique(counts[counts.sum(1) >= 2], axis=0, return_counts=True)
    if not len(kinds):
        return Estimate(np.nan, np.nan, np.nan)
    draws = np.random.default_rng(seed).multinomial(many.sum(), many / many.sum(), size=RESAMPLES)
    found = statistic(kinds, draws)
    found = found[~np.isnan(found)]  # all values drawn were of one category
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (np.nan, np.nan)
    return Estimate(float(statistic(kinds, many)), float(low), float(high))


def _units(counts: ArrayLike, times: ArrayLike | None) -> tuple[Floats, Floats]:
    """The units with two values or more, and how often each counts."""
    units = np.asarray(counts, dtype=np.float64)
    often = np.ones(len(units)) if times is None else np.asarray(times, dtype=np.float64)
    paired = units.sum(1) >= 2
    return units[paired], often[..., paired]


def _equal(units: Floats) -> Floats:
    n = units.sum(1)
    return (units * (units - 1)).sum(1) / (n * (n - 1))


def _strengths(votes: Votes) -> Ints | None:
    """[I, K] numbers of votes of each strength and side, from the strongest b to the strongest a."""
    said: list[float | None] = [vote.by.strength for vote in votes.records]
    if not said or any(strength is None for strength in said):
        return None
    values, place = np.unique(np.abs(np.array(said, dtype=np.float64)) * (TIE - votes.choice), return_inverse=True)
    size = len(votes.items) * len(values)
    return np.bincount(votes.item * len(values) + place, minlength=size).reshape(-1, len(values))
