"""The memory that a dry run estimates, beside what the run then takes.

    python benchmarks/memory.py --hh harmless-base-test.jsonl.gz

Every case is a process of its own: `preftune train` with dry_run=true, then the same run, of one step. What is estimated is
what the run adds to the process: Python and its libraries, resident before anything is loaded, are taken off the peak. One
prompt is held out, and answered before and after.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import common
import rows
from arm import forget_peak, peak_gb, resident_gb

WITHIN = 0.2
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": 8192}
WIDE["num_key_value_heads"] = WIDE["num_attention_heads"]
CASES: list[tuple[str, dict[str, int], int, list[str]]] = [  # profile, other sizes, tokens of a micro-batch, other keys
    ("hh", {}, 4096, []),
    ("hh", {}, 512, []),
    ("hh", {}, 4096, ["train.checkpointing=true"]),
    ("hh", {}, 4096, ["adapter=lora"]),
    ("hh", {}, 512, ["adapter=lora"]),
    ("hh", {}, 512, ["train.optimizer=adafactor"]),
    ("hh", {}, 1024, ["method=simpo", "train.eval_every=1", "steps=2"]),
    ("four", {}, 2048, []),
    ("summaries", {}, 2048, []),
    ("chat", {}, 2048, []),
    ("long", {}, 4352, []),
    ("hh", WIDE, 4096, []),
    ("hh", WIDE, 512, []),
]


def case(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """GB: estimated; measured after the step, and at the end of the run."""
    import torch  # noqa: F401  # a part of what is there before
    import transformers  # noqa: F401

    from preftune.config import resolve
    from preftune.keys import TrainKeys
    from preftune.runs import answers
    from preftune.runs.train import train

    answers.NEW_TOKENS = 16  # more take their time, and hardly memory
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    size = json.loads((folder / "settings.json").read_text())["batch"]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        data, held = Path(place) / "train.jsonl", Path(place) / "held.jsonl"
        data.write_text("".join(lines[:size]))
        held.write_text(lines[-1])
        own = [f"model={folder / 'model'}", f"data={data}", f"eval_data={held}", f"out={place}/run", f"dtype={how['dtype']}"]
        own += ["steps=1", f"batch_size={size}", f"train.tokens_per_microbatch={how['tokens']}", "reference.store=off"]
        words = [*own, *how["keys"]]
        plan = train(resolve(TrainKeys, [*words, "dry_run=true"]))
        forget_peak()
        before = resident_gb()
        run: Any = train(resolve(TrainKeys, words))
    return {"estimated": plan["memory_gb"], "step": run.metrics[-1]["memory_gb"] - before, "run": peak_gb() - before}


def main() -> None:
    parser = common.arguments(__doc__)
    words = parser.parse_args()
    found: list[dict[str, Any]] = []
    for profile, shape, tokens, keys in CASES:
        folder = words.work / f"{profile}-2{'-wide' if shape else ''}"
        rows.prepare(folder, profile, 2, words.hh, rows.SHAPE | words.shape | shape)
        how = {"profile": profile, "wide": bool(shape), "tokens": tokens, "keys": keys, "dtype": words.dtype}
        found.append(common.run_arm("memory:case", folder, how))
    for arm in found:
        how = arm["how"]
        name = " ".join([how["profile"], *(["wide"] if how["wide"] else []), f"{how['tokens']:,} tokens", *how["keys"]])
        if "failed" in arm:
            print(f"{name}: {arm['failed']}")
            continue
        arm["off"] = arm["estimated"] / arm["run"] - 1
        beyond = "" if abs(arm["off"]) <= WITHIN else f"  (more than {WITHIN:.0%})"
        figures = f"{arm['estimated']:6.2f} GB, measured {arm['run']:6.2f} ({arm['step']:.2f} after the step)"
        print(f"{name:60} {figures}: {arm['off']:+.0%}{beyond}")
    common.write(words, f"memory-{words.dtype}", {"within": WITHIN, "cases": found})


if __name__ == "__main__":
    main()
