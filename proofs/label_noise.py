"""Flipped labels: where dpo, cdpo and robust end when a share of the judgements is turned around.

The clean preference is 0.9, a log-ratio of 2.197. With the noise rate e judges say 0.9 (1 - e) + 0.1 e. DPO fits what it
sees, cDPO (Mitchell 2023) is more careful still, robust DPO (Chowdhury et al. 2024, arXiv 2403.00409) finds the clean
log-ratio. The same from finite data: labels drawn and flipped, each loss minimised over the one log-ratio.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import common
import torch
from torch import Tensor

from preftune import losses

CLEAN, RATES = 0.9, (0.0, 0.1, 0.2, 0.3, 0.4)
DRAWS, SEEDS = 10_000, 50
ARMS = ("dpo", "cdpo", "robust")


def best(name: str, seen: float, noise: float) -> float:
    """The minimum of the loss over the log-ratio of the two answers, beta 1, by Newton's steps in float64."""
    keys = {} if name == "dpo" else {"noise": noise}
    gap = torch.zeros((), dtype=torch.float64, requires_grad=True)
    zero, one = torch.tensor([0]), torch.tensor([1])
    reference = torch.zeros(2, dtype=torch.float64)
    preference = torch.tensor([seen], dtype=torch.float64)
    for _ in range(30):
        policy = torch.stack([gap / 2, -gap / 2])
        loss: Tensor = getattr(losses, name)(policy, reference, zero, one, beta=1.0, preference=preference, **keys).sum()
        (slope,) = torch.autograd.grad(loss, gap, create_graph=True)
        (curve,) = torch.autograd.grad(slope, gap)
        with torch.no_grad():
            gap -= (slope / curve.abs().clamp(min=1e-9)).clamp(-0.5, 0.5)
    return float(gap.detach())


def drawn(noise: float, seed: int) -> float:
    """The share of labels for the better answer, of so many drawn and flipped ones."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(DRAWS, generator=generator) < CLEAN
    flipped = torch.rand(DRAWS, generator=generator) < noise
    return float((right ^ flipped).double().mean())


def draw(figure: Any, found: dict[str, dict[str, list[float]]]) -> None:
    axes = figure.subplots()
    for n, name in enumerate(ARMS):
        middle = [fmean(found[name][f"{e:g}"]) for e in RATES]
        spread = [stdev(found[name][f"{e:g}"]) for e in RATES]
        axes.errorbar(RATES, middle, yerr=spread, fmt="o-", markersize=4, capsize=3, color=common.INKS[n], label=name)
    axes.axhline(torch.tensor(CLEAN).logit(), color="#3c4047", linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of labels that are flipped")
    axes.set_ylabel("log-ratio at the minimum")
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    exact: dict[str, dict[str, float]] = {name: {} for name in ARMS}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ARMS}
    for noise in RATES:
        seen = CLEAN * (1 - noise) + (1 - CLEAN) * noise
        for name in ARMS:
            exact[name][f"{noise:g}"] = best(name, seen, noise)
            found[name][f"{noise:g}"] = [best(name, drawn(noise, seed), noise) for seed in range(SEEDS)]
    rows = [
        [f"{e:g}"]
        + [
            f"{exact[name][f'{e:g}']:.3f} ({fmean(found[name][f'{e:g}']):.2f} ± {stdev(found[name][f'{e:g}']):.2f})"
            for name in ARMS
        ]
        for e in RATES
    ]
    text = [
        f"The log-ratio at the minimum; clean: {float(torch.tensor(CLEAN, dtype=torch.float64).logit()):.3f}. First on the "
        f"whole population, in brackets on {DRAWS:,} labels drawn and flipped, mean ± standard deviation over {SEEDS} draws. "
        "`noise` is told to cdpo and robust; beta 1.",
        "![log-ratio against noise](label_noise.png)",
        common.table(["flipped", *ARMS], rows),
        "What robust pays for finding the clean value is variance: the more labels are flipped, the more of them it takes.",
    ]
    common.picture("label_noise", lambda figure: draw(figure, found), size=(6, 3.6))
    common.write("label_noise", "Flipped labels", "\n\n".join(text), {"exact": exact, "drawn": found})


if __name__ == "__main__":
    main()
