"""The demo's task for the proofs: openings and answers of the packaged film-review model, judged by its sentiment scorer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from preftune.data.render import render_prompts
from preftune.demo import scorers
from preftune.demo.experiment import NEW_TOKENS, SETTINGS, mean_tokens, model_folder, sample_openings
from preftune.evaluation.kl import kl_per_response
from preftune.functions import judge
from preftune.generation.sample import Sample, Sampling, sample
from preftune.models.load import load_model, load_tokenizer
from preftune.records import By, Comparison, Demonstration, Group, Mark, Ranking, Rating, Response
from preftune.runs.fit import fit

STEP = 48  # comparisons of a step, or of another kind what those are made of
OPENINGS = 8  # of a step: four answers each, six pairs


@dataclass(frozen=True, slots=True)
class Task:
    """Answers to openings of training, with the reward of each; openings held out."""

    tokenizer: Any
    openings: list[str]
    answers: list[list[Sample]]
    rewards: list[list[float]]
    held: list[str]


def rewards_of(openings: Sequence[str], texts: Sequence[str]) -> list[float]:
    """The gold reward: the log-odds that the sentiment scorer gives to "positive"."""
    return judge(scorers.sentiment, list(openings), list(texts), "sentiment")


def prepare(
    openings: int, held: int, *, samples: int = 4, new_tokens: int = NEW_TOKENS, model: Any = None, seed: int = 0
) -> Task:
    """Openings of the packaged model, and distinct answers to them, its own or those of `model`."""
    tokenizer, packaged = load_tokenizer(model_folder()), load_model(model_folder())
    found = sample_openings(packaged, tokenizer, openings + held, seed)
    how = Sampling(samples=samples, max_new_tokens=new_tokens, seed=seed + 1)
    drawn = sample(model or packaged, tokenizer, render_prompts([Group(o) for o in found[:openings]], tokenizer), how)
    answers: list[list[Sample]] = [[] for _ in range(openings)]
    for s in {(s.prompt_index, s.text): s for s in drawn if s.text.strip()}.values():
        answers[s.prompt_index].append(s)
    rewards = [rewards_of([o] * len(own), [s.text for s in own]) for o, own in zip(found, answers, strict=False)]
    return Task(tokenizer, found[:openings], answers, rewards, found[openings:])


def groups(task: Task, kind: str, *, seed: int = 0) -> list[Group]:
    """The same answers and rewards r, judged as a method asks: `pairs` with the probability sigmoid(r_a - r_b) and the strength
    |r_a - r_b|, `ratings` that are desirable with the probability sigmoid(r - m), m the mean reward of all answers, `rankings`
    by reward, `answers` the best of each opening."""
    middle = fmean(r for own in task.rewards for r in own)
    rng = random.Random(seed)
    found: list[Group] = []
    for opening, answers, rewards in zip(task.openings, task.answers, task.rewards, strict=True):
        places = range(len(answers))
        marks: list[Mark] = []
        if kind == "ratings":
            marks = [Rating(n, rng.random() < logistic(rewards[n] - middle)) for n in places]
        elif len(answers) < 2:
            continue
        elif kind == "rankings":
            marks = [Ranking(tuple((n,) for n in sorted(places, key=lambda n: -rewards[n])))]
        elif kind == "answers":
            marks = [Demonstration(max(places, key=lambda n: rewards[n]))]
        else:
            marks = [compared(a, b, rewards[a] - rewards[b]) for a in places for b in places if a < b]
        found.append(Group(opening, tuple(Response(s.text, finished=s.finish == "stop") for s in answers), tuple(marks)))
    return found


def logistic(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).sigmoid())


def compared(a: int, b: int, gap: float) -> Comparison:
    return Comparison(a, b, preference=logistic(gap), by=By(kind="rule", strength=abs(gap)))


def trained(task: Task, data: Sequence[Group], *, base: Any = None, **keys: Any) -> Any:
    """The packaged model (or `base`, which is changed) after a run with the demo's settings and these keys."""
    policy = base or load_model(model_folder())
    return fit(policy, task.tokenizer, data, **({"eval_groups": data[:1], "batch_size": STEP} | SETTINGS | keys)).model


def measured(task: Task, policy: Any, base: Any, *, new_tokens: int = NEW_TOKENS, seed: int = 2) -> dict[str, float]:
    """One answer to each opening held out: {reward, positive (share of rewards over 0), length (tokens), kl (nats)}."""
    ids = render_prompts([Group(o) for o in task.held], task.tokenizer)
    drawn = sample(policy, task.tokenizer, ids, Sampling(max_new_tokens=new_tokens, seed=seed))
    rewards = rewards_of(task.held, [s.text for s in drawn])
    return {
        "reward": fmean(rewards),
        "positive": fmean(r > 0 for r in rewards),
        "length": mean_tokens(drawn),
        "kl": fmean(kl_per_response(policy, base, drawn)),
    }
