"""The learning rate of each kind of adapter, in multiples of the one that is right for all weights.

The defaults are ten times that for low-rank matrices, and a hundred times for virtual tokens (`models.options.rate_factor`).
"""

from __future__ import annotations

import logging
from functools import partial

import common
import film

from preftune.demo.experiment import model_folder
from preftune.models.load import load_model

STEPS, HELD = 60, 384
ARMS = (
    ("none", 1),
    *(("lora", times) for times in (1, 10, 100)),
    *((kind, times) for kind in ("prompt", "prefix") for times in (10, 100, 1000)),
)


def of_arm(task: film.Task, arm: tuple[str, int]) -> dict[str, float]:
    """What a run comes to with this adapter, at so many times the rate of all weights."""
    logging.getLogger("preftune").setLevel(logging.ERROR)
    kind, times = arm
    rate = times * film.SETTINGS["learning_rate"]
    policy = film.trained(task, film.groups(task, "pairs"), adapter={"type": kind}, learning_rate=rate, epochs=1.0, steps=STEPS)
    found = film.measured(task, policy, load_model(model_folder()))
    print(kind, times, found, flush=True)
    return {"times": times, **found}


def main() -> None:
    logging.getLogger("preftune").setLevel(logging.ERROR)
    task, start = film.prepare(STEPS * film.OPENINGS, HELD), load_model(model_folder())
    before = {"times": 0, **film.measured(task, start, start)}
    with common.workers() as pool:
        found = list(pool.map(partial(of_arm, task), ARMS))
    rows = [
        [name, times or "–", f"{f['reward']:+.2f}", f"{f['positive']:.0%}", f"{f['kl']:.1f}"]
        for (name, times), f in zip((("before training", 0), *ARMS), (before, *found), strict=True)
    ]
    text = [
        f"The packaged film-review model, DPO with beta 0.1 on soft pairs of four sampled answers to {STEPS * film.OPENINGS} "
        f"openings; {STEPS} steps of {film.STEP} pairs. Rates are multiples of {film.SETTINGS['learning_rate']:g}, which is "
        f"right for all weights of this small model; adapters otherwise as by default. One answer to each of {HELD} openings "
        "held out. Virtual tokens start as random tokens, and so the policy starts a nat or two from the model.",
        common.table(["adapter", "times the rate", "gold reward", "positive", "KL, nats"], rows),
    ]
    figures = {f"{name} {times}": f for (name, times), f in zip((("before", 0), *ARMS), (before, *found), strict=True)}
    common.write("adapter_rates", "Learning rates of adapters", "\n\n".join(text), figures)


if __name__ == "__main__":
    main()
