"""What the policy writes before it is trained, and what that costs: the frozen samples of a constraint that is a cost."""

from __future__ import annotations

import logging
from dataclasses import replace

from preftune import processes
from preftune.data.render import Batch, Rendered, render_prompts
from preftune.evaluation.evaluate import prompt_text
from preftune.functions import judge, load_function
from preftune.generation.sample import Sample, Sampling, sample, with_room
from preftune.methods.constraints import Constrained, Cost, Sampled
from preftune.records import Group
from preftune.runs.job import Job, advancing, plan_of
from preftune.scoring.score import score_logp
from preftune.training.precision import Weights
from preftune.training.signals import Stop

log = logging.getLogger("preftune")


def with_samples(job: Job, weights: Weights, stop: Stop) -> Job:
    """The job whose training batch holds, under each prompt that its steps use, the samples that its costs are taken of."""
    method = job.method
    if not isinstance(method, Constrained) or not method.costs:
        return job
    used = {e.group for _, examples in plan_of(method, job.train, job.keys).batches for e in examples}
    share = job.keys.train.shares
    groups = [job.train.groups[g] for g in sorted(used)]
    ids = render_prompts(groups, job.tokenizer, template=job.keys.data.template)
    fitting = with_room(weights.compute, ids)
    samples: dict[str, list[Sampled]] = {groups[n].id: [] for n in fitting}
    for number, cost in enumerate(method.costs):
        how = Sampling(samples=cost.options.samples, max_new_tokens=cost.options.max_new_tokens, seed=job.keys.seed + number)
        advance = advancing(job, "sample", len(fitting) * how.samples, stop)
        written = processes.of_first(sample(weights.compute, job.tokenizer, [ids[n] for n in fitting], how, progress=advance))
        own = [fitting[s.prompt_index] for s in written]
        costs = processes.of_first(_costs(cost, [groups[n] for n in own], written))
        rows = [Rendered(n, 0, s.prompt_ids + s.ids, len(s.prompt_ids)) for n, s in zip(own, written, strict=True)]
        logp = score_logp(weights.compute, Batch(tuple(groups), tuple(rows)), range(len(rows)), share=share)
        for n, row, each, nats in zip(own, rows, costs, logp.tolist(), strict=True):
            samples[groups[n].id].append(Sampled(row, each, nats))
        log.info(
            f"{cost.name}: {len(written):,} answers to {len(fitting):,} prompts cost {sum(costs) / max(1, len(costs)):.4g}"
        )
    numbers = {group.id: n for n, group in enumerate(job.train.groups)}
    placed = {name: [replace(s, row=replace(s.row, group=numbers[name])) for s in own] for name, own in samples.items()}
    return replace(job, train=method.with_samples(job.train, placed))


def _costs(cost: Cost, groups: list[Group], written: list[Sample]) -> list[float]:
    name = cost.options.cost or ""
    key = f"method.constraints.{cost.name}.cost"
    return judge(load_function(name, key), [prompt_text(g) for g in groups], [s.text for s in written], name, key)
