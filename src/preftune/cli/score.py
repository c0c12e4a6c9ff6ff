"""preftune score"""

from __future__ import annotations

import logging
from typing import Any

from preftune.config import ScoreKeys, resolve
from preftune.runs import folder as files

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    keys = resolve(ScoreKeys, words)
    out = files.choose_file(keys.out, overwrite=keys.overwrite)
    from preftune.cli.common import open_data

    data = open_data(keys.model, keys.data, keys, reference=keys.reference.model)
    import torch

    from preftune.scoring.score import Scores, score

    policy, reference = data.models()
    with torch.no_grad():
        ours = score(policy, data.batch, want=("token_logp",) if keys.token_logps else ())
        theirs: Scores | None = score(reference, data.batch) if reference is not None else None
    lines: list[dict[str, Any]] = []
    for n, sequence in enumerate(data.batch.sequences):
        group = data.batch.groups[sequence.group]
        response = group.responses[sequence.response]
        line: dict[str, Any] = {
            "group": sequence.group,
            "response": sequence.response,
            "group_id": group.id,
            "response_id": response.id,
            "from": [{"file": o.file, "row": o.row, "column": o.column} for o in response.origins],
            "logp": float(ours.logp[n]),
            "length": sequence.length,
        }
        if theirs is not None:
            line["reference_logp"] = float(theirs.logp[n])
            line["reward"] = keys.beta * (line["logp"] - line["reference_logp"])
        if ours.token_logp is not None:
            line["token_logps"] = ours.token_logp[n].tolist()
        lines.append(line)
    files.write_lines(out, lines)
    log.info(f"{len(lines):,} responses scored: {out}")
    return {"out": str(out), "responses": len(lines), "groups": len(data.batch.groups)}
