"""preftune score"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from preftune.cli.common import open_data, output_file
from preftune.cli.console import Watch
from preftune.config import resolve
from preftune.errors import Refusal
from preftune.keys import ScoreKeys
from preftune.records import Group, origins
from preftune.runs import folder as files

if TYPE_CHECKING:
    from preftune.data.render import Batch
    from preftune.scoring.score import Scores

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    keys = resolve(ScoreKeys, words)
    models = {"model": keys.model, "reference": keys.reference.model}
    out = output_file(keys.out, words, keys.data, overwrite=keys.overwrite, **models)
    data = open_data(keys.model, keys.data, keys, reference=keys.reference.model, check=_check_answers)
    policy, reference = data.models()
    with Watch() as watch:
        ours = _scored(policy, data.batch, "score", watch, token_logps=keys.token_logps)
        theirs = None if reference is None else _scored(reference, data.batch, "reference", watch)
    lines: list[dict[str, Any]] = []
    for n, line in in_order(data.batch, data.files):
        line |= {"logp": float(ours.logp[n]), "length": data.batch.sequences[n].length}
        if theirs is not None:
            line["reference_logp"] = float(theirs.logp[n])
            line["reward"] = keys.beta * (line["logp"] - line["reference_logp"])
        if ours.token_logp is not None:
            line["token_logps"] = ours.token_logp[n].tolist()
        lines.append(line)
    files.write_lines(out, lines)
    log.info(f"{len(lines):,} responses scored: {out}")
    return {"out": str(out), "responses": len(lines), "groups": len(data.batch.groups)}


def _check_answers(groups: list[Group]) -> None:
    if not any(group.responses for group in groups):
        raise Refusal("the data holds prompts only: no answer to score", code="no_marks", key="data")


def _scored(model: Any, batch: Batch, phase: str, watch: Watch, *, token_logps: bool = False) -> Scores:
    import torch

    from preftune.evaluation.evaluate import counted
    from preftune.scoring.score import score
    from preftune.scoring.selfcheck import check_finite

    with torch.no_grad():
        found = score(model, batch, want=("token_logp",) if token_logps else (), progress=counted(watch, phase, len(batch)))
    check_finite(found.logp, batch, range(len(batch)))
    return found


def in_order(batch: Batch, names: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every response of rows that were kept, as its index in the batch and the head of its line, by first appearance.

    A row is kept where its mark is: a response that also stands in a dropped one is named without that place.

    Args:
        batch: rendered data.
        names: its files, in the order in which they were read.
    """
    place = {name: n for n, name in reversed(list(enumerate(names)))}  # where it is read first
    marks = ((g, mark) for g, group in enumerate(batch.groups) for mark in group.marks)
    rows = [(origin, g, mark.responses) for g, mark in marks for origin in origins(mark)]
    rows.sort(key=lambda row: (place.get(row[0].file, len(place)), row[0].row) if row[0] else (len(place), 0))
    kept = {(origin.file, origin.row) for origin, _, _ in rows if origin}
    numbers: dict[int, int] = {}
    found: dict[int, dict[int, int]] = {}
    for _, g, responses in rows:
        number, own = numbers.setdefault(g, len(numbers)), found.setdefault(g, {})
        for r in responses:
            if r in own:
                continue
            own[r] = len(own)
            group, response = batch.groups[g], batch.groups[g].responses[r]
            places = [o for o in response.origins if (o.file, o.row) in kept]
            head = {"group": number, "response": own[r], "group_id": group.id, "response_id": response.id}
            yield batch.index(g, r), head | {"from": [{"file": o.file, "row": o.row, "column": o.column} for o in places]}
