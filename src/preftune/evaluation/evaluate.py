"""preftune.evaluate: a model on judged data, with models and rows in hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from preftune import methods
from preftune.data.read import by_row, enforce, say_drops
from preftune.data.render import Batch, TooLong, render, render_prompts
from preftune.errors import Refusal
from preftune.evaluation.held_out import held_out, needed_rows
from preftune.evaluation.intervals import mean_interval
from preftune.evaluation.kl import kl_per_response
from preftune.evaluation.win_rate import win_rate
from preftune.functions import Scorer, judge
from preftune.generation.sample import Sample, Sampling, sample, with_room
from preftune.models.adapters import gives_scalars
from preftune.models.load import check_tokenizer, longest, max_positions
from preftune.records import Group
from preftune.scoring.score import score_logp

log = logging.getLogger("preftune")

Progress = Callable[[str, int, int, dict[str, Any]], None]  # phase, done, total, nothing more


def _silent(phase: str, done: int, total: int, line: dict[str, Any]) -> None: ...


def evaluate(
    model: Any,
    tokenizer: Any,
    groups: Sequence[Group] | Batch,
    *,
    reference: Any = None,
    method: methods.Asked = None,
    beta: float | None = None,
    max_length: int | None = None,
    too_long: TooLong = "drop",
    template: str | None = None,
    kl_samples: int = 64,
    max_new_tokens: int = 128,
    seed: int = 0,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Held-out figures of a model.

    Args:
        model, tokenizer: a causal language model of transformers (or peft) and its tokenizer.
        groups: from `preftune.read`, or already rendered.
        reference: the model that log-ratios, accuracy, loss and KL are taken against; None: those are None.
        method: whose loss is reported, as in `fit`; None: by the kind of marks.
        beta: None: the method's own default.
        kl_samples: prompts that one response each is sampled for, to measure the KL; 0: no KL.
        progress: called with (phase, done, total, {}) as the work goes on.

    Returns:
        `comparisons, demonstrations, prompts, accuracy, accuracy_interval, logp_accuracy, logp_accuracy_interval, margin
        (nats, without beta), loss, kl (nats per response), kl_samples, kl_interval, method, beta`; for sft also `perplexity`,
        for other judgements their number, `ratings` or `rankings`.

    Raises:
        Refusal: data without marks for the method, or vocabularies that do not fit.
    """
    check_tokenizer(model, tokenizer, reference)
    if isinstance(groups, Batch):
        batch = groups
    else:
        limit = longest(max_length, max_positions(model))
        batch = render(groups, tokenizer, max_length=limit, too_long=too_long, template=template)
        judged = sum(len(g.marks) for g in groups)
        enforce(judged, by_row(batch.findings), batch.findings, strict=False, allow_drops=False)
        say_drops(batch.findings)
    scalar, named = gives_scalars(model), bool(methods.options_of(method).members)
    asked = methods.choose("reward" if scalar and not named else method, batch.groups)
    methods.check_head(asked, scalar=scalar)
    methods.check_beta(asked, beta)
    chosen = methods.make(asked, beta=beta)
    batch = chosen.rows(batch, partial(render, tokenizer=tokenizer, template=template))
    rows = needed_rows(batch, chosen)
    policy_logp = score_logp(model, batch, rows, progress=counted(progress, "evaluate", len(rows)))
    reference_logp = None
    if reference is not None:
        reference_logp = score_logp(reference, batch, rows, progress=counted(progress, "reference", len(rows)))
    result = held_out(batch, chosen, policy_logp, reference_logp, seed=seed)
    if reference is None or not kl_samples or chosen.head == "scalar":
        return result
    prompts = batch.groups[:kl_samples]
    how = Sampling(max_new_tokens=max_new_tokens, seed=seed)
    samples = sample_prompts(model, tokenizer, prompts, how, template=template, progress=progress)
    if not samples:
        log.warning("no KL: no prompt leaves room for a response")
        return result
    values = kl_per_response(model, reference, samples, progress=counted(progress, "kl", len(samples)))
    found = mean_interval(values, range(len(values)), seed=seed)
    return result | ({"kl": found[0], "kl_samples": len(values), "kl_interval": found[1]} if found else {})


def compare(
    model: Any,
    against: Any,
    tokenizer: Any,
    groups: Sequence[Group],
    scorer: Scorer,
    *,
    name: str,
    against_tokenizer: Any = None,
    template: str | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Win rate of one sample of each model per prompt under a scoring function; both sample with the same seed.

    Returns:
        `prompts, win_rate, win_rate_interval, wins, ties, losses, length, length_against` (mean new tokens), `scorer`.
    """
    how = Sampling(max_new_tokens=max_new_tokens, seed=seed)
    one_each = partial(sample_prompts, groups=groups, how=how, template=template, progress=progress)
    ours = one_each(model, tokenizer)
    theirs = one_each(against, against_tokenizer or tokenizer)
    if not ours or not theirs:
        raise Refusal("no prompt leaves room for a response", code="prompts_too_long", key="prompts")
    both = sorted({s.prompt_index for s in ours} & {s.prompt_index for s in theirs})
    place = [{s.prompt_index: s for s in side} for side in (ours, theirs)]
    prompts = [prompt_text(groups[n]) for n in both]
    values = [judge(scorer, prompts, [side[n].text for n in both], name) for side in place]
    lengths = [sum(len(side[n].ids) for n in both) / max(len(both), 1) for side in place]
    result = win_rate(values[0], values[1], seed=seed)
    return result | {"length": lengths[0], "length_against": lengths[1], "scorer": name}


def sample_prompts(
    model: Any,
    tokenizer: Any,
    groups: Sequence[Group],
    how: Sampling,
    *,
    template: str | None,
    progress: Progress = _silent,
) -> list[Sample]:
    """Responses to the prompts of groups, by their index there; prompts that leave no room for one are left out, and
    that is said."""
    ids = render_prompts(groups, tokenizer, template=template)
    fits = with_room(model, ids)
    total = len(fits) * how.samples
    found = sample(model, tokenizer, [ids[n] for n in fits], how, progress=counted(progress, "sample", total))
    return [replace(s, prompt_index=fits[s.prompt_index]) for s in found]


def counted(progress: Progress, phase: str, total: int) -> Callable[[int], None]:
    """A function that is told how many more are done, and passes on how many are done in all."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(phase, done, total, {})

    return advance


def prompt_text(group: Group) -> str:
    """A prompt as a scorer sees it: the text, or the turns as a dialogue."""
    if isinstance(group.prompt, str):
        return group.prompt
    return "\n\n".join(f"{m.role}: {m.content}" for m in group.prompt)
