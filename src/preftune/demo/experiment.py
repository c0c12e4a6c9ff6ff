"""Controlled sentiment, after the DPO paper's section 6: sample, label with a known reward, train, measure.

Openings are sampled from the packaged model, four continuations each; all pairs are labelled by the sentiment scorer as
Bradley-Terry probabilities; DPO trains on them; then one sample of the base and one of the aligned model on held-out
openings are compared, by the scorer that labelled and by a lexicon that did not.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from preftune import report
from preftune.data.render import render_prompts
from preftune.demo import scorers
from preftune.evaluation.intervals import mean_interval
from preftune.evaluation.kl import kl_per_response
from preftune.evaluation.win_rate import win_rate
from preftune.functions import judge
from preftune.generation.sample import Sample, Sampling, sample
from preftune.keys import DemoKeys
from preftune.models.load import load_model, load_tokenizer
from preftune.records import By, Comparison, Group, Response
from preftune.runs import folder as files
from preftune.runs.fit import fit

log = logging.getLogger("preftune")

SCORERS = {"sentiment": scorers.sentiment, "lexicon": scorers.lexicon}
TRAIN_PROMPTS, HELD_PROMPTS = 1000, 512
SAMPLES, NEW_TOKENS = 4, 48
SETTINGS: dict[str, Any] = {
    "epochs": 2.0,
    "batch_size": 48,  # eight openings of six pairs: no opening is cut between two steps
    "learning_rate": 4e-4,
    "dtype": "float32",
    "train": {"tokens_per_microbatch": 4096},
}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Task:
    """What every beta starts from: training groups, held-out openings, and the base model's answers to them."""

    train: list[Group]
    held: list[str]
    base: list[Sample]


def model_folder() -> str:
    """The packaged model. A package is installed as files, so the resource is a path."""
    return str(resources.files("preftune.demo").joinpath("assets", "film_reviews"))


def run(keys: DemoKeys, out: Path, *, progress: Any = None) -> dict[str, Any]:
    """The whole experiment; one DPO run per beta.

    Returns:
        {prompts, base: {reward, distinct_2}, runs: [{beta, win_rate: {scorer: {...}}, reward, kl (nats per response),
        kl_interval, kl_samples, distinct_2, samples}]}, as written to demo.json.
    """
    files.make(out, overwrite=keys.overwrite)
    tokenizer = load_tokenizer(model_folder())
    log.info(f"sampling {TRAIN_PROMPTS + HELD_PROMPTS} openings, and {SAMPLES} continuations for {TRAIN_PROMPTS} of them")
    task = prepare(tokenizer, keys.seed)
    base_texts = [s.text for s in task.base]
    rewards = judge(scorers.sentiment, task.held, base_texts, "sentiment")
    result: dict[str, Any] = {
        "prompts": len(task.held),
        "base": {"reward": sum(rewards) / len(rewards), "distinct_2": distinct_2(base_texts)},
        "runs": [],
    }
    for beta in keys.betas:
        folder = out if len(keys.betas) == 1 else out / f"beta-{beta:g}"
        result["runs"].append(one_beta(task, tokenizer, beta, folder, keys.seed, progress))
    files.write_json(out / "demo.json", result)
    report.write(out)
    return result


def prepare(tokenizer: Any, seed: int) -> Task:
    """Openings, labelled training groups and the base model's held-out answers, all from the packaged model."""
    model = load_model(model_folder())
    openings = sample_openings(model, tokenizer, TRAIN_PROMPTS + HELD_PROMPTS, seed)
    train, held = openings[:TRAIN_PROMPTS], openings[TRAIN_PROMPTS:]
    answers = continuations(model, tokenizer, train, samples=SAMPLES, seed=seed + 1)
    return Task(label(train, answers), held, continuations(model, tokenizer, held, samples=1, seed=seed + 2))


