"""Tiny random models, a tiny tokenizer and short groups: built in memory, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
)

from preftune.records import Comparison, Content, Demonstration, Group, Message, Origin, Response

MERGES = [("a", "b"), ("ab", "c"), ("t", "h"), ("th", "e")]
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(BYTES) + len(MERGES) + len(SPECIAL)


def tokenizer(*, start: bool | str = True, end: bool = True, template: str | None = None) -> Any:
    """Bytes with four merges that do not stop at spaces, so "a" + "bc" is one token. `start`: True (written before every
    text), False (there is none) or "unused" (there is one, and the tokenizer does not write it, as GPT-2's)."""
    pieces = [*BYTES, *(a + b for a, b in MERGES), *SPECIAL]
    core = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    if start is True:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if start else None,
        eos_token="</s>" if end else None,
        additional_special_tokens=list(SPECIAL[2:]),
    )
    made.chat_template = template
    return made


_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_ENDS = {"bos_token_id": VOCABULARY - 7, "eos_token_id": VOCABULARY - 6, "pad_token_id": None}

CONFIGS: dict[str, Any] = {
    "llama": lambda n: LlamaConfig(**_SMALL, **_HEADS, **_ENDS, max_position_embeddings=n, tie_word_embeddings=True),
    "untied": lambda n: LlamaConfig(**_SMALL, **_HEADS, **_ENDS, max_position_embeddings=n, tie_word_embeddings=False),
    "gpt2": lambda n: GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=n, initializer_range=0.2, **_ENDS
    ),
    "gemma2": lambda n: Gemma2Config(  # caps so low that leaving them out shows
        **_SMALL, **_HEADS, **_ENDS, head_dim=8, max_position_embeddings=n, sliding_window=8, final_logit_softcapping=0.5
    ),
    "gptj": lambda n: GPTJConfig(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=n, initializer_range=0.2, **_ENDS
    ),
    "phi": lambda n: PhiConfig(**_SMALL, **_HEADS, **_ENDS, max_position_embeddings=n),  # its head has a bias
    "cohere": lambda n: CohereConfig(**_SMALL, **_HEADS, **_ENDS, max_position_embeddings=n, logit_scale=0.25),
    "granite": lambda n: GraniteConfig(**_SMALL, **_HEADS, **_ENDS, max_position_embeddings=n, logits_scaling=4.0),
}


def model(name: str = "llama", *, seed: int = 0, positions: int = 64, **changes: Any) -> Any:
    """A random model in evaluation mode; biases are random too. `changes`: attributes of its config."""
    config = CONFIGS[name](positions)
    for key, value in changes.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for key, parameter in made.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.5)
    return made.eval()


def answers(prompt: Content, *contents: Content, first_row: int = 1) -> tuple[Response, ...]:
    return tuple(Response(c, (Origin("pairs.jsonl", first_row, f"answer {n}"),)) for n, c in enumerate(contents))


def pair(prompt: Content, chosen: Content, rejected: Content, *, row: int = 1, **mark: Any) -> Group:
    """One comparison, the first answer the better one."""
    origin = Origin("pairs.jsonl", row, "chosen")
    return Group(prompt, answers(prompt, chosen, rejected, first_row=row), (Comparison(0, 1, origin=origin, **mark),))


def shown(prompt: Content, response: Content, *, row: int = 1, **mark: Any) -> Group:
    """One demonstration."""
    origin = Origin("shown.jsonl", row, "response")
    return Group(prompt, answers(prompt, response, first_row=row), (Demonstration(0, origin=origin, **mark),))


def pairs(count: int = 6, **mark: Any) -> list[Group]:
    """Comparisons whose answers differ in length, so that padding and cuts matter, under prompts long enough to share."""
    words = ["the cat", "a", "abcabc the end", "no", "yes, it is", "the the the the", "oh", "that is what they said"]
    return [
        pair(f"{n} asks: ", words[n % 8] + "!" * (n % 3), words[(3 * n + 1) % 8] + "?", row=n + 1, **mark) for n in range(count)
    ]


def turns(*contents: str, first: str = "user") -> tuple[Message, ...]:
    """Messages whose roles alternate."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return tuple(Message(roles[n % 2], text) for n, text in enumerate(contents))


def state(module: Any) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names: Sequence[str] | None = None) -> bool:
    return all(torch.equal(a[name], b[name]) for name in (names or a))
