"""Held-out perplexity of a language model, with plain transformers.

    python examples/controlled_sentiment/perplexity.py FOLDER [--data build/controlled_sentiment/heldout.jsonl]

Every passage is scored from its first token on, given the start token, and with its end token, in float32. A word is
what stands between spaces (in these corpora punctuation marks do too), so the figures per word can be compared between
tokenizers. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

HELDOUT = Path(__file__).resolve().parents[2] / "build" / "controlled_sentiment" / "heldout.jsonl"


@torch.inference_mode()
def total_nats(model: PreTrainedModel, sequences: list[list[int]], batch_size: int) -> float:
    """-log p of every token after the first, summed over all sequences, in nats."""
    sequences = sorted(sequences, key=len)  # alike lengths together: less padding
    total = 0.0
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size]
        longest = len(batch[-1])
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in batch])
        real = torch.arange(longest) < torch.tensor([len(s) for s in batch])[:, None]
        logits = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(~real[:, 1:], -100)
        total += cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out perplexity per token and per word.")
    parser.add_argument("model", help="folder or hub name of a causal model with its tokenizer")
    parser.add_argument("--data", type=Path, default=HELDOUT)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    texts = [json.loads(line)["text"] for line in options.data.read_text("utf-8").splitlines()]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    sequences = [[start, *ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    tokens, words = sum(len(s) - 1 for s in sequences), sum(len(text.split()) for text in texts)
    nats = total_nats(model, sequences, options.batch_size)
    figures = {
        "passages": len(texts),
        "tokens": tokens,
        "words": words,
        "nats_per_token": nats / tokens,
        "perplexity_per_token": math.exp(nats / tokens),
        "nats_per_word": nats / words,
        "perplexity_per_word": math.exp(nats / words),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
