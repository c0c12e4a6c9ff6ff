"""Every method for 60 steps on one task: gold reward against KL from the packaged model.

The answers, their rewards, the steps and the learning rate are the same for all; a method reads of them what it asks for
(pairs, ratings, rankings, the best answers), with its own default settings.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import common
import film

from preftune.demo.experiment import model_folder
from preftune.methods.table import NEEDS
from preftune.models.load import load_model

STEPS, HELD, OPENINGS = 60, 192, 4  # openings of a step
KINDS = {"cut_pairs": "pairs"}
SIZES = {"pairs": 6 * OPENINGS, "ratings": 4 * OPENINGS, "answers": OPENINGS, "rankings": OPENINGS}  # judgements of them
WORDS = {"pairs": "pairs", "ratings": "ratings", "rankings": "rankings", "answers": "best answers"}


def draw(figure: Any, base: dict[str, float], runs: dict[str, dict[str, float]]) -> None:
    axes = figure.subplots()
    kinds = list(WORDS)
    for n, (name, found) in enumerate(sorted(runs.items(), key=lambda item: item[1]["reward"])):
        ink = common.INKS[kinds.index(found["kind"])]  # type: ignore[arg-type]
        axes.plot(found["kl"], found["reward"], "o", color=ink, markersize=5)
        # names of neighbours stand on either side of their points
        place, side = ((6, -3), "left") if n % 2 else ((-6, -3), "right")
        where = (found["kl"], found["reward"])
        axes.annotate(name, where, xytext=place, textcoords="offset points", ha=side, fontsize=7)
    axes.set_xscale("log")
    for n, kind in enumerate(kinds):
        axes.plot([], [], "o", color=common.INKS[n], label=WORDS[kind])
    axes.axhline(base["reward"], color="#3c4047", linewidth=0.8, linestyle=":")
    axes.set_xlabel("KL from the start, nats per answer")
    axes.set_ylabel("gold reward")
    axes.legend(frameon=False, fontsize=8, title="judgements", title_fontsize=8)


def run(task: film.Task, name: str) -> dict[str, Any]:
    """What the model is after so many steps of a method."""
    logging.getLogger("preftune").setLevel(logging.ERROR)
    kind = KINDS.get(NEEDS[name].kind, NEEDS[name].kind)
    keys = {"method": name, "epochs": 1.0, "steps": STEPS, "batch_size": SIZES[kind]}
    policy = film.trained(task, film.groups(task, kind), **keys)
    found = film.measured(task, policy, load_model(model_folder()))
    print(name, found, flush=True)
    return {"beta": NEEDS[name].beta, "kind": kind, **found}


def main() -> None:
    logging.getLogger("preftune").setLevel(logging.ERROR)
    task = film.prepare(STEPS * OPENINGS, HELD)
    start = load_model(model_folder())
    base = film.measured(task, start, start)
    names = [name for name, needs in NEEDS.items() if not needs.scalar]
    with common.workers() as pool:
        runs = dict(zip(names, pool.map(partial(run, task), names), strict=True))
    rows = [
        [name, WORDS[r["kind"]], "–" if r["beta"] is None else f"{r['beta']:g}", f"{r['reward']:+.2f}", f"{r['positive']:.0%}",
         f"{r['kl']:.2f}", f"{r['length']:.1f}"]
        for name, r in sorted(runs.items(), key=lambda item: -item[1]["reward"])
    ]  # fmt: skip
    text = [
        f"The packaged film-review model, {STEPS} steps each on the same {STEPS * OPENINGS} openings with four sampled "
        "answers: all six pairs as probabilities sigmoid(r_a - r_b) of the gold reward r (the sentiment scorer's log-odds), "
        "one rating of each answer drawn with sigmoid(r - mean), the ranking by r, or the best answer. Learning rate "
        f"{film.SETTINGS['learning_rate']:g} for all, AdamW, float32; every other setting is the method's default. Measured on "
        f"one answer to each of {HELD} openings held out, of at most 48 tokens; before training the reward is "
        f"{base['reward']:+.2f}, {base['positive']:.0%} positive.",
        "![gold reward against KL](all_methods.png)",
        common.table(["method", "learns from", "beta", "gold reward", "positive", "KL, nats", "tokens"], rows),
        "One seed, one learning rate and defaults: this shows how far each method comes, and how far from the start, in the "
        "same number of steps; it is no ranking of methods. A method further to the right has moved more, not learned better: "
        "beta and learning rate move it along the curve. A rating is one bit drawn at random where a pair has its probability: "
        f"{SIZES['ratings']} of them a step teach nothing that shows here, and 48 do ([KTO](kto_imbalance.md)). `apo_down` "
        "lowers both answers, for data that is worse than the model; on the model's own answers nothing holds it. `reward` "
        "trains a reward model and has no policy to sample from.",
    ]
    common.picture("all_methods", lambda figure: draw(figure, base, runs), size=(9, 5.4))
    common.write("all_methods", "All methods on one task", "\n\n".join(text), {"before": base, "runs": runs})


if __name__ == "__main__":
    main()
