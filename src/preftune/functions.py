"""Functions of the user's own, named as package.module:function: imported, tried, and held to what they must give."""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from preftune.errors import Refusal, RunFailed

Scorer = Callable[[list[str], list[str]], Sequence[float]]


def load_function(name: str, key: str) -> Callable[..., Any]:
    """`package.module:function`, looked for in the working folder too.

    Raises:
        Refusal: it cannot be imported.
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise Refusal(f"write it as package.module:function, not {name!r}", code="bad_scorer", key=key)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = getattr(importlib.import_module(module_name), function)
    except Exception as error:  # a user's module runs here: whatever it raises is one line
        raise Refusal(f"{name} cannot be imported: {_said(error)}", code="bad_scorer", key=key) from error
    if not callable(found):
        raise Refusal(f"{name} is not a function", code="bad_scorer", key=key)
    return cast("Callable[..., Any]", found)


def check_scorer(scorer: Scorer, name: str, key: str = "scorer") -> None:
    """Refuses a scorer that does not answer two made-up responses with two numbers, before anything is sampled."""
    try:
        judge(scorer, ["Hello", "How are you?"], [" there.", " Fine."], name, key)
    except RunFailed as failed:
        raise Refusal(failed.message, code=failed.code, key=failed.key) from failed


def judge(scorer: Scorer, prompts: list[str], responses: list[str], name: str, key: str = "scorer") -> list[float]:
    """One finite number per response.

    Raises:
        RunFailed: says what the scorer gave or raised instead.
    """
    try:
        answer: Any = scorer(prompts, responses)
    except Exception as error:  # a user's function
        raise _bad(f"{name} raised {_said(error)}", key) from error
    if not isinstance(answer, Iterable):
        raise _bad(f"{name} gave {answer!r}: give a list with one number for each response", key)
    given = list(answer)
    if len(given) != len(responses):
        raise _bad(f"{name} gave {len(given)} values for {len(responses)} responses: give one number for each", key)
    values: list[float] = []
    for n, value in enumerate(given):
        try:
            values.append(float(value))
        except (TypeError, ValueError):
            raise _bad(f"{name} gave {value!r} for response {n}: give a number", key) from None
        if not math.isfinite(values[-1]):
            raise _bad(f"{name} gave {values[-1]} for response {n}: give a finite number", key)
    return values


def _bad(message: str, key: str) -> RunFailed:
    return RunFailed(message, code="bad_scorer", key=key)


def _said(error: Exception) -> str:
    """An exception of a user's code in one line, with the place in that code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
