"""A model in float32 for the time of a check: what differs there is a fault, and what differs in bfloat16 alone is rounding."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from preftune.models.weights import is_packed


class Untried(Exception):
    """Why a model could not be tried in float32."""


def _why_not(model: Any) -> str | None:
    if any(not p.is_floating_point() or is_packed(p) for p in model.parameters()):
        return "its weights are quantized"
    if 4 * sum(p.numel() for p in model.parameters()) > _room(next(model.parameters()).device):
        return "there is no memory for a copy of it in float32"
    return None


def _room(device: torch.device) -> int:
    """Bytes that a copy may take: half of what is free on an accelerator, elsewhere a quarter of all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return 2**31


@contextmanager
def in_float32(model: Any) -> Generator[None]:
    """Every weight and buffer of lower precision is a copy in float32, a leaf of its own; afterwards each is what it was.

    Raises:
        Untried: there is no room for that, or what is done meanwhile fails; kernels may know bfloat16 only.
    """
    if cannot := _why_not(model):
        raise Untried(cannot)
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    copies: dict[int, Tensor] = {}  # a tied weight is copied once
    try:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None or not tensor.is_floating_point() or tensor.dtype.itemsize >= 4:
                        continue
                    if id(tensor) not in copies:
                        copies[id(tensor)] = tensor.detach().float().requires_grad_(tensor.requires_grad)
                    before.append((held, name, tensor))
                    held[name] = copies[id(tensor)]
        yield
    except Exception as error:
        what = " ".join(str(error).split())[:120]
        raise Untried(f"it does not run in float32 ({type(error).__name__}: {what})") from error
    finally:
        for held, name, tensor in before:
            held[name] = tensor
