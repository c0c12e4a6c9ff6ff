"""preftune report RUN ... [out=PAGE.html]"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from preftune.errors import Refusal
from preftune.runs.folder import check_parent

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    runs, out = _read(words)
    from preftune import report
    from preftune.report import compare

    if len(runs) > compare.MOST:
        raise Refusal(f"{len(runs)} runs: a comparison shows {compare.MOST} at most", code="usage", key="RUN")
    pages, found = [report.write(place) for place in runs], {}
    for place, page in zip(runs, pages, strict=True):
        log.info(f"report: {page}")
        found[str(place)] = [finding.as_dict() for finding in say_findings(place)]
    result: dict[str, Any] = {"reports": [str(page) for page in pages], "diagnosis": found}
    if len(runs) > 1:
        result["comparison"] = str(compare.write(runs, out or runs[0].parent / "comparison.html"))
        log.info(f"comparison: {result['comparison']}")
    return result


def say_findings(run: Path) -> tuple[Any, ...]:
    """What the report says is wrong with a run, a line each in the terminal."""
    from preftune import report

    found = report.findings(run)
    for finding in found:
        log.info(f"diagnosis: {finding.line}")
    return found


def _read(words: list[str]) -> tuple[list[Path], Path | None]:
    """The runs, and where their comparison goes, if that is said."""
    out = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    runs = list(dict.fromkeys(word for word in words if not word.startswith("out=")))
    if not runs:
        raise Refusal("report takes runs: preftune report RUN ...", code="usage")
    for word in runs:
        if not any((Path(word) / name).is_file() for name in ("config.yaml", "demo.json")):
            raise Refusal(f"{word} holds no run (no config.yaml)", code="no_run", key="RUN")
    if out and len(runs) == 1:
        raise Refusal(
            "names the page of a comparison, and one run is given: its page is RUN/report.html", code="usage", key="out"
        )
    if out and not out[-1].endswith(".html"):
        raise Refusal(f"{out[-1]} is no page: name a .html file", code="usage", key="out")
    if out:
        check_parent(Path(out[-1]))
    return [Path(word) for word in runs], Path(out[-1]) if out else None
