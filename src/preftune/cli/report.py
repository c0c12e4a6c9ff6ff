"""preftune report RUN ..."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from preftune.errors import Refusal

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    if not words:
        raise Refusal("report takes runs: preftune report RUN ...", code="usage")
    for word in words:
        if not any((Path(word) / name).is_file() for name in ("config.yaml", "demo.json")):
            raise Refusal(f"{word} holds no run (no config.yaml)", code="no_run", key="RUN")
    from preftune import report

    pages = [report.write(Path(word)) for word in words]
    for page in pages:
        log.info(f"report: {page}")
    return {"reports": [str(page) for page in pages]}
