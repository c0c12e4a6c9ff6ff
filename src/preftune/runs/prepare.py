"""From sources to rendered batches: read, choose the method, hold out, render, and count every row that fell away."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preftune import methods
from preftune.data.options import DataOptions
from preftune.data.read import Reading, enforce, load, tally
from preftune.data.render import Batch, TooLong, render
from preftune.data.split import split
from preftune.errors import Refusal
from preftune.records import Finding, Group

log = logging.getLogger("preftune")


@dataclass
class Data:
    """Read, not yet rendered: groups to train on and to hold out, with what was read to get them."""

    method: str
    train: list[Group]
    held: list[Group]
    readings: list[tuple[Reading, DataOptions]]


def load_said(sources: Any, options: DataOptions) -> Reading:
    """Reads, refuses what the options do not allow, and says what was read and dropped."""
    check_template(options.template)
    reading = load(sources, options=options)
    enforce(reading.rows, reading.dropped, reading.findings, strict=options.strict, allow_drops=options.allow_drops)
    for line in reading.summary():
        log.info(line)
    return reading


def check_template(template: str | None) -> None:
    """Refuses a template file that cannot be read."""
    if template in (None, "plain"):
        return
    try:
        Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        line = f"the chat template {template} cannot be read ({why}): give a Jinja file, or plain"
        raise Refusal(line, code="bad_template", key="data.template") from error


def read_data(sources: Any, options: DataOptions, eval_sources: Any, method: str | None) -> Data:
    """Everything that can be refused about the data without a tokenizer."""
    if method is not None:
        method = methods.check_name(method)
    reading = load_said(sources, options)
    chosen = methods.choose(method, reading.groups)
    if method is None:
        log.info(f"method: {chosen}, by the kind of marks in the data")
    if eval_sources:
        held = load_said(eval_sources, options)
        methods.choose(chosen, held.groups)
        shared = {g.id for g in reading.groups} & {g.id for g in held.groups}
        if shared and any(g.prompt not in ("", ()) for g in held.groups):
            log.warning(f"eval_data shares {len(shared):,} of its {len(held.groups):,} prompts with the training data")
        return Data(chosen, reading.groups, held.groups, [(reading, options), (held, options)])
    train, out = split(reading.groups)
    if not train:
        train, out = out, []
    if not out:
        log.warning("nothing is held out: 5 % of so few prompts is none; eval_data=... names held-out data")
    return Data(chosen, train, out, [(reading, options)])


def from_groups(groups: Sequence[Group], held: Sequence[Group] | None, method: str, options: DataOptions) -> Data:
    """The same for groups at hand: each mark counts as a row."""
    train, out = split(groups) if held is None else (list(groups), list(held))
    if not train:
        train, out = out, []
    marks = sum(len(g.marks) for g in [*train, *out])
    reading = Reading([*train, *out], marks, sources=[{"path": "groups", "format": None, "rows": marks, "kept": marks}])
    return Data(method, train, out, [(reading, options)])


@dataclass
class Rendered:
    """Batches ready to be scored, and the count of every row."""

    train: Batch
    held: Batch
    summary: dict[str, Any]


def render_data(data: Data, tokenizer: Any, *, max_length: int | None, too_long: TooLong, template: str | None) -> Rendered:
    """Renders both parts and refuses what is left of too little, before a model is loaded."""
    parts = [
        render(groups, tokenizer, max_length=max_length, too_long=too_long, template=template)
        for groups in (data.train, data.held)
    ]
    findings = [f for part in parts for f in part.findings]
    formats = {source["format"] for reading, _ in data.readings for source in reading.sources}
    if "hh" in formats and getattr(tokenizer, "chat_template", None) and template is None:
        log.info("the model has a chat template, and HH dialogues are read as text: data.format=hh_messages uses it")
    rows = sum(reading.rows for reading, _ in data.readings)
    lost = [f for reading, _ in data.readings for f in reading.findings] + findings
    dropped = sum((reading.dropped for reading, _ in data.readings), Counter[str]()) + by_row(findings)
    options = data.readings[0][1]
    enforce(rows, dropped, lost, strict=options.strict, allow_drops=options.allow_drops)
    say_drops(findings)
    method = methods.make(data.method, beta=1.0)
    sizes = [{"groups": len(part.groups), "examples": len(method.examples(part.groups))} for part in parts]
    if not sizes[0]["examples"]:
        why = tally(dropped, lost) or "all of them are ties without a better answer, or have weight 0"
        raise Refusal(f"no example is left to train on: {why}", code="nothing_kept", key="data")
    summary = {
        "rows": rows,
        "kept": rows - dropped.total(),
        "dropped": dict(dropped),
        "groups": sum(size["groups"] for size in sizes),
        "findings": [asdict(f) for f in lost],
        "sources": [source for reading, _ in data.readings for source in reading.sources],
        "train": sizes[0],
        "eval": sizes[1],
    }
    return Rendered(parts[0], parts[1], summary)


def by_row(findings: Sequence[Finding]) -> Counter[str]:
    """How many rows fell away, by code: a row with several findings counts once, a mark without a row for itself."""
    first: dict[tuple[str, int | None, int], str] = {}
    for n, finding in enumerate(findings):
        first.setdefault((finding.file, finding.row, n if finding.row is None else 0), finding.code)
    return Counter(first.values())


def say_drops(findings: Sequence[Finding]) -> None:
    if findings:
        log.warning(f"{by_row(findings).total():,} more rows dropped: {tally(by_row(findings), findings)}")
