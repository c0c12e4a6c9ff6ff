"""Losses: pure functions of log-probabilities, torch alone. Unreduced: one value per example."""

from preftune.losses.pairwise import dpo, rewards
from preftune.losses.sft import sft

__all__ = ["dpo", "rewards", "sft"]
