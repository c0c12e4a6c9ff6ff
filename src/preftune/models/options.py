"""The keys under `adapter.`. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16"]


class AdapterOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["none", "lora"] = Field(
        default="none", description="none: train all weights; lora: low-rank adapters (peft)."
    )
    r: Annotated[int, Field(ge=1)] = Field(default=16, description="Rank of the adapter.")
    alpha: Annotated[float, Field(gt=0)] = Field(default=32.0, description="Scale of the adapter: updates count alpha / r.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="Dropout on the adapter's input.")
    target_modules: list[str] = Field(
        default=[], description="Names of the layers that get an adapter; empty: all linear ones."
    )
    merge: bool = Field(default=False, description="Save the model with the adapter merged in, not the adapter alone.")
