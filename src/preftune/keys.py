"""The keys of each verb, with their defaults and a sentence each: what `preftune VERB --help` prints.

Those that belong to a room stand in its options.py. No torch, no transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from preftune.data.options import DataOptions, ScoredOptions, Sources
from preftune.methods.options import MethodOptions
from preftune.models.options import AdapterOptions, Dtype
from preftune.records import Pairs
from preftune.training.options import TrainOptions

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Keys(BaseModel):
    """Words that are named here, of the types that stand here, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _home(text: str) -> str:
    return str(Path(text).expanduser()) if text.startswith("~/") else text


Place = Annotated[str, AfterValidator(_home)]  # a path or hub name; the shell does not see the ~ in a YAML file


class ReferenceOptions(Keys):
    model: Place | None = Field(default=None, description="Folder, hub name or run; absent: the starting policy.")
    store: Place | None = Field(
        default=None,
        description="train, doctor: file of reference log-probabilities for later runs, or off; absent: in the user's cache.",
    )
    sync_steps: Count | None = Field(
        default=None,
        description="train: optimizer steps after which the reference follows the policy, each time; absent: never.",
    )
    sync_alpha: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.6, description="train: how far it then goes: alpha * policy + (1 - alpha) * reference."
    )


_METHOD = Field(default=MethodOptions(), description="Short for method.name.")
_REFERENCE = Field(default=ReferenceOptions(), description="Short for reference.model.")


class WithModel(Keys):
    """What every verb that loads a model takes."""

    model: Place = Field(description="Folder, hub name, or a run folder (its model/).")
    trust_remote_code: bool = Field(default=False, description="Run code that the model's folder brings along.")
    dtype: Dtype | None = Field(default=None, description="float32 or bfloat16; training: bfloat16 where the hardware has it.")
    seed: Seed = Field(default=0, description="Of shuffling, sampling and intervals.")


class TrainKeys(WithModel):
    data: ScoredOptions = Field(description="What to train on: a source or a list of sources.")
    eval_data: Sources = Field(default=[], description="Held-out data; absent: 5 % of the prompts, at most 1,000.")
    method: MethodOptions = _METHOD
    reference: ReferenceOptions = _REFERENCE
    beta: Positive | None = Field(
        default=None, description="How strongly the policy is held to the reference. Default by method: 0.1, simpo 2, ln_dpo 5."
    )
    batch_size: Count = Field(default=32, description="Comparisons, rankings, ratings or demonstrations per optimizer step.")
    steps: Count | None = Field(default=None, description="Optimizer steps; wins over epochs.")
    epochs: Positive = Field(default=1.0, description="Passes over the training data.")
    learning_rate: Positive | None = Field(
        default=None,
        description="Default by method: DPO family 1e-6, orpo and ratings 5e-6, sft 2e-5; LoRA 10 times that, prompt 100.",
    )
    max_length: Count | None = Field(
        default=None, description="Most tokens of prompt plus response; default: the model's positions."
    )
    adapter: AdapterOptions = Field(default=AdapterOptions(), description="Short for adapter.type.")
    train: TrainOptions = Field(default=TrainOptions(), description="How training goes: the keys below.")
    out: Place | None = Field(default=None, description="Run folder; default runs/<method>-<date>-<n>.")
    resume: Place | None = Field(
        default=None, description="Run folder: go on where it stopped. Besides, only steps, epochs and train.trackers."
    )
    overwrite: bool = Field(default=False, description="Move a run that is there to .old-1 instead of refusing.")
    dry_run: bool = Field(default=False, description="Resolve, check, estimate memory, show three rendered rows, stop.")


class EvaluateKeys(WithModel):
    data: ScoredOptions | None = Field(default=None, description="Judged data: accuracy, loss and KL on it.")
    against: Place | None = Field(default=None, description="Another model: win rate of one sample each per prompt.")
    prompts: DataOptions | None = Field(default=None, description="Any data source; its prompts are used for the win rate.")
    scorer: str | None = Field(default=None, description="package.module:function taking (prompts, responses).")
    reference: ReferenceOptions = _REFERENCE
    method: MethodOptions = _METHOD
    beta: Positive | None = Field(default=None, description="Of the loss and the rewards; default by method.")
    max_length: Count | None = Field(
        default=None, description="Most tokens of prompt plus response; default: the model's positions."
    )
    kl_samples: Annotated[int, Field(ge=0)] = Field(default=64, description="Prompts sampled for the KL; 0: no KL.")
    max_new_tokens: Count = Field(default=128, description="Longest sample.")


class GenerateKeys(WithModel):
    prompts: DataOptions = Field(description="Any data source; its prompts are used.")
    out: Place | None = Field(default=None, description="A .jsonl file; default: standard output.")
    samples: Count = Field(default=1, description="Samples per prompt.")
    temperature: Annotated[float, Field(ge=0)] = Field(default=1.0, description="0: the likeliest token each time.")
    top_k: Annotated[int, Field(ge=0)] = Field(default=0, description="Only the k likeliest tokens; 0: all.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Only the likeliest tokens with this mass; 1: all."
    )
    beams: Count = Field(default=1, description="Beam search with this many beams, without sampling.")
    max_new_tokens: Count = Field(default=128, description="Longest sample.")
    overwrite: bool = Field(default=False, description="Replace the file at out.")


