"""preftune generate"""

from __future__ import annotations

import json
import logging
from typing import Any

from preftune.config import GenerateKeys, resolve
from preftune.errors import Refusal
from preftune.models import inspect
from preftune.runs import folder as files
from preftune.runs.prepare import load_said

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any] | None:
    keys = resolve(GenerateKeys, words)
    out = files.choose_file(keys.out, overwrite=keys.overwrite) if keys.out else None
    if out is None and as_json:
        raise Refusal("--json prints one document: name a file with out=...", code="missing_key", key="out")
    inspect.check_vocabulary(inspect.facts(inspect.resolve(keys.model, "model"), "model"))
    groups = load_said(keys.prompts.sources, keys.prompts).groups
    from preftune.data.render import render_prompts
    from preftune.evaluation.evaluate import prompt_text
    from preftune.generation.sample import Sampling, sample
    from preftune.models.load import load_model, load_tokenizer, positions_of
    from preftune.training.precision import DTYPES

    tokenizer = load_tokenizer(keys.model, trust_remote_code=keys.trust_remote_code)
    ids = render_prompts(groups, tokenizer, template=keys.prompts.template)
    limit, longest = positions_of(keys.model, trust_remote_code=keys.trust_remote_code), max(map(len, ids))
    if limit is not None and longest + keys.max_new_tokens > limit:
        raise Refusal(
            f"a prompt of {longest:,} tokens and {keys.max_new_tokens:,} new ones are over the model's {limit:,} positions: "
            "lower max_new_tokens, or leave the prompt out",
            code="too_long",
            key="max_new_tokens",
        )
    model = load_model(keys.model, dtype=DTYPES[keys.dtype or "float32"], trust_remote_code=keys.trust_remote_code)
    names = ("samples", "temperature", "top_k", "top_p", "beams", "max_new_tokens", "seed")
    found = sample(model, tokenizer, ids, Sampling(**{name: getattr(keys, name) for name in names}))
    lines = [
        {
            "prompt_index": s.prompt_index,
            "sample": s.sample,
            "prompt": prompt_text(groups[s.prompt_index]),
            "response": s.text,
            "tokens": len(s.ids),
            "finish": s.finish,
        }
        for s in found
    ]
    if out is None:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))
        return None
    files.write_lines(out, lines)
    log.info(f"{len(lines):,} responses to {len(ids):,} prompts: {out}")
    return {"out": str(out), "prompts": len(ids), "responses": len(lines)}
