"""preftune evaluate"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from preftune import methods
from preftune.cli.console import Watch
from preftune.config import resolve
from preftune.errors import Refusal
from preftune.keys import EvaluateKeys
from preftune.models import inspect

log = logging.getLogger("preftune")


# keys that say nothing to the other kind of evaluation
HELD_OUT = ("reference", "method", "beta", "max_length", "kl_samples")
WIN_RATE = ("prompts", "scorer")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    keys = resolve(EvaluateKeys, words)
    if keys.data is not None and keys.against is not None:
        line = "held-out data and a win rate (against=...) are two evaluations: leave one away, data=null or against=null"
        raise Refusal(line, code="unused_key", key="data")
    if keys.against is not None:
        _check_unused(keys, words, HELD_OUT, "a win rate", "evaluate data=... uses it")
        result = _win_rate(keys)
    elif keys.data is not None:
        _check_unused(keys, words, WIN_RATE, "held-out data", "it belongs to a win rate: name the other model with against=...")
        result = _held_out(keys)
    else:
        raise Refusal(
            "evaluate needs data=... (accuracy), or against=... prompts=... scorer=...", code="missing_key", key="data"
        )
    if not as_json:
        _print(result)
    return result


def _check_unused(keys: EvaluateKeys, words: list[str], names: Sequence[str], what: str, where: str) -> None:
    """Refuses a word that this evaluation would not read; of a file, which may serve others too, it is said."""
    unused = [name for name in names if name in keys.model_fields_set]
    given = {word.partition("=")[0].partition(".")[0] for word in words}
    for name in unused:
        if name in given:
            raise Refusal(f"{what} does not use it; {where}", code="unused_key", key=name)
    if unused:
        log.info(f"not used by {what}: {', '.join(unused)}")


def _held_out(keys: EvaluateKeys) -> dict[str, Any]:
    assert keys.data is not None
    from preftune.cli.common import open_data

    data = open_data(keys.model, keys.data, keys, reference=keys.reference.model, check=partial(methods.choose, keys.method))
    from preftune.evaluation.evaluate import evaluate
    from preftune.models.reward import load_either

    beta = keys.beta and methods.beta_said(methods.choose(keys.method, data.batch.groups), keys.beta)
    models = data.models(load=load_either)

    with Watch() as watch:
        return evaluate(
            models[0],
            data.tokenizer,
            data.batch,
            reference=models[1],
            method=keys.method,
            beta=beta,
            template=keys.data.template,
            kl_samples=keys.kl_samples,
            max_new_tokens=keys.max_new_tokens,
            seed=keys.seed,
            progress=watch,
        )


def _win_rate(keys: EvaluateKeys) -> dict[str, Any]:
    from preftune.functions import check_scorer, load_function
    from preftune.runs.prepare import load_said

    if keys.prompts is None or keys.scorer is None or keys.against is None:
        missing = "prompts" if keys.prompts is None else "scorer"
        line = "a win rate needs against=..., prompts=... and scorer=package.module:function"
        raise Refusal(line, code="missing_key", key=missing)
    scorer = load_function(keys.scorer, "scorer")
    for ref, key in ((keys.model, "model"), (keys.against, "against")):
        inspect.check_vocabulary(inspect.facts(inspect.resolve(ref, key), key))
    groups = load_said(keys.prompts.sources, keys.prompts).groups
    check_scorer(scorer, keys.scorer)
    from preftune.evaluation.evaluate import compare
    from preftune.models.load import load_model, load_tokenizer
    from preftune.training.precision import DTYPES

    dtype, trust = DTYPES[keys.dtype or "float32"], keys.trust_remote_code
    model = load_model(keys.model, dtype=dtype, trust_remote_code=trust)
    against = load_model(keys.against, dtype=dtype, key="against", trust_remote_code=trust)
    with Watch() as watch:
        return compare(
            model,
            against,
            load_tokenizer(keys.model, trust_remote_code=trust),
            groups,
            scorer,
            name=keys.scorer,
            against_tokenizer=load_tokenizer(keys.against, key="against", trust_remote_code=trust),
            template=keys.prompts.template,
            max_new_tokens=keys.max_new_tokens,
            seed=keys.seed,
            progress=watch,
        )


def _print(result: dict[str, Any]) -> None:
    for name, value in result.items():
        if value is None or isinstance(value, list) or name.endswith("_interval"):
            continue
        interval = result.get(f"{name}_interval")
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"{name:<16} {shown}" + (f"   [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""))
