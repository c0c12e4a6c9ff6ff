"""preftune generate"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from preftune.cli.common import output_file
from preftune.cli.console import Watch
from preftune.config import resolve
from preftune.errors import Refusal
from preftune.keys import GenerateKeys
from preftune.models import inspect
from preftune.records import Group
from preftune.runs import folder as files
from preftune.runs.prepare import load_said

log = logging.getLogger("preftune")

SHOWN = 5  # prompts that a message names


def run(words: list[str], as_json: bool) -> dict[str, Any] | None:
    keys = resolve(GenerateKeys, words)
    out = output_file(keys.out, words, keys.prompts, overwrite=keys.overwrite, model=keys.model) if keys.out else None
    if out is None and as_json:
        raise Refusal("--json prints one document: name a file with out=...", code="missing_key", key="out")
    inspect.check_vocabulary(inspect.facts(inspect.resolve(keys.model, "model"), "model"))
    groups = load_said(keys.prompts.sources, keys.prompts).groups
    from preftune.data.render import render_prompts
    from preftune.evaluation.evaluate import counted, prompt_text
    from preftune.generation.sample import Sampling, sample
    from preftune.models.load import load_model, load_tokenizer, positions_of
    from preftune.training.precision import DTYPES

    tokenizer = load_tokenizer(keys.model, trust_remote_code=keys.trust_remote_code)
    ids = render_prompts(groups, tokenizer, template=keys.prompts.template)
    limit = positions_of(keys.model, trust_remote_code=keys.trust_remote_code)
    fitting = _fitting(groups, [len(i) for i in ids], limit, keys.max_new_tokens)
    model = load_model(keys.model, dtype=DTYPES[keys.dtype or "float32"], trust_remote_code=keys.trust_remote_code)
    names = ("samples", "temperature", "top_k", "top_p", "beams", "max_new_tokens", "seed")
    how = Sampling(**{name: getattr(keys, name) for name in names})
    with Watch() as watch:
        progress = counted(watch, "sample", len(fitting) * keys.samples)
        found = sample(model, tokenizer, [ids[n] for n in fitting], how, progress=progress)
    lines = [
        {
            "prompt_index": fitting[s.prompt_index],
            "sample": s.sample,
            "prompt": prompt_text(groups[fitting[s.prompt_index]]),
            "response": s.text,
            "tokens": len(s.ids),
            "finish": s.finish,
        }
        for s in found
    ]
    if out is None:
        for line in lines:
            print(files.to_json(line))
        return None
    files.write_lines(out, lines)
    log.info(f"{len(lines):,} responses to {len(fitting):,} prompts: {out}")
    return {"out": str(out), "prompts": len(fitting), "responses": len(lines), "left_out": len(groups) - len(fitting)}


def _fitting(groups: Sequence[Group], lengths: Sequence[int], limit: int | None, new: int) -> list[int]:
    """The prompts, by index, that leave room for all new tokens; the others are counted and named."""
    over = [n for n, length in enumerate(lengths) if limit is not None and length + new > limit]
    if not over:
        return list(range(len(lengths)))
    why = f"with {new:,} new tokens over the model's {limit:,} positions (the longest prompt has {max(lengths):,})"
    if len(over) == len(lengths):
        line = f"every prompt is {why}: lower max_new_tokens"
        raise Refusal(line, code="too_long", key="max_new_tokens")
    named = ", ".join(_place(groups[n], n) for n in over[:SHOWN]) + (", ..." if len(over) > SHOWN else "")
    log.warning(f"{len(over):,} of {len(lengths):,} prompts left out, {why}: {named}")
    return sorted(set(range(len(lengths))) - set(over))


def _place(group: Group, index: int) -> str:
    """Where a prompt stands in the data; rows of prompts alone are known by their index only."""
    origin = next((o for response in group.responses for o in response.origins), None)
    return f"prompt_index {index}" if origin is None else f"{origin.file} row {origin.row}"
