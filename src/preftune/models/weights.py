"""Weights of a model: their precision, their size, and copies that share them; packed ones (4 bits) among them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from preftune import processes

Model = TypeVar("Model", bound=nn.Module)

# of one weight in NF4: half a byte, an 8-bit scale per 64, and a float32 scale of the scales per 64 * 256
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def name_of(dtype: torch.dtype) -> str:
    """As configs have it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def is_packed(parameter: Tensor) -> bool:
    """Whether several weights stand in one number: bitsandbytes' Params4bit, of any storage type."""
    return hasattr(parameter, "quant_state")


def is_in_parts(tensor: Tensor) -> bool:
    """Whether it lies on several processes, a part on each: torch's DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """A tensor in parts put together, on the CPU of the first process; nothing on the others, which all have to ask."""
    if not is_in_parts(tensor):
        return tensor
    full = tensor.detach().full_tensor()
    return full.cpu() if processes.rank() == 0 else full.new_empty(0, device="cpu")


def parted(value: Tensor, like: Any) -> Tensor:
    """A whole tensor, which every process has, in the parts of another one of its shape."""
    if not is_in_parts(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The weights that a model is saved with, put together on the first process; None where it is whole anyhow."""
    if not any(map(is_in_parts, model.parameters())):
        return None
    from preftune.models.adapters import is_adapter  # here: adapters are made of weights

    adapter = is_adapter(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    once = {name for name, _ in model.named_parameters()}  # tied weights
    state = model.state_dict()
    return {name: whole(state[name]) for name in state if (name in trained if adapter else name in once)}


def count(parameter: Tensor) -> int:
    """Weights in a parameter."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def frozen_bytes(parameter: Tensor, dtype: torch.dtype) -> int:
    """What a frozen parameter takes in a run that computes in `dtype`: packed weights stay packed. A packed parameter without
    a state (on the meta device) is one that loading will pack."""
    if not is_packed(parameter):
        return parameter.numel() * (dtype if parameter.is_floating_point() else parameter.dtype).itemsize
    state: Any = parameter.quant_state  # type: ignore[attr-defined]
    if state is None:
        return math.ceil(parameter.numel() * NF4_BYTES)
    return parameter.nbytes + sum(tensor.nbytes for tensor in state.as_dict(packed=True).values())


def cast_parameters(model: Model, dtype: torch.dtype) -> Model:
    """Casts the parameters and leaves the buffers: rotary frequencies lose their digits in bfloat16."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not is_packed(parameter):
            parameter.data = parameter.data.to(dtype)
    return model


def copy_sharing(model: Model, shared: Callable[[nn.Parameter], bool]) -> Model:
    """A copy of a model in which those parameters are the same objects as in the original."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if shared(parameter):
            memo[id(parameter)] = parameter
            if (state := getattr(parameter, "quant_state", None)) is not None:
                memo[id(state)] = state  # its layer knows it too
    return copy.deepcopy(model, memo)
