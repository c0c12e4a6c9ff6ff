"""Intervals: 95 %, bootstrap over prompts, 2,000 resamples, seeded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000


def mean_interval(
    values: Sequence[float], prompts: Sequence[Hashable], *, seed: int = 0
) -> tuple[float, tuple[float, float]] | None:
    """The mean of `values` and its interval when whole prompts are drawn again.

    Args:
        values: one per example; NaN does not count.
        prompts: the prompt of each example; examples of one prompt are drawn together, since they are not independent.
        seed: of the resampling.

    Returns:
        (mean, (low, high)), or None where nothing counts.
    """
    number: dict[Hashable, int] = {}
    place = np.array([number.setdefault(p, len(number)) for p in prompts], dtype=np.int64)
    x = np.asarray(values, dtype=np.float64)
    counted = ~np.isnan(x)
    if not counted.any():
        return None
    sums = np.bincount(place[counted], weights=x[counted], minlength=len(number))
    counts = np.bincount(place[counted], minlength=len(number))
    present = counts > 0
    sums, counts = sums[present], counts[present]
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), (float(low), float(high))


def share_interval(good: ArrayLike, of: ArrayLike, *, seed: int = 0) -> tuple[float, tuple[float, float]] | None:
    """sum(good) / sum(of) and its interval when whole prompts are drawn again; for millions of them. Prompts with equal counts
    are exchangeable, so that how often each pair of counts is drawn is one multinomial.

    Args:
        good, of: [prompts] whole numbers, good <= of.
        seed: of the resampling.

    Returns:
        (share, (low, high)), or None where nothing counts.
    """
    pairs = np.stack([np.asarray(good, dtype=np.int64), np.asarray(of, dtype=np.int64)], axis=1)
    kinds, count = np.unique(pairs[pairs[:, 1] > 0], axis=0, return_counts=True)
    if not len(kinds):
        return None
    draws = np.random.default_rng(seed).multinomial(count.sum(), count / count.sum(), size=RESAMPLES)
    shares = (draws @ kinds[:, 0]) / (draws @ kinds[:, 1])
    low, high = np.percentile(shares, [2.5, 97.5])
    return float((count @ kinds[:, 0]) / (count @ kinds[:, 1])), (float(low), float(high))
