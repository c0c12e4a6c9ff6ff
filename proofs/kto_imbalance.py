"""KTO on unbalanced ratings (Ethayarajh et al. 2024, arXiv 2402.01306, section 4.3): 90 % of the desirable ones are dropped.

The paper's rule keeps desirable_weight * n_desirable / (undesirable_weight * n_undesirable) within [1, 3/2].
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import common
import film

from preftune.demo.experiment import model_folder
from preftune.models.load import load_model
from preftune.records import Group, Rating

OPENINGS, HELD, SEEDS, STEPS, KEPT = 960, 256, 3, 60, 0.1


def unbalanced(data: Sequence[Group], seed: int) -> list[Group]:
    """A tenth of the desirable ratings, and all others."""
    rng = random.Random(seed)

    def kept(mark: Any) -> bool:
        return not mark.desirable or rng.random() < KEPT

    found = [replace(g, marks=tuple(m for m in g.marks if kept(m))) for g in data]
    return [g for g in found if g.marks]


def counts(data: Sequence[Group]) -> tuple[int, int]:
    good = sum(isinstance(m, Rating) and m.desirable for g in data for m in g.marks)
    return good, sum(len(g.marks) for g in data) - good


def draw(figure: Any, found: dict[str, list[dict[str, float]]]) -> None:
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("reward", "kl"), ("gold reward", "KL from the start, nats"), strict=True):
        for n, runs in enumerate(found.values()):
            axes.bar(n, fmean(r[key] for r in runs), color=common.INKS[n], width=0.6)
            axes.plot([n] * len(runs), [r[key] for r in runs], "o", color="#3c4047", markersize=3)
        axes.axhline(0, color="#3c4047", linewidth=0.8)
        axes.set_xticks(
            range(len(found)), [name.replace(", ", ",\n").replace(" of the", "\nof the") for name in found], fontsize=7
        )
        axes.set_title(label, fontsize=9)


def of_seed(seed: int) -> tuple[dict[str, dict[str, float]], dict[str, tuple[int, int]]]:
    """(figures, counts of desirable and undesirable ratings) of each arm"""
    logging.getLogger("preftune").setLevel(logging.ERROR)
    start, task = load_model(model_folder()), film.prepare(OPENINGS, HELD, seed=100 * seed)
    everything = film.groups(task, "ratings", seed=seed)
    few = unbalanced(everything, seed)
    arms: dict[str, tuple[list[Group], float]] = {
        "all ratings, weight 1": (everything, 1.0),
        "a tenth of the desirable, weight 1": (few, 1.0),
        "a tenth of the desirable, weight 13.33": (few, 13.33),
    }
    found = {"before": {"weight": 0.0, **film.measured(task, start, start)}}
    for name, (data, weight) in arms.items():
        keys = {"method": {"name": "kto", "desirable_weight": weight}, "seed": seed, "steps": STEPS}
        found[name] = {"weight": weight, **film.measured(task, film.trained(task, data, **keys), start)}
        print(seed, name, found[name], flush=True)
    return found, {name: counts(data) for name, (data, _) in arms.items()}


def main() -> None:
    with common.workers() as pool:
        seeds = list(pool.map(of_seed, range(SEEDS)))
    found = {name: [figures[name] for figures, _ in seeds] for name in seeds[0][0]}
    numbers = seeds[-1][1]

    def shown(runs: list[dict[str, float]], key: str) -> str:
        values = [r[key] for r in runs]
        return f"{fmean(values):+.2f} ± {stdev(values):.2f}"

    rows = [
        [name, "{:,} / {:,}".format(*numbers[name]) if name in numbers else "–", f"{fmean(r['weight'] for r in runs):.2f}",
         shown(runs, "reward"), f"{fmean(r['positive'] for r in runs):.0%}", shown(runs, "kl")]
        for name, runs in found.items()
    ]  # fmt: skip
    text = [
        f"The packaged film-review model, KTO with beta 0.1 on ratings of four sampled answers to {OPENINGS} openings, each "
        f"desirable with the probability sigmoid(r - mean) of the gold reward r; {STEPS} steps of {film.STEP} ratings at "
        f"{film.SETTINGS['learning_rate']:g}, undesirable weight 1; {SEEDS} seeds (mean ± standard deviation over them). "
        "Counts are those of the last seed.",
        "![reward and KL](kto_imbalance.png)",
        common.table(["ratings", "desirable / undesirable", "desirable weight", "gold reward", "positive", "KL, nats"], rows),
    ]
    common.picture("kto_imbalance", lambda figure: draw(figure, found))
    common.write("kto_imbalance", "KTO with nine tenths of the desirable ratings gone", "\n\n".join(text), found)


if __name__ == "__main__":
    main()
