"""preftune doctor"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

from preftune import methods
from preftune.config import resolve
from preftune.errors import RunFailed
from preftune.keys import DoctorKeys
from preftune.models.inspect import check_adapter_of, facts
from preftune.models.inspect import resolve as resolve_model
from preftune.scoring.place import check_place

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    keys = resolve(DoctorKeys, words)
    check_place(keys.reference.store, ())
    from preftune.cli.common import open_data

    check_adapter_of(facts(resolve_model(keys.model, "model"), "model"), keys.adapter)
    check = partial(methods.choose, keys.method)
    data = open_data(keys.model, keys.data, keys, reference=None, check=check, virtual=keys.adapter.virtual)
    from preftune.data.render import render
    from preftune.models.adapters import add_adapter, is_adapter, trainable_adapter
    from preftune.models.load import device, load_model
    from preftune.models.reward import load_reward, name_padding
    from preftune.models.size import check_layers
    from preftune.models.weights import name_of
    from preftune.runs.doctor import examine, expect
    from preftune.runs.job import rows_of
    from preftune.training.options import TrainOptions
    from preftune.training.precision import DTYPES, default_dtype
    from preftune.training.steps import plan

    asked = methods.choose(keys.method, data.batch.groups)
    dtype = DTYPES[keys.dtype] if keys.dtype else default_dtype(device())
    scalar = methods.needs(asked).scalar
    check_layers(data.refs[0], keys.adapter, scalar=scalar, trust_remote_code=keys.trust_remote_code)
    packed = keys.adapter.type == "qlora"
    load = partial(load_reward if scalar else load_model, quantize=packed)
    model, _ = data.models(dtype, load=load)
    if scalar:
        name_padding(model, data.tokenizer)
    new_adapter = keys.adapter.type != "none"
    if new_adapter:
        model = add_adapter(model, keys.adapter, seed=keys.seed, tokenizer=data.tokenizer, dtype=dtype)
    else:
        model = trainable_adapter(model) if is_adapter(model) else model.requires_grad_(True)

    method = methods.make(asked, beta=1.0)  # what it costs does not depend on it
    batch = method.rows(data.batch, partial(render, tokenizer=data.tokenizer, template=keys.data.template))
    options: Any = {"batch_size": keys.batch_size, "epochs": 1.0, "steps": None, "seed": keys.seed}
    examples = method.examples(batch.groups)
    the_plan = plan(examples, learning_rate=1.0, options=TrainOptions(), **options)
    steps = [rows_of(batch, own) for _, own in the_plan.batches]
    known_by: Any = {"ref": data.refs[0], "store": keys.reference.store, "packed": packed}
    lines = examine(model, batch, steps[0], dtype=dtype, new_adapter=new_adapter, **known_by)
    expected = expect(model, batch, steps, examples, dtype=dtype, reference=method.needs_reference)
    healthy = all(line["passed"] for line in lines)
    told = {"healthy": healthy, "method": method.name, "dtype": name_of(dtype)}
    result = {**told, "checks": lines, "run": expected}
    if not healthy or (not as_json and log.isEnabledFor(logging.INFO)):
        _print(result, keys.batch_size)
    if not healthy:
        wrong = ", ".join(line["check"] for line in lines if not line["passed"])
        raise RunFailed(f"not the same: {wrong}. Training on this model and machine would go wrong", code="unhealthy")
    return result


def _print(result: dict[str, Any], batch_size: int) -> None:
    from preftune.runs.preview import duration

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    rows = [("check", "", "nats per token", "gradients", "")]
    for line in result["checks"]:
        verdict = "same" if line["passed"] else "DIFFERENT"
        rows.append((line["check"], verdict, shown(line["values"]), shown(line["gradients"]), line["note"]))
    name, same, values, slopes, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"{a:<{name}}  {b:<{same}}  {c:>{values}}  {d:>{slopes}}  {e}".rstrip() for a, b, c, d, e in rows]
    run = result["run"]
    free = f" of {run['free_gb']:.3g} free" if run["free_gb"] is not None else ""
    about = "not known" if run["memory_gb"] is None else f"about {run['memory_gb']:.3g} GB"
    saved = f"{run['tokens']:,} tokens, {run['saved']:.0%} fewer than one by one"
    lines += [
        f"one epoch of {result['method']} in {result['dtype']}: {run['steps']:,} steps of {batch_size}, {saved}",
        f"time: about {duration(run['seconds'])} for the steps, at half the rate of one matrix product on this machine",
        f"memory: {about}{free}, {run['fixed_gb']:.3g} GB of it weights, gradients and the optimizer's state",
    ]
    print("\n".join(lines), file=sys.stderr)
