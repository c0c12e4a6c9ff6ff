"""score(model, batch) -> Scores: the log-probability of each response under its prompt.

One padded row per response, the model's own logits, float32 log-softmax: right for any causal model, whatever its head does
(bias, untied, scaled, soft-capped).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from preftune.data.render import Batch, Rendered
from preftune.errors import Refusal
from preftune.scoring.plan import pack
from preftune.scoring.selfcheck import check_finite

Want = Literal["token_logp", "entropy"]


@dataclass(frozen=True, slots=True)
class Scores:
    """Values of R responses, in the order of the batch.

    logp: [R] nats, summed over the scored tokens of a response (end token included).
    length: [R] scored tokens.
    token_logp, entropy: on request, per response a [length] tensor: nats of each scored token, nats of entropy there.
    """

    logp: Tensor
    length: Tensor
    token_logp: tuple[Tensor, ...] | None = None
    entropy: tuple[Tensor, ...] | None = None


def score(
    model: Any,
    batch: Batch,
    *,
    head: str = "logp",
    want: Sequence[Want] = (),
    tokens_per_microbatch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Scores every response of a batch: logp(y | x) = sum over scored tokens t of log p(y_t | x, y_<t).

    Args:
        model: a causal language model of transformers (or a peft model around one).
        batch: from `preftune.render`.
        head: `logp`, the language model's own.
        want: also `token_logp` and/or `entropy`, per scored token.
        tokens_per_microbatch: most padded tokens of one forward pass; None: from the size of the vocabulary.
        progress: called with the number of responses just scored.

    Returns:
        Scores, in the order group, then response; with a graph where gradients are enabled.

    Raises:
        Refusal: an unknown head, or an unknown value in `want`.
    """
    if head != "logp":
        raise Refusal(f"head {head!r} is not known; known: logp", code="unknown_head", key="head")
    unknown = [w for w in want if w not in ("token_logp", "entropy")]
    if unknown:
        raise Refusal(f"want {unknown[0]!r} is not known; known: token_logp, entropy", code="unknown_want", key="want")
    if not batch.sequences:
        nothing = torch.zeros(0)
        return Scores(nothing, nothing.clone(), *(() if w in want else None for w in ("token_logp", "entropy")))
    budget = tokens_per_microbatch or default_budget(model)
    order = pack([len(s.ids) for s in batch.sequences], budget)
    tokens: dict[int, dict[str, Tensor]] = {}
    # a model in evaluation mode is left as it is: training switches an adapter's own dropout on in it
    with evaluation_mode(model) if model.training else nullcontext():
        for rows in order:
            for row, values in zip(rows, _forward(model, [batch.sequences[r] for r in rows], want), strict=True):
                tokens[row] = values
            if progress:
                progress(len(rows))
    in_order = [tokens[r] for r in range(len(batch.sequences))]
    token_logp = tuple(v["token_logp"] for v in in_order)
    return Scores(
        logp=torch.stack([t.sum() for t in token_logp]),
        length=torch.tensor([len(t) for t in token_logp], dtype=torch.float32, device=token_logp[0].device),
        token_logp=token_logp if "token_logp" in want else None,
        entropy=tuple(v["entropy"] for v in in_order) if "entropy" in want else None,
    )


def score_logp(
    model: Any,
    batch: Batch,
    rows: Sequence[int],
    *,
    tokens_per_microbatch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """[len(batch)] logp of the asked rows without a graph, on the CPU; NaN where a row was not asked.

    Raises:
        RunFailed: a log-probability that is not finite.
    """
    values = torch.full((len(batch),), float("nan"))
    rows = sorted(set(rows))
    with torch.no_grad(), evaluation_mode(model):
        budget = tokens_per_microbatch or default_budget(model)
        for places in pack([len(batch.sequences[r].ids) for r in rows], budget):
            chosen = [rows[p] for p in places]
            scored = _forward(model, [batch.sequences[r] for r in chosen], ())
            values[chosen] = torch.stack([v["token_logp"].sum() for v in scored]).cpu()
            check_finite(values[chosen], batch, chosen)
            if progress:
                progress(len(chosen))
    return values


def default_budget(model: Any) -> int:
    """Padded tokens of one pass so that its float32 logits stay near 0.5 GiB: 2^27 / vocabulary, 1,024 to 16,384."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return max(1024, min(16384, 2**27 // vocabulary))


def _forward(model: Any, sequences: Sequence[Rendered], want: Sequence[Want]) -> list[dict[str, Tensor]]:
    device = next(model.parameters()).device
    longest = max(len(s.ids) for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    real = torch.zeros(len(sequences), longest, dtype=torch.long)
    scored = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for n, s in enumerate(sequences):
        ids[n, : len(s.ids)] = torch.tensor(s.ids)
        real[n, : len(s.ids)] = 1
        scored[n, s.start : len(s.ids)] = True if s.mask is None else torch.tensor(s.mask)
    ids, real, scored = ids.to(device), real.to(device), scored.to(device)
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    # The logits at position t - 1 predict token t; only the scored positions are turned to float32.
    chosen = logits[:, :-1][scored[:, 1:]].float()
    log_z = chosen.logsumexp(-1)
    token_logp = chosen.gather(-1, ids[:, 1:][scored[:, 1:]].unsqueeze(-1)).squeeze(-1) - log_z
    lengths = scored.sum(1).tolist()
    values = {"token_logp": token_logp.split(lengths)}
    if "entropy" in want:
        p = torch.softmax(chosen, -1)
        values["entropy"] = (log_z - (p * chosen).sum(-1)).split(lengths)
    return [{name: parts[n] for name, parts in values.items()} for n in range(len(sequences))]


@contextmanager
def evaluation_mode(model: Any) -> Generator[None]:
    """Every dropout off for the time of the call, and afterwards each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
