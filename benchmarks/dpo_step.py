"""A whole DPO step (reference, forward, backward, optimizer) of preftune beside TRL's, on the same rows in the same order.

    python benchmarks/dpo_step.py --trl TRL_PYTHON --hh harmless-base-test.jsonl.gz --out benchmarks/results

TRL_PYTHON is the interpreter of an environment with `trl==1.16.0` and the same torch. Every arm is a process of its own, one at
a time, on all cores. TRL's best is searched first, over batch x accumulation x checkpointing; then the best and preftune
alternate. Printed: medians of seconds per step over the steps after the first, the losses of every step beside each other, peak
memory. `--profile long` is preftune sharing the prompt beside preftune with a copy of it per answer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import rows

SIZES = (16, 8, 4, 2, 1)  # pairs of TRL's micro-batch
HERE = Path(__file__).parent


def arm(python: str, name: str, folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([python, str(HERE / "arm.py"), name, str(folder), json.dumps(how)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {"how": how, "failed": done.stderr.strip().splitlines()[-1][:300]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["median"] = statistics.median(found["seconds"][rows.WARM :])
    print(f"{name:9} {how}  {found['median']:.2f} s/step  peak {found['peak_gb']:.1f} GB", file=sys.stderr, flush=True)
    return {"how": how, **found}


def prepare(folder: Path, profile: str, hh: Path) -> None:
    """The model, the tokenizer and the rows of a profile, unless they are there."""
    if (folder / "settings.json").exists():
        return
    text = [row["prompt"] + row["chosen"] + row["rejected"] for row in rows.hh(hh, 10**6)]
    words = sorted({word for line in text[:500] for word in line.split() if word.isalpha()})
    steps = rows.STEPS + rows.WARM
    if profile == "hh":
        made, batch = rows.hh(hh, steps * rows.BATCH), rows.BATCH
    else:
        groups = {"four": 8, "long": 2}.get(profile, rows.BATCH)  # four: 8 prompts of six pairs a step
        batch = groups * 6 if profile == "four" else groups
        made = rows.made_up(profile, steps * groups, words)
    rows.make(folder / "model", text)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps({"batch": batch, "profile": profile}))


def environment(trl: str) -> dict[str, Any]:
    asked = subprocess.run([trl, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True)
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    versions = {name: metadata.version(name) for name in ("preftune", "torch", "transformers")}
    return {
        "date": date.today().isoformat(),
        "machine": {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {**versions, "trl": asked.stdout.strip(), "python": platform.python_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A DPO step of preftune beside TRL's.")
    parser.add_argument("--trl", default=sys.executable, help="python of an environment with TRL")
    parser.add_argument("--hh", type=Path, required=True, help="harmless-base-test.jsonl.gz of HH-RLHF")
    parser.add_argument("--profile", default="hh", choices=("hh", "four", "summaries", "chat", "long"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=4096, help="preftune's tokens per micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="TRL's micro-batches that are tried")
    parser.add_argument("--no-checkpointing", action="store_true", help="leave TRL's gradient checkpointing out of the search")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    words = parser.parse_args()
    folder = words.work / words.profile
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, words.profile, words.hh)
    batch = json.loads((folder / "settings.json").read_text())["batch"]
    mode = {"dtype": words.dtype}
    if words.profile == "long":
        other, rival, grid = sys.executable, "preftune", []
        best: dict[str, Any] = {"how": {**mode, "tokens": words.tokens, "share": False}}
    else:
        other, rival = words.trl, "trl"
        tried = [False] if words.no_checkpointing else [False, True]
        hows = [{**mode, "batch": b, "accumulation": batch // b, "checkpointing": c} for c in tried for b in words.sizes]
        grid = [arm(other, rival, folder, how) for how in hows if batch % how["batch"] == 0]
        best = min((found for found in grid if "median" in found), key=lambda found: found["median"])
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for _ in range(words.repeats):
        ours.append(arm(sys.executable, "preftune", folder, {"dtype": words.dtype, "tokens": words.tokens}))
        theirs.append(arm(other, rival, folder, best["how"]))
    mine, their = (statistics.median(s for run in runs for s in run["seconds"][rows.WARM :]) for runs in (ours, theirs))
    print("step  preftune  TRL")
    for n, (a, b) in enumerate(zip(ours[0]["losses"], theirs[0]["losses"], strict=True), start=1):
        print(f"{n:4}  {a:.6f}  {b:.6f}")
    memory = max(run["peak_gb"] for run in ours) / max(run["peak_gb"] for run in theirs)
    speed = f"{batch / mine:.2f} pairs/s against {batch / their:.2f}: {their / mine:.2f}x"
    print(f"{words.profile}, {words.dtype}: {speed}; memory {memory:.2f}x")
    words.out.mkdir(parents=True, exist_ok=True)
    result = {
        "settings": {name: getattr(words, name) for name in ("tokens", "repeats", "sizes", "no_checkpointing")},
        "profile": words.profile,
        "dtype": words.dtype,
        "batch": batch,
        "pairs_per_s": {"preftune": batch / mine, "trl": batch / their},
        "ratio": their / mine,
        "peak_gb": {"preftune": max(r["peak_gb"] for r in ours), "trl": max(r["peak_gb"] for r in theirs)},
        "preftune": ours,
        "trl": theirs,
        "grid": grid,
        **environment(words.trl),
    }
    (words.out / f"dpo_step-{words.profile}-{words.dtype}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
