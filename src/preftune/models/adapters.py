"""Adapters through peft: adding one, switching it off for the reference, copying and merging it."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from preftune.errors import Refusal
from preftune.models.options import AdapterOptions
from preftune.models.quantized import differentiable, is_quantized, unpacked
from preftune.models.randomness import random_state_kept
from preftune.models.weights import copy_sharing

TRAINED = ("lora_", "modules_to_save.", "prompt_encoder.")  # in the names of what an adapter trains


def is_adapter(model: Any) -> bool:
    """Whether it is a peft model. The base that one was made around has its layers too, and is none by itself."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def inside(model: Any) -> Any:
    """The model of transformers in a peft model, and any other as it is."""
    return model.get_base_model() if is_adapter(model) else model


def gives_scalars(model: Any) -> bool:
    """Whether it is a sequence classifier with one label, as reward models are; a peft model is asked for what is inside."""
    inner = inside(model)
    return callable(getattr(inner, "score", None)) and getattr(inner.config, "num_labels", None) == 1


def task_of(model: Any) -> str:
    """As peft calls it. Of a reward model the head trains as a whole, beside the adapter, and is saved with it."""
    return "SEQ_CLS" if gives_scalars(model) else "CAUSAL_LM"


def virtual_tokens(model: Any) -> int:
    """Positions that the model's adapter takes of every sequence: those of prompt and prefix tuning."""
    return getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0


def add_adapter(
    model: Any, options: AdapterOptions, *, seed: int, tokenizer: Any = None, dtype: torch.dtype | None = None
) -> Any:
    """A peft model around `model`, of which only the adapter trains.

    Low-rank adapters start at zero: the model computes exactly what it did. Virtual tokens start as tokens of the vocabulary.

    Args:
        seed: of the random start.
        tokenizer: for `adapter.text`.
        dtype: that the run computes in; None: that of the model.

    Raises:
        Refusal: no layer has the names that are asked for, or the model cannot take virtual tokens.
    """
    with random_state_kept(model.device):
        torch.manual_seed(seed)
        made = _with_virtual_tokens(model, options, tokenizer) if options.virtual else _with_low_rank(model, options)
    if options.type == "dora" and dtype is not None:
        _start_magnitudes(made, dtype)
    return differentiable(made)


def _with_low_rank(model: Any, options: AdapterOptions) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=task_of(model),
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft divides by r: a fraction is fine
        lora_dropout=options.dropout,
        target_modules=options.target_modules or "all-linear",
        use_rslora=options.rslora,
        use_dora=options.type == "dora",
    )
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if any(kind in type(module).__name__ for kind in ("Linear", "Conv1D"))
    }
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False)  # A starts random, B at zero
    except ValueError as error:
        raise Refusal(
            f"no layer is named {', '.join(options.target_modules)}; the model's linear layers: {', '.join(sorted(linear))}",
            code="no_target_modules",
            key="adapter.target_modules",
        ) from error


@torch.no_grad()
def _start_magnitudes(model: Any, dtype: torch.dtype) -> None:
    """DoRA's magnitudes as the norms that the compute precision finds: rounded after they are taken, they would differ from
    those in the last digit, and the model from its base."""
    from peft.utils.integrations import dequantize_module_weight

    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_magnitude_vector")]
    for layer in layers:
        for magnitude in layer.lora_magnitude_vector.values():
            weight: Any = dequantize_module_weight(layer.get_base_layer())
            weight = weight.to(dtype)
            norm = magnitude.get_weight_norm(weight, torch.zeros((), dtype=dtype, device=weight.device), 1)
            magnitude.weight.copy_(norm)


# -- virtual tokens ---------------------------------------------------------------------------------------------------------


