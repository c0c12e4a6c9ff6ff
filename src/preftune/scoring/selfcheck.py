"""What scores must be before anything is built on them: finite, and at step 0 equal to those of a reference that is the
starting policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from preftune.data.render import Batch
from preftune.errors import RunFailed

# nats per token; bfloat16 keeps 8 bits, so two paths may differ in the third digit of a token's logp
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check_finite(logp: Tensor, batch: Batch, rows: Sequence[int]) -> None:
    """Refuses to go on with a log-probability that is not a number.

    Args:
        logp: [len(rows)] nats, of these rows of the batch.

    Raises:
        RunFailed: names the data rows.
    """
    wrong = (~torch.isfinite(logp)).nonzero().flatten().tolist()
    if wrong:
        raise RunFailed(
            f"the model gives no finite log-probability to {len(wrong):,} of {len(rows):,} responses "
            f"({_places(batch, [rows[n] for n in wrong[:5]])}): are its weights sound?",
            code="not_finite",
        )


def check_start(policy_logp: Tensor, reference_logp: Tensor, batch: Batch, rows: list[int], *, dtype: torch.dtype) -> float:
    """Largest |log-ratio| per token over `rows`; a run that starts elsewhere than at its reference must not go on.

    Args:
        policy_logp, reference_logp: [len(batch)] nats, summed; read at `rows`.
        dtype: the compute precision, which sets the tolerance.

    Raises:
        RunFailed: names the data rows that differ most.
    """
    length = torch.tensor([batch.sequences[r].length for r in rows], dtype=torch.float32)
    differs = (policy_logp[rows] - reference_logp[rows]).abs() / length
    worst = float(differs.max())
    if worst <= TOLERANCE[dtype]:  # False for NaN too
        return worst
    order = torch.argsort(differs.nan_to_num(float("inf")), descending=True)[:5].tolist()
    raise RunFailed(
        f"the policy and its reference differ before the first step, by up to {worst:.3g} nats per token (tolerance "
        f"{TOLERANCE[dtype]:g}), worst at {_places(batch, [rows[n] for n in order])}. They should be the same model here: "
        "is dropout on, the adapter not at zero, or the model not deterministic?",
        code="start_check",
    )


def _places(batch: Batch, rows: Sequence[int]) -> str:
    """Where these responses stand in the data."""
    places: list[str] = []
    for row in rows:
        s = batch.sequences[row]
        origins = batch.groups[s.group].responses[s.response].origins
        places.append(f"{origins[0].file} row {origins[0].row}" if origins else f"group {s.group} response {s.response}")
    return ", ".join(dict.fromkeys(places))
