"""preftune train"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from preftune import processes
from preftune.cli.console import Watch
from preftune.cli.report import say_findings
from preftune.config import resolve
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.runs.resume import is_resume, keys_of

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    again = is_resume(words)
    keys = keys_of(words) if again else resolve(TrainKeys, words)
    if keys.resume and not again:
        raise Refusal("is written on the command line: train resume=RUN", code="usage", key="resume")
    config = Path(keys.resume) / "config.yaml" if keys.resume else next((Path(w) for w in words if "=" not in w), None)
    from preftune.runs.train import train

    with Watch() as watch:
        result = train(keys, config=config, progress=watch)
    if isinstance(result, dict):  # the plan of a dry run
        return result
    from preftune.report import verdict

    assert result.out is not None
    if processes.number():  # the first one says it
        return {}
    log.info(verdict(result.out))
    found = say_findings(result.out)
    log.info(f"run: {result.out}  (report.html, model/, metrics.jsonl)")
    told = {"out": str(result.out), "method": result.method, "before": result.before, "after": result.after}
    return told | {"diagnosis": [finding.as_dict() for finding in found]}
