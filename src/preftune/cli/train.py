"""preftune train"""

from __future__ import annotations

import logging
from typing import Any

from preftune.cli.console import Watch, once_before
from preftune.config import TrainKeys, resolve

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any] | None:
    keys = resolve(TrainKeys, words)
    from preftune.runs.train import train

    with Watch() as watch:
        result = train(keys, progress=once_before(watch, _keep_freed_memory))
    if result is None:
        return None
    from preftune.report import verdict

    assert result.out is not None
    log.info(verdict(result.out))
    log.info(f"run: {result.out}  (report.html, model/, metrics.jsonl)")
    return {"out": str(result.out), "method": result.method, "before": result.before, "after": result.after}


def _keep_freed_memory() -> None:
    """When the work has begun: not before, since this imports torch, and refusals come first."""
    from preftune.training.memory import keep_freed_memory

    keep_freed_memory()
