"""Losses of the first steps of every method, as they are to stay: a tiny model, float32, fixed rows.

python tests/golden.py        writes tests/golden.json again; CHANGELOG.md says, under Numerics, why they are other ones
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tiny
import torch
from test_methods import judged

from preftune import methods
from preftune.data.render import render
from preftune.models.reward import load_reward, name_padding
from preftune.scoring.score import score
from preftune.training.options import TrainOptions
from preftune.training.precision import Weights
from preftune.training.steps import begin, plan, steps

FILE = Path(__file__).with_suffix(".json")
STEPS = 20


def losses(name: str) -> list[float]:
    """Of 20 steps of four examples, two micro-batches or so each, that start at the reference."""
    method, tokenizer = methods.make(name), tiny.tokenizer()
    model = _reward_model(tokenizer) if method.head == "scalar" else tiny.model()
    batch = render(judged(name), tokenizer)
    batch = method.rows(batch, lambda groups: render(groups, tokenizer))
    reference = score(model, batch).logp.detach() if method.needs_reference else None
    options = TrainOptions(tokens_per_microbatch=150)
    the_plan = plan(
        method.examples(batch.groups), batch_size=4, epochs=1.0, steps=STEPS, seed=0, learning_rate=3e-3, options=options
    )
    training = begin(Weights(model.requires_grad_(True), torch.float32), the_plan)
    return [line["loss"] for line in steps(training, batch, method, the_plan, reference)]


def _reward_model(tokenizer: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tiny.model().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = load_reward(folder)
    name_padding(model, tokenizer)
    return model


if __name__ == "__main__":
    found = {name: losses(name) for name in methods.NEEDS}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{FILE}: {len(found)} methods")
