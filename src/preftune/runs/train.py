"""`preftune train`: what the keys name, read, checked and loaded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from preftune import methods, processes
from preftune.config import check_moving
from preftune.data.template import apply_template
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.models.inspect import check_adapter_of, check_vocabulary, facts, resolve
from preftune.models.options import rate_factor
from preftune.runs import folder as files
from preftune.runs import preview
from preftune.runs.conduct import References, Setup, conduct, is_kept, resolved
from preftune.runs.prepare import Data, RenderedData, read_data, render_said
from preftune.runs.resume import check_files, check_no_more, keys_of_run
from preftune.scoring.place import check_place
from preftune.training import extras

if TYPE_CHECKING:
    from preftune.runs.job import Progress, Run
    from preftune.scoring.store import Stored

log = logging.getLogger("preftune")


def train(keys: TrainKeys, *, config: Path | None = None, progress: Progress | None = None) -> Run | dict[str, Any]:
    """The run of a resolved config; of a dry run its plan.

    Args:
        keys: with `resume`, those that `runs.resume.keys_of` gave.
        config: the file that the keys were read from; that of an earlier run has the reference values beside it that it used.

    Raises:
        Refusal: anything that can be known to be wrong, before a model is loaded and before a folder is made.
        RunFailed, Interrupted: see `runs.trainer.run`.
    """
    with processes.joined(), contextlib.ExitStack() as taken:
        with processes.agreeing():
            if keys.resume and not processes.number():
                taken.enter_context(files.held(Path(keys.resume), "resume"))
            setup = _setup(keys, config, progress)
        if not isinstance(setup, Setup):
            return setup
        _check_shared(setup.resume)
        return conduct(setup)


def _setup(keys: TrainKeys, config: Path | None, progress: Progress | None) -> Setup | dict[str, Any]:
    """All that a run is made of; of a dry run its plan."""
    _check_processes(keys)
    found = _models(keys)
    extras.check(keys.train)
    reopened = Path(keys.resume) if keys.resume else None
    named = [found.model, found.reference, *(source.path for source in (*keys.data.sources, *keys.eval_data))]
    if reopened:  # whatever became of the store since, it goes on with the values of its own
        known = check_files(reopened)
    else:
        known = None
        files.choose_out(keys.out, "run", overwrite=keys.overwrite)
        check_place(keys.reference.store, filter(None, named), keys.out)
    data = read_data(keys.data.sources, keys.data, keys.eval_data, keys.method)
    check_moving(keys.reference, data.method)
    out = reopened or files.choose_out(keys.out, data.method.label, overwrite=keys.overwrite)
    read_from = [found.model, found.reference, *(source["path"] for reading in data.readings for source in reading.sources)]
    files.check_apart(out, [Path(path) for path in read_from if path])
    inputs = files.inputs(*filter(None, read_from))
    if reopened and known is not None:
        check_no_more(reopened, known, inputs)
    tokenizer, rendered, limit = _rendered(keys, found, data)
    faster = rate_factor(keys.adapter, adapter=found.adapter, virtual=found.virtual)
    keys = resolved(keys, data.method, out, limit, faster=faster)
    if keys.dry_run:
        return preview.show(keys, rendered, tokenizer)
    resume = _checkpoint(reopened, keys, rendered) if reopened else None
    model, references = _loaded(keys, found, tokenizer, rendered, config)
    return Setup(model, tokenizer, rendered, keys, references, inputs, out, progress, reopened is not None, resume)


def _check_shared(resume: Path | None) -> None:
    """Refuses a run folder that is not the same for all processes, as on machines without a common disk."""
    found = {path.name if path else "none" for path in processes.gathered(resume)}
    if len(found) > 1:
        line = f"processes see different checkpoints ({', '.join(sorted(found))}): all machines need the same run folder"
        raise Refusal(line, code="not_shared", key="resume")


def _check_processes(keys: TrainKeys) -> None:
    """Refuses more processes than a step has examples."""
    if processes.size() > keys.batch_size:
        line = f"{processes.size()} processes cannot share {keys.batch_size} examples of a step: start fewer, or raise it"
        raise Refusal(line, code="too_many_processes", key="batch_size")
    if keys.train.parallel == "fsdp" and processes.size() > 1:
        optimizer = keys.train.optimizer
        whole = f"train.optimizer={optimizer}, whose state is no part of it" if optimizer != "adamw" else None
        packed = "weights in 4 bits" if keys.adapter.type == "qlora" else None
        moving = "a reference that follows the policy" if keys.reference.sync_steps else None
        merging = (
            "an adapter that is folded in (adapter.merge; preftune merge RUN does it later)" if keys.adapter.merge else None
        )
        if what := whole or packed or moving or merging:
            raise Refusal(f"fsdp does not go with {what}", code="no_parts", key="train.parallel")


class _Models(NamedTuple):
    """Where policy and reference are, and whether the policy is an adapter already, with how many virtual tokens."""

    model: str
    reference: str | None
    adapter: bool
    virtual: int


def _models(keys: TrainKeys) -> _Models:
    model = resolve(keys.model, "model")
    reference = resolve(keys.reference.model, "reference") if keys.reference.model else None
    known = facts(model, "model")
    check_vocabulary(known, facts(reference, "reference") if reference else None)
    check_adapter_of(known, keys.adapter)
    return _Models(model, reference, known.adapter, known.virtual)


# from here on torch and transformers are needed


def _rendered(keys: TrainKeys, found: _Models, data: Data) -> tuple[Any, RenderedData, int | None]:
    """(tokenizer, tokens of all rows, the longest that a row may be)"""
    from preftune.models.load import check_same_vocabulary, load_tokenizer, longest, positions_of
    from preftune.models.size import check_layers
    from preftune.training.memory import keep_freed_memory

    keep_freed_memory()
    trust = keys.trust_remote_code
    tokenizer = load_tokenizer(found.model, trust_remote_code=trust)
    apply_template(tokenizer, keys.data.template, [*data.train, *data.held])
    if found.reference and not Path(found.reference).is_dir():  # of a folder the files told it already
        check_same_vocabulary(tokenizer, load_tokenizer(found.reference, key="reference", trust_remote_code=trust))
    limit = longest(keys.max_length, positions_of(found.model, trust_remote_code=trust), keys.adapter.virtual)
    check_layers(found.model, keys.adapter, scalar=methods.needs(data.method).scalar, trust_remote_code=trust)
    return tokenizer, render_said(data, tokenizer, keys, limit), limit


def _checkpoint(run: Path, keys: TrainKeys, rendered: RenderedData) -> Path | None:
    """Where a run goes on: its newest checkpoint that is whole; None: it was stopped before the first.

    Raises:
        Refusal: it is complete and has none, or is asked to end earlier than it was to.
    """
    from preftune.runs.checkpoint import latest
    from preftune.runs.job import plan_of

    method = methods.make(keys.method, beta=keys.beta)
    asked, before = (len(plan_of(method, rendered.train, one)) for one in (keys, keys_of_run(run)))
    if asked < before:
        line = f"{run} was begun for {before:,} steps, and {asked:,} are asked for: resume makes a run longer, not shorter"
        raise Refusal(line, code="shorter", key="steps" if keys.steps is not None else "epochs")
    found = latest(run / "checkpoints")
    if found is None:
        if (run / "evaluation.json").is_file():
            line = f"{run} is complete and has no checkpoint to go on from: begin a run with model={run}"
            raise Refusal(line, code="no_checkpoint", key="resume")
        log.info(f"{run}: stopped before its first checkpoint: it begins again")
        return None
    return found


def _loaded(
    keys: TrainKeys, found: _Models, tokenizer: Any, rendered: RenderedData, config: Path | None
) -> tuple[Any, References]:
    """The policy, and where its reference comes from. A reference model that is another one is loaded too, before a folder is
    made: it may not be loadable. With no value left to score it was, from the same files."""
    import torch

    from preftune.models.load import check_tokenizer, device, load_model
    from preftune.models.reward import load_reward, name_padding
    from preftune.runs.reference import OWN
    from preftune.scoring.store import Store, Stored, digest_of, open_store
    from preftune.training.precision import DTYPES, default_dtype

    dtype = DTYPES[keys.dtype] if keys.dtype else default_dtype(device())
    scalar = methods.needs(keys.method).scalar
    load = partial(load_reward if scalar else load_model, dtype=dtype, trust_remote_code=keys.trust_remote_code)
    other = partial(load, found.reference, key="reference") if found.reference else None
    # weights that train are loaded in float32; under an adapter the frozen ones stay in the compute precision
    frozen, packed = found.adapter or keys.adapter.type != "none", keys.adapter.type == "qlora"
    model = load(found.model, quantize=packed) if frozen else load(found.model, dtype=torch.float32)
    if scalar:
        name_padding(model, tokenizer)
    store = open_store(keys.reference.store) if is_kept(keys) else None
    # None: files that are not here
    identity = store.digest(found.reference or found.model, packed=packed and not found.reference) if store else None
    earlier = config.parent / "checkpoints" / OWN if config and store else None
    stores = [store, Store(earlier) if earlier and earlier.is_file() else None]
    kind = model.device.type
    known_all = identity and any(_has_all(Stored(one, identity, dtype, kind), rendered, keys) for one in stores if one)
    first = other() if other and not known_all else None
    check_tokenizer(model, tokenizer, first)
    identity = identity or (digest_of(first or model) if is_kept(keys) else None)
    passing = sum(p.nbytes for p in first.parameters()) if first is not None else 0
    again = partial(load, found.model)
    return model, References(_first_then(first, other) if other else None, again, store, identity, earlier, passing)


def _has_all(stored: Stored, rendered: RenderedData, keys: TrainKeys) -> bool:
    """Whether no reference value of a resolved run is left to be scored."""
    from preftune.evaluation.held_out import needed_rows
    from preftune.runs.job import plan_of, planned_rows

    method = methods.make(keys.method, beta=keys.beta)
    rows = planned_rows(rendered.train, plan_of(method, rendered.train, keys))
    with contextlib.closing(stored.store):
        return stored.has(rendered.train, rows) and stored.has(rendered.held, needed_rows(rendered.held, method))


def _first_then(first: Any, again: Callable[[], Any]) -> Callable[[], Any]:
    """What is loaded already, if it is, given away once so that nothing here keeps it; then loaded anew."""
    held = [] if first is None else [first]
    return lambda: held.pop() if held else again()
