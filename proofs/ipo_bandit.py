"""IPO's bandit (Azar et al. 2023, arXiv 2310.12036, section 5.4): three actions, a softmax policy, Adam.

On D1 = {a > b, b > c, a > c} DPO goes to a deterministic policy for every tau, and IPO to a softmax that depends on tau. The
paper's second set is printed as {a > b, b > a}: there c stands in no pair, so neither loss moves it, and it can show nothing.
With a > c beside them, D3', the claim holds: DPO gives c up altogether, IPO does not.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import common
import torch
from torch import Tensor

from preftune import losses

TAUS = (0.1, 0.5, 1.0, 10.0)
SEEDS, STEPS, BATCH, RATE, EVERY = 10, 18_000, 9, 0.01, 200
SETS = {"D1": [(0, 1), (1, 2), (0, 2)], "D3'": [(0, 1), (1, 0), (0, 2)]}
LOSSES = {"dpo": losses.dpo, "ipo": losses.ipo}


def train(name: str, pairs: list[tuple[int, int]], tau: float) -> Tensor:
    """[points, seeds, 3] probabilities along training, all seeds at once: their gradients do not meet."""
    drawn = torch.stack(
        [torch.randint(len(pairs), (STEPS, BATCH), generator=torch.Generator().manual_seed(seed)) for seed in range(SEEDS)], 1
    )
    ordered = torch.tensor(pairs)
    offset = 3 * torch.arange(SEEDS)[:, None]
    theta = torch.zeros(SEEDS, 3, requires_grad=True)
    reference = torch.full((3 * SEEDS,), -math.log(3))
    optimizer = torch.optim.Adam([theta], lr=RATE)
    found: list[Tensor] = []
    for step in range(STEPS):
        if step % EVERY == 0:
            found.append(theta.detach().softmax(-1))
        chosen, rejected = (ordered[drawn[step]][..., side] + offset for side in (0, 1))
        logp = theta.log_softmax(-1).flatten()
        loss = LOSSES[name](logp, reference, chosen.flatten(), rejected.flatten(), beta=tau)
        optimizer.zero_grad()
        (loss.sum() / BATCH).backward()
        optimizer.step()
    return torch.stack([*found, theta.detach().softmax(-1)])


def optimum(data: str, tau: float) -> list[float]:
    """Of IPO, exactly: gaps of 1 / (3 tau) from a to b and b to c on D1; on D3' a and b tie, 1 / (2 tau) above c."""
    gap = 1 / (3 * tau) if data == "D1" else 1 / (2 * tau)
    logits = [2 * gap, gap, 0.0] if data == "D1" else [gap, gap, 0.0]
    return torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval over the seeds, Student's t with 9 degrees of freedom."""
    half = 2.262 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.4f} ± {half:.4f}"


def draw(figure: Any, runs: dict[tuple[str, str, float], Tensor]) -> None:
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for row, (data, name) in zip(panels, (("D1", "dpo"), ("D1", "ipo")), strict=True):
        for axes, tau in zip(row, TAUS, strict=True):
            for action, letter in enumerate("abc"):
                values = runs[data, name, tau][..., action]
                steps = [min(n * EVERY, STEPS) for n in range(len(values))]
                mean, spread = values.mean(1), 2.262 * values.std(1) / math.sqrt(SEEDS)
                axes.plot(steps, mean, color=common.INKS[action], label=f"π({letter})")
                axes.fill_between(steps, mean - spread, mean + spread, color=common.INKS[action], alpha=0.2, linewidth=0)
                if name == "ipo":
                    axes.axhline(optimum(data, tau)[action], color=common.INKS[action], linewidth=0.8, linestyle=":")
            axes.set_title(f"{name}, tau {tau:g}", fontsize=9)
            axes.tick_params(labelsize=8)
    panels[0][0].legend(frameon=False, fontsize=8)
    panels[1][0].set_xlabel("step", fontsize=8)


def main() -> None:
    torch.set_num_threads(1)
    runs = {(data, name, tau): train(name, pairs, tau) for data, pairs in SETS.items() for name in LOSSES for tau in TAUS}
    figures: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "learning_rate": RATE, "seeds": SEEDS, "runs": {}}
    text = [
        f"Three actions, softmax policy from uniform, Adam at {RATE:g}, {STEPS:,} steps of {BATCH} pairs with replacement,"
        f" {SEEDS} seeds; mean and 95 % interval of the last policy. Dotted in the picture: IPO's exact optimum.",
        "![probabilities along training](ipo_bandit.png)",
    ]
    for data, action in (("D1", 0), ("D3'", 2)):
        letter = "abc"[action]
        rows: list[list[str]] = []
        for tau in TAUS:
            last = {name: runs[data, name, tau][-1][:, action].tolist() for name in LOSSES}
            exact = optimum(data, tau)[action]
            figures["runs"][f"{data} tau {tau:g}"] = {**last, "ipo_exact": exact}
            rows.append([f"{tau:g}", interval(last["dpo"]), interval(last["ipo"]), f"{exact:.4f}"])
        text += [
            f"## {data} = {{{', '.join('abc'[w] + ' > ' + 'abc'[o] for w, o in SETS[data])}}}: π({letter})",
            common.table(["tau", "dpo", "ipo", "ipo, exactly"], rows),
        ]
    text.append(
        "The paper prints its third set as {a > b, b > a}. There c is in no pair: its logit gets no gradient from either loss, "
        "and both leave a = b by symmetry, so π stays uniform and nothing can be shown. D3' adds a > c.\n\n"
        "That DPO ends at a deterministic policy is a statement about the limit: at tau 10 it is far from there."
    )
    common.picture("ipo_bandit", lambda figure: draw(figure, runs), size=(10, 4.6))
    common.write("ipo_bandit", "IPO's bandit", "\n\n".join(text), figures)


if __name__ == "__main__":
    main()
