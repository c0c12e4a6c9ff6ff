"""Intervals: 95 %, bootstrap over prompts, 2,000 resamples, seeded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

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
