"""The structure of the model that a run trains, without its weights: what it holds can be counted before it is loaded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from preftune.errors import Refusal
from preftune.models.adapters import add_adapter, trainable_adapter
from preftune.models.inspect import facts, resolve
from preftune.models.load import base_of, quiet
from preftune.models.options import AdapterOptions

log = logging.getLogger("preftune")


def structure(ref: str, adapter: AdapterOptions, *, scalar: bool = False, trust_remote_code: bool = False) -> Any:
    """The model on the meta device, with the adapter that it is given or is; what trains requires a gradient.

    Args:
        scalar: a reward model, also of what holds a language model.

    Raises:
        Refusal: no layer has the names that the adapter is asked for.
        Exception: whatever a model raises that cannot be built without its weights.
    """
    path = resolve(ref, "model")
    adapted = facts(path, "model").adapter
    base = base_of(path) if adapted else path
    with quiet(), torch.device("meta"):
        keys = {"num_labels": 1} if scalar else {}
        config: Any = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **keys)
        packed = adapter.type == "qlora" or facts(path, "model").quantized
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # without it the structure is built of plain layers
        kind: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
        if packed:
            _mark_packed(model)
        if adapted:
            from peft import PeftConfig, get_peft_model

            settings = PeftConfig.from_pretrained(path)
            settings.inference_mode = False
            return trainable_adapter(get_peft_model(model, settings, autocast_adapter_dtype=False))
        return add_adapter(model, adapter, seed=0) if adapter.type != "none" else model


def check_layers(ref: str, adapter: AdapterOptions, *, scalar: bool = False, trust_remote_code: bool = False) -> None:
    """Refuses names of layers that the model does not have, before there are weights to load."""
    if not adapter.target_modules:
        return
    try:
        structure(ref, adapter, scalar=scalar, trust_remote_code=trust_remote_code)
    except Refusal:
        raise
    except Exception as error:  # it cannot be built without its weights: adding the adapter to them will tell
        log.debug(f"{ref}: {error}")


def _mark_packed(model: Any) -> None:
    """Marks the weights that loading would pack: those of all linear layers but the head."""
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D) and not any(module is head for head in heads):
            module.weight.quant_state = None
