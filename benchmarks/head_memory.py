"""Memory of the head: forward and backward of the log-probabilities of N tokens, at width 4,096 and vocabulary 128k.

    python benchmarks/head_memory.py --counts 256 1024 4096 8192

Every case is a process of its own, and takes two micro-batches as a training step does: a trained weight has a float32 master,
whose gradient both add to. Printed: by how much the resident memory grew at most beyond what was there before (the weight, its
master and the hidden states), less the master's gradient where the weight trains; the gradient of the hidden states is part of
it. `--by autograd` leaves the sum of the gradients to torch, for comparison.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import common
from arm import forget_peak, peak_gb, resident_gb

SHAPE = {"hidden_size": 4096, "vocab_size": 131_072}
LIMIT = 1.0  # GB


def case(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Growth in GB for `count` tokens in `dtype`, by the first and by the second micro-batch; `trained`: the weight gets a
    gradient. The folder is not used."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from preftune.scoring.head import Head
    from preftune.training.memory import keep_freed_memory
    from preftune.training.precision import DTYPES, Weights

    small = {"intermediate_size": 64, "num_hidden_layers": 1}
    with torch.device("meta"):  # the layers are not needed
        model = LlamaForCausalLM(LlamaConfig(**how["shape"], **small)).requires_grad_(False)
    dtype, trained = DTYPES[how["dtype"]], how["trained"]
    model.lm_head.to(torch.float32 if trained else dtype).to_empty(device="cpu").requires_grad_(trained)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.02)
    weights = Weights(model, dtype)
    head = Head(weights.compute)
    assert head.plain, "it would not be the function that is measured"
    hidden = [torch.randn(how["count"], model.lm_head.in_features, dtype=dtype).requires_grad_() for _ in range(2)]
    targets = torch.randint(model.lm_head.out_features, (2, how["count"]))
    keep_freed_memory()  # not before: what the copy took and gave back would be there for what is measured
    forget_peak()
    before, began = resident_gb(), time.perf_counter()
    grown: list[float] = []
    with weights.collecting(head if how["by"] == "blocks" else None):
        for h, t in zip(hidden, targets, strict=True):
            head(h, t).sum().backward()
            own = sum(m.grad.nbytes for m in weights.masters if m.grad is not None) / 1e9
            grown.append(peak_gb() - before - own)
            h.grad = None  # the backbone's backward pass takes it up
    return {"growth_gb": max(grown), "first_gb": grown[0], "seconds": time.perf_counter() - began}


def main() -> None:
    parser = common.arguments(__doc__, data=False)
    parser.add_argument("--counts", type=int, nargs="+", default=[256, 1024, 4096, 8192], help="scored tokens")
    parser.add_argument("--dtype", default="bfloat16", choices=common.DTYPES)
    parser.add_argument("--by", default="blocks", choices=("blocks", "autograd"), help="who adds up the weight's gradient")
    words = parser.parse_args()
    model = {"shape": SHAPE | words.shape, "dtype": words.dtype, "by": words.by}
    cases = [
        common.run_arm("head_memory:case", Path(), {**model, "count": count, "trained": trained})
        for trained in (False, True)
        for count in words.counts
    ]
    for arm in cases:
        weight = "trained" if arm["how"]["trained"] else "frozen"
        grown = (
            f"{arm['growth_gb']:.2f} GB (at most {LIMIT:.0f}; the first {arm['first_gb']:.2f})"
            if "growth_gb" in arm
            else arm["failed"]
        )
        print(f"{weight:7} weight, {arm['how']['count']:6,} tokens: {grown}")
    name = f"head_memory-{words.dtype}" + ("" if words.by == "blocks" else f"-{words.by}")
    common.write(words, name, {"limit_gb": LIMIT, "cases": cases})


if __name__ == "__main__":
    main()