def _with_virtual_tokens(model: Any, options: AdapterOptions, tokenizer: Any) -> Any:
    """Prompt tuning (Lester et al. 2021) starts at the embeddings of tokens, prefix tuning (Li and Liang 2021) at the keys and
    values that the model itself computes for them: either way the model begins as it would after that text."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    kind = PromptTuningConfig if options.type == "prompt" else PrefixTuningConfig
    config = kind(task_type=task_of(model), num_virtual_tokens=options.tokens)
    if model.device.type == "meta":
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    ids = _start_ids(options, tokenizer, model.get_input_embeddings().weight.shape[0])
    try:
        start = _keys_and_values(model, ids) if options.type == "prefix" else _embeddings(model, ids)
        made: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            made.prompt_encoder["default"].embedding.weight.copy_(start)
            made(input_ids=torch.tensor([ids[:1]], device=model.device), use_cache=False)
    except Exception as error:  # models whose attention keeps something else than keys and values raise many kinds
        line = f"adapter={options.type} does not fit {type(model).__name__} ({' '.join(str(error).split())[:120]})"
        raise Refusal(f"{line}: adapter=lora does", code="no_virtual_tokens", key="adapter.type") from error
    return made


def _start_ids(options: AdapterOptions, tokenizer: Any, rows: int) -> list[int]:
    if options.text is None:
        known = rows if tokenizer is None else min(rows, len(tokenizer))
        return torch.randint(known, (options.tokens,)).tolist()
    ids: Sequence[int] = tokenizer(options.text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise Refusal("holds no token to start from", code="bad_value", key="adapter.text")
    return (list(ids) * math.ceil(options.tokens / len(ids)))[: options.tokens]


@torch.no_grad()
def _embeddings(model: Any, ids: list[int]) -> Tensor:
    """[tokens, D]"""
    return model.get_input_embeddings()(torch.tensor(ids, device=model.device))


@torch.no_grad()
def _keys_and_values(model: Any, ids: list[int]) -> Tensor:
    """[tokens, layers * 2 * key-value heads * d], in the order in which peft reads them."""
    from transformers import DynamicCache

    training = model.training
    cache = DynamicCache()
    model.eval()(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    model.train(training)
    layers: list[Any] = cache.layers
    return torch.stack([kept for layer in layers for kept in (layer.keys, layer.values)])[:, 0].permute(2, 0, 1, 3).flatten(1)


# -- what trains ------------------------------------------------------------------------------------------------------------


def trainable_adapter(model: Any) -> Any:
    """Switches the gradients of a loaded adapter on, and all others off.

    Raises:
        Refusal: an adapter of another kind.
    """
    active = model.active_adapters
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED) and any(f".{a}." in f"{name}." for a in active))
    if not any(p.requires_grad for p in model.parameters()):
        kind = model.active_peft_config.peft_type.value
        line = f"an adapter of type {kind} cannot be trained on here: LoRA (DoRA, QLoRA), prompt and prefix tuning can"
        raise Refusal(line, code="unknown_adapter", key="model")
    return differentiable(model)


def adapter_dropout_on(model: Any) -> Any:
    """In a model in evaluation mode, the dropout of the adapter alone: the only one that is asked for by a key."""
    for name, module in model.named_modules():
        if name.endswith("lora_dropout") or ".lora_dropout." in name:
            module.train()
        elif getattr(module, "lora_magnitude_vector", None):
            module.training = True  # DoRA asks the layer itself, whose base has no dropout of its own
    return model


def checkpointing_on(model: Any) -> Any:
    """In a model in evaluation mode, activation checkpointing of its layers (Chen et al. 2016, arXiv 1604.06174) alone.

    Raises:
        Refusal: a model whose layers cannot.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    inner = model.get_base_model() if is_adapter(model) else model
    layers = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not inner.supports_gradient_checkpointing:
        line = f"{type(inner).__name__} cannot compute its layers again: leave it away"
        raise Refusal(line, code="no_checkpointing", key="train.checkpointing")
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        layer.training = True  # of the layer alone, which asks itself; what is in it stays as it was
    return model


def is_checkpointed(model: Any) -> bool:
    """Whether any of its layers is computed again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def adapter_off(model: Any) -> Generator[None]:
    """The base model for the time of the call, with the gradients of exactly the same parameters on afterwards."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    try:
        with model.disable_adapter():
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)


def frozen_copy(model: Any) -> Any:
    """The model as it is now, for a reference after training: a copy of what trains, around the same base."""
    return copy_sharing(model, lambda parameter: not parameter.requires_grad).requires_grad_(False)


def merged(model: Any) -> Any:
    """The plain model with a low-rank adapter folded into its weights. A base in 4 bits is unpacked first: packed again, the
    sum would lose most of what was learned."""
    if not is_quantized(model):
        return model.merge_and_unload()
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    learned, config = get_peft_model_state_dict(model, save_embedding_layers=False), model.active_peft_config
    again = get_peft_model(unpacked(model.unload()), config, autocast_adapter_dtype=False)
    set_peft_model_state_dict(again, learned)
    return again.merge_and_unload()
