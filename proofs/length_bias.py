"""Judges that like long answers: how much longer the answers get under methods with and without a remedy.

The packaged model first learns to end its answers (SFT on samples cut after one to four sentences). Its own answers are then
compared by sigmoid(r_a - r_b + LIKING * (tokens_a - tokens_b)), r the gold reward: the length is the judges' own liking, and a
method that does not know better learns to write more. Sources: r_dpo Park et al. 2024 (arXiv 2403.19159), ld_dpo Liu et al.
2024 (arXiv 2409.06411), simpo Meng et al. 2024 (arXiv 2405.14734).
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import common
import film
import torch

from preftune.demo.experiment import model_folder
from preftune.models.load import load_model
from preftune.records import Comparison, Demonstration, Group, Response

OPENINGS, HELD, SEEDS, STEPS = 320, 128, 3, 40
LIKING = 0.05  # log-odds a token
LONGEST = 128
ARMS: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo"},
    "r_dpo, alpha 0.05": {"method": {"name": "r_dpo", "alpha": 0.05}},
    "ld_dpo, alpha 0": {"method": {"name": "ld_dpo", "alpha": 0.0}},
    "ln_dpo": {"method": "ln_dpo"},
    "simpo": {"method": "simpo"},
}


def ending(seed: int) -> Any:
    """The packaged model after 80 steps on passages of one to four sentences."""
    task = film.prepare(OPENINGS, 0, samples=1, seed=1000 + seed)
    rng = random.Random(seed)
    shown: list[Group] = []
    for opening, answers in zip(task.openings, task.answers, strict=True):
        for s in answers:
            sentences = re.findall(r"[^.!?]*[.!?]+", s.text)
            if sentences:
                text = "".join(sentences[: rng.randint(1, 4)])
                shown.append(Group(opening, (Response(text),), (Demonstration(0),)))
    return film.trained(task, shown, method="sft", epochs=4.0, batch_size=32)


def judged(task: film.Task) -> list[Group]:
    """All pairs, by the gold reward and by length."""
    found: list[Group] = []
    for group, answers, rewards in zip(film.groups(task, "pairs"), *_several(task), strict=True):
        lengths = [len(s.ids) for s in answers]
        marks = [
            replace(m, preference=film.logistic(rewards[m.a] - rewards[m.b] + LIKING * (lengths[m.a] - lengths[m.b])))
            for m in group.marks
            if isinstance(m, Comparison)
        ]
        found.append(replace(group, marks=tuple(marks)))
    return found


def _several(task: film.Task) -> tuple[list[Any], list[Any]]:
    """Answers and rewards of the openings that have two or more."""
    kept = [n for n, own in enumerate(task.answers) if len(own) > 1]
    return [task.answers[n] for n in kept], [task.rewards[n] for n in kept]


def longer_wins(data: Sequence[Group], task: film.Task) -> float:
    """How often the longer answer is the likelier winner, of pairs of unlike lengths."""
    hits: list[float] = []
    for group, answers in zip(data, _several(task)[0], strict=True):
        for m in group.marks:
            assert isinstance(m, Comparison)
            gap = len(answers[m.a].ids) - len(answers[m.b].ids)
            if gap:
                hits.append(m.preference if gap > 0 else 1 - m.preference)
    return fmean(hits)


@dataclass(frozen=True, slots=True)
class Begun:
    """What the arms of one seed have in common: the model that has learned to end its answers, and what was judged."""

    weights: dict[str, torch.Tensor]
    task: film.Task
    data: list[Group]
    longer_wins: float
    before: dict[str, float]


def begin(seed: int) -> Begun:
    logging.getLogger("preftune").setLevel(logging.ERROR)
    base = ending(seed)
    task = film.prepare(OPENINGS, HELD, seed=100 * seed, model=base, new_tokens=LONGEST)
    data = judged(task)
    before = film.measured(task, base, base, new_tokens=LONGEST)
    print(seed, before, flush=True)
    return Begun(base.state_dict(), task, data, longer_wins(data, task), before)


def run(job: tuple[Begun, int, str]) -> dict[str, float]:
    """What a model is after the steps of one arm."""
    logging.getLogger("preftune").setLevel(logging.ERROR)
    begun, seed, name = job
    base, policy = load_model(model_folder()), load_model(model_folder())
    for model in (base, policy):
        model.load_state_dict(begun.weights)
    film.trained(begun.task, begun.data, base=policy, steps=STEPS, seed=seed, **ARMS[name])
    found = film.measured(begun.task, policy, base, new_tokens=LONGEST)
    print(seed, name, found, flush=True)
    return found


def draw(figure: Any, found: dict[str, list[dict[str, float]]]) -> None:
    axes = figure.subplots()
    for n, (name, runs) in enumerate(found.items()):
        lengths, rewards = ([r[key] for r in runs] for key in ("length", "reward"))
        axes.plot(lengths, rewards, "o", color=common.INKS[n], markersize=5, label=name)
    axes.set_xlabel("mean length of an answer, tokens")
    axes.set_ylabel("gold reward")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def main() -> None:
    with common.workers() as pool:
        begun = list(pool.map(begin, range(SEEDS)))
        jobs = [(begun[seed], seed, name) for name in ARMS for seed in range(SEEDS)]
        figures = list(pool.map(run, jobs))
    found = {"before": [own.before for own in begun]}
    for (_, _, name), figure in zip(jobs, figures, strict=True):
        found.setdefault(name, []).append(figure)
    share = [own.longer_wins for own in begun]

    def shown(runs: list[dict[str, float]], key: str, form: str) -> str:
        values = [r[key] for r in runs]
        return f"{fmean(values):{form}} ± {stdev(values):{form.strip('+')}}"

    before = fmean(r["length"] for r in found["before"])
    rows = [
        [name, shown(runs, "length", ".1f"), f"{fmean(r['length'] for r in runs) / before - 1:+.0%}",
         shown(runs, "reward", "+.2f"), shown(runs, "kl", ".2f")]
        for name, runs in found.items()
    ]  # fmt: skip
    text = [
        f"Judges' log-odds are the gold reward's difference plus {LIKING:g} for every token that an answer is longer: the "
        f"longer answer wins {fmean(share):.0%} of pairs of unlike lengths. {OPENINGS} openings with four answers of the model "
        f"itself, {STEPS} steps of {film.STEP} pairs at {film.SETTINGS['learning_rate']:g}, default betas; {SEEDS} "
        f"seeds (mean ± standard deviation). Measured on {HELD} openings held out, at most {LONGEST} tokens.",
        "![length and reward](length_bias.png)",
        common.table(["method", "tokens", "against before", "gold reward", "KL, nats"], rows),
        "The methods are not at the same KL: simpo and ld_dpo have moved furthest, and are the longest. r_dpo is given the "
        "judges' own liking as alpha, which takes it out of the labels; in practice it has to be guessed, and preftune check "
        "says which way the labels lean.",
    ]
    common.picture("length_bias", lambda figure: draw(figure, found), size=(8, 4))
    common.write("length_bias", "Length-biased judges", "\n\n".join(text), {"longer_wins": share, "runs": found})


if __name__ == "__main__":
    main()
