"""Win rates: one sample of each model per prompt, judged by a scoring function."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from preftune.errors import Refusal
from preftune.evaluation.intervals import mean_interval

Scorer = Callable[[list[str], list[str]], Sequence[float]]


def load_scorer(name: str) -> Scorer:
    """`package.module:function`, looked for in the working folder too."""
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise Refusal(f"write it as package.module:function, not {name!r}", code="bad_scorer", key="scorer")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        scorer: Any = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise Refusal(f"{name} cannot be imported: {error}", code="bad_scorer", key="scorer") from error
    if not callable(scorer):
        raise Refusal(f"{name} is not a function", code="bad_scorer", key="scorer")
    return cast(Scorer, scorer)


def judge(scorer: Scorer, prompts: list[str], responses: list[str], name: str) -> list[float]:
    """One finite number per response, or a line that says what the scorer gave instead."""
    values = [float(v) for v in scorer(prompts, responses)]
    if len(values) != len(responses):
        raise Refusal(f"{name} gave {len(values)} numbers for {len(responses)} responses", code="bad_scorer", key="scorer")
    bad = [n for n, v in enumerate(values) if not math.isfinite(v)]
    if bad:
        raise Refusal(f"{name} gave {values[bad[0]]} for response {bad[0]}", code="bad_scorer", key="scorer")
    return values


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
