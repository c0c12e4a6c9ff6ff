"""A whole DPO step (reference, forward, backward, optimizer) of preftune beside TRL's, on the same rows in the same order.

    python benchmarks/dpo_step.py --trl TRL_PYTHON --hh harmless-base-test.jsonl.gz

TRL_PYTHON is the interpreter of an environment with `trl==1.16.0` and the same torch. Every arm is a process of its own, one
at a time, on all cores. TRL's best is searched first, in few steps, over micro-batch x checkpointing; then preftune, TRL's best
and TRL's whole padded batch alternate. Printed: the losses of every step beside each other, pairs per second by the median of
the steps after the first, peak memory. `--profile long` is preftune sharing the prompt beside preftune with a copy per answer;
`--smaller 512` runs preftune with micro-batches of at most 512 tokens too, beside the same, and `--recomputed 512` with
activation checkpointing besides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import common
import rows

Arm = dict[str, Any]


def search(words: argparse.Namespace, folder: Path, batch: int) -> list[Arm]:
    """TRL's arms over the grid; one that fails, by lack of memory for example, stays in it with the reason. Of a grid of one
    setting nothing is run."""
    sizes = words.sizes or range(batch, 0, -1)
    steps = min(rows.SEARCH, words.steps) + rows.WARM
    grid = [
        {"dtype": words.dtype, "batch": b, "accumulation": batch // b, "checkpointing": checkpointing, "steps": steps}
        for checkpointing in ([False] if words.no_checkpointing else [False, True])
        for b in sizes
        if batch % b == 0
    ]
    if len(grid) == 1:
        return [{"how": grid[0]}]
    return [common.run_arm("sides:trl", folder, how, words.trl) for how in grid]


def rivals(words: argparse.Namespace, grid: list[Arm], batch: int) -> dict[str, dict[str, Any]]:
    """What preftune is compared with, by name: the settings of each. TRL's whole padded batch is there if the search could run
    it, unless it is the best."""
    steps = words.steps + rows.WARM
    if words.profile == "long":
        return {"unshared": {"dtype": words.dtype, "tokens": words.tokens, "steps": steps, "share": False}}
    ran = [arm for arm in grid if "failed" not in arm]
    if not ran:
        sys.exit("TRL ran with none of the settings of the grid")
    best = min(ran, key=lambda arm: arm.get("median", 0.0))["how"]
    found = {"TRL's best": {**best, "steps": steps}}
    for how in (arm["how"] for arm in ran):
        if how["batch"] == batch and not how["checkpointing"] and how != best:
            found["TRL padded"] = {**how, "steps": steps}
    return found


def compared(ours: list[Arm], theirs: list[Arm], batch: int) -> dict[str, Any]:
    """Speed, memory and losses of the runs of one side against those of another. `ratio` is of the median steps, `ratios` the
    same by run, `of_all` of all seconds; the first step of a run counts in none of them."""
    timed = [[run["seconds"][rows.WARM :] for run in runs] for runs in (ours, theirs)]
    mine, their = (statistics.median(itertools.chain(*side)) for side in timed)
    peaks = [max(run["peak_gb"] for run in runs) for runs in (ours, theirs)]
    losses = zip(ours[0]["losses"], theirs[0]["losses"], strict=True)
    return {
        "how": theirs[0]["how"],
        "seconds_per_step": {"preftune": mine, "other": their},
        "pairs_per_s": {"preftune": batch / mine, "other": batch / their},
        "ratio": their / mine,
        "ratios": [statistics.median(b) / statistics.median(a) for a, b in zip(*timed, strict=False)],
        "of_all": statistics.mean(itertools.chain(*timed[1])) / statistics.mean(itertools.chain(*timed[0])),
        "peak_gb": {"preftune": peaks[0], "other": peaks[1]},
        "memory": peaks[0] / peaks[1],
        "largest_loss_difference": max(abs(a - b) for a, b in losses),
    }


def show(words: argparse.Namespace, runs: dict[str, list[Arm]], against: dict[str, dict[str, Any]]) -> None:
    """The table of losses, then a line for each rival."""
    print("step", *(f"{name:>10}" for name in runs))
    for n, losses in enumerate(zip(*(arms[0]["losses"] for arms in runs.values()), strict=True), start=1):
        print(f"{n:4}", *(f"{loss:10.6f}" for loss in losses))
    for name, found in against.items():
        speed, peak = found["pairs_per_s"], found["peak_gb"]
        at_once = f", micro-batch of {found['how']['batch']}" if "batch" in found["how"] else ""
        print(
            f"{words.profile}, {words.dtype}, {name}{at_once}: "
            f"{speed['preftune']:.2f} pairs/s against {speed['other']:.2f}, {found['ratio']:.2f}x "
            f"(by run {common.listed(found['ratios'])}; by all seconds {found['of_all']:.2f}); "
            f"{peak['preftune']:.2f} GB against {peak['other']:.2f}, {found['memory']:.2f}x; "
            f"losses differ by at most {found['largest_loss_difference']:.1e}"
        )


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--trl", default=sys.executable, help="python of an environment with TRL")
    parser.add_argument("--profile", default="hh", choices=("hh", "four", "summaries", "chat", "long"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=rows.STEPS, help="steps that are timed, after the first")
    parser.add_argument("--sizes", type=int, nargs="+", help="TRL's micro-batches that are tried; all divisors of the batch")
    parser.add_argument("--no-checkpointing", action="store_true", help="leave TRL's gradient checkpointing out of the search")
    parser.add_argument("--smaller", type=int, nargs="+", default=[], help="preftune with so many tokens at once, too")
    parser.add_argument("--recomputed", type=int, nargs="+", default=[], help="the same with activation checkpointing")
    parser.add_argument("--name", help="of the result; the profile's where it is absent")
    words = parser.parse_args()
    folder = common.prepared(words, words.profile, words.steps + rows.WARM)
    batch = json.loads((folder / "settings.json").read_text())["batch"]
    grid = [] if words.profile == "long" else search(words, folder, batch)
    others = rivals(words, grid, batch)
    how = {"dtype": words.dtype, "tokens": words.tokens, "steps": words.steps + rows.WARM}
    ours = {"preftune": how, **{f"{n} tokens at once": how | {"tokens": n} for n in words.smaller}}
    ours |= {f"{n} tokens, recomputed": how | {"tokens": n, "checkpointing": True} for n in words.recomputed}
    runs: dict[str, list[Arm]] = {name: [] for name in (*ours, *others)}
    for _ in range(words.repeats):
        for name, how in {**ours, **others}.items():
            side, python = ("sides:preftune", sys.executable) if "tokens" in how else ("sides:trl", words.trl)
            runs[name].append(common.run_arm(side, folder, how, python))
    runs = {name: ran for name, arms in runs.items() if (ran := [arm for arm in arms if "median" in arm])}
    against = {
        f"{own} against {name}": compared(runs[own], runs[name], batch)
        for own in ours
        for name in others
        if own in runs and name in runs
    }
    show(words, runs, against)
    result = {"batch": batch, "against": against, "runs": runs, "grid": grid}
    trl = None if words.profile == "long" else words.trl
    common.write(words, f"dpo_step-{words.name or words.profile}-{words.dtype}", result, trl)


if __name__ == "__main__":
    main()
