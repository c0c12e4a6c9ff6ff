"""Texts to token ids, by the fastest way that a tokenizer has."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

Encode = Callable[[list[str], bool], list[list[int]]]  # texts, and whether the tokenizer's own special tokens are written

_PROBE = ["", "A probe, with 2 lines:\n\n  Über  naïve 東京 🙂 ", "</s><|im_end|>"]


def encoder(tokenizer: Any) -> Encode:
    """The tokenizer of transformers, or what stands below it: that counts no offsets, and is faster. It is used where it
    gives the same for a few texts."""

    one = Lock()  # a call puts truncation and padding off, which nobody else's call may see half done

    def whole(texts: list[str], special: bool) -> list[list[int]]:
        with one:
            return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

    def below(texts: list[str], special: bool) -> list[list[int]]:
        return [found.ids for found in core.encode_batch_fast(texts, add_special_tokens=special)]

    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(core, "encode_batch_fast"):
        return whole
    # the call above also puts truncation and padding off, which a tokenizer may have been saved with
    same = all(whole(_PROBE, special) == below(_PROBE, special) for special in (True, False))
    return below if same else whole
