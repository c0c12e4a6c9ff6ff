"""What a model draws: its dropout, and the states of torch's generators on a device, the CPU's and the device's own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_WITHOUT = ("cpu", "meta")  # devices that have no generator beside the CPU's


def random_state(device: torch.device) -> list[Tensor]:
    """A copy of them; see `set_random_state`."""
    if device.type in _WITHOUT:
        return [torch.get_rng_state()]
    return [torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)]


def set_random_state(device: torch.device, state: list[Tensor]) -> None:
    """Puts back what `random_state` gave; of a CPU's, on a device with a generator of its own, that stays as it is."""
    torch.set_rng_state(state[0])
    if device.type not in _WITHOUT and len(state) > 1:
        torch.get_device_module(device).set_rng_state(state[1], device)


@contextmanager
def random_state_kept(device: torch.device) -> Generator[None]:
    """Inside, they may be drawn from and seeded; afterwards they are what they were. Other devices are not asked for theirs."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(device, state)


@contextmanager
def evaluation_mode(model: Any) -> Generator[None]:
    """Every dropout off for the time of the call, and afterwards each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
