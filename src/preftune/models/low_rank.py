"""A linear layer with a low-rank update as one operation: the same numbers as peft's, without its temporary tensors.

peft computes base(x), then lora_B(lora_A(x)), then scales, then adds: three more tensors of the output's size, read and written
forward and backward. On a CPU, where memory is slow, that costs as much as the frozen weights save.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable


class _Sum(Function):
    """x W^T + bias + scaling * (x A^T) B^T: x [..., K], W [N, K], A [r, K], B [N, r]. W and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.T
        out = nn.functional.linear(rows, weight, bias).addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, low, weight, a, b = ctx.saved_tensors
        of_x, _, _, of_a, of_b, _ = ctx.needs_input_grad
        gradient = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        inner = (gradient @ b) * ctx.scaling
        return (
            (gradient @ weight).addmm_(inner, a).view(ctx.shape) if of_x else None,
            None,
            None,
            inner.T @ rows if of_a else None,
            (gradient.T @ low) * ctx.scaling if of_b else None,
            None,
        )


class _FusedLinear(Linear):
    """peft's LoRA layer, whose forward pass is one operation where it is nothing but base and one update."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else _only_update(self, x.dtype)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return _Sum.apply(x, base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-any-return]


def _only_update(layer: Any, dtype: torch.dtype) -> str | None:
    """The adapter's name, where the layer is base + scaling * B A, all of one precision and the base frozen."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    base, dropout = layer.base_layer, layer.lora_dropout[active[0]]
    a, b = layer.lora_A[active[0]], layer.lora_B[active[0]]
    plain = all(map(_is_plain, (base, a, b))) and not any(p.requires_grad for p in base.parameters())
    falls = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    same = plain and all(t.dtype == dtype for t in (base.weight, a.weight, b.weight))
    return active[0] if same and not falls and b.bias is None else None


def _is_plain(module: Any) -> bool:
    """Whether calling it is x W^T + bias and nothing else: somebody's hooks are called by peft's own forward pass alone."""
    return type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@contextmanager
def fused(model: nn.Module) -> Generator[None]:
    """Inside, the LoRA layers of a model, and of copies that are made of it, compute like this."""
    layers = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.__class__ = _FusedLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = Linear
