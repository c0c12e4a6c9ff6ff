"""From sources to rendered batches: read, choose the method, hold out, render, and count every row that fell away."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from preftune import methods
from preftune.data.kept import check_marks
from preftune.data.options import DataOptions
from preftune.data.read import Part, Reading, enforce, load, say_drops, tally
from preftune.data.render import Batch, TooLong, render
from preftune.data.split import split
from preftune.data.template import read_template
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.records import Group
from preftune.training.order import Mixing, check_curriculum

if TYPE_CHECKING:
    from preftune.training.method import Method

log = logging.getLogger("preftune")


@dataclass
class Data:
    """Read, not yet rendered: groups to train on and to hold out, with what was read to get them: one reading, or two
    where held-out data was named."""

    method: methods.MethodOptions
    train: list[Group]
    held: list[Group]
    readings: list[Reading]
    options: DataOptions


def load_said(sources: Any, options: DataOptions) -> Reading:
    """Reads, refuses what the options do not allow, and says what was read and dropped."""
    check_template(options.template)
    reading = load(sources, options=options)
    enforce(reading.rows, reading.dropped, reading.findings, strict=options.strict, allow_drops=options.allow_drops)
    for line in reading.summary():
        log.info(line)
    if options.votes:
        reading.groups, reading.votes = with_labels(reading.groups, options.votes)
    return reading


def with_labels(groups: Sequence[Group], method: str) -> tuple[list[Group], dict[str, Any]]:
    """The groups with one label for each pair that several votes judged, and what was said of the votes."""
    from preftune import labels  # scipy takes its time

    votes = labels.votes_of(groups)
    found = labels.summarised(votes)
    if found.several:
        log.info(f"votes: {found}; labels by {method}")
    else:
        log.warning(f"data.votes={method} changes nothing: no pair of answers has more than one vote")
    return labels.merged(groups, method, votes), {"method": method, **found.as_dict()}


def check_template(template: str | None, *, key: str = "data.template") -> None:
    """Refuses a template file that cannot be read."""
    if template not in (None, "plain"):
        read_template(template, key=key)


def read_data(sources: Any, options: DataOptions, eval_sources: Any, method: methods.Asked) -> Data:
    """Everything that can be refused about the data without a tokenizer."""
    asked = methods.options_of(method)
    reading = load_said(sources, options)
    chosen = methods.choose(asked, reading.groups)
    if not asked.members:
        log.info(f"method: {chosen.label}, by the kind of marks in the data")
    _check_quickly(reading)
    if eval_sources:
        held = load_said(eval_sources, options)
        methods.choose(chosen, held.groups)
        shared = {g.id for g in reading.groups} & {g.id for g in held.groups}
        if shared and any(g.prompt not in ("", ()) for g in held.groups):
            log.warning(f"eval_data shares {len(shared):,} of its {len(held.groups):,} prompts with the training data")
        return Data(chosen, reading.groups, held.groups, [reading, held], options)
    return Data(chosen, *_hold_out(reading.groups), [reading], options)


def _check_quickly(reading: Reading) -> None:
    """What `preftune check` finds without texts or a tokenizer, in one line; the rows stand in data.json and in the report."""
    from preftune.checks.check import quick

    line, found = quick(reading.groups)
    reading.findings += found
    log.info(line + ("; preftune check DATA says more" if found else ""))


def from_groups(groups: Sequence[Group], held: Sequence[Group] | None, method: methods.Asked, options: DataOptions) -> Data:
    """The same for groups at hand: each mark counts as a row, and so does a response that no mark refers to."""
    check_marks([*groups, *(held or ())])
    readings = [_counted(part) for part in ((groups, held) if held else (groups,))]
    if options.votes:
        for reading in readings:
            reading.groups, reading.votes = with_labels(reading.groups, options.votes)
    given = readings[0].groups
    chosen = methods.choose(method, given)
    if held:
        methods.choose(chosen, readings[1].groups)
        return Data(chosen, given, readings[1].groups, readings, options)
    train, out = _hold_out(given) if held is None else (given, [])
    return Data(chosen, train, out, readings, options)


def _hold_out(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """(training, held-out) groups, the latter said where there are none."""
    train, out = split(groups)
    if not train:
        train, out = out, []
    if not out:
        what = "too few prompts, or too few answers that are not compared with each other, for 5 % of them"
        log.warning(f"nothing is held out: {what}; held-out data of your own can be named (eval_data)")
    return train, out


def _counted(groups: Sequence[Group]) -> Reading:
    rows = 0
    for group in groups:
        marked = {i for mark in group.marks for i in mark.responses}
        rows += len(group.marks) + len(group.responses) - len(marked)
    source = {"path": "groups", "format": None, "rows": rows, "kept": rows, "dropped": {}}
    return Reading(list(groups), rows, sources=[source])


@dataclass
class RenderedData:
    """Batches ready to be scored, with the rows that the method asks for besides, and the count of every row."""

    train: Batch
    held: Batch
    summary: dict[str, Any]


def render_data(data: Data, tokenizer: Any, *, max_length: int | None, too_long: TooLong, template: str | None) -> RenderedData:
    """Renders both parts and refuses what is left of too little, before a model is loaded."""
    train, held = (
        render(groups, tokenizer, max_length=max_length, too_long=too_long, template=template)
        for groups in (data.train, data.held)
    )
    if len(data.readings) == 1:
        parts = [Part("", data.readings[0], [*train.findings, *held.findings])]
    else:
        found = (("training data", train), ("held-out data", held))
        parts = [Part(name, reading, [*b.findings]) for (name, b), reading in zip(found, data.readings, strict=True)]
    formats = {source["format"] for reading in data.readings for source in reading.sources}
    if "hh" in formats and getattr(tokenizer, "chat_template", None) and template is None:
        log.info("the model has a chat template, and HH dialogues are read as text: data.format=hh_messages uses it")
    method = methods.make(data.method, beta=1.0)
    examples = [method.examples(part.groups) for part in (train, held)]
    used = sum(len({(e.group, e.mark) for e in own}) for own in examples)
    unused = methods.unused(data.method, [*train.groups, *held.groups], used)
    sizes = [{"groups": len(b.groups), "examples": len(own)} for b, own in zip((train, held), examples, strict=True)]
    for part, size in zip(parts, sizes, strict=False):
        _check(part, data.options, examples=size["examples"])
    dropped = sum((part.dropped for part in parts), Counter[str]())
    rows = sum(reading.rows for reading in data.readings)
    summary = {
        "rows": rows,
        "kept": rows - dropped.total(),
        "dropped": dict(dropped),
        "groups": sum(size["groups"] for size in sizes),
        "findings": [asdict(f) for part in parts for f in part.lost],
        "sources": [source for part in parts for source in part.sources()],
        **({"votes": [reading.votes for reading in data.readings]} if data.options.votes else {}),
        "unused": unused,
        "train": sizes[0],
        "eval": sizes[1],
    }
    again = partial(render, tokenizer=tokenizer, template=template)
    return RenderedData(method.rows(train, again), method.rows(held, again), summary)


def render_said(data: Data, tokenizer: Any, keys: TrainKeys, limit: int | None) -> RenderedData:
    """`render_data` by the keys of a run; what came of it is said."""
    too_long, template = keys.data.too_long, keys.data.template
    rendered = render_data(data, tokenizer, max_length=limit, too_long=too_long, template=template)
    counts = rendered.summary
    log.info(
        f"{counts['train']['examples']:,} examples to train on and {counts['eval']['examples']:,} held out, "
        f"from {counts['kept']:,} of {counts['rows']:,} rows"
    )
    if counts["unused"]:
        what = ", ".join(f"{count:,} {kind}" for kind, count in counts["unused"].items())
        log.warning(f"{data.method.label} makes no example of {what}")
    if line := methods.balance(data.method, rendered.train.groups):
        log.info(line)
    _say_order(methods.make(data.method, beta=1.0), rendered.train, keys)
    return rendered


def _say_order(method: Method, train: Batch, keys: TrainKeys) -> None:
    """What an epoch is drawn from, and in which order, where that is asked for; refuses an order that there is not."""
    mixing, curriculum = Mixing.of(keys.data.sources), keys.train.curriculum
    if mixing:
        log.info(mixing.said(method.examples(train.groups)))
    if curriculum:
        if method.examples_are != "comparisons":
            line = f"it orders comparisons, and {method.name} trains on {method.examples_are}"
            raise Refusal(line, code="unused_key", key="train.curriculum")
        log.info(check_curriculum(curriculum, method.examples(train.groups)))


def _check(part: Part, options: DataOptions, *, examples: int) -> None:
    """Refuses a part of which too much is gone, or that leaves nothing to train on or to measure."""
    dropped, lost = part.dropped, part.lost
    strict, allow_drops = options.strict, options.allow_drops
    enforce(part.reading.rows, dropped, lost, strict=strict, allow_drops=allow_drops, part=part.name)
    say_drops(part.findings, part.name)
    if not examples:
        why = tally(dropped, lost) or "all of them are ties without a better answer, or have weight 0"
        what = f"no example is left in the {part.name or 'training data'}: {why}"
        raise Refusal(what, code="nothing_kept", key="eval_data" if part.name == "held-out data" else "data")
