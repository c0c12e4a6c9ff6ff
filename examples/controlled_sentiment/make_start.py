"""The tokenizer and the untrained film-review model.

    python examples/controlled_sentiment/make_start.py

reads `build/controlled_sentiment/train.jsonl` (see corpus.py) and writes `build/controlled_sentiment/start/`: a
byte-level BPE tokenizer learned from the training passages alone, and a freshly initialised Llama model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BUILD = Path(__file__).resolve().parents[2] / "build" / "controlled_sentiment"
START, END, PAD = "<s>", "</s>", "<pad>"  # ids 0, 1, 2
VOCABULARY, POSITIONS = 4096, 256


def read_texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def learn_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <s> before every text and gives every text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, tokenizer.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A small Llama in float32 with random weights (standard deviation 0.02) and tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        attention_bias=False,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the tokenizer and initialise the model.")
    parser.add_argument("--data", type=Path, default=BUILD)
    parser.add_argument("--out", type=Path, default=BUILD / "start")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    train = read_texts(options.data / "train.jsonl")
    tokenizer = learn_tokenizer(train)
    model = new_model(tokenizer, options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    compact = options.out / "tokenizer.json"  # without indentation, a third of the size
    compact.write_text(json.dumps(json.loads(compact.read_text("utf-8")), separators=(",", ":")), encoding="utf-8")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.out)
    tokens = [len(ids) + 1 for ids in tokenizer(train)["input_ids"]]  # </s> is one more
    heldout = read_texts(options.data / "heldout.jsonl")
    changed = [t for t in heldout if tokenizer.decode(tokenizer(t)["input_ids"], skip_special_tokens=True) != t]
    if changed:
        raise SystemExit(f"{len(changed)} held-out passages do not come back from the tokenizer: {changed[0]!r}")
    parameters = sum(p.numel() for p in model.parameters())
    figures = {
        "vocabulary": len(tokenizer),
        "parameters": parameters,
        "bytes": {"bf16 weights": 2 * parameters, "tokenizer.json": compact.stat().st_size},
        "passages": len(train),
        "tokens per epoch": sum(tokens),
        "tokens per passage": {"mean": round(sum(tokens) / len(tokens), 2), "longest": max(tokens)},
        "tokens per word": round(sum(tokens) / sum(len(text.split()) for text in train), 3),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
