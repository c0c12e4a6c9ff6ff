"""A model whose weights lie in parts, one on each process of a run, and are whole only while they compute (torch's FSDP2).

What is cut is the `Scorer`, since it reads the head's weight outside the model's own forward pass: its root holds embeddings,
last norm and head, and each layer is gathered by itself. All processes take part in every pass of any of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.export import register_dataclass

from preftune import processes
from preftune.data.render import Rendered
from preftune.errors import Refusal
from preftune.scoring.scorer import PassScores, Scorer, give

register_dataclass(PassScores)  # FSDP2 looks through what a module returns for the tensors that a backward pass begins at


def put_in_parts(model: Any, dtype: torch.dtype, *, share: bool = True) -> None:
    """Cuts a model in place: it computes in `dtype`, and sums of gradients, never their means, are float32. From here on
    `scorer_of` gives its one scorer.

    Raises:
        Refusal: its layers cannot be told, or run once for every response.
    """
    scorer = Scorer(model, share=share)
    if scorer.head.body is None:  # processes would gather its layers another number of times each
        line = f"{type(scorer.inner).__name__} can only be run response by response: leave it out, and every process has a copy"
        raise Refusal(line, code="no_parts", key="train.parallel")
    mesh = init_device_mesh(scorer.device.type, (processes.size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in _layers(scorer.inner):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    cut: Any = fully_shard(scorer, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    for module in cut.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    scorer.in_parts = True
    give(model, scorer)
    with torch.no_grad():  # which of its modules is the root FSDP2 learns from the first pass
        scorer([Rendered(0, 0, (0, 0), 1)])


def _layers(model: nn.Module) -> list[nn.Module]:
    said: Any = getattr(model, "_no_split_modules", None)
    names: set[str] = set(said or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        line = f"{type(model).__name__} does not say which modules are its layers: leave it out, and every process has a copy"
        raise Refusal(line, code="no_parts", key="train.parallel")
    return found
