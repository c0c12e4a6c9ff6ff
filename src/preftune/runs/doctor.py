"""`preftune doctor`: on the user's own model and rows, that every way to a number gives the same number, and what a run takes.

The checks are those that a run makes of itself, one by one and said: here they only report.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune.data.render import Batch, Rendered
from preftune.errors import RunFailed
from preftune.models.adapters import adapter_off, gives_scalars, virtual_tokens
from preftune.scoring.head import Head
from preftune.scoring.score import score_logp
from preftune.scoring.scorer import Scorer
from preftune.scoring.selfcheck import VALUES, Difference, check_start, difference, few, one_by_one, shortened
from preftune.scoring.sharing import Wrong, cannot_share
from preftune.scoring.store import Store, Stored, open_store
from preftune.training.estimate import Estimate, free_bytes, largest_example, matrix_rate, step_tokens
from preftune.training.method import Example
from preftune.training.precision import reused_bytes


def examine(
    model: Any,
    batch: Batch,
    rows: Sequence[int],
    *,
    dtype: torch.dtype,
    new_adapter: bool,
    ref: str,
    store: str | None = None,
    packed: bool = False,
) -> list[dict[str, Any]]:
    """Each equivalence on a few of the rows, against the model's own forward pass response by response.

    Args:
        model: as it trains, in the compute precision, with its adapter.
        rows: of the batch, in the order of training.
        new_adapter: the adapter starts at zero, and the model without it is the reference.
        ref: folder or hub name that the model was loaded from, by which the store of reference values knows it.
        store: as `reference.store` names it.
        packed: it was packed into 4 bits then.

    Returns:
        One dict a check: `check, passed, values, gradients` (see `Difference`; None where it was not measured), `note`.
    """
    chosen = few(model, batch, rows)
    sequences = shortened(model, [batch.sequences[row] for row in chosen])
    cut = dict(zip(chosen, sequences, strict=True))
    short = replace(batch, sequences=tuple(cut.get(row, own) for row, own in enumerate(batch.sequences)))
    shared, padded, chunked = Scorer(model), Scorer(model, share=False), Scorer(model)
    if isinstance(chunked.head, Head):
        head = chunked.head
        head.entries, head.wide, head.kept = 1, 8, 0  # few rows at once, and again in the backward pass

    def by(scorer: Scorer) -> Callable[[Sequence[Rendered]], Tensor]:
        return lambda rows: scorer(rows).logp

    def against(name: str, scorer: Scorer, note: str = "") -> dict[str, Any]:
        found = difference(model, sequences, by(scorer), dtype=dtype)
        return _line(name, found.small, found, note)

    def against_reference() -> list[dict[str, Any]]:
        stored = _of_earlier_runs(model, batch, rows, dtype, open_store(store), new_adapter=new_adapter, ref=ref, packed=packed)
        return [*stored, _start(model, short, chosen, dtype, new_adapter=new_adapter)]

    why = cannot_share(shared.inner)
    return [
        against("answers together on a trie = one by one", shared)
        if shared.shares
        else _line("answers together on a trie = one by one", not isinstance(why, Wrong), None, f"not used: {why}"),
        against("padded = one by one", padded),
        against(
            "head in chunks = all logits at once", chunked, "" if chunked.head.plain else "the model's own head, in chunks"
        ),
        _stored(model, short, chosen, dtype),
        *(against_reference() if not gives_scalars(model) else ()),  # a reward model has none
    ]


def _line(name: str, passed: bool, found: Difference | None, note: str = "") -> dict[str, Any]:
    values, gradients = (found.values, found.gradients) if found else (None, None)
    if found and found.rounded and not passed:  # what float32 alone would not show
        note = str(found)
    return {"check": name, "passed": passed, "values": values, "gradients": gradients, "note": note}


def _stored(model: Any, batch: Batch, rows: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """What a store gives back, against what was put into it."""
    live: dict[int, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        stored = Stored(Store(Path(folder) / "reference.sqlite"), b"doctor", dtype, model.device.type)

        def keep(own: list[int], tokens: list[Tensor]) -> None:
            live.update(zip(own, tokens, strict=True))
            stored.put(batch, own, tokens)

        score_logp(model, batch, rows, keep=keep)
        found = stored.find(batch, rows)
        stored.store.close()
    same = len(found) == len(rows) and all(torch.equal(found[row], live[row]) for row in rows)
    worst = max((float((found[row] - live[row]).abs().max()) for row in found), default=float("nan"))
    return _line("stored = live", same, None) | {"values": worst}


def _of_earlier_runs(
    model: Any,
    batch: Batch,
    rows: Sequence[int],
    dtype: torch.dtype,
    store: Store | None,
    *,
    new_adapter: bool,
    ref: str,
    packed: bool,
) -> list[dict[str, Any]]:
    """What the store has of these rows, against live values: no line where it has none. It is not made for this."""
    if store is None or not store.path.is_file():
        return []
    with closing(store):
        identity = store.digest(ref, packed=packed)
        known = Stored(store, identity, dtype, model.device.type).find(batch, rows) if identity else {}
    if not known:
        return []
    chosen = few(model, batch, list(known))
    with adapter_off(model) if new_adapter else nullcontext():
        live = score_logp(model, batch, chosen)
    worst = max(float((known[row].sum() - live[row]).abs()) / batch.sequences[row].length for row in chosen)
    line = _line("stored by earlier runs = live", worst <= VALUES[dtype], None, f"{len(chosen):,} responses from {store.path}")
    return [line | {"values": worst}]


def _start(model: Any, batch: Batch, rows: list[int], dtype: torch.dtype, *, new_adapter: bool) -> dict[str, Any]:
    """Every log-ratio is 0 before the first step; with virtual tokens, which move the policy, that of the model without them,
    one by one."""
    name = "policy = reference before the first step"
    if new_adapter and virtual_tokens(model):
        name = "without the adapter = its base, one by one"
        with adapter_off(model), torch.no_grad():
            policy = score_logp(model, batch, rows)
            reference = torch.full_like(policy, torch.nan)
            reference[rows] = one_by_one(model, [batch.sequences[row] for row in rows]).float().cpu()
    else:
        policy = score_logp(model, batch, rows)
        with adapter_off(model) if new_adapter else nullcontext():
            reference = score_logp(model, batch, rows)
    try:
        worst = check_start(policy, reference, batch, rows, dtype=dtype)
    except RunFailed as error:
        return _line(name, False, None, error.message)
    return _line(name, True, None) | {"values": worst}


def expect(
    model: Any,
    batch: Batch,
    steps: Sequence[Sequence[int]],
    examples: Sequence[Example],
    *,
    dtype: torch.dtype,
    reference: bool,
) -> dict[str, Any]:
    """Tokens, memory and time of a run.

    Args:
        steps: the rows that each step needs. examples: of all of them; none is cut.

    Returns:
        `steps`, `tokens` of all steps as they are computed, `tokens_one_by_one` with a prompt for every response, `saved` (a
        share), `fixed_gb, memory_gb, free_gb, tokens_per_microbatch, seconds` (see `Estimate`; None where it is not known).
    """
    device, shares, before = model.device, Scorer(model).shares, virtual_tokens(model)
    sizes = [step_tokens(batch.sequences, rows, shares=shares, before=before) for rows in steps]
    largest = largest_example(batch, examples, shares=shares, before=before)
    alone = sum(step_tokens(batch.sequences, rows, shares=False, before=before) for rows in steps)
    tokens = sum(sizes)
    found = Estimate.of(model, dtype, best=False, reference=reference)
    free = free_bytes(device)
    if free is not None:  # the model is there already, and a part of what the run will hold
        free += reused_bytes(model, dtype)
    budget = found.tokens(free)
    peak = found.peak_bytes(budget, sizes, largest)
    return {
        "steps": len(steps),
        "tokens": tokens,
        "tokens_one_by_one": alone,
        "saved": 1 - tokens / alone,
        "fixed_gb": found.fixed_bytes / 1e9,
        "memory_gb": None if peak is None else peak / 1e9,
        "free_gb": None if free is None else free / 1e9,
        "tokens_per_microbatch": budget,
        "seconds": found.seconds(tokens, matrix_rate(dtype, device)),
    }
