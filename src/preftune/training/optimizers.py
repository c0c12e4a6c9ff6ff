"""The optimizers of a run, and the bytes that each keeps per weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.training.options import Optimizer

SHARED = ("qmap1", "qmap2")  # bitsandbytes' code books: one tensor in the state of all weights, and always the same
_PLAIN = 4096  # weights of a tensor below which bitsandbytes keeps float32
_BLOCK = 256  # weights that share a scale there


def make(name: Optimizer, weights: Sequence[Tensor], rate: float, decay: float) -> torch.optim.Optimizer:
    """The optimizer of float32 weights. All three decay weights apart from the gradient: weight -= rate * decay * weight.

    Source: Loshchilov & Hutter 2019 (adamw), Dettmers et al. 2022 (adamw_8bit: moments in blocks of 8-bit numbers, in memory
    that an accelerator may page out), Shazeer & Stern 2018 (adafactor: a row and a column in place of the second moment, no
    first; its steps are relative to the size of each weight).
    """
    if name == "adafactor":
        return torch.optim.Adafactor(weights, lr=rate, weight_decay=decay)
    if name == "adamw_8bit":
        from bitsandbytes.optim import PagedAdamW8bit  # pyright: ignore[reportMissingImports]  # an extra

        return PagedAdamW8bit(weights, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=rate, weight_decay=decay, fused=True)


def state_bytes(name: Optimizer, shape: Sequence[int]) -> int:
    """What the optimizer keeps for a weight of this shape."""
    count = math.prod(shape)
    if name == "adafactor":
        return 4 * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)
    if name == "adamw_8bit" and count >= _PLAIN:
        return 2 * (count + 4 * math.ceil(count / _BLOCK))
    return 8 * count


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Leaves the state in its place, as it is before the first step: zeros."""
    for state in optimizer.state.values():
        own: dict[str, Any] = state
        for key, value in own.items():
            if key not in SHARED:
                own[key] = value.zero_() if isinstance(value, Tensor) else 0


def step_at(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step at this learning rate."""
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    optimizer.step()
