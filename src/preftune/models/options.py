"""The keys under `adapter.`. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from preftune.errors import Refusal

Dtype = Literal["float32", "bfloat16"]

_LOW_RANK = ("r", "alpha", "dropout", "target_modules", "rslora", "merge")
_VIRTUAL = ("tokens", "text")
# the keys that each type reads
READ = {"none": (), "lora": _LOW_RANK, "dora": _LOW_RANK, "qlora": _LOW_RANK, "prompt": _VIRTUAL, "prefix": _VIRTUAL}
NO_MERGE = "virtual tokens are no part of any weight, and cannot be merged into the model: it needs its adapter beside it"


class AdapterOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["none", "lora", "dora", "qlora", "prompt", "prefix"] = Field(
        default="none",
        description="none: train all weights; lora: low-rank updates; dora: with a trained magnitude; qlora: over a base in "
        "4 bits; prompt: virtual tokens before every prompt; prefix: virtual keys and values in every layer.",
    )
    r: Annotated[int, Field(ge=1)] = Field(default=16, description="Rank of the updates.")
    alpha: Annotated[float, Field(gt=0)] = Field(default=32.0, description="Scale of the updates: they count alpha / r.")
    rslora: bool = Field(default=False, description="Updates count alpha / sqrt(r) (rsLoRA).")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="Dropout on the adapter's input.")
    target_modules: list[str] = Field(
        default=[], description="Names of the layers that get an adapter; empty: all linear ones."
    )
    merge: bool = Field(default=False, description="Save the model with the adapter merged in, not the adapter alone.")
    tokens: Annotated[int, Field(ge=1)] = Field(default=20, description="prompt, prefix: how many virtual tokens.")
    text: str | None = Field(
        default=None,
        description="prompt, prefix: what the virtual tokens start as, repeated or cut to their number; absent: random tokens.",
    )

    @property
    def virtual(self) -> int:
        """Positions that the adapter takes of every sequence."""
        return self.tokens if self.type in ("prompt", "prefix") else 0


def rate_factor(options: AdapterOptions, *, adapter: bool, virtual: int) -> int:
    """How many times the learning rate of all weights is right for what trains. Virtual tokens take the largest steps: they are
    few, and start anywhere (docs/adapters.md).

    Args:
        options: of a new adapter.
        adapter, virtual: whether the model is one already, and its virtual tokens.
    """
    if options.virtual or virtual:
        return 100
    return 10 if adapter or options.type != "none" else 1


def check_adapter(options: AdapterOptions) -> None:
    """Refuses keys that the type does not read: whoever gives a rank does not mean to train all weights.

    `merge` alone may stand without a type: the model may be an adapter.
    """
    kind, read = options.type, READ[options.type]
    for name, field in AdapterOptions.model_fields.items():
        key = f"adapter.{name}"
        if name in ("type", *read) or getattr(options, name) == field.default:
            continue
        if kind == "none" and name != "merge":
            line = f"no adapter is asked for: adapter={'prompt' if name in _VIRTUAL else 'lora'}"
            raise Refusal(line, code="no_adapter", key=key)
        if kind != "none" and name == "merge":
            raise Refusal(NO_MERGE, code="cannot_merge", key=key)
        if kind != "none":
            raise Refusal(f"adapter={kind} does not use it; it has {', '.join(read)}", code="unused_key", key=key)
