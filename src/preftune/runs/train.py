"""`preftune train` and `preftune.fit`: bring data and model together, run, and leave the folder behind."""

from __future__ import annotations

import logging
import shutil
import signal as signals
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune import methods, report
from preftune.config import TrainKeys, build, check_moving, dump
from preftune.data.template import apply_template
from preftune.errors import Interrupted, Refusal, RunFailed
from preftune.models.inspect import Facts, check_adapter_of, check_vocabulary, facts, resolve
from preftune.records import Group
from preftune.runs import folder as files
from preftune.runs import preview
from preftune.runs.prepare import Rendered, from_groups, read_data, render_said
from preftune.scoring.place import check_place
from preftune.training import trackers

if TYPE_CHECKING:
    import torch

    from preftune.runs.job import Progress, Run
    from preftune.scoring.store import Store, Stored
    from preftune.training.signals import Stop

log = logging.getLogger("preftune")


def train(keys: TrainKeys, *, config: Path | None = None, progress: Progress | None = None) -> Run | dict[str, Any]:
    """The run of a resolved config; of a dry run its plan.

    Args:
        config: the file that the keys were read from; that of an earlier run has the reference values beside it that it used.

    Raises:
        Refusal: anything that can be known to be wrong, before a model is loaded and before a folder is made.
        RunFailed, Interrupted: see `runs.trainer.run`.
    """
    model_ref = resolve(keys.model, "model")
    reference_ref = resolve(keys.reference.model, "reference") if keys.reference.model else None
    known = facts(model_ref, "model")
    check_vocabulary(known, facts(reference_ref, "reference") if reference_ref else None)
    check_adapter_of(known, keys.adapter)
    trackers.check(keys.train.trackers)
    files.choose_out(keys.out, "run", overwrite=keys.overwrite)
    data = read_data(keys.data.sources, keys.data, keys.eval_data, keys.method)
    check_moving(keys.reference, data.method)
    out = files.choose_out(keys.out, data.method.label, overwrite=keys.overwrite)
    read_from = [model_ref, reference_ref, *(source["path"] for reading in data.readings for source in reading.sources)]
    files.check_apart(out, [Path(path) for path in read_from if path])
    check_place(keys.reference.store, [path for path in read_from if path])

    # from here on torch and transformers are needed
    import torch

    from preftune.models.load import (
        check_same_vocabulary,
        check_tokenizer,
        device,
        load_model,
        load_tokenizer,
        longest,
        positions_of,
    )
    from preftune.models.reward import load_reward, name_padding
    from preftune.models.size import check_layers
    from preftune.runs.reference import OWN
    from preftune.scoring.store import Store, Stored, digest_of, open_store
    from preftune.training.memory import keep_freed_memory
    from preftune.training.precision import DTYPES, default_dtype

    keep_freed_memory()
    trust = keys.trust_remote_code
    tokenizer = load_tokenizer(model_ref, trust_remote_code=trust)
    apply_template(tokenizer, keys.data.template, [*data.train, *data.held])
    if reference_ref and not Path(reference_ref).is_dir():  # of a folder the files told it already
        check_same_vocabulary(tokenizer, load_tokenizer(reference_ref, key="reference", trust_remote_code=trust))
    scalar = methods.needs(data.method).scalar
    limit = longest(keys.max_length, positions_of(model_ref, trust_remote_code=trust), keys.adapter.virtual)
    check_layers(model_ref, keys.adapter, scalar=scalar, trust_remote_code=trust)
    rendered = render_said(data, tokenizer, keys, limit)
    keys = _resolved(keys, data.method, out, limit, adapter=known.adapter or keys.adapter.type != "none")
    if keys.dry_run:
        return preview.show(keys, rendered, tokenizer)
    dtype = DTYPES[keys.dtype] if keys.dtype else default_dtype(device())
    load = partial(load_reward if scalar else load_model, dtype=dtype, trust_remote_code=trust)
    other = partial(load, reference_ref, key="reference") if reference_ref else None
    # weights that train are loaded in float32; under an adapter the frozen ones stay in the compute precision
    frozen, packed = known.adapter or keys.adapter.type != "none", keys.adapter.type == "qlora"
    model = load(model_ref, quantize=packed) if frozen else load(model_ref, dtype=torch.float32)
    if scalar:
        name_padding(model, tokenizer)
    store = open_store(keys.reference.store) if _is_kept(keys) else None
    # None: files that are not here
    identity = store.digest(reference_ref or model_ref, packed=packed and not reference_ref) if store else None
    earlier = config.parent / "checkpoints" / OWN if config and store else None
    stores = [store, Store(earlier) if earlier and earlier.is_file() else None]
    kind = model.device.type
    known_all = identity and any(_has_all(Stored(one, identity, dtype, kind), rendered, keys) for one in stores if one)
    # before a folder is made: it may not be loadable. With nothing left to score it was, from the same files
    first = other() if other and not known_all else None
    check_tokenizer(model, tokenizer, first)
    identity = identity or (digest_of(first or model) if _is_kept(keys) else None)
    other = _first_then(first, other) if other else None
    passing = sum(p.nbytes for p in first.parameters()) if first is not None else 0
    sources = References(other, partial(load, model_ref), store, identity, earlier, passing)
    del first
    return _go(model, tokenizer, rendered, keys, sources, out, model_ref, progress)


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
    check_place(options.reference.store, ())
    check_tokenizer(model, tokenizer, reference)
    trackers.check(options.train.trackers)
    data = from_groups(groups, eval_groups, options.method, options.data)
    check_moving(options.reference, data.method)
    methods.check_head(data.method, scalar=gives_scalars(model))
    folder = files.choose_out(str(out), data.method.label, overwrite=options.overwrite) if out is not None else None
    if folder and methods.needs(data.method).scalar:
        name_padding(model, tokenizer)
    apply_template(tokenizer, options.data.template, [*data.train, *data.held])
    limit = longest(options.max_length, max_positions(model), options.adapter.virtual)
    rendered = render_said(data, tokenizer, options, limit)
    adapter = is_adapter(model) or options.adapter.type != "none"
    options = _resolved(options, data.method, folder, limit, adapter=adapter)
    store = open_store(options.reference.store) if _is_kept(options) else None
    kept = _is_kept(options) and (store or folder)
    identity = digest_of(model if reference is None else reference) if kept else None
    other = None if reference is None else lambda: reference
    sources = References(other=other, again=None, store=store, identity=identity)
    return _go(model, tokenizer, rendered, options, sources, folder, options.model, progress)


