"""Win rates: one sample of each model per prompt, judged by a scoring function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from preftune.evaluation.intervals import mean_interval


def win_rate(values: Sequence[float], against: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """Share of prompts whose first value is larger, ties one half, with its interval over prompts."""
    points = [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(values, against, strict=True)]
    found = mean_interval(points, range(len(points)), seed=seed)
    rate, interval = found or (None, None)
    return {
        "prompts": len(points),
        "win_rate": rate,
        "win_rate_interval": interval,
        "wins": points.count(1.0),
        "ties": points.count(0.5),
        "losses": points.count(0.0),
    }
