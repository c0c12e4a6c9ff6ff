"""preftune merge RUN out=DIR"""

from __future__ import annotations

import logging
from typing import Any

from preftune.config import resolve
from preftune.errors import Refusal
from preftune.keys import MergeKeys
from preftune.models import inspect
from preftune.models.options import NO_MERGE
from preftune.runs import folder as files

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    runs = [w for w in words if "=" not in w]
    if len(runs) != 1:
        raise Refusal("merge takes one run: preftune merge RUN out=DIR", code="usage")
    keys = resolve(MergeKeys, [w for w in words if "=" in w])
    ref = inspect.resolve(runs[0], "RUN")
    known = inspect.facts(ref, "RUN")
    if not known.adapter:
        raise Refusal(f"{ref} is a plain model: there is no adapter to merge", code="no_adapter", key="RUN")
    if known.virtual:
        raise Refusal(NO_MERGE, code="cannot_merge", key="RUN")
    out = files.choose_out(keys.out, "merged", overwrite=keys.overwrite)
    from preftune.models.adapters import merged
    from preftune.models.load import load_tokenizer, save_model, stored_dtype
    from preftune.models.reward import load_either, name_padding
    from preftune.training.precision import DTYPES

    trust = keys.trust_remote_code
    model = merged(load_either(ref, trust_remote_code=trust))  # the sum is taken in float32, and rounded once
    dtype = DTYPES[keys.dtype] if keys.dtype else stored_dtype(ref, trust_remote_code=trust)
    tokenizer = load_tokenizer(ref, trust_remote_code=trust)
    if known.classifier:
        name_padding(model, tokenizer)
    files.make(out, overwrite=keys.overwrite).rmdir()
    save_model(model.to(dtype), tokenizer, out)
    base = " (the base is what its 4 bits stand for)" if known.quantized else ""
    log.info(f"merged model, in {str(dtype).removeprefix('torch.')}{base}: {out}")
    return {"out": str(out)}
