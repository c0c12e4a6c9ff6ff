"""Puts the trained film-review model into the package, in bfloat16 (half the bytes; it computes in float32).

    python examples/controlled_sentiment/package_model.py

reads `build/controlled_sentiment/run/model` and writes `src/preftune/demo/assets/film_reviews`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 8_000_000  # bytes that the package gives the model, tokenizer included
KEPT = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cast the trained model to bfloat16 and package it.")
    parser.add_argument("--model", type=Path, default=ROOT / "build/controlled_sentiment/run/model")
    parser.add_argument("--out", type=Path, default=ROOT / "src/preftune/demo/assets/film_reviews")
    options = parser.parse_args()

    LlamaForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    compact = options.out / "tokenizer.json"  # without indentation, a third of the size
    compact.write_text(json.dumps(json.loads(compact.read_text("utf-8")), separators=(",", ":")), encoding="utf-8")
    for extra in sorted(set(options.out.iterdir()) - {options.out / name for name in KEPT}):
        extra.unlink()
    size = sum(file.stat().st_size for file in options.out.iterdir())
    if size > LIMIT:
        raise SystemExit(f"{size:,} bytes, over the limit of {LIMIT:,}")
    print(json.dumps({"bytes": size, "files": sorted(file.name for file in options.out.iterdir())}))


if __name__ == "__main__":
    main()