# keys of a run that stand in fit's own arguments, or that belong to files and loading
_NOT_IN_FIT = {
    "model": "the model is the first argument",
    "eval_data": "held-out groups are eval_groups",
    "dry_run": "preftune train has it",
    "trust_remote_code": "the model is loaded already",
}


def _check_fit_keys(keys: dict[str, Any]) -> None:
    """Refuses keys that `fit` would not read."""
    for key, why in _NOT_IN_FIT.items():
        if key in keys:
            raise Refusal(f"fit does not take it: {why}", code="not_in_fit", key=key)
    data = keys.get("data")
    if data is not None and (not isinstance(data, dict) or "sources" in data):
        raise Refusal("fit takes no sources: preftune.read(...) gives its groups", code="not_in_fit", key="data.sources")


@dataclass(frozen=True, slots=True)
class References:
    """How to get another reference model, and the starting policy once more after training; None: there is none.

    store, identity: where the reference's values are kept, and what it is known by there.
    earlier: of another run, with which this one's folder begins. passing: bytes of a reference that is gone before the steps.
    """

    other: Callable[[], Any] | None
    again: Callable[[], Any] | None
    store: Store | None
    identity: bytes | None
    earlier: Path | None = None
    passing: int = 0


def _is_kept(keys: TrainKeys) -> bool:
    """Whether there is a reference, and its values stay what they are."""
    return methods.needs(keys.method).reference and not keys.reference.sync_steps


