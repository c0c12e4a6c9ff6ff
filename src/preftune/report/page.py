"""The page: the run's files in, report.html and the pictures out."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from preftune.report import curves, folder, png, svg, tables, verdicts
from preftune.report.diagnosis import Finding, diagnose


def write(run: Path) -> Path:
    """Writes `report.html` and `plots/*.png` into the run folder and returns the page's path.

    Whatever the folder lacks is said on the page. The page needs no network, and its one script is in it.
    """
    files = folder.read(run)
    drawn, frontier = curves.plots(files.metrics), curves.reward_kl(files.demo)
    page = render(files, drawn)
    plots = [*drawn, *([frontier] if frontier else [])]
    if plots:
        (run / "plots").mkdir(exist_ok=True)
    for plot in plots:
        put(run / "plots" / f"{plot.name}.png", png.draw(plot))
    put(run / "report.html", page.encode())
    return run / "report.html"


def verdict(run: Path) -> str:
    """The sentence at the head of the report, for the terminal."""
    return verdicts.sentence(folder.read(run))


def findings(run: Path) -> tuple[Finding, ...]:
    """What the report says is wrong with the run, for the terminal and for programs."""
    return diagnose(folder.read(run)).findings


def render(files: folder.RunFiles, drawn: list[curves.Plot]) -> str:
    """The page as text; `drawn` are the run's curves."""
    held_out = tables.held_out(files.evaluation)
    if held_out and (length := tables.answer_length(files.samples)):
        held_out.append(length)
    columns, rows = tables.demo_table(files.demo)
    return filled(
        "page.html",
        name=files.path.resolve().name,
        model=str(files.settings.get("model") or ""),
        method=_method(files),
        verdict=verdicts.sentence(files),
        remarks=[*files.remarks, *curves.not_finite(files.metrics)],
        demo_columns=columns,
        demo_rows=rows,
        reward_kl=curves.reward_kl(files.demo),
        diagnosis=diagnose(files) if drawn else None,
        kept=_kept(files),
        warned=tables.warned(files.warnings),
        values=svg.values(drawn),
        tiles=tables.tiles(files),
        held_out=held_out,
        intervals=any(row.before[1] or row.after[1] for row in held_out),
        held_out_size=tables.held_out_size(files.evaluation),
        plots=drawn,
        dots=any(trace.kind == "dots" for plot in drawn for trace in plot.traces),
        window=curves.smoothing(files.metrics),
        data=tables.data_summary(files.data) if files.data else None,
        samples=tables.samples(files),
        environment=tables.environment(files.environment),
        config=files.config,
    )


def filled(template: str, **values: Any) -> str:
    """A page of this folder, with these values in it; whatever they hold stays text."""
    import jinja2  # here, since importing preftune.report must cost nothing

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"svg": svg.draw, "nobreak": _nobreak, "code": _code}
    script, script_hash = _script()
    shared = {"inks": list(zip(curves.LIGHT, curves.DARK, strict=True)), "page_js": script, "page_js_hash": script_hash}
    return environment.get_template(template).render(**shared, **values)


@cache
def _script() -> tuple[str, str]:
    """The page's script, and its hash, by which the page's own policy lets it run and no other."""
    text = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    return text, "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _code(text: str) -> Any:
    """Escaped, with what stands between backticks as code."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)))


def _nobreak(text: str) -> str:
    """Keeps a figure and its unit on one line."""
    return re.sub(r"(?<=\d) (?=%|nats\b)", "\N{NO-BREAK SPACE}", text)


def _kept(files: folder.RunFiles) -> str:
    """Whose weights the run ended with, where that is not the last step: curves and what is found in them go on beyond it."""
    kept, steps = folder.number(files.evaluation.get("kept_step")), [line.get("step") for line in files.metrics]
    last = folder.number(steps[-1]) if steps else None
    if kept is None or last is None or kept == last:
        return ""
    return (
        f"The weights kept are those of step {kept:,.0f}; curves go on to step {last:,.0f}, and so does what is found in them."
    )


def _method(files: folder.RunFiles) -> str:
    for side in ("after", "before"):
        name = folder.mapping(files.evaluation.get(side)).get("method")
        if isinstance(name, str):
            return name
    return ""


def put(path: Path, content: bytes) -> None:
    """Written aside and renamed: a reader never meets half a file, nor do two processes that draw the same page, as of a run
    that is going on, meet in the file aside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
