"""What a dry run shows: the plan, what it takes in memory, and three rows token by token with the scored span marked."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from preftune import methods, processes
from preftune.errors import Refusal
from preftune.models.inspect import facts, resolve

if TYPE_CHECKING:
    from preftune.data.render import Batch
    from preftune.data.render import Rendered as Sequence
    from preftune.keys import TrainKeys
    from preftune.runs.prepare import RenderedData
    from preftune.training.estimate import Estimate
    from preftune.training.method import Example

log = logging.getLogger("preftune")

ROWS = 3


def show(keys: TrainKeys, rendered: RenderedData, tokenizer: Any) -> dict[str, Any]:
    """Says it through the log, like everything that is said.

    Returns:
        `method, examples, groups, held_out` (groups), `steps, batch_size, tokens_per_epoch` (each row once), `longest`
        (tokens), `max_length`, `fixed_gb, memory_gb, free_gb, seconds, tokens_per_microbatch` (estimates; None where the model
        cannot be built without its weights), `rows` (texts).
    """
    from preftune.runs.job import plan_of, rows_of
    from preftune.training.estimate import largest_example, step_tokens

    batch = rendered.train
    method = methods.make(keys.method, beta=keys.beta)
    examples = method.examples(batch.groups)
    the_plan = plan_of(method, batch, keys)
    lengths = [len(batch.sequences[row].ids) for row in rows_of(batch, examples)]
    plan: dict[str, Any] = {
        "method": method.name,
        "examples": len(examples),
        "groups": len(batch.groups),
        "held_out": len(rendered.held.groups),
        "steps": len(the_plan),
        "batch_size": keys.batch_size,
        "tokens_per_epoch": sum(lengths),
        "longest": max(lengths),
        "max_length": keys.max_length,
    }
    log.info(
        f"dry run: {method.name} on {len(examples):,} examples in {len(batch.groups):,} groups, "
        f"{plan['held_out']:,} groups held out; {plan['steps']:,} steps of {keys.batch_size}; "
        f"{plan['tokens_per_epoch']:,} tokens an epoch, longest {plan['longest']:,} of {keys.max_length or 'no limit'}"
    )
    found = estimate_of(keys, evaluates=bool(rendered.held.groups))
    before = keys.adapter.virtual or facts(resolve(keys.model, "model"), "model").virtual
    steps = [rows_of(batch, own) for _, own in the_plan.batches]
    how: Any = {"shares": keys.train.shares, "before": before}
    sizes = [step_tokens(batch.sequences, rows, **how) for rows in steps]
    largest = largest_example(batch, (e for _, own in the_plan.batches for e in own), **how)
    unknown = dict.fromkeys(("fixed_gb", "memory_gb", "free_gb", "seconds", "tokens_per_microbatch"))
    plan |= takes(keys, found, sizes, largest, sum(sizes)) if found else unknown
    plan["rows"] = [_row(example, method.roles(example), batch, tokenizer) for example in examples[:ROWS]]
    for row in plan["rows"]:
        log.info(row)
    return plan


def estimate_of(keys: TrainKeys, *, evaluates: bool) -> Estimate | None:
    """Of the model's structure; its weights are not loaded."""
    from preftune.models.load import device
    from preftune.models.size import structure
    from preftune.training.estimate import Estimate
    from preftune.training.precision import DTYPES, default_dtype

    dtype = DTYPES[keys.dtype] if keys.dtype else default_dtype(device())
    best = evaluates and bool(keys.train.eval_every) and keys.train.keep_best
    try:
        needs, moving = methods.needs(keys.method), bool(keys.reference.sync_steps)
        model = structure(keys.model, keys.adapter, scalar=needs.scalar, trust_remote_code=keys.trust_remote_code)
        return Estimate.of(
            model,
            dtype,
            best=best,
            reference=needs.reference,
            moving=moving,
            checkpointing=keys.train.checkpointing,
            optimizer=keys.train.optimizer,
            parts=processes.size() if keys.train.parallel == "fsdp" else 1,
        )
    except Refusal:
        raise
    except Exception as error:  # a model's own code, which a run gives its weights; the rest of the plan holds
        log.warning(f"memory: not known, the model cannot be built without its weights ({type(error).__name__}: {error})")
        return None


def takes(keys: TrainKeys, found: Estimate, sizes: list[int], largest: int, tokens: int) -> dict[str, Any]:
    """Memory and time, said.

    Args:
        sizes: tokens of each step, or of the largest. largest: of one example. tokens: of all steps.
    """
    from preftune.models.load import device
    from preftune.training.estimate import free_bytes, matrix_rate
    from preftune.training.precision import DTYPES, default_dtype

    free, fixed = free_bytes(device()), found.fixed_bytes
    budget = keys.train.tokens_per_microbatch or found.tokens(free)
    peak, most = found.peak_bytes(budget, sizes, largest), min(max(sizes), max(largest, budget))
    seconds = found.seconds(tokens, matrix_rate(DTYPES[keys.dtype] if keys.dtype else default_dtype(device()), device()))
    weights = (
        f"{fixed / 1e9:.3g} for {found.parameters:,} parameters, {found.trained:,} of them trained, with float32 gradients and "
        f"the state of {keys.train.optimizer}"
    )
    if found.token_bytes is None or peak is None:
        log.info(f"memory: {weights}, and an amount per token that is not known")
    else:
        log.info(
            f"memory: about {peak / 1e9:.3g} GB{f' of {free / 1e9:.3g} free' if free else ''}: {weights}, and "
            f"{found.token_bytes / 1e6:.2g} MB per token of a micro-batch, at most {most:,} tokens; "
            "gradients come as activations go"
        )
    log.info(f"time: about {duration(seconds)} for the steps, at half the rate of one matrix product on this machine")
    if free and (peak or fixed) > free:
        log.warning("this is more memory than is free: lower train.tokens_per_microbatch, or train an adapter (adapter=lora)")
    figures = {"fixed_gb": fixed / 1e9, "memory_gb": peak and peak / 1e9, "free_gb": free and free / 1e9, "seconds": seconds}
    return figures | {"tokens_per_microbatch": budget if peak else keys.train.tokens_per_microbatch}


def duration(seconds: float) -> str:
    """In the unit in which it is read best."""
    unit, size = next(((u, n) for u, n in (("h", 3600), ("min", 60)) if seconds >= 2 * n), ("s", 1))
    return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:,.0f} {unit}"


def _row(example: Example, roles: list[str], batch: Batch, tokenizer: Any) -> str:
    """`file:row`, and under it each response under its prompt."""
    origin = example.origin
    place = f"{origin.file}:{origin.row}" if origin else f"group {example.group}"
    sides = zip(roles, example.responses, strict=False)
    return "\n".join(
        [place, *(f"  {role}: {draw(batch.sequences[batch.index(example.group, r)], tokenizer)}" for role, r in sides)]
    )


def draw(sequence: Sequence, tokenizer: Any) -> str:
    """The tokens of one response under its prompt; what is scored stands between the marks ⟦ ⟧."""
    from preftune.checks.tokens import spelled

    return marked(spelled(sequence, tokenizer))


def marked(tokens: Iterable[tuple[str, bool]]) -> str:
    """(token, whether it is trained on) of each, as one line."""
    text, inside = "", False
    for token, now in tokens:
        text += ("⟦" if now else "⟧") if now != inside else ("·" if text else "")
        text, inside = text + token.replace("\n", "\\n"), now
    return text + ("⟧" if inside else "")
