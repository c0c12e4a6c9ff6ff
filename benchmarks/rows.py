"""What every arm of a benchmark shares: the same rows, model and settings, made once into a folder."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {  # the shape of SmolLM2-135M
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 100_000,
}
BATCH, STEPS, WARM = 8, 5, 1  # pairs of a step; steps that are timed, after those that are not
SEARCH = 2  # steps that are timed in a search
LEARNING_RATE, BETA = 1e-6, 0.1


def hh(path: Path, count: int) -> list[dict[str, str]]:
    """The first usable rows of HH dialogues: a prompt that both sides share, and two answers that are not blank."""
    found: list[dict[str, str]] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            (prompt, chosen), (other, rejected) = (
                (text[: text.rindex("\n\nAssistant:") + 12], text[text.rindex("\n\nAssistant:") + 12 :])
                for text in (row["chosen"], row["rejected"])
            )
            if prompt == other and chosen.strip() and rejected.strip() and chosen != rejected:
                found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            if len(found) == count:
                break
    return found


def made_up(profile: str, count: int, vocabulary: list[str]) -> list[dict[str, str]]:
    """Random words in the proportions of a task, in words: a summary's long prompt, a short question with long answers, one
    prompt of 4,100 tokens with two short answers, or four answers to a prompt with all six pairs of them."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " " + " ".join(draw.choices(vocabulary, k=number))

    if profile == "four":
        rows: list[dict[str, str]] = []
        for _ in range(count):
            prompt, answers = words(draw.randint(40, 120)), [words(draw.randint(30, 90)) for _ in range(4)]
            pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
            rows += [{"prompt": prompt, "chosen": answers[a], "rejected": answers[b]} for a, b in pairs]
        return rows
    prompt, answer = {"summaries": (300, 30), "chat": (40, 250), "long": (4096, 64)}[profile]
    near = (lambda n: n) if profile == "long" else (lambda n: draw.randint(n // 2, n * 3 // 2))
    return [
        {"prompt": words(near(prompt)), "chosen": words(near(answer)), "rejected": words(near(answer))} for _ in range(count)
    ]


def prepare(folder: Path, profile: str, steps: int, dialogues: Path, shape: dict[str, Any]) -> None:
    """The model, the tokenizer, the settings and the rows of some steps of a profile, unless they are there."""
    groups = {"four": 8, "long": 1}.get(profile, BATCH)  # four: 8 prompts of six pairs a step
    settings = {"batch": groups * 6 if profile == "four" else groups, "profile": profile, "shape": shape}
    place = folder / "settings.json"
    if place.exists() and json.loads(place.read_text()) == settings:
        return
    text = [row["prompt"] + row["chosen"] + row["rejected"] for row in hh(dialogues, 10**6)]
    words = sorted({word for line in text[:500] for word in line.split() if word.isalpha()})
    made = hh(dialogues, steps * BATCH) if profile == "hh" else made_up(profile, steps * groups, words)
    make(folder / "model", text, shape)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    place.write_text(json.dumps(settings))


def make(folder: Path, text: list[str], shape: dict[str, Any]) -> None:
    """A random model of the shape with a byte-level BPE learned from the text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=shape["vocab_size"], special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