def sample_openings(model: Any, tokenizer: Any, count: int, seed: int) -> list[str]:
    """Distinct openings of 2 to 8 words: the beginnings of passages that the model writes from nothing."""
    start = render_prompts([Group("")], tokenizer)
    rng = random.Random(seed)
    found: dict[str, None] = {}
    round_ = 0
    while len(found) < count:
        how = Sampling(samples=count, max_new_tokens=16, seed=seed + round_)
        for s in sample(model, tokenizer, start, how):
            words = s.text.split()
            length = rng.randint(2, 8)
            if len(words) > length:  # the last word may be cut in two by the token limit
                found[" ".join(words[:length])] = None
        round_ += 1
    return list(found)[:count]


def continuations(model: Any, tokenizer: Any, openings: Sequence[str], *, samples: int, seed: int) -> list[Sample]:
    ids = render_prompts([Group(o) for o in openings], tokenizer)
    return sample(model, tokenizer, ids, Sampling(samples=samples, max_new_tokens=NEW_TOKENS, seed=seed))


def label(openings: Sequence[str], answers: Sequence[Sample]) -> list[Group]:
    """All pairs of distinct answers, with P(a better than b) = sigmoid(r_a - r_b) under the sentiment scorer."""
    by = By(who="preftune.demo.scorers:sentiment", kind="rule")
    groups: list[Group] = []
    for n, opening in enumerate(openings):
        texts = {s.text: s for s in answers if s.prompt_index == n and s.text.strip()}
        rewards = judge(scorers.sentiment, [opening] * len(texts), list(texts), "sentiment")
        marks = [
            Comparison(a, b, preference=1 / (1 + math.exp(rewards[b] - rewards[a])), by=by)
            for a, b in combinations(range(len(texts)), 2)
        ]
        responses = tuple(Response(text, finished=s.finish == "stop") for text, s in texts.items())
        groups.append(Group(opening, responses, tuple(marks)))
    return groups


def one_beta(task: Task, tokenizer: Any, beta: float, folder: Path, seed: int, progress: Any) -> dict[str, Any]:
    """Trains from the packaged model and measures the aligned one against it."""
    log.info(f"training with DPO, beta {beta:g}")
    policy, base = load_model(model_folder()), load_model(model_folder())
    fit(policy, tokenizer, task.train, method="dpo", beta=beta, seed=seed, out=folder, progress=progress, **SETTINGS)
    answers = continuations(policy, tokenizer, task.held, samples=1, seed=seed + 2)
    log.info("judging the base and the aligned model on held-out openings")
    texts, base_texts = [s.text for s in answers], [s.text for s in task.base]
    verdicts: dict[str, Any] = {}
    for name, scorer in SCORERS.items():
        ours, theirs = (judge(scorer, task.held, side, name) for side in (texts, base_texts))
        lengths = {"length": mean_tokens(answers), "length_against": mean_tokens(task.base)}
        verdicts[name] = win_rate(ours, theirs, seed=seed) | lengths | {"scorer": f"preftune.demo.scorers:{name}"}
    rewards = judge(scorers.sentiment, task.held, texts, "sentiment")
    kl = kl_per_response(policy, base, answers)
    kl_mean, kl_interval = mean_interval(kl, range(len(kl)), seed=seed) or (None, None)
    shown = [{"prompt": task.held[n], "before": base_texts[n], "after": texts[n]} for n in range(min(20, len(texts)))]
    return {
        "beta": beta,
        "win_rate": verdicts,
        "reward": sum(rewards) / len(rewards),
        "kl": kl_mean,
        "kl_interval": kl_interval,
        "kl_samples": len(kl),
        "distinct_2": distinct_2(texts),
        "samples": shown,
    }


def mean_tokens(samples: Sequence[Sample]) -> float:
    return sum(len(s.ids) for s in samples) / len(samples)


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct pairs of neighbouring words over all such pairs (Li et al. 2016, arXiv 1510.03055); 0 where there are none."""
    found = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(found)) / len(found) if found else 0.0
