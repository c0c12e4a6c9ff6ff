"""Precision is one thing everywhere: float32 master weights, and where asked a lower-precision compute copy of them.

Gradients leave the compute copy one by one and are summed in float32; the copy is refreshed once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from preftune import processes
from preftune.models.weights import cast_parameters, copy_sharing, is_in_parts, is_packed
from preftune.scoring.head import Head, ScalarHead

_PART = 2**23  # entries of a sum of two precisions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )
    return torch.bfloat16 if device.type == "cpu" and has else torch.float32


class Weights:
    """The trained weights of a model: float32 masters, and the model that computes with them.

    `compute` is the caller's model where its trained parameters are float32 and float32 is asked; otherwise a copy of
    it in the compute precision. `masters` are always float32 and are what the optimizer steps; `names` are theirs.

    Args:
        in_parts: the model itself is cut into parts, one on each process: float32 masters, gathered in the compute precision.
        share: see `Scorer`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, in_parts: bool = False, share: bool = True) -> None:
        self.model, self.dtype, self.in_parts = model, dtype, in_parts
        if in_parts:
            from preftune.scoring.parts import put_in_parts  # FSDP2 takes a while to import

            for parameter in model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
            put_in_parts(model, dtype, share=share)
        self.compute: Any = model if in_parts else in_precision(model, dtype)
        pairs = zip(model.named_parameters(), self.compute.parameters(), strict=True)
        trained = [(name, own, used) for (name, own), used in pairs if own.requires_grad]
        self.names = [name for name, _, _ in trained]
        self._trained = [(own, used) for _, own, used in trained]
        self.masters = [own if own.dtype == torch.float32 else own.detach().float() for own, _ in self._trained]

    def beside(self, model: nn.Module) -> nn.Module:
        """Another model, to compute beside this one: in the same precision, and in parts where this one is."""
        if not self.in_parts:
            return in_precision(model, self.dtype)
        from preftune.scoring.parts import put_in_parts

        put_in_parts(model.requires_grad_(False), self.dtype)
        return model

    @contextmanager
    def collecting(self, head: Head | ScalarHead | None = None) -> Generator[None]:
        """Inside, each gradient of the compute copy goes into its master's, in float32, as soon as it is there: the copy's
        own gradients never stand in memory together.

        Args:
            head: of the compute copy. Where it is one matrix product, and what comes after that, it adds to its master's
                gradient block by block, so that no micro-batch makes another tensor of the weight's size; what else the weight
                is used for adds to the same.
        """

        def into(master: Tensor) -> Callable[[Tensor], None]:
            def move(used: Tensor) -> None:
                gradient, used.grad = used.grad, None
                if gradient is None:  # the head's, which added it itself
                    return
                if master.grad is None:
                    master.grad = gradient.float()
                    return
                # in parts: on the CPU a sum of two precisions makes a copy of its terms
                rows = max(1, _PART // max(1, gradient[:1].numel())) if gradient.ndim else 1
                for sums, part in zip(*(torch.atleast_1d(g).split(rows) for g in (master.grad, gradient)), strict=True):
                    sums.add_(part)

            return move

        pairs = list(zip(self.masters, (used for _, used in self._trained), strict=True))
        hooks = [used.register_post_accumulate_grad_hook(into(master)) for master, used in pairs if used is not master]
        own = head if isinstance(head, Head) and not self.in_parts else None
        layer = own.layer if own else None
        master = next((master for master, used in pairs if layer and used is layer.weight), None)
        try:
            if own and master is not None:
                own.into = partial(_gradient_of, master)
            yield
        finally:
            if own:
                own.into = None
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def add_up_gradients(self) -> None:
        """Of several processes each has its own part of every gradient; afterwards each has their sum."""
        if processes.size() > 1 and not self.in_parts:
            used = zip(*processes.gathered([master.grad is not None for master in self.masters]), strict=True)
            summed = [master for master, by in zip(self.masters, used, strict=True) if any(by)]
            processes.add_up(_gradient_of(master) for master in summed)

    @torch.no_grad()
    def refresh(self) -> None:
        """Puts the masters into the caller's model and the compute copy. Call after each optimizer step."""
        for master, (own, used) in zip(self.masters, self._trained, strict=True):
            if own is not master:
                own.copy_(master)
            if used is not master and used is not own:
                used.copy_(master)


def _gradient_of(master: Tensor) -> Tensor:
    """Its gradient, zeros where it has none."""
    if master.grad is None:
        master.grad = torch.zeros_like(master)
    return master.grad


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself where all its parameters have this precision, else a copy that has it. Frozen parameters that
    have it already, or are packed, are shared, not copied: the base under an adapter."""

    if all(_has(p, dtype) for p in model.parameters()):
        return model
    return cast_parameters(copy_sharing(model, lambda p: _has(p, dtype) and not p.requires_grad), dtype)


def reused_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Of a model's parameters those that a run of `dtype` goes on with. Not those frozen ones of which `in_precision` makes a
    copy: they stay beside it, the caller's."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad or _has(p, dtype))


def _has(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Whether it is computed with as it is."""
    return parameter.dtype == dtype or not parameter.is_floating_point() or is_packed(parameter)


def gradient_norm(masters: list[Tensor]) -> Tensor:
    """L2 norm over all gradients, float32."""
    norm: Any = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
    return norm.full_tensor() if is_in_parts(norm) else norm
