"""Held-out figures from scores: the method's own loss and metrics, and accuracy with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.data.render import Batch
from preftune.evaluation.intervals import mean_interval
from preftune.methods.pairs import comparisons, right_sign
from preftune.training.method import Example, Method, Scored


def needed_rows(batch: Batch, method: Method) -> list[int]:
    """The responses that `held_out` reads scores of."""
    examples = [*method.examples(batch.groups), *comparisons(batch.groups)]
    return sorted({batch.index(e.group, r) for e in examples for r in e.responses})


def method_metrics(batch: Batch, method: Method, policy_logp: Tensor, reference_logp: Tensor | None) -> dict[str, float]:
    """Mean loss and metrics of the method over a scored batch, as a training step would log them."""
    examples = method.examples(batch.groups)
    if not examples or (method.needs_reference and reference_logp is None):
        return {}
    index, length = _index(batch, examples), torch.tensor([s.length for s in batch.sequences], dtype=torch.float32)
    weight, preference = (torch.tensor([getattr(e, name) for e in examples]) for name in ("weight", "preference"))
    loss, metrics = method.loss(Scored(policy_logp, reference_logp, length, index, preference, weight))
    lengths = length[index].tolist()
    total = sum(method.weight(e, lengths[n]) for n, e in enumerate(examples))
    means = {name: float(values.nanmean()) for name, values in metrics.items()}
    return {"loss": float(loss.sum()) / total, **{k: v for k, v in means.items() if not math.isnan(v)}}


def held_out(
    batch: Batch,
    method: Method,
    policy_logp: Tensor,
    reference_logp: Tensor | None,
    *,
    beta: float | None,
    seed: int = 0,
) -> dict[str, Any]:
    """What `preftune evaluate` says of a scored batch; None where the data or a missing reference leaves no answer.

    Args:
        batch: rendered held-out groups.
        method: whose loss is reported.
        policy_logp, reference_logp: [len(batch)] nats, summed over the span.
        beta: of the method, where it has one.
    """
    pairs = comparisons(batch.groups)
    prompts = [e.group for e in pairs]
    result: dict[str, Any] = {
        "comparisons": len(pairs),
        "demonstrations": len(method.examples(batch.groups)) if method.name == "sft" else None,
        "prompts": len({s.group for s in batch.sequences}),
    }
    index = _index(batch, pairs)
    log_ratio = None if reference_logp is None else policy_logp - reference_logp
    for name, values in (("accuracy", log_ratio), ("logp_accuracy", policy_logp)):
        found = None
        if pairs and values is not None:
            found = mean_interval(right_order(batch, values).tolist(), prompts, seed=seed)
        result[name], result[f"{name}_interval"] = found or (None, None)
    metrics = method_metrics(batch, method, policy_logp, reference_logp)
    margin = None
    if pairs and log_ratio is not None:
        margin = float((log_ratio[index[:, 0]] - log_ratio[index[:, 1]]).mean())
    result |= {"margin": margin, "loss": metrics.get("loss")}
    if method.name == "sft":
        result["perplexity"] = math.exp(metrics["loss"]) if "loss" in metrics else None
    return result | {"kl": None, "kl_samples": None, "kl_interval": None, "method": method.name, "beta": beta}


def right_order(batch: Batch, values: Tensor) -> Tensor:
    """[comparisons] 1 where the values of [len(batch)] responses put the better one first; see `pairs.right_sign`."""
    pairs = comparisons(batch.groups)
    index = _index(batch, pairs)
    return right_sign(values[index[:, 0]] - values[index[:, 1]], torch.tensor([e.preference for e in pairs]))


def _index(batch: Batch, examples: Sequence[Example]) -> Tensor:
    rows = [[batch.index(e.group, r) for r in e.responses] for e in examples]
    return torch.tensor(rows, dtype=torch.long) if rows else torch.zeros(0, 2, dtype=torch.long)
