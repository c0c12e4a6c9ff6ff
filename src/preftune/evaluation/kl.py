"""KL(policy || reference): exact at every step of responses that the policy sampled itself, at temperature 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from preftune.errors import RunFailed
from preftune.generation.sample import Sample
from preftune.models.randomness import evaluation_mode
from preftune.scoring.plan import pack
from preftune.scoring.rope import Rope
from preftune.scoring.score import default_budget
from preftune.scoring.scorer import callable_itself


def kl_per_response(
    policy: Any,
    reference: Any | None,
    samples: Sequence[Sample],
    *,
    without_adapter: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """sum over the steps t of one sampled response of KL(policy(. | x, y_<t) || reference(. | x, y_<t)), in nats.

    Its mean over samples estimates the KL between the two distributions over whole responses: the chain rule, with the
    expectation over prefixes taken by sampling and the one over the next token exactly.

    Args:
        policy: the model that sampled.
        reference: another model of the same vocabulary; None with `without_adapter`: the policy's base.
        samples: from `generation.sample` at temperature 1, no top_k, no top_p.

    Returns:
        One value per sample, in their order.

    Raises:
        RunFailed: a value that is not finite.
    """
    from preftune.models.adapters import adapter_off, virtual_tokens

    other = policy if without_adapter else reference
    values = [0.0] * len(samples)
    ids = [list(s.prompt_ids) + list(s.ids) for s in samples]
    own = callable_itself(policy), callable_itself(reference)
    with torch.no_grad(), evaluation_mode(policy), evaluation_mode(other), own[0], own[1]:
        before = virtual_tokens(policy), 0 if without_adapter else virtual_tokens(other)
        for rows in _passes(policy, other, [len(i) for i in ids], before):
            log_p = _log_probabilities(policy, [ids[r] for r in rows], nullcontext())
            off = adapter_off(policy) if without_adapter else nullcontext()
            log_q = _log_probabilities(other, [ids[r] for r in rows], off)
            shared = min(log_p.shape[-1], log_q.shape[-1])  # a vocabulary may be padded further in one of them
            log_p, log_q = log_p[..., :shared], log_q[..., :shared]
            p = log_p.exp()
            terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # a token that a model rules out has p = 0 and log p = -inf
            per_step = terms.sum(-1).clamp(min=0)  # rounding can fall below 0
            for n, r in enumerate(rows):
                begin, end = len(samples[r].prompt_ids) - 1, len(ids[r]) - 1
                values[r] = float(per_step[n, begin:end].sum())
                if not math.isfinite(values[r]):
                    line = f"the KL of response {r} is {values[r]}: one of the models gives no finite log-probabilities there"
                    raise RunFailed(line, code="not_finite")
            if progress:
                progress(len(rows))
    return values


def _passes(policy: Any, other: Any, lengths: list[int], before: tuple[int, int]) -> Iterator[list[int]]:
    """Rows that go through both models together: none whose rotary frequencies are others in one of them. `before`: the
    virtual tokens of each model."""
    ropes = Rope.of(policy), Rope.of(other)
    for side in ropes[0].runs([before[0] + length for length in lengths]):
        for part in ropes[1].runs([before[1] + lengths[n] for n in side]):
            own = [side[n] for n in part]
            for rows in pack([lengths[n] for n in own], default_budget(policy) // 2):
                for rope in ropes:
                    rope.restart()
                yield [own[n] for n in rows]


def _log_probabilities(model: Any, ids: list[list[int]], mode: AbstractContextManager[None]) -> torch.Tensor:
    device = next(model.parameters()).device
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    with mode:
        logits = model(input_ids=padded, attention_mask=real, use_cache=False).logits[:, -longest:]  # less virtual tokens'
    return torch.log_softmax(logits.float(), -1)
