"""One arm of the DPO step benchmark, in a process of its own: prints one JSON line.

    python benchmarks/arm.py preftune FOLDER '{"dtype": "bfloat16"}'
    python benchmarks/arm.py trl FOLDER '{"dtype": "bfloat16", "batch": 4, "accumulation": 2, "checkpointing": false}'

FOLDER holds model/, rows.jsonl and settings.json of dpo_step.py. Rows are taken in file order by both.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # TRL would report its use otherwise
LEARNING_RATE = 1e-6


def preftune(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """A whole step as preftune takes it: the reference of its rows, then forward, backward, optimizer."""
    import torch

    from preftune import methods, read, render
    from preftune.models.load import load_model, load_tokenizer
    from preftune.scoring import scorer
    from preftune.scoring.score import score_logp
    from preftune.training.memory import keep_freed_memory
    from preftune.training.options import TrainOptions
    from preftune.training.precision import DTYPES, Weights
    from preftune.training.steps import Plan, steps

    keep_freed_memory()
    if not how.get("share", True):
        scorer.cannot_share = lambda model: "asked for"
    settings = json.loads((folder / "settings.json").read_text())
    model, tokenizer = load_model(str(folder / "model")), load_tokenizer(str(folder / "model"))
    batch = render(read(str(folder / "rows.jsonl")), tokenizer)
    method = methods.make("dpo", beta=0.1)
    examples = sorted(method.examples(batch.groups), key=lambda e: e.origin.row if e.origin else 0)
    size = settings["batch"]
    batches = tuple((0, tuple(examples[i : i + size])) for i in range(0, len(examples), size))
    options = TrainOptions(warmup=0.0, schedule="constant", tokens_per_microbatch=how.get("tokens"))
    weights = Weights(model, DTYPES[how["dtype"]])
    reference = load_model(str(folder / "model"), dtype=DTYPES[how["dtype"]])
    reference_logp = torch.full((len(batch),), float("nan"))
    before = [m.detach().clone() for m in weights.masters] if how.get("changed") else []
    seconds: list[float] = []
    losses: list[float] = []
    run = steps(weights, batch, method, Plan(batches, LEARNING_RATE, options), reference_logp)
    for _, members in batches:
        began = time.perf_counter()
        rows = list(dict.fromkeys(batch.index(e.group, r) for e in members for r in e.responses))
        reference_logp[rows] = score_logp(reference, batch, rows, tokens_per_microbatch=how.get("tokens"))[rows]
        losses.append(next(run)["loss"])
        seconds.append(time.perf_counter() - began)
    changed = [float((m != b).float().mean()) for m, b in zip(weights.masters, before, strict=True)] if before else []
    return {"seconds": seconds, "losses": losses, "changed": min(changed) if changed else None}


def trl(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """The same rows in the same order through trl.DPOTrainer, with its own precision: bf16 is autocast over float32 weights."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    settings = json.loads((folder / "settings.json").read_text())
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=how["batch"],
        gradient_accumulation_steps=how["accumulation"],
        gradient_checkpointing=how["checkpointing"],
        bf16=how["dtype"] == "bfloat16",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        beta=0.1,
        max_length=None,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = InOrder(model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    trainer.add_callback(Clock())
    assert how["batch"] * how["accumulation"] == settings["batch"]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": seconds, "losses": losses}


if __name__ == "__main__":
    arm, place, keys = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    found = {"preftune": preftune, "trl": trl}[arm](place, keys)
    print(json.dumps({**found, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))
