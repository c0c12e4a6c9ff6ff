"""score(model, batch) -> Scores: the log-probability of each response under its prompt, a prompt computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from preftune import processes
from preftune.data.render import Batch
from preftune.errors import Refusal, RunFailed
from preftune.models.randomness import evaluation_mode
from preftune.scoring.head import Kind
from preftune.scoring.plan import padded_batches, shared_batches
from preftune.scoring.scorer import Scorer, scorer_of
from preftune.scoring.selfcheck import check_finite

Want = Literal["token_logp", "entropy", "top1"]
WANTS = ("token_logp", "entropy", "top1")
HEADS: tuple[Kind, ...] = ("logp", "scalar")


@dataclass(frozen=True, slots=True)
class Scores:
    """Values of R responses, in the order of the batch.

    logp: [R] nats, summed over the scored tokens of a response (end token included).
    length: [R] scored tokens.
    scalar: [R] the numbers of a reward model, with head="scalar"; logp is NaN then.
    token_logp, entropy, top1: on request, per response a [length] tensor: nats of each scored token; nats of entropy there, and
        the likeliest token in its place, both without a graph.
    """

    logp: Tensor
    length: Tensor
    scalar: Tensor | None = None
    token_logp: tuple[Tensor, ...] | None = None
    entropy: tuple[Tensor, ...] | None = None
    top1: tuple[Tensor, ...] | None = None


def score(
    model: Any,
    batch: Batch,
    *,
    head: Kind = "logp",
    want: Sequence[Want] = (),
    tokens_per_microbatch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Scores every response of a batch: logp(y | x) = sum over scored tokens t of log p(y_t | x, y_<t).

    Args:
        model: a causal language model of transformers (or a peft model around one).
        batch: from `preftune.render`.
        head: `logp`, the language model's own; `scalar`, that of a reward model (a sequence classifier with one label).
        want: also `token_logp`, `entropy` and/or `top1`, per scored token.
        tokens_per_microbatch: most distinct tokens of one forward pass; None: `default_budget`.
        progress: called with the number of responses just scored.

    Returns:
        Scores, in the order group, then response; with a graph where gradients are enabled.

    Raises:
        Refusal: an unknown head or one that the model has not, or an unknown value in `want`, or a string alone.
    """
    if head not in HEADS:
        raise Refusal(f"head {head!r} is not known; known: {', '.join(HEADS)}", code="unknown_head", key="head")
    if isinstance(want, str):
        raise Refusal(f'give a tuple of names: want=("{want}",)', code="bad_value", key="want")
    unknown = [w for w in want if w not in WANTS]
    if unknown:
        raise Refusal(f"want {unknown[0]!r} is not known; known: {', '.join(WANTS)}", code="unknown_want", key="want")
    extra = tuple(w for w in ("entropy", "top1") if w in want)
    tokens: list[Tensor] = [torch.zeros(0)] * len(batch)
    values: dict[str, list[Tensor]] = {name: [torch.zeros(0)] * len(batch) for name in extra}
    # a model in evaluation mode too: training switches an adapter's own dropout on in it
    with evaluation_mode(model):
        scorer = Scorer(model, head=head)
        cut = passes(scorer, batch, [[row] for row in range(len(batch))], tokens_per_microbatch)
        scorer.at_once = len(cut)
        for rows in cut:
            found = scorer([batch.sequences[row] for row in rows], extra)
            for row, each in zip(rows, found.token_logp.split(found.lengths), strict=True):
                tokens[row] = each
            for name in extra:
                for row, each in zip(rows, found.values[name].split(found.lengths), strict=True):
                    values[name][row] = each
            if progress:
                progress(len(rows))
    summed = torch.stack([t.sum() for t in tokens]) if tokens else torch.zeros(0)
    return Scores(
        logp=summed if head == "logp" else torch.full_like(summed, torch.nan),
        length=torch.tensor([float(s.length) for s in batch.sequences], device=summed.device),
        scalar=summed if head == "scalar" else None,
        token_logp=tuple(tokens) if "token_logp" in want else None,
        **{name: tuple(each) for name, each in values.items()},
    )


def score_logp(
    model: Any,
    batch: Batch,
    rows: Sequence[int],
    *,
    tokens_per_microbatch: int | None = None,
    share: bool = True,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[list[int], list[Tensor]], None] | None = None,
) -> Tensor:
    """[len(batch)] logp of the asked rows without a graph, on the CPU; NaN where a row was not asked. The passes are shared
    out among the processes of a run, and each is given all values.

    Args:
        keep: given the rows of each pass and [length] nats of each scored token of theirs, on the CPU.

    Raises:
        RunFailed: a log-probability that is not finite.
    """
    values = torch.full((len(batch),), float("nan"))
    rows = sorted(set(rows))
    with torch.no_grad(), evaluation_mode(model):
        scorer = scorer_of(model, share=share)
        cut = passes(scorer, batch, [[row] for row in rows], tokens_per_microbatch)
        for first in range(0, len(cut), processes.size()):
            mine = first + processes.rank()
            chosen = [rows[p] for p in cut[min(mine, len(cut) - 1)]]  # all take part to the end: the model may be in parts
            scored = scorer([batch.sequences[r] for r in chosen])
            own = chosen, list(scored.token_logp.cpu().split(scored.lengths))
            for found, tokens in filter(None, processes.gathered(own if mine < len(cut) else None)):
                values[found] = torch.stack([each.sum() for each in tokens])
                check_finite(values[found], batch, found)
                if keep:
                    keep(found, tokens)
                if progress:
                    progress(len(found))
    return values


def passes(scorer: Scorer, batch: Batch, needs: Sequence[Sequence[int]], budget: int | None) -> list[list[int]]:
    """Items, each of which needs some sequences of one group, cut into passes of the scorer."""
    budget = budget or default_budget(scorer.model)
    if not needs:
        return []
    if scorer.shares:
        cut = shared_batches(batch.sequences, needs, max(1, budget - scorer.before))
    else:
        cut = padded_batches(batch.sequences, needs, budget, scorer.before)
    if scorer.in_parts:
        _check_alike(scorer, batch, needs, cut)
    return cut


def _check_alike(scorer: Scorer, batch: Batch, needs: Sequence[Sequence[int]], cut: list[list[int]]) -> None:
    """A pass with rows of other rotary frequencies runs the layers once for each kind. Of a model in parts all processes have
    to gather them together, and have other passes.

    Raises:
        RunFailed: there is such a pass.
    """
    for places in cut:
        lengths = [scorer.before + len(batch.sequences[row].ids) for place in places for row in needs[place]]
        if len(scorer.rope.runs(lengths)) > 1:
            raise RunFailed(
                f"rotary frequencies of the model change with a row's length, at {min(scorer.rope.limits):,} tokens, and rows "
                f"of {min(lengths):,} to {max(lengths):,} stand in one pass: lower max_length, or leave train.parallel out",
                code="no_parts",
                key="train.parallel",
            )


def default_budget(model: Any) -> int:
    """Tokens of one pass so that the float32 logits of all of them would stay near 0.5 GiB: 2^27 / vocabulary, 1,024 to
    16,384."""
    output = model.get_output_embeddings()
    return max(1024, min(16384, 2**27 // output.weight.shape[0])) if output is not None else 16384
