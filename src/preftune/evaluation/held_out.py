"""Held-out figures from scores: the method's own loss and metrics, and accuracy with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.data.render import Batch
from preftune.evaluation.calibration import calibration
from preftune.evaluation.intervals import mean_interval
from preftune.methods.pairs import comparisons, right_sign
from preftune.training.gradient import denominator
from preftune.training.method import Example, ExampleScores, Method


def needed_rows(batch: Batch, method: Method) -> list[int]:
    """The rows that `held_out` reads scores of."""
    examples = [*method.examples(batch.groups), *comparisons(batch.groups)]
    return sorted({batch.index(e.group, r) for e in examples for r in e.rows})


def method_metrics(batch: Batch, method: Method, policy_logp: Tensor, reference_logp: Tensor | None) -> dict[str, float]:
    """Mean loss and metrics of the method over a scored batch, as a training step of all its examples would log them."""
    examples = method.examples(batch.groups)
    if not examples or (method.needs_reference and reference_logp is None):
        return {}
    rows = [[batch.index(e.group, r) for r in e.read] for e in examples]
    lengths = [s.length for s in batch.sequences]
    baseline = None
    if method.baseline is not None:
        assert reference_logp is not None
        beside = [batch.index(e.group, r) for e in examples for r in e.beside]
        baseline = method.baseline(policy_logp[beside] - reference_logp[beside])
    loss, metrics = method.loss(ExampleScores.of(examples, rows, policy_logp, reference_logp, lengths, baseline))
    total = denominator(method, batch, examples)
    means = {name: float(values.nanmean()) for name, values in metrics.items()}
    return {"loss": float(loss.sum()) / total, **{k: v for k, v in means.items() if not math.isnan(v)}}


def held_out(
    batch: Batch,
    method: Method,
    policy_logp: Tensor,
    reference_logp: Tensor | None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """What `preftune evaluate` says of a scored batch; None where the data or a missing reference leaves no answer. Of a reward
    model accuracy and margin are those of its rewards, and their calibration stands beside.

    Args:
        batch: rendered held-out groups.
        method: whose loss is reported.
        policy_logp, reference_logp: [len(batch)] nats, summed over the span; NaN where no figure reads them. policy_logp of a
            reward model: its rewards.
    """
    pairs = comparisons(batch.groups)
    prompts = [e.group for e in pairs]
    result: dict[str, Any] = {
        "comparisons": len(pairs),
        "demonstrations": None,
        "prompts": len({s.group for s in batch.sequences}),
    }
    if method.examples_are != "comparisons":
        result[method.examples_are] = len(method.examples(batch.groups))
    index = _index(batch, pairs)
    if method.head == "scalar":
        rewards, logp = policy_logp, None
    else:
        rewards, logp = None if reference_logp is None else policy_logp - reference_logp, policy_logp
    for name, values in (("accuracy", rewards), ("logp_accuracy", logp)):
        found = None
        if pairs and values is not None:
            found = mean_interval(right_order(batch, values).tolist(), prompts, seed=seed)
        result[name], result[f"{name}_interval"] = found or (None, None)
    metrics = method_metrics(batch, method, policy_logp, reference_logp)
    margins = None if rewards is None or not pairs else rewards[index[:, 0]] - rewards[index[:, 1]]
    result |= {"margin": None if margins is None else float(margins.mean()), "loss": metrics.get("loss")}
    if method.head == "scalar" and margins is not None:
        result |= calibration(margins, torch.tensor([e.preference for e in pairs]))
    if method.examples_are == "demonstrations":  # whose loss is per token
        result["perplexity"] = math.exp(metrics["loss"]) if "loss" in metrics else None
    return result | {"kl": None, "kl_samples": None, "kl_interval": None, "method": method.name, "beta": method.beta}


def right_order(batch: Batch, values: Tensor) -> Tensor:
    """[comparisons] 1 where the values of [len(batch)] responses put the better one first; see `pairs.right_sign`."""
    pairs = comparisons(batch.groups)
    index = _index(batch, pairs)
    return right_sign(values[index[:, 0]] - values[index[:, 1]], torch.tensor([e.preference for e in pairs]))


def _index(batch: Batch, examples: Sequence[Example]) -> Tensor:
    rows = [[batch.index(e.group, r) for r in e.responses] for e in examples]
    return torch.tensor(rows, dtype=torch.long) if rows else torch.zeros(0, 2, dtype=torch.long)
