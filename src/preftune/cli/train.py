"""preftune train"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from preftune.cli.console import Watch
from preftune.config import TrainKeys, resolve

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    keys = resolve(TrainKeys, words)
    from preftune.runs.train import train

    with Watch() as watch:
        result = train(keys, config=next((Path(word) for word in words if "=" not in word), None), progress=watch)
    if isinstance(result, dict):  # the plan of a dry run
        return result
    from preftune.report import verdict

    assert result.out is not None
    log.info(verdict(result.out))
    log.info(f"run: {result.out}  (report.html, model/, metrics.jsonl)")
    return {"out": str(result.out), "method": result.method, "before": result.before, "after": result.after}
