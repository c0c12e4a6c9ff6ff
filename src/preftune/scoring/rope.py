"""Rotary frequencies that follow from the longest row of a pass: which rows may go through a model together.

transformers picks the frequencies of a whole forward pass by its greatest position. `longrope` has one set up to
`original_max_position_embeddings` tokens and another beyond; `dynamic` has, beyond `max_position_embeddings`, a set of its own
for every length, and keeps that of the longest row so far until a row within the limit comes. A row has the value that it has
by itself only beside rows whose frequencies are its own, and in a model that has seen nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rope:
    """long: the limits of longrope. dynamic: each module with such frequencies, its prefix of buffers, and its limit."""

    long: tuple[int, ...]
    dynamic: tuple[tuple[Any, str, int], ...]

    @classmethod
    def of(cls, model: Any) -> Rope:
        long: set[int] = set()
        dynamic: list[tuple[Any, str, int]] = []
        for module in model.modules():
            own = getattr(module, "rope_type", None)
            kinds: dict[str | None, Any] = own if isinstance(own, dict) else {None: own}  # pyright: ignore[reportUnknownVariableType]
            for layer, kind in kinds.items():
                if kind == "longrope":
                    settings = module.config.rope_parameters
                    long.add((settings if layer is None else settings[layer])["original_max_position_embeddings"])
                elif isinstance(kind, str) and "dynamic" in kind:
                    dynamic.append((module, "" if layer is None else f"{layer}_", module.original_max_seq_len))
        return cls(tuple(sorted(long)), tuple(dynamic))

    @property
    def limits(self) -> list[int]:
        """Lengths beyond which frequencies are others."""
        return [*self.long, *(limit for _, _, limit in self.dynamic)]

    def runs(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which rows go through the model together, by index: those with the same frequencies."""
        found: dict[tuple[int, ...], list[int]] = {}
        for n, length in enumerate(lengths):
            side = [length > limit for limit in self.long]
            own = length if any(length > limit for _, _, limit in self.dynamic) else 0
            found.setdefault((*side, own), []).append(n)
        return list(found.values())

    def restart(self) -> None:
        """Forgets the longest row so far."""
        for module, prefix, limit in self.dynamic:
            name = f"{prefix}max_seq_len_cached"
            if getattr(module, name, limit) > limit:
                module.register_buffer(f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"), persistent=False)
                setattr(module, name, limit)
