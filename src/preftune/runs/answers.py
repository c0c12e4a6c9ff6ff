"""What the policy answers before and after, and its KL from the reference on its own answers."""

from __future__ import annotations

from typing import Any

from preftune.data.render import render_prompts
from preftune.evaluation.intervals import mean_interval
from preftune.evaluation.kl import kl_per_response
from preftune.generation.sample import Sample, Sampling, sample, with_room
from preftune.methods.pairs import comparisons
from preftune.records import Group
from preftune.runs.job import Job, advancing
from preftune.training.precision import Weights
from preftune.training.signals import Stop

SAMPLES = 20  # prompts answered before and after
NEW_TOKENS = 128


Prompts = tuple[list[Group], list[tuple[int, ...]]]  # and the tokens of each


def sample_prompts(job: Job) -> Prompts:
    """The first of those held out, as far as they leave room for an answer."""
    if job.method.head == "scalar":  # it writes no text
        return [], []
    groups = list(job.held.groups or job.train.groups)[:SAMPLES]
    ids = render_prompts(groups, job.tokenizer, template=job.keys.data.template)
    fitting = with_room(job.model, ids)
    return [groups[n] for n in fitting], [ids[n] for n in fitting]


def answers(job: Job, weights: Weights, prompts: Prompts, stop: Stop) -> list[Sample]:
    """One sample to each."""
    how = Sampling(max_new_tokens=NEW_TOKENS, seed=job.keys.seed)
    advance = advancing(job, "sample", len(prompts[1]), stop)
    return sample(weights.compute, job.tokenizer, prompts[1], how, progress=advance)


def sample_of(said: dict[str, Any]) -> Sample:
    """A sample from its form in JSON."""
    tokens: dict[str, Any] = {name: tuple(said[name]) for name in ("prompt_ids", "ids")}
    return Sample(**(said | tokens))


def side_by_side(job: Job, prompts: Prompts, before: list[Sample], after: list[Sample]) -> list[dict[str, Any]]:
    """What samples.jsonl holds."""
    lines: list[dict[str, Any]] = []
    for n, (group, ids) in enumerate(zip(*prompts, strict=True)):
        line = {
            "prompt": job.tokenizer.decode(ids, skip_special_tokens=True),
            "before": before[n].text,
            "after": after[n].text,
            "tokens_before": len(before[n].ids),
            "tokens_after": len(after[n].ids),
        }
        pairs = comparisons([group])
        if pairs:
            content = group.responses[pairs[0].responses[0]].content
            line["chosen"] = content if isinstance(content, str) else "\n".join(m.content for m in content)
        lines.append(line)
    return lines


def kl(job: Job, weights: Weights, samples: list[Sample], stop: Stop) -> dict[str, Any]:
    """KL of the trained policy from its reference, on the answers it just gave; nothing where the reference is gone."""
    off = job.new_adapter and job.load_reference is None  # the base under the adapter is the reference
    load = job.load_reference or job.load_start
    if not samples or not job.method.needs_reference or (not off and load is None):
        return {}
    reference = None if off or load is None else weights.beside(load())
    advance = advancing(job, "kl", len(samples), stop)
    values = kl_per_response(weights.compute, reference, samples, without_adapter=off, progress=advance)
    found = mean_interval(values, range(len(values)), seed=job.keys.seed)
    assert found is not None
    return {"kl": found[0], "kl_samples": len(values), "kl_interval": found[1]}
