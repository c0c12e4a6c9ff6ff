"""What saving costs: a checkpoint of a model of 135M parameters with its optimizer, beside the steps between two of them.

    python benchmarks/checkpoint.py --hh harmless-base-test.jsonl.gz

A few steps are taken and one checkpoint after each; the share is that of a run that saves every hundredth step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import rows

EVERY = 100


def saving(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step and of each checkpoint of one run."""
    from preftune import fit, read
    from preftune.models.load import load_model, load_tokenizer
    from preftune.runs import checkpoint, trainer
    from preftune.training.memory import keep_freed_memory

    keep_freed_memory()
    trainer.sample_prompts = lambda job: ([], [])  # answers before and after are not what is timed
    seconds: list[float] = []
    sizes: list[int] = []
    save = checkpoint.save

    def timed(*given: Any, **more: Any) -> Path:
        began = time.perf_counter()
        made = save(*given, **more)
        seconds.append(time.perf_counter() - began)
        sizes.append(sum(path.stat().st_size for path in made.iterdir()))
        return made

    checkpoint.save = timed
    ref = str(folder / "model")
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run = fit(
            load_model(ref),
            load_tokenizer(ref),
            read(str(folder / "rows.jsonl")),
            eval_groups=[],
            out=Path(out) / "run",
            reference_store="off",
            dtype=how["dtype"],
            batch_size=rows.BATCH,
            steps=how["steps"],
            learning_rate=rows.LEARNING_RATE,
            train={"tokens_per_microbatch": how["tokens"], "save_every": 1, "keep_checkpoints": 1},
        )
    steps = [rows.BATCH / line["pairs_per_s"] for line in run.metrics]
    return {"steps": steps, "checkpoints": seconds, "gigabytes": sizes[0] / 1e9}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=3)
    words = parser.parse_args()
    folder = common.prepared(words, steps=words.steps)
    found = common.run_arm("checkpoint:saving", folder, {"dtype": words.dtype, "tokens": words.tokens, "steps": words.steps})
    step, save = statistics.median(found["steps"]), statistics.median(found["checkpoints"])
    share = save / (EVERY * step + save)
    print(f"{found['gigabytes']:.2f} GB in {save:.1f} s, a step of {rows.BATCH} pairs in {step:.1f} s: {share:.1%} of a run")
    common.write(words, f"checkpoint-{words.dtype}", {**found, "share": share})


if __name__ == "__main__":
    main()
