"""Reward models: a decoder with one number per sequence, as transformers' sequence classifiers are."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from preftune.errors import Refusal
from preftune.models.inspect import facts, resolve
from preftune.models.load import device, load_base, load_model, place_of, quiet, refusing, with_adapter

log = logging.getLogger("preftune")


def load_reward(
    ref: str,
    *,
    dtype: torch.dtype = torch.float32,
    key: str = "model",
    seed: int = 0,
    trust_remote_code: bool = False,
    quantize: bool = False,
) -> Any:
    """A sequence classifier with one label, in evaluation mode, on the best device.

    A folder that holds one gives it, an adapter's over its base. Of a causal language model the decoder is taken, and a head
    [1, D] is put on it whose entries are drawn from a normal distribution of variance 1 / (D + 1) (Stiennon et al. 2020, arXiv
    2009.01325), seeded.

    Args:
        dtype: that it computes in.
        quantize: hold the weights of the decoder's linear layers in 4 bits.

    Raises:
        Refusal: it cannot be loaded, gives several numbers, or is of a kind that has no such classifier.
    """
    from transformers import AutoModelForSequenceClassification

    path, known = place_of(ref, key)
    if known.adapter and not known.classifier:  # its head would be drawn, and not train
        line = f"{ref} is an adapter of a language model: fold it in first, preftune merge {ref} out=DIR, and start from that"
        raise Refusal(line, code="no_scalar_head", key=key)
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "quantize": quantize, "num_labels": 1}
    with refusing(ref, "model", key), quiet(warnings=False):
        model, missing = load_base(AutoModelForSequenceClassification, path, dtype=dtype, key=key, **how)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        line = f"{type(model).__name__} is no decoder with a head named score: it cannot be a reward model here"
        raise Refusal(line, code="no_scalar_head", key=key)
    lost = [name for name in missing if name != "score.weight"]
    if lost:  # transformers would fill them with random numbers
        line = f"{ref} holds no decoder of a language model: its weights lack {', '.join(lost[:3])}"
        raise Refusal(line, code="incomplete_model", key=key)
    if missing:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            drawn = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
            head.weight.copy_(drawn)
    if known.adapter:
        with refusing(ref, "model", key), quiet(warnings=False):
            model = with_adapter(model, path, key)
    return model.to(device()).eval()


def load_either(ref: str, *, key: str = "model", **keys: Any) -> Any:
    """A reward model where the folder holds one, else a language model."""
    return (load_reward if is_reward(ref, key) else load_model)(ref, key=key, **keys)


def is_reward(ref: str, key: str) -> bool:
    """Whether a local folder says that it holds a sequence classifier; False of a hub name, which is not fetched for it."""
    return facts(resolve(ref, key), key).classifier


def name_padding(model: Any, tokenizer: Any) -> None:
    """Writes into the config which token pads. transformers reads a padded classifier at the last token that is not it.

    So it must be none that ends an answer, though many tokenizers pad with their end token: the unknown token takes its place
    then, a special token that no text holds, or the start token, which ends nothing. Where there is none of them, rows can only
    be scored one at a time, and that is said.
    """
    end = tokenizer.eos_token_id
    other = (tokenizer.pad_token_id, tokenizer.unk_token_id, *_spare(tokenizer), tokenizer.bos_token_id)
    chosen = next((token for token in other if token is not None and token != end), None)
    if chosen is None:
        log.warning("the tokenizer has no token to pad with but its end token: transformers scores one row at a time with it")
    model.config.pad_token_id = chosen
    if chosen is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)


def _spare(tokenizer: Any) -> list[int]:
    """Special tokens that are named after padding, or reserved for nothing yet."""
    special = {token.content: n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [n for word in ("pad", "reserved") for content, n in special.items() if word in content.lower()]
