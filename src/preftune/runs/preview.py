"""What a dry run shows: the plan, what it takes in memory, and three rows token by token with the scored span marked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from preftune import methods
from preftune.errors import Refusal

if TYPE_CHECKING:
    from preftune.config import TrainKeys
    from preftune.data.render import Batch
    from preftune.data.render import Rendered as Sequence
    from preftune.runs.prepare import Rendered
    from preftune.training.method import Example

log = logging.getLogger("preftune")

ROWS = 3
ROLES = {1: ("response",), 2: ("chosen", "rejected")}  # by how many responses an example has


def show(keys: TrainKeys, rendered: Rendered, tokenizer: Any) -> dict[str, Any]:
    """Says it through the log, like everything that is said.

    Returns:
        `method, examples, groups, held_out` (groups), `steps, batch_size, tokens_per_epoch` (each response once), `longest`
        (tokens), `max_length, memory_gb` (see `_memory`; None where it is not known), `rows` (texts).
    """
    from preftune.training.steps import count_steps

    batch = rendered.train
    method = methods.make(keys.method.name or "", beta=keys.beta)
    examples = method.examples(batch.groups)
    used = {batch.index(e.group, r) for e in examples for r in e.responses}
    lengths = [len(batch.sequences[i].ids) for i in used]
    plan: dict[str, Any] = {
        "method": keys.method.name,
        "examples": len(examples),
        "groups": len(batch.groups),
        "held_out": len(rendered.held.groups),
        "steps": count_steps(len(examples), batch_size=keys.batch_size, epochs=keys.epochs, steps=keys.steps),
        "batch_size": keys.batch_size,
        "tokens_per_epoch": sum(lengths),
        "longest": max(lengths),
        "max_length": keys.max_length,
    }
    log.info(
        f"dry run: {keys.method.name} on {len(examples):,} examples in {len(batch.groups):,} groups, "
        f"{plan['held_out']:,} groups held out; {plan['steps']:,} steps of {keys.batch_size}; "
        f"{plan['tokens_per_epoch']:,} tokens an epoch, longest {plan['longest']:,} of {keys.max_length or 'no limit'}"
    )
    plan["memory_gb"] = _memory(keys, evaluates=bool(rendered.held.groups))
    plan["rows"] = [_row(example, batch, tokenizer) for example in examples[:ROWS]]
    for row in plan["rows"]:
        log.info(row)
    return plan


def _memory(keys: TrainKeys, *, evaluates: bool) -> float | None:
    """GB (10^9 bytes) of everything that is there for the whole run: weights, their gradient in float32, AdamW's two
    moments, and in bfloat16 the copy that computes, with its gradient; where the best weights are kept, these too.
    Activations and logits are not in it: they depend on the micro-batch."""
    from preftune.models.load import device
    from preftune.models.size import count_parameters
    from preftune.training.precision import DTYPES, default_dtype

    try:
        total, trained = count_parameters(keys.model, keys.adapter, trust_remote_code=keys.trust_remote_code)
    except Refusal:
        raise
    except Exception as error:  # a model's own code, which a run gives its weights; the rest of the plan holds
        log.warning(f"memory: not known, the model cannot be built without its weights ({type(error).__name__}: {error})")
        return None
    dtype = DTYPES[keys.dtype] if keys.dtype else default_dtype(device())
    copy = 0 if dtype.itemsize == 4 else 2 * dtype.itemsize
    best = 4 if evaluates and keys.train.eval_every and keys.train.keep_best else 0
    gb = ((total - trained) * dtype.itemsize + trained * (4 + 4 + 8 + copy + best)) / 1e9
    log.info(
        f"memory: {gb:.3g} GB for {total:,} parameters in {str(dtype).removeprefix('torch.')}, {trained:,} of them trained: "
        "weights, float32 gradients and AdamW's moments; activations and logits come on top"
    )
    return gb


def _row(example: Example, batch: Batch, tokenizer: Any) -> str:
    """`file:row`, and under it each response under its prompt."""
    origin = example.origin
    place = f"{origin.file}:{origin.row}" if origin else f"group {example.group}"
    sides = zip(ROLES[len(example.responses)], example.responses, strict=True)
    return "\n".join(
        [place, *(f"  {role}: {draw(batch.sequences[batch.index(example.group, r)], tokenizer)}" for role, r in sides)]
    )


def draw(sequence: Sequence, tokenizer: Any) -> str:
    """The tokens of one response under its prompt; what is scored stands between the marks ⟦ ⟧."""
    scored = [False] * sequence.start + list(sequence.mask or [True] * (len(sequence.ids) - sequence.start))
    text, inside = "", False
    for token, now in zip(tokenizer.convert_ids_to_tokens(list(sequence.ids)), scored, strict=True):
        text += ("⟦" if now else "⟧") if now != inside else ("·" if text else "")
        text, inside = text + str(token).replace("\n", "\\n"), now
    return text + ("⟧" if inside else "")