def _has_all(stored: Stored, rendered: Rendered, keys: TrainKeys) -> bool:
    """Whether no reference value of a resolved run is left to be scored."""
    from preftune.evaluation.held_out import needed_rows
    from preftune.runs.job import plan_of, planned_rows

    method = methods.make(keys.method, beta=keys.beta)
    rows = planned_rows(rendered.train, plan_of(method, rendered.train, keys))
    with closing(stored.store):
        return stored.has(rendered.train, rows) and stored.has(rendered.held, needed_rows(rendered.held, method))


def _first_then(first: Any, again: Callable[[], Any]) -> Callable[[], Any]:
    """What is loaded already, if it is, given away once so that nothing here keeps it; then loaded anew."""
    held = [] if first is None else [first]
    return lambda: held.pop() if held else again()


def _go(
    model: Any,
    tokenizer: Any,
    rendered: Rendered,
    keys: TrainKeys,
    sources: References,
    out: Path | None,
    model_ref: str,
    progress: Progress | None,
) -> Run:
    """Adapter, precision, the run, its folder."""
    import torch

    from preftune.models.adapters import (
        adapter_dropout_on,
        add_adapter,
        frozen_copy,
        is_adapter,
        merged,
        trainable_adapter,
    )
    from preftune.models.load import save_model
    from preftune.models.weights import cast_parameters
    from preftune.runs.job import Job
    from preftune.runs.reference import OWN
    from preftune.runs.trainer import run
    from preftune.scoring.scorer import require_sharing
    from preftune.scoring.store import Store, Stored
    from preftune.training.precision import DTYPES, default_dtype

    dtype = DTYPES[keys.dtype] if keys.dtype else default_dtype(model.device)
    keys = keys.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    if any(p.is_floating_point() and torch.finfo(p.dtype).bits < torch.finfo(dtype).bits for p in model.parameters()):
        # what is measured would have digits that the model in hand could not keep
        log.info(f"the model's weights are held in {keys.dtype} from here on, the precision that it is trained and measured in")
        cast_parameters(model, dtype)
    new_adapter, again = keys.adapter.type != "none", sources.again
    if new_adapter:
        model = add_adapter(model, keys.adapter, seed=keys.seed, tokenizer=tokenizer, dtype=dtype)
        # a reference that follows the policy starts as it does: with virtual tokens that is not the base
        new_adapter = not (keys.adapter.virtual and keys.reference.sync_steps)
    else:
        model = trainable_adapter(model) if is_adapter(model) else model.requires_grad_(True)
    if is_adapter(model) and not new_adapter:
        start = frozen_copy(model)
        again = lambda: start  # noqa: E731  # the adapter as it was, around the same base
    if keys.train.sharing == "require":
        require_sharing(model)
    keys = _with_budget(keys, model, dtype, passing=sources.passing)
    stores = [Store(out / "checkpoints" / OWN)] if out else []
    stores += [sources.store] if sources.store else []
    identity, kind = sources.identity, model.device.type
    job = Job(
        model=adapter_dropout_on(model.eval()),
        tokenizer=tokenizer,
        train=rendered.train,
        held=rendered.held,
        method=methods.make(keys.method, beta=keys.beta),
        keys=keys,
        dtype=dtype,
        new_adapter=new_adapter,
        load_reference=sources.other,
        load_start=again,
        stored=tuple(Stored(store, identity, dtype, kind) for store in stores) if identity else (),
        out=out,
        **({"progress": progress} if progress else {}),
    )
    started = time.time()
    with _brought_to_an_end(out) as stop:
        environment = _open_folder(out, keys, rendered, model_ref, str(model.device)) if out else {}
        if out and sources.earlier and sources.earlier.is_file():
            (out / "checkpoints").mkdir()
            shutil.copyfile(sources.earlier, out / "checkpoints" / OWN)
        try:
            result = run(job, stop)
        finally:
            model.eval()  # the adapter's dropout off again
        if out is not None:
            if keys.adapter.merge and is_adapter(result.model):
                result.model = merged(result.model)
            save_model(result.model, tokenizer, out / "model", dtype=dtype)
            _close_folder(out, result, environment | {"seconds": round(time.time() - started, 1)})
    return result


