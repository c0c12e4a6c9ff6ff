"""From the keys of a method to the method. Here torch comes in."""

from __future__ import annotations

from typing import Any

from preftune import losses
from preftune.methods.constraints import Constrained
from preftune.methods.cut import CutPairs
from preftune.methods.listwise import Listwise
from preftune.methods.mix import Mix
from preftune.methods.options import MethodOptions
from preftune.methods.pairs import Pairwise, likelihood
from preftune.methods.reward import Reward
from preftune.methods.sft import SFT
from preftune.methods.table import NEEDS
from preftune.methods.unpaired import Unpaired
from preftune.training.method import Method


def made(asked: MethodOptions, beta: float | None) -> Method:
    method = _unconstrained(asked, beta)
    return Constrained(method, asked.constraints) if asked.constraints else method


def _unconstrained(asked: MethodOptions, beta: float | None) -> Method:
    if asked.mix:
        parts = [(weight, _pairwise(name, asked, beta)) for name, weight in asked.mix.items()]
        return Mix(asked.label, parts, beta=beta)
    (name,) = asked.members
    row, own = NEEDS[name], _hyperparameters(name, asked)
    pairs = asked.pairs or "all"
    match row.kind:
        case "answers":
            return SFT()
        case "rankings":
            return Listwise(name, beta=beta)
        case "cut_pairs":
            return CutPairs(name, beta=beta, pairs=pairs, **own)
        case "ratings":
            return Unpaired(name, getattr(losses, name), beta=beta, hyperparameters=own)
        case "pairs" if row.scalar and own.pop("listwise"):
            return Listwise(name, beta=None, head="scalar")
        case "pairs" if row.scalar:
            return Reward(name, pairs=pairs, **own)
        case "pairs":
            return _pairwise(name, asked, beta)


def _hyperparameters(name: str, asked: MethodOptions) -> dict[str, Any]:
    given = asked.settings
    return {key: given.get(key, default) for key, default in NEEDS[name].reads.items()}


def _pairwise(name: str, asked: MethodOptions, beta: float | None) -> Pairwise:
    if name == "sft":
        return Pairwise(name, likelihood, beta=None, weighting=asked.weighting, pairs=asked.pairs or "all")
    row = NEEDS[name]
    return Pairwise(
        name,
        getattr(losses, name),
        beta=beta,
        hyperparameters=_hyperparameters(name, asked),
        divergence=asked.divergence if asked.divergence and row.diverges else "reverse_kl",
        divergence_alpha=asked.divergence_alpha or 0.5,
        weighting=asked.weighting,
        pairs=asked.pairs or "all",
    )
