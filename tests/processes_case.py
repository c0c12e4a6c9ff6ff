"""Ten steps of a small model, by however many processes this was started as; the first one saves what came of them.

    python tests/processes_case.py OUT        with RANK, WORLD_SIZE ... in the environment, as torchrun sets them

For each case OUT holds NAME.safetensors: `gradient.` of the first step, accumulated and not clipped, `change.` of each weight
after ten steps of SGD, and `loss` of each step.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from preftune import methods, processes
from preftune.data.render import render
from preftune.models.adapters import add_adapter
from preftune.models.options import AdapterOptions
from preftune.models.weights import whole
from preftune.records import Rating
from preftune.scoring.score import score_logp
from preftune.training.options import TrainOptions
from preftune.training.precision import Weights
from preftune.training.steps import Plan, begin, steps

BETA = 0.3
CASES = [(method, adapter, "auto") for method in ("dpo", "kto", "sft") for adapter in ("none", "lora")]
CASES += [("aot", "none", "auto")]  # its loss is over the whole batch, and takes two passes
CASES += [("dpo", "none", "off")]  # a prompt with every answer
SIZES = (3, 1, 2, 4, 1, 3, 2, 3, 1, 4)  # examples of each step: of one, the second process has nothing to do


class Watched(torch.optim.SGD):
    """Remembers the gradients that it was first given."""

    first: list[Tensor] | None = None

    def step(self, *args: Any, **kwargs: Any) -> Any:
        if self.first is None and float(self.param_groups[0]["lr"]):  # at 0 it is only tried whether a step fits
            self.first = [p.grad.detach().clone() for p in self.param_groups[0]["params"]]
        return super().step(*args, **kwargs)


def case(name: str, adapter: str, sharing: Any, *, in_parts: bool) -> dict[str, Tensor]:
    model = tiny.model(seed=0)
    if adapter == "lora":
        model = add_adapter(model, AdapterOptions(type="lora", dropout=0.0), seed=0)
        with torch.no_grad():  # B begins at 0, and A would have no gradient
            for n, p in enumerate(p for p in model.parameters() if p.requires_grad):
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
    method = methods.make(name, beta=BETA)
    tokenizer = tiny.tokenizer()
    groups = tiny.pairs(8)
    if name == "kto":
        groups = [replace(g, marks=(Rating(0, True), Rating(1, False, weight=2.0))) for g in groups]
    batch = method.rows(render(groups, tokenizer), lambda groups: render(groups, tokenizer))
    examples = method.examples(batch.groups)
    reference = score_logp(tiny.model(seed=1), batch, range(len(batch)))
    places = [range(n, n + size) for n, size in enumerate(SIZES)]
    batches = tuple((0, tuple(examples[place % len(examples)] for place in own)) for own in places)
    # so few tokens that most processes have several micro-batches
    options = TrainOptions(tokens_per_microbatch=40, sharing=sharing, warmup=0.0, schedule="constant", max_grad_norm=1e9)
    the_plan = Plan(batches, 1e-2, options)
    weights = Weights(model, torch.float32, in_parts=in_parts)
    before = [whole(master).clone() for master in weights.masters]
    training = begin(weights, the_plan)
    training.optimizer = optimizer = Watched(weights.masters, lr=1e-2)
    losses = [line["loss"] for line in steps(training, batch, method, the_plan, reference)]
    assert optimizer.first is not None
    found = {f"gradient.{n}": whole(own) for n, own in zip(weights.names, optimizer.first, strict=True)}
    after = [whole(master) for master in weights.masters]
    pairs = zip(weights.names, before, after, strict=True)
    return found | {f"change.{n}": b - a for n, a, b in pairs} | {"loss": torch.tensor(losses, dtype=torch.float64)}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    with processes.joined():
        for in_parts in (False, True):
            for name, adapter, sharing in CASES:
                found = case(name, adapter, sharing, in_parts=in_parts)
                if processes.rank() == 0:
                    how = "fsdp" if in_parts else "replicate"
                    save_file(
                        {k: v.contiguous() for k, v in found.items()}, out / f"{name}-{adapter}-{sharing}-{how}.safetensors"
                    )


if __name__ == "__main__":
    main()
    processes.leave(0)