def _with_budget(keys: TrainKeys, model: Any, dtype: torch.dtype, *, passing: int) -> TrainKeys:
    """With the token budget of a micro-batch that the free memory allows, where none is asked for."""
    from preftune.training.estimate import Estimate, free_bytes

    free = free_bytes(model.device)
    best = bool(keys.train.eval_every) and keys.train.keep_best
    reference, moving = methods.needs(keys.method).reference, bool(keys.reference.sync_steps)
    found = Estimate.of(model, dtype, best=best, reference=reference, moving=moving)
    if free is not None:
        free += sum(p.nbytes for p in model.parameters()) + passing  # they are there already
        if found.fixed_bytes > free:
            raise RunFailed(
                f"{found.parameters:,} parameters, {found.trained:,} of them trained, take {found.fixed_bytes / 1e9:.3g} GB "
                f"with gradients and AdamW's moments, and {free / 1e9:.3g} GB are free: train an adapter (adapter=lora)",
                code="out_of_memory",
            )
    if keys.train.tokens_per_microbatch is not None:
        return keys
    train = keys.train.model_copy(update={"tokens_per_microbatch": found.tokens(free)})
    return keys.model_copy(update={"train": train})


@contextmanager
def _brought_to_an_end(out: Path | None) -> Generator[Stop]:
    """A signal stops the steps where everything that was computed is saved; one that comes while the end is being written lets
    it be written, and is answered then."""
    from preftune.training.signals import stoppable

    with stoppable() as stop:
        yield stop
    if stop.signal is not None:
        done = f"; the run is complete in {out}" if out else ""
        name = signals.Signals(stop.signal).name
        raise Interrupted(f"stopped by {name} after the last step{done}", signal_number=stop.signal)


def _open_folder(out: Path, keys: TrainKeys, rendered: Rendered, model_ref: str, device: str) -> dict[str, Any]:
    """What can be written before the first step; gives the environment back, which the end adds to."""
    files.make(out, overwrite=keys.overwrite)
    files.write_text(out / "config.yaml", dump(keys))
    files.write_json(out / "data.json", rendered.summary)
    data_files = [source["path"] for source in rendered.summary["sources"]]
    environment = files.environment([*files.model_files(model_ref), *data_files], device=device)
    files.write_json(out / "environment.json", environment)
    return environment


def _close_folder(out: Path, result: Run, environment: dict[str, Any]) -> None:
    """The figures and the report; the weights are saved by then."""
    kept = {"kept_step": result.kept_step}
    files.write_json(out / "evaluation.json", {"before": result.before, "after": result.after, **kept})
    files.write_lines(out / "samples.jsonl", result.samples)
    files.write_json(out / "environment.json", environment)
    report.write(out)


def _resolved(
    keys: TrainKeys, method: methods.MethodOptions, out: Path | None, limit: int | None, *, adapter: bool
) -> TrainKeys:
    """The keys with every default filled in, said where it was chosen here."""
    usual = methods.needs(method).learning_rate
    rate = keys.learning_rate or (float(f"{10 * usual:g}") if adapter else usual)  # not 9.999999999999999e-06
    if keys.learning_rate is None:
        log.info(f"learning_rate: {rate:g}, the default for {method.label}{' with an adapter' if adapter else ''}")
    if keys.steps is not None and "epochs" in keys.model_fields_set:
        log.info(f"steps and epochs are both given: steps={keys.steps} counts")
    return keys.model_copy(
        update={
            "method": methods.resolved(method),
            "beta": methods.beta_said(method, keys.beta),
            "learning_rate": rate,
            "max_length": limit,
            "out": str(out) if out else None,
        }
    )
