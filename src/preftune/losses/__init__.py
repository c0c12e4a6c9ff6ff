"""Losses: pure functions of log-probabilities, torch alone. Unreduced: one value per example.

`COUPLED` names those whose value for one example depends on the others given: they want the whole step at once.
"""

from preftune.losses.anchored import apo_down, apo_zero, bco, nca, sppo
from preftune.losses.constraints import drift, excess, score_function
from preftune.losses.divergence import diverge
from preftune.losses.extended import dpop, mm_dpo, rpo
from preftune.losses.lengths import ipo_mean, ld_dpo, ln_dpo, r_dpo
from preftune.losses.listwise import plackett_luce
from preftune.losses.pairwise import cdpo, discopop, dpo, exo, hinge, ipo, rewards, robust
from preftune.losses.reference_free import cpo, orpo, simpo
from preftune.losses.reward_model import reward
from preftune.losses.sft import sft
from preftune.losses.transport import aot, aot_unpaired
from preftune.losses.unpaired import apo_zero_unpaired, bco_unpaired, kto, kto_baseline
from preftune.losses.weighting import wpo_weight

COUPLED = frozenset({"aot", "aot_unpaired", "bco", "bco_unpaired"})

__all__ = [
    "COUPLED",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_unpaired",
    "cdpo",
    "cpo",
    "discopop",
    "diverge",
    "dpo",
    "dpop",
    "drift",
    "excess",
    "exo",
    "hinge",
    "ipo",
    "ipo_mean",
    "kto",
    "kto_baseline",
    "ld_dpo",
    "ln_dpo",
    "mm_dpo",
    "nca",
    "orpo",
    "plackett_luce",
    "r_dpo",
    "reward",
    "rewards",
    "robust",
    "rpo",
    "score_function",
    "sft",
    "simpo",
    "sppo",
    "wpo_weight",
]
