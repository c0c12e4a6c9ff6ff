"""What changes in a run from step to step, taken out whole and put back: weights, optimizer, a reference that moves, random
numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preftune import processes
from preftune.models.randomness import random_state, set_random_state
from preftune.models.weights import parted, whole
from preftune.training.moving import Moving
from preftune.training.optimizers import SHARED
from preftune.training.precision import Weights


@dataclass(frozen=True, slots=True)
class Saved:
    """What a `Training` held after some step."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass
class Training:
    """A run between two steps.

    step: steps taken. budget: tokens of a micro-batch; None: not known yet. skipped: steps in a row, up to the last, whose
    gradient was not finite and moved nothing. random: states of torch's generators, of every process, when the last step had
    been taken; a step that fails leaves them behind. moves: what is here is of no step: none was taken or taken up yet, or an
    update has begun.
    """

    weights: Weights
    optimizer: torch.optim.Optimizer
    moving: Moving | None = None
    budget: int | None = None
    step: int = 0
    skipped: int = 0
    random: list[list[Tensor]] = field(default_factory=list[list[Tensor]])
    moves: bool = True

    def taken(self, step: int, budget: int, random: list[list[Tensor]]) -> None:
        """Call after each step, with what `random_states` gave before its update."""
        self.step, self.budget, self.random = step, budget, random
        self.moves = False

    def random_states(self) -> list[list[Tensor]]:
        """Of every process now. All take part, so that any of them can save alone, whatever becomes of the others."""
        return processes.gathered(random_state(self.weights.compute.device))

    def tensors(self) -> dict[str, Tensor]:
        """All of it that is a tensor, by name, where it stands: `weight.` the float32 masters, `optimizer.` its state of each,
        `reference.` the weights of a reference that moves, `random.` the generators of each process."""
        found = {f"weight.{name}": master for name, master in zip(self.weights.names, self.weights.masters, strict=True)}
        if self.moving is not None:
            found |= {f"reference.{name}": own for name, own in zip(self.weights.names, self.moving.masters, strict=True)}
        found |= {f"optimizer.{name}.{key}": own[key] for name, key, own in self._moments() if isinstance(own[key], Tensor)}
        for rank, states in enumerate(self.random):
            found |= {f"random.{rank}.{n}": state for n, state in enumerate(states)}
        return {name: whole(tensor.detach()) for name, tensor in found.items()}

    def facts(self) -> dict[str, Any]:
        """The rest, as JSON takes it."""
        others: dict[str, dict[str, Any]] = {}
        for name, key, own in self._moments():
            if not isinstance(own[key], Tensor):
                others.setdefault(name, {})[key] = own[key]
        return {"step": self.step, "budget": self.budget, "skipped": self.skipped, "optimizer": others}

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """Puts back what `tensors` and `facts` gave, of a run of the same model and settings, whose optimizer has its state in
        its place; the random numbers come last."""
        tensors, facts = saved.tensors, saved.facts
        self.restore_weights(saved)
        if self.moving is not None:
            self.moving.put([tensors[f"reference.{name}"] for name in self.weights.names])
        for name, key, own in self._moments():
            if isinstance(own[key], Tensor):
                own[key].copy_(parted(tensors[f"optimizer.{name}.{key}"], own[key]))
            else:
                own[key] = facts["optimizer"][name][key]
        mine = f"random.{processes.rank()}."
        count = sum(key.startswith(mine) for key in tensors)
        if count:  # a process more than there were keeps the numbers that its own seed gives
            set_random_state(self.weights.compute.device, [tensors[f"{mine}{n}"].cpu() for n in range(count)])
        self.skipped = facts.get("skipped", 0)
        self.taken(facts["step"], facts["budget"], self.random_states())

    @torch.no_grad()
    def restore_weights(self, saved: Saved) -> None:
        """Puts back the weights alone."""
        for name, master in zip(self.weights.names, self.weights.masters, strict=True):
            master.copy_(parted(saved.tensors[f"weight.{name}"], master))
        self.weights.refresh()

    def _moments(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(name of a weight, key, the optimizer's state of that weight, which has the key)"""
        for name, master in zip(self.weights.names, self.weights.masters, strict=True):
            own: dict[str, Any] = self.optimizer.state.get(master, {})
            yield from ((name, key, own) for key in own if key not in SHARED)
