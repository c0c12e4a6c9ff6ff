"""The keys under `train.`, declared beside the code that reads them. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Schedule = Literal["cosine", "linear", "constant"]
Tracker = Literal["tensorboard", "wandb"]
Optimizer = Literal["adamw", "adamw_8bit", "adafactor"]
Parallel = Literal["replicate", "fsdp"]
Sharing = Literal["auto", "require", "off"]
Curriculum = Literal["easy_first", "hard_first"]


class TrainOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    eval_every: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Optimizer steps between evaluations on the held-out data; 0: before and after training only."
    )
    keep_best: bool = Field(
        default=True, description="With eval_every: model/ holds the weights with the lowest held-out loss, not the last ones."
    )
    early_stop: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Evaluations in a row without a lower held-out loss after which training ends; with eval_every.",
    )
    save_every: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Optimizer steps between checkpoints; absent: one every 30 minutes; 0: only when the run is stopped.",
    )
    keep_checkpoints: Annotated[int, Field(ge=1)] = Field(default=2, description="Newest checkpoints kept.")
    tokens_per_microbatch: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Most distinct tokens of one pass: memory and speed, but for rounding no result. Default: by free memory.",
    )
    parallel: Parallel = Field(
        default="replicate",
        description="Of several processes (torchrun) each has the whole model: replicate; or a part of it: fsdp.",
    )
    checkpointing: bool = Field(
        default=False,
        description="Activations are computed again in the backward pass instead of kept: less memory, more time.",
    )
    sharing: Sharing = Field(
        default="auto",
        description="auto: answers share their prompt where the model can; require: refused where not; off.",
    )
    warmup: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Share of the steps with rising learning rate."
    )
    schedule: Schedule = Field(default="cosine", description="Course of the learning rate after the warm-up.")
    curriculum: Curriculum | None = Field(
        default=None,
        description="Order of the comparisons in each epoch by margin: easy_first or hard_first; absent: shuffled.",
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Gradients are clipped to this norm.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Decoupled weight decay.")
    optimizer: Optimizer = Field(
        default="adamw",
        description="adamw; adamw_8bit: moments in 8 bits (extra qlora); adafactor: factored, rates relative to each weight.",
    )
    not_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="What a loss or gradient that is not finite does: stop the run, or skip its step (10 in a row stop it).",
    )
    kl_budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Nats per response: evaluations sample answers, and warn once their KL is above; absent: no KL there.",
    )
    deterministic: bool = Field(
        default=False, description="CUDA: kernels that give the same bits each time, which are slower; the CPU's do anyway."
    )
    trackers: list[Tracker] = Field(
        default=[],
        description="Where metrics go besides metrics.jsonl: tensorboard, wandb (offline, unless WANDB_MODE is set).",
    )

    @property
    def shares(self) -> bool:
        """Whether answers share their prompt where the model can."""
        return self.sharing != "off"
