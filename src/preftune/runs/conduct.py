"""From what was brought together to a run and its folder: adapter, precision, token budget, steps, files."""

from __future__ import annotations

import logging
import shutil
import signal as signals
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune import methods, processes, report
from preftune.config import dump
from preftune.errors import Interrupted, Refusal, RunFailed
from preftune.keys import TrainKeys
from preftune.runs import folder as files
from preftune.runs.prepare import RenderedData

if TYPE_CHECKING:
    import torch

    from preftune.runs.job import Job, Progress, Run
    from preftune.scoring.store import Store
    from preftune.training.signals import Stop

log = logging.getLogger("preftune")


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


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a run is made of, brought together: loaded, rendered, resolved.

    inputs: the files that it was made from. out: its folder, if it has one. reopened: a run began there, and this one goes on
    for it, from the checkpoint `resume` or, where there is none yet, from the start.
    """

    model: Any
    tokenizer: Any
    rendered: RenderedData
    keys: TrainKeys
    references: References
    inputs: Sequence[Path] = ()
    out: Path | None = None
    progress: Progress | None = None
    reopened: bool = False
    resume: Path | None = None


def is_kept(keys: TrainKeys) -> bool:
    """Whether there is a reference, and its values stay what they are."""
    return methods.needs(keys.method).reference and not keys.reference.sync_steps


def resolved(keys: TrainKeys, method: methods.MethodOptions, out: Path | None, limit: int | None, *, faster: int) -> TrainKeys:
    """The keys with every default filled in, said where it was chosen here. faster: of `models.options.rate_factor`."""
    usual = methods.needs(method).learning_rate
    if keys.train.kl_budget is not None and not methods.needs(method).reference:
        raise Refusal(f"{method.label} has no reference to measure a KL from", code="unused_key", key="train.kl_budget")
    rate = keys.learning_rate or float(f"{faster * usual:g}")  # not 9.999999999999999e-06
    if keys.learning_rate is None:
        log.info(f"learning_rate: {rate:g}, the default for {method.label}{' with this adapter' if faster > 1 else ''}")
        if keys.train.optimizer == "adafactor":
            log.info(
                "that default is AdamW's: adafactor's steps are relative to the size of each weight, and take a larger one"
            )
    if keys.steps is not None and keys.epochs != 1:  # which every config.yaml holds
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


def conduct(setup: Setup) -> Run:
    """The run, and its folder.

    Raises:
        RunFailed, Interrupted: see `runs.trainer.run`.
    """
    from preftune.models.adapters import is_adapter, merged
    from preftune.models.load import save_model
    from preftune.models.low_rank import fused
    from preftune.models.weights import whole_state
    from preftune.runs.checkpoint import needed
    from preftune.runs.reference import OWN
    from preftune.runs.trainer import run
    from preftune.training.determinism import deterministic

    job = _job(setup)
    out, earlier, started = setup.out if job.writes else None, setup.references.earlier, time.time()
    with _brought_to_an_end(out) as stop, ExitStack() as taken:
        if out and not setup.reopened:
            taken.enter_context(files.held(files.make(out, overwrite=job.keys.overwrite)))
            if earlier and earlier.is_file():
                (out / "checkpoints").mkdir()
                _take_over(earlier, out / "checkpoints" / OWN)
        environment = _open_folder(out, job.keys, setup) if out else {}
        try:
            repeated = deterministic(job.model.device) if job.keys.train.deterministic else nullcontext()
            with fused(job.model), repeated:
                result = run(job, stop)
        finally:
            job.model.eval()  # the adapter's dropout off again, and its checkpointing
        if job.keys.adapter.merge and is_adapter(result.model) and job.writes:
            result.model = merged(result.model)
        state = whole_state(result.model) if job.out else None
        if out is not None:
            with needed("model/", out / "checkpoints", job.again):
                save_model(result.model, setup.tokenizer, out / "model", dtype=job.dtype, state=state)
            _close_folder(out, result, environment | {"seconds": round(time.time() - started, 1)})
    return result


def _take_over(earlier: Path, own: Path) -> None:
    """The reference values of the run that this one repeats, where they can be had: they only save work."""
    try:
        shutil.copyfile(earlier, own)
    except OSError as error:
        own.unlink(missing_ok=True)
        log.warning(f"{earlier}: its reference log-probabilities cannot be taken over, and are scored again: {error}")


def _job(setup: Setup) -> Job:
    """The model in its precision, with its adapter; the budget; the stores."""
    from preftune.models.adapters import adapter_dropout_on, checkpointing_on
    from preftune.models.weights import name_of
    from preftune.runs.job import Job
    from preftune.runs.reference import OWN
    from preftune.scoring.scorer import check_recomputed
    from preftune.scoring.sharing import require_sharing
    from preftune.scoring.store import Store, Stored
    from preftune.training.precision import DTYPES, default_dtype

    keys, references, kind = setup.keys, setup.references, setup.model.device.type
    dtype = DTYPES[keys.dtype] if keys.dtype else default_dtype(setup.model.device)
    keys = keys.model_copy(update={"dtype": name_of(dtype)})
    model, new_adapter, again = _trainable(setup, dtype)
    if keys.train.kl_budget is not None and not (new_adapter or references.other or again):
        line = "the starting policy is gone once it trains: give fit a reference, such as a copy of it, or train an adapter"
        raise Refusal(line, code="no_reference", key="train.kl_budget")
    if keys.train.sharing == "require":
        require_sharing(model)
    if keys.train.checkpointing:
        check_recomputed(model, share=keys.train.shares)
    keys = _with_budget(keys, model, dtype, passing=references.passing)
    stores = [Store(setup.out / "checkpoints" / OWN)] if setup.out else []
    stores += [references.store] if references.store else []
    stores = stores if processes.rank() == 0 else []
    identity = references.identity
    model = adapter_dropout_on(model.eval())
    return Job(
        model=checkpointing_on(model) if keys.train.checkpointing else model,
        tokenizer=setup.tokenizer,
        train=setup.rendered.train,
        held=setup.rendered.held,
        method=methods.make(keys.method, beta=keys.beta),
        keys=keys,
        dtype=dtype,
        new_adapter=new_adapter,
        load_reference=references.other,
        load_start=again,
        stored=tuple(Stored(store, identity, dtype, kind) for store in stores) if identity else (),
        out=setup.out,
        resume=setup.resume,
        **({"progress": setup.progress} if setup.progress else {}),
    )


def _trainable(setup: Setup, dtype: torch.dtype) -> tuple[Any, bool, Callable[[], Any] | None]:
    """(the model with what trains switched on, whether an adapter is new and its base the reference, the start once more)."""
    import torch

    from preftune.models.adapters import add_adapter, frozen_copy, is_adapter, trainable_adapter
    from preftune.models.weights import cast_parameters, name_of

    model, keys, again = setup.model, setup.keys, setup.references.again
    if any(p.is_floating_point() and torch.finfo(p.dtype).bits < torch.finfo(dtype).bits for p in model.parameters()):
        # what is measured would have digits that the model in hand could not keep
        log.info(
            f"the model's weights are held in {name_of(dtype)} from here on, the precision that it is trained and measured in"
        )
        cast_parameters(model, dtype)
    new_adapter = keys.adapter.type != "none"
    if new_adapter:
        model = add_adapter(model, keys.adapter, seed=keys.seed, tokenizer=setup.tokenizer, dtype=dtype)
        # a reference that follows the policy starts as it does: with virtual tokens that is not the base
        new_adapter = not (keys.adapter.virtual and keys.reference.sync_steps)
    else:
        model = trainable_adapter(model) if is_adapter(model) else model.requires_grad_(True)
    if is_adapter(model) and not new_adapter:
        start = frozen_copy(model)
        again = lambda: start  # noqa: E731  # the adapter as it was, around the same base
    return model, new_adapter, again


def _with_budget(keys: TrainKeys, model: Any, dtype: torch.dtype, *, passing: int) -> TrainKeys:
    """With the token budget of a micro-batch that the free memory allows, where none is asked for."""
    from preftune.training.estimate import Estimate, free_bytes
    from preftune.training.precision import reused_bytes

    own, parts = free_bytes(model.device), processes.size() if keys.train.parallel == "fsdp" else 1
    if own is not None:  # they are there already; what is cut into parts is cut in its place
        own += (reused_bytes(model, dtype) if parts == 1 else sum(p.nbytes for p in model.parameters())) + passing
    free = min((free for free in processes.gathered(own) if free is not None), default=None)
    best = bool(keys.train.eval_every) and keys.train.keep_best
    reference, moving = methods.needs(keys.method).reference, bool(keys.reference.sync_steps)
    found = Estimate.of(
        model,
        dtype,
        best=best,
        reference=reference,
        moving=moving,
        checkpointing=keys.train.checkpointing,
        optimizer=keys.train.optimizer,
        parts=parts,
    )
    if free is not None and found.fixed_bytes > free:
        raise RunFailed(
            f"{found.parameters:,} parameters, {found.trained:,} of them trained, take {found.fixed_bytes / 1e9:.3g} GB "
            f"with gradients and the optimizer's state, and {free / 1e9:.3g} GB are free: train an adapter (adapter=lora)",
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


def _open_folder(out: Path, keys: TrainKeys, setup: Setup) -> dict[str, Any]:
    """What can be written before the first step; gives the environment back, which the end adds to."""
    files.write_text(out / "config.yaml", dump(keys))
    first = files.read_json(out / "environment.json") if setup.reopened else None
    environment = files.environment(() if first else setup.inputs, device=str(setup.model.device))
    if first:  # its files were looked at already
        again = {"started": environment["started"], "versions": environment["versions"]}
        environment = first | {"resumed": [*first.get("resumed", []), again]}
    files.write_json(out / "environment.json", environment)
    files.write_json(out / "data.json", setup.rendered.summary)
    return environment


def _close_folder(out: Path, result: Run, environment: dict[str, Any]) -> None:
    """The figures and the report; the weights are saved by then."""
    kept = {"kept_step": result.kept_step}
    files.write_lines(out / "samples.jsonl", result.samples)
    files.write_json(out / "environment.json", environment)
    # by this file a run is complete, and is not gone on with: whatever cannot be made from the others is there before
    files.write_json(out / "evaluation.json", {"before": result.before, "after": result.after, **kept})
    report.write(out)
