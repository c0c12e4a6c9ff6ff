"""A long run: does its memory stay flat?

    python benchmarks/soak.py --steps 2000

The packaged film-review model trains on pairs made here, with evaluations and checkpoints between the steps. Read every hundred
steps is what the process holds (resident), and compared with what it held at step 200.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import kill
from arm import resident_gb

from preftune import fit
from preftune.demo.experiment import model_folder
from preftune.models.load import load_model, load_tokenizer
from preftune.records import Comparison, Group, Response

FIRST, EVERY = 200, 100


def main() -> None:
    parser = common.arguments(__doc__, data=False)
    parser.add_argument("--steps", type=int, default=2000)
    words = parser.parse_args()
    logging.getLogger("preftune").setLevel(logging.ERROR)
    rows = kill.rows(2000)
    groups = [Group(r["prompt"], (Response(r["chosen"]), Response(r["rejected"])), (Comparison(0, 1),)) for r in rows]
    held: list[tuple[int, float]] = []
    began = time.perf_counter()

    def progress(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if phase == "train" and done % EVERY == 0:
            held.append((done, resident_gb()))
            print(f"step {done:5}: {held[-1][1]:.3f} GB", flush=True)

    with tempfile.TemporaryDirectory() as out:
        fit(
            load_model(model_folder()),
            load_tokenizer(model_folder()),
            groups,
            out=Path(out) / "run",
            reference_store="off",
            progress=progress,
            dtype="float32",
            batch_size=4,
            steps=words.steps,
            learning_rate=1e-5,
            train={"eval_every": 250, "save_every": 250},
        )
    first = next(gb for step, gb in held if step >= FIRST)
    worst = max(gb for step, gb in held if step >= FIRST)
    seconds = time.perf_counter() - began
    grown = worst / first - 1
    print(f"{words.steps:,} steps in {seconds:.0f} s: {first:.3f} GB at step {FIRST}, at most {worst:.3f} after: {grown:+.1%}")
    common.write(words, "soak", {"resident_gb": held, "growth": grown, "seconds": seconds})


if __name__ == "__main__":
    main()
