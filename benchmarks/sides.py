"""The two sides of the DPO step: whole steps (reference, forward, backward, optimizer) on a folder's rows in file order."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rows


class Preftune:
    """Whole steps as preftune takes them. The reference is live, as TRL's is: scored in every step, by a frozen copy in the
    compute precision.

    Args:
        folder: of rows.prepare.
        how: `dtype`, `tokens` of a micro-batch, `steps` to take, `share` the prompts (yes, where it is not said),
            `checkpointing` (no).
    """

    def __init__(self, folder: Path, how: dict[str, Any]) -> None:
        import torch

        from preftune import methods, read, render
        from preftune.models.adapters import checkpointing_on
        from preftune.models.load import load_model, load_tokenizer
        from preftune.training.memory import keep_freed_memory
        from preftune.training.options import TrainOptions
        from preftune.training.precision import DTYPES, Weights

        keep_freed_memory()
        self.budget, self.share = how["tokens"], how.get("share", True)
        model, dtype = str(folder / "model"), DTYPES[how["dtype"]]
        self.batch = render(read(str(folder / "rows.jsonl")), load_tokenizer(model))
        self.method = methods.make("dpo", beta=rows.BETA)
        examples = sorted(self.method.examples(self.batch.groups), key=lambda e: e.origin.row if e.origin else 0)
        size = json.loads((folder / "settings.json").read_text())["batch"]
        cut = [tuple(examples[i : i + size]) for i in range(0, len(examples), size)]
        self.batches = cut[: how.get("steps", rows.STEPS + rows.WARM)]
        self.options = TrainOptions(
            warmup=0.0,
            schedule="constant",
            tokens_per_microbatch=self.budget,
            sharing="auto" if self.share else "off",
        )
        # the reference first: what loading takes for a moment is gone before anything else stands
        self.reference = load_model(model, dtype=dtype).requires_grad_(False)
        self.reference_logp = torch.full((len(self.batch),), float("nan"))
        policy = load_model(model)
        self.weights = Weights(checkpointing_on(policy) if how.get("checkpointing") else policy, dtype)

    def responses(self, examples: tuple[Any, ...]) -> list[int]:
        """The rows of the batch that some examples need."""
        return list(dict.fromkeys(self.batch.index(e.group, r) for e in examples for r in e.responses))

    def steps(self) -> Iterator[dict[str, float]]:
        """Takes one step after the other: `seconds` and `loss` of each."""
        from preftune.scoring.score import score_logp
        from preftune.training.steps import Plan, begin, steps

        plan = Plan(tuple((0, examples) for examples in self.batches), rows.LEARNING_RATE, self.options)
        run = steps(begin(self.weights, plan), self.batch, self.method, plan, self.reference_logp)
        for examples in self.batches:
            began, asked = time.perf_counter(), self.responses(examples)
            found = score_logp(self.reference, self.batch, asked, tokens_per_microbatch=self.budget, share=self.share)
            self.reference_logp[asked] = found[asked]
            loss = next(run)["loss"]
            yield {"seconds": time.perf_counter() - began, "loss": loss}


def preftune(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Seconds and losses of preftune's steps; with `changed` the least share of a weight that they changed."""
    side = Preftune(folder, how)
    masters = side.weights.masters
    before = [m.detach().clone() for m in masters] if how.get("changed") else []
    taken = list(side.steps())
    changed = [float((m != b).float().mean()) for m, b in zip(masters, before, strict=True)] if before else []
    found = _found([step["seconds"] for step in taken], [step["loss"] for step in taken])
    return {**found, **({"changed": min(changed)} if changed else {})}


def trl(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """The same rows in the same order through trl.DPOTrainer, with its own precision: bf16 is autocast over float32 weights."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    assert how["batch"] * how["accumulation"] == json.loads((folder / "settings.json").read_text())["batch"]
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
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
        learning_rate=rows.LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        beta=rows.BETA,
        max_length=None,
        max_steps=how.get("steps", rows.STEPS + rows.WARM),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = InOrder(model, args=arguments, train_dataset=datasets.Dataset.from_list(lines), processing_class=tokenizer)
    trainer.add_callback(Clock())
    trainer.train()
    return _found(seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line])


def _found(seconds: list[float], losses: list[float]) -> dict[str, Any]:
    return {"seconds": seconds, "losses": losses, "median": statistics.median(seconds[rows.WARM :])}
