"""`preftune.fit`: a run of a model and groups at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune import methods
from preftune.config import build, check_moving
from preftune.data.template import apply_template
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.models.inspect import Facts, check_adapter_of
from preftune.models.options import rate_factor
from preftune.records import Group
from preftune.runs import folder as files
from preftune.runs.conduct import References, Setup, conduct, is_kept, resolved
from preftune.runs.prepare import from_groups, render_said
from preftune.scoring.place import check_place
from preftune.training import extras

if TYPE_CHECKING:
    from preftune.runs.job import Progress, Run


def fit(
    model: Any,
    tokenizer: Any,
    groups: Sequence[Group],
    *,
    method: methods.Asked = "dpo",
    reference: Any = None,
    reference_store: str | Path | None = None,
    reference_sync_steps: int | None = None,
    reference_sync_alpha: float | None = None,
    eval_groups: Sequence[Group] | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **keys: Any,
) -> Run:
    """Trains `model` in place on groups at hand, without config or files.

    Args:
        model: a causal language model of transformers, or a peft model.
        tokenizer: its tokenizer.
        groups: from `preftune.read`.
        method: a name of docs/methods/README.md, or the keys of a run's `method`, such as `{"mix": {"dpo": 0.8, "sft": 0.2}}`;
            None: by the kind of marks.
        reference: another model; None: `model` as it is now.
        reference_store: file that keeps reference log-probabilities for later runs, or "off"; None: in the user's cache.
        reference_sync_steps, reference_sync_alpha: a reference that follows the policy, the keys `reference.sync_steps` and
            `.sync_alpha`; None: it stays, and 0.6.
        eval_groups: held-out groups; None: 5 % of the prompts by hash.
        out: a run folder to write; None: no files.
        progress: called with (phase, done, total, last metrics).
        **keys: the keys of a run: `beta=0.1, learning_rate=1e-6, train={"eval_every": 50}, adapter="lora"` ...

    Returns:
        A Run: `metrics`, `before`, `after`, `samples`, `model`.

    Raises:
        Refusal: keys, data or models that do not fit together.
        RunFailed: the policy does not start at its reference, or a step is not finite.

    Example:
        run = preftune.fit(model, tokenizer, preftune.read("pairs.jsonl"), beta=0.1, learning_rate=1e-6)
    """
    from preftune.models.adapters import gives_scalars, is_adapter, virtual_tokens
    from preftune.models.load import check_tokenizer, longest, max_positions
    from preftune.models.quantized import is_quantized
    from preftune.models.reward import name_padding
    from preftune.scoring.store import digest_of, open_store

    _check_fit_keys(keys)
    _check_loaded("model", model)
    if reference is not None:
        _check_loaded("reference", reference)
    sync = {"sync_steps": reference_sync_steps, "sync_alpha": reference_sync_alpha}
    of_reference = {"store": None if reference_store is None else str(reference_store), **sync}
    own = {"model": str(getattr(model, "name_or_path", "")), "data": {}, "reference": of_reference}
    options = build(TrainKeys, {**own, "method": methods.keys_of(method), **keys})
    if reference is not None and reference_sync_steps is not None:
        line = "a reference that follows the policy starts as the policy: leave one of the two away"
        raise Refusal(line, code="unused_key", key="reference")
    packed, virtual = is_quantized(model), virtual_tokens(model)
    check_adapter_of(Facts("", adapter=is_adapter(model), virtual=virtual, quantized=packed), options.adapter)
    if options.adapter.type == "qlora" and not packed:
        line = "the model's weights are not in 4 bits: load it with quantization_config=BitsAndBytesConfig(load_in_4bit=True)"
        raise Refusal(line, code="not_quantized", key="adapter.type")
    check_place(options.reference.store, (), out)
    check_tokenizer(model, tokenizer, reference)
    extras.check(options.train)
    data = from_groups(groups, eval_groups, options.method, options.data)
    check_moving(options.reference, data.method)
    methods.check_head(data.method, scalar=gives_scalars(model))
    folder = files.choose_out(str(out), data.method.label, overwrite=options.overwrite) if out is not None else None
    if methods.needs(data.method).scalar:
        name_padding(model, tokenizer)
    apply_template(tokenizer, options.data.template, [*data.train, *data.held])
    limit = longest(options.max_length, max_positions(model), options.adapter.virtual)
    rendered = render_said(data, tokenizer, options, limit)
    faster = rate_factor(options.adapter, adapter=is_adapter(model), virtual=virtual)
    options = resolved(options, data.method, folder, limit, faster=faster)
    store = open_store(options.reference.store) if is_kept(options) else None
    kept = is_kept(options) and (store or folder)
    identity = digest_of(model if reference is None else reference) if kept else None
    other = None if reference is None else lambda: reference
    sources = References(other=other, again=None, store=store, identity=identity)
    inputs = files.inputs(*filter(None, [options.model]))
    return conduct(Setup(model, tokenizer, rendered, options, sources, inputs, folder, progress))


# keys of a run that stand in fit's own arguments, or that belong to files and loading
_NOT_IN_FIT = {
    "model": "the model is the first argument",
    "eval_data": "held-out groups are eval_groups",
    "dry_run": "preftune train has it",
    "resume": "preftune train has it",
    "trust_remote_code": "the model is loaded already",
}


def _check_loaded(key: str, given: Any) -> None:
    """Refuses what is no model: a path, the keys of a run's `reference`, or the inside of an adapter."""
    from preftune.models.adapters import is_adapter

    if callable(getattr(given, "named_parameters", None)):
        if hasattr(given, "peft_config") and not is_adapter(given):
            line = "an adapter was put into this model: give the peft model around it, which fit returned as run.model"
            raise Refusal(line, code="not_a_model", key=key)
        return
    settings = "; what a run's config says under `reference` is reference_store=, reference_sync_steps=, reference_sync_alpha="
    line = f"fit takes a loaded model of transformers, not {given!r:.80}" + (settings if isinstance(given, dict) else "")
    raise Refusal(line, code="not_a_model", key=key)


def _check_fit_keys(keys: dict[str, Any]) -> None:
    """Refuses keys that `fit` would not read."""
    for key, why in _NOT_IN_FIT.items():
        if key in keys:
            raise Refusal(f"fit does not take it: {why}", code="not_in_fit", key=key)
    data = keys.get("data")
    if data is not None and (not isinstance(data, dict) or "sources" in data):
        raise Refusal("fit takes no sources: preftune.read(...) gives its groups", code="not_in_fit", key="data.sources")
