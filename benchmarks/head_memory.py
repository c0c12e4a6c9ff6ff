"""Memory of the head: forward and backward of the log-probabilities of N tokens, at width 4,096 and vocabulary 128k.

    python benchmarks/head_memory.py --counts 256 1024 4096 8192

Every case is a process of its own, and takes two micro-batches as a training step does: a trained weight has a float32 master,
whose gradient both add to. Printed: by how much the resident memory grew at most beyond what was there before (the weight, its
master and the hidden states), less the master's gradient where the weight trains; the gradient of the hidden states is part of
it. Heads: `plain`, one matrix product; `capped` (Gemma 2's) and `scaled` (Granite's), by the model's own code; `saved`, in
peft's wrapper beside an adapter. Each kind has a result of its own. `--by autograd` leaves the sum of the gradients to
torch, for comparison.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import common
from arm import forget_peak, peak_gb, resident_gb

SHAPE = {"hidden_size": 4096, "vocab_size": 131_072}
LIMIT = 1.0  # GB
HEADS = ("plain", "capped", "scaled", "saved")


def case(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Growth in GB for `count` tokens in `dtype`, by the first and by the second micro-batch; `trained`: the weight gets a
    gradient. The folder is not used."""
    import torch

    from preftune.models.adapters import inside
    from preftune.scoring.head import Head
    from preftune.training.memory import keep_freed_memory
    from preftune.training.precision import DTYPES, Weights

    dtype, trained = DTYPES[how["dtype"]], how["trained"]
    weights = Weights(_model(how, torch.float32 if trained else dtype), dtype)
    head = Head(inside(weights.compute))
    assert head.plain == (how["head"] == "plain"), "it would not be the function that is measured"
    hidden = [torch.randn(how["count"], how["shape"]["hidden_size"], dtype=dtype).requires_grad_() for _ in range(2)]
    targets = torch.randint(how["shape"]["vocab_size"], (2, how["count"]))
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


def _model(how: dict[str, Any], dtype: Any) -> Any:
    """One with such a head, of which nothing else is large or trains."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    kind = {"capped": "Gemma2", "scaled": "Granite"}.get(how["head"], "Llama")
    small = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(**how["shape"], **small, tie_word_embeddings=False)
    if how["head"] == "scaled":
        config.logits_scaling = 8.0
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
        model.set_input_embeddings(torch.nn.Embedding(8, config.hidden_size, dtype=dtype))
    model = model.to_empty(device="cpu").requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.02)
    if how["head"] == "saved":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        return model if how["trained"] else model.requires_grad_(False)
    model.lm_head.requires_grad_(how["trained"])
    return model


def main() -> None:
    parser = common.arguments(__doc__, data=False)
    parser.add_argument("--counts", type=int, nargs="+", default=[256, 1024, 4096, 8192], help="scored tokens")
    parser.add_argument("--dtype", default="bfloat16", choices=common.DTYPES)
    parser.add_argument("--heads", nargs="+", default=HEADS, choices=HEADS)
    parser.add_argument("--by", default="blocks", choices=("blocks", "autograd"), help="who adds up the weight's gradient")
    words = parser.parse_args()
    model = {"shape": SHAPE | words.shape, "dtype": words.dtype, "by": words.by}
    for kind in words.heads:
        cases = [
            common.run_arm("head_memory:case", Path(), {**model, "head": kind, "count": count, "trained": trained})
            for trained in (False, True)
            for count in words.counts
        ]
        for arm in cases:
            how, weight = arm["how"], "trained" if arm["how"]["trained"] else "frozen"
            said = arm.get("failed", "")
            if not said:
                beyond = "" if arm["growth_gb"] <= LIMIT else f"  (more than {LIMIT:.0f} GB)"
                said = f"{arm['growth_gb']:.2f} GB, the first micro-batch {arm['first_gb']:.2f}{beyond}"
            print(f"{kind:6} head, {weight:7}, {how['count']:6,} tokens: {said}", flush=True)
        name = f"head_memory-{kind}-{words.dtype}" + ("" if words.by == "blocks" else f"-{words.by}")
        common.write(words, name, {"limit_gb": LIMIT, "cases": cases})


if __name__ == "__main__":
    main()
