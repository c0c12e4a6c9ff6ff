"""`preftune check`: the rows against each other; with a model also what its tokenizer makes of them and what a run takes."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from preftune import methods
from preftune.checks.check import Checked, Progress, check
from preftune.checks.codes import finding
from preftune.checks.tokens import Tokens
from preftune.config import build
from preftune.data.options import Sources
from preftune.errors import Refusal
from preftune.keys import CheckKeys, TrainKeys
from preftune.models.inspect import check_vocabulary, facts, resolve
from preftune.runs import preview
from preftune.runs.prepare import check_template

log = logging.getLogger("preftune")


def examine(keys: CheckKeys, sources: Sources, progress: Progress) -> Checked:
    """The report of a check by its keys.

    Raises:
        Refusal: a file or a model that cannot be read.
    """
    tokens = _tokens(keys) if keys.model else None
    checked = check(
        sources,
        options=keys.data,
        eval_sources=keys.eval_data,
        near_duplicates=keys.near_duplicates,
        columns=tuple(keys.count),
        tokens=tokens,
        progress=progress,
    )
    if tokens and checked.report["kept"]:
        checked.report["run"] = _run(keys, checked, tokens)
    return checked


def _tokens(keys: CheckKeys) -> Tokens:
    assert keys.model is not None
    ref = resolve(keys.model, "model")
    check_vocabulary(facts(ref, "model"), None)
    check_template(keys.data.template)
    from preftune.models.load import load_tokenizer, longest, positions_of

    tokenizer = load_tokenizer(ref, trust_remote_code=keys.trust_remote_code)
    limit = longest(keys.max_length, positions_of(ref, trust_remote_code=keys.trust_remote_code))
    return Tokens(tokenizer, limit=limit, too_long=keys.data.too_long, template=keys.data.template)


def _run(keys: CheckKeys, checked: Checked, tokens: Tokens) -> dict[str, Any]:
    """Steps, memory and time of an epoch; what refuses the run is a finding."""
    try:
        method = methods.choose(keys.method, list(checked.samples.values()))
    except Refusal as refusal:
        checked.report["findings"].insert(0, asdict(finding("mixed_marks", refusal.message)))
        return {}
    given: dict[str, Any] = {"model": keys.model, "data": {}, "method": methods.keys_of(method), "batch_size": keys.batch_size}
    given |= {"adapter": keys.adapter.model_dump(exclude_unset=True), "dtype": keys.dtype, "max_length": keys.max_length}
    run = build(TrainKeys, {**given, "trust_remote_code": keys.trust_remote_code})
    steps, largest, pair = tokens.steps(keys.batch_size)
    found: dict[str, Any] = {"method": method.label, "steps": steps, "batch_size": keys.batch_size}
    estimate = preview.estimate_of(run, evaluates=True)
    return found | (preview.takes(run, estimate, [largest], pair, tokens.summary()["shared"]) if estimate else {})
