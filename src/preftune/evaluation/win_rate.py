"""Win rates: one sample of each model per prompt, judged by a scoring function."""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from preftune.errors import Refusal, RunFailed
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
    except Exception as error:  # a user's module runs here: whatever it raises is one line
        raise Refusal(f"{name} cannot be imported: {_said(error)}", code="bad_scorer", key="scorer") from error
    if not callable(scorer):
        raise Refusal(f"{name} is not a function", code="bad_scorer", key="scorer")
    return cast(Scorer, scorer)


def check_scorer(scorer: Scorer, name: str) -> None:
    """Refuses a scorer that does not answer two made-up responses with two numbers, before anything is sampled."""
    try:
        judge(scorer, ["Hello", "How are you?"], [" there.", " Fine."], name)
    except RunFailed as failed:
        raise Refusal(failed.message, code=failed.code, key=failed.key) from failed


def judge(scorer: Scorer, prompts: list[str], responses: list[str], name: str) -> list[float]:
    """One finite number per response.

    Raises:
        RunFailed: says what the scorer gave or raised instead.
    """
    try:
        answer: Any = scorer(prompts, responses)
    except Exception as error:  # a user's function
        raise _bad(f"{name} raised {_said(error)}") from error
    if not isinstance(answer, Iterable):
        raise _bad(f"{name} gave {answer!r}: give a list with one number for each response")
    given = list(answer)
    if len(given) != len(responses):
        raise _bad(f"{name} gave {len(given)} values for {len(responses)} responses: give one number for each")
    values: list[float] = []
    for n, value in enumerate(given):
        try:
            values.append(float(value))
        except (TypeError, ValueError):
            raise _bad(f"{name} gave {value!r} for response {n}: give a number") from None
        if not math.isfinite(values[-1]):
            raise _bad(f"{name} gave {values[-1]} for response {n}: give a finite number")
    return values


def _bad(message: str) -> RunFailed:
    return RunFailed(message, code="bad_scorer", key="scorer")


def _said(error: Exception) -> str:
    """An exception of a user's code in one line, with the place in that code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


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