class ScoreKeys(WithModel):
    data: ScoredOptions = Field(description="Responses to score.")
    out: Place = Field(description="A .jsonl file, one line per distinct response.")
    reference: ReferenceOptions = _REFERENCE
    beta: Positive = Field(default=0.1, description="reward = beta * (logp - reference_logp).")
    token_logps: bool = Field(default=False, description="Also the log-probability of every scored token.")
    max_length: Count | None = Field(
        default=None, description="Most tokens of prompt plus response; default: the model's positions."
    )
    overwrite: bool = Field(default=False, description="Replace the file at out.")


class DoctorKeys(WithModel):
    data: ScoredOptions = Field(description="What a run would train on.")
    method: MethodOptions = _METHOD
    reference: ReferenceOptions = _REFERENCE
    adapter: AdapterOptions = Field(default=AdapterOptions(), description="Short for adapter.type.")
    batch_size: Count = Field(default=32, description="Of the run whose time is estimated.")
    max_length: Count | None = Field(
        default=None, description="Most tokens of prompt plus response; default: the model's positions."
    )


class ChatKeys(WithModel):
    system: str | None = Field(default=None, description="A system message.")
    template: Place | None = Field(
        default=None, description="Chat template to use instead of the model's own; plain is the built-in one."
    )
    temperature: Annotated[float, Field(ge=0)] = Field(default=0.7, description="0: the likeliest token each time.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=0.95, description="Only the likeliest tokens with this mass.")
    max_new_tokens: Count = Field(default=256, description="Longest answer.")


class MergeKeys(Keys):
    out: Place = Field(description="Folder for the merged model.")
    dtype: Dtype | None = Field(default=None, description="Of the merged weights; absent: as the base model's are stored.")
    trust_remote_code: bool = Field(default=False, description="Run code that the model's folder brings along.")
    overwrite: bool = Field(default=False, description="Move a folder that is there to .old-1 instead of refusing.")


class ConvertKeys(Keys):
    to: str = Field(description="Format to write; the list stands below.")
    data: DataOptions = Field(default=DataOptions(), description="How IN is read.")
    pairs: Pairs = Field(default="all", description="What rankings become in a format of pairs: all, or best_vs_rest.")
    overwrite: bool = Field(default=False, description="Replace the file OUT.")


class CheckKeys(Keys):
    data: ScoredOptions = Field(default=ScoredOptions(), description="How DATA is read; data.sources may name it here, too.")
    eval_data: Sources = Field(default=[], description="Held-out data: prompts that stand in DATA too are named.")
    near_duplicates: bool = Field(default=False, description="Also look for rows that are almost the same: takes longer.")
    count: list[str] = Field(
        default=["source", "category"],
        description="Columns of the file whose values are counted; those not there do not matter.",
    )
    out: Place | None = Field(default=None, description="An .html file for the whole report.")
    overwrite: bool = Field(default=False, description="Replace the file at out.")
    model: Place | None = Field(
        default=None, description="Folder, hub name or run: also tokens, truncation, template, and what a run takes."
    )
    trust_remote_code: bool = Field(default=False, description="Run code that the model's folder brings along.")
    dtype: Dtype | None = Field(default=None, description="Of the run that is estimated.")
    method: MethodOptions = _METHOD
    adapter: AdapterOptions = Field(default=AdapterOptions(), description="Short for adapter.type.")
    batch_size: Count = Field(default=32, description="Of the run that is estimated.")
    max_length: Count | None = Field(
        default=None, description="Most tokens of prompt plus response; default: the model's positions."
    )


def _distinct(betas: list[float]) -> list[float]:
    return list(dict.fromkeys(betas))


Betas = Annotated[list[Positive], Field(min_length=1), AfterValidator(_distinct)]


class DemoKeys(Keys):
    betas: Betas = Field(default=[0.05], description="One run per beta; several draw the frontier.")
    out: Place | None = Field(default=None, description="Run folder; default runs/demo-<date>-<n>.")
    overwrite: bool = Field(default=False, description="Move a run that is there to .old-1 instead of refusing.")
    seed: Seed = Field(default=0, description="Of sampling, shuffling and intervals.")


VERB_KEYS: dict[str, type[Keys]] = {
    "train": TrainKeys,
    "evaluate": EvaluateKeys,
    "generate": GenerateKeys,
    "score": ScoreKeys,
    "doctor": DoctorKeys,
    "check": CheckKeys,
    "chat": ChatKeys,
    "merge": MergeKeys,
    "convert": ConvertKeys,
    "demo": DemoKeys,
}
