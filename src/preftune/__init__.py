"""preftune: people's judgements in, an aligned model and a trustworthy verdict out.

    groups = preftune.read("pairs.jsonl")
    run = preftune.fit(model, tokenizer, groups, method="dpo", beta=0.1)
    print(preftune.evaluate(run.model, tokenizer, preftune.read("held_out.jsonl")))

Names are imported when they are first used, so `import preftune` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preftune import losses
    from preftune.data.read import read
    from preftune.data.render import render
    from preftune.errors import Interrupted, PreftuneError, Refusal, RunFailed
    from preftune.evaluation.evaluate import evaluate
    from preftune.runs.fit import fit
    from preftune.scoring.score import score

__version__ = "0.1.0"

__all__ = ["Interrupted", "PreftuneError", "Refusal", "RunFailed", "evaluate", "fit", "losses", "read", "render", "score"]

_WHERE = {
    "Interrupted": "preftune.errors",
    "PreftuneError": "preftune.errors",
    "Refusal": "preftune.errors",
    "RunFailed": "preftune.errors",
    "evaluate": "preftune.evaluation.evaluate",
    "fit": "preftune.runs.fit",
    "read": "preftune.data.read",
    "render": "preftune.data.render",
    "score": "preftune.scoring.score",
}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("preftune.losses")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'preftune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
