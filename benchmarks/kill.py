"""kill -9 at random moments, then resume: is what is left the run that nothing stopped, to the bit?

    python benchmarks/kill.py --kills 20

The packaged film-review model trains on pairs made here, with a checkpoint every second step. Some kills wait for a moment:
until a checkpoint is half written, or until the store of reference values is. Every run is a process of its own, `preftune
train`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

from preftune.demo.experiment import model_folder

MEASURED = {"pairs_per_s", "tokens_per_s", "memory_gb"}
STEPS = 12
WORDS = "the a film story actor scene good bad long short dull warm sharp loud quiet old new plot ends begins"


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    words = WORDS.split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    return [{"prompt": text(3, 8), "chosen": " " + text(5, 30), "rejected": " " + text(5, 30)} for _ in range(count)]


def command(work: Path, out: Path) -> list[str]:
    keys = [f"model={model_folder()}", f"data={work / 'pairs.jsonl'}", f"out={out}", f"reference.store={out}.sqlite"]
    keys += [
        f"steps={STEPS}",
        "batch_size=16",
        "learning_rate=1e-4",
        "train.save_every=2",
        "train.eval_every=3",
        "dtype=float32",
    ]
    return [sys.executable, "-m", "preftune", "train", *keys, "--quiet"]


def left(out: Path) -> str:
    """A digest of what a run leaves: weights, lines of metrics without what was measured of the machine, samples, figures."""
    digest = hashlib.sha256()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    digest.update(json.dumps([{k: v for k, v in line.items() if k not in MEASURED} for line in lines]).encode())
    for path in (*sorted((out / "model").glob("*.safetensors")), out / "samples.jsonl", out / "evaluation.json"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def in_checkpoint(out: Path) -> bool:
    return any((out / "checkpoints").glob("step-*.tmp/*")) if (out / "checkpoints").is_dir() else False


def in_store(out: Path) -> bool:
    own = out / "checkpoints" / "reference.sqlite-wal"
    return own.is_file() and own.stat().st_size > 0


def killed(words: list[str], out: Path, moment: float | Callable[[Path], bool], after: float) -> tuple[float, int] | None:
    """(seconds after which the process was killed, steps in metrics.jsonl); None: it had ended before that."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while process.poll() is None:
        passed = time.monotonic() - began
        if passed >= moment if isinstance(moment, float) else passed >= after and moment(out):
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    process.wait()
    if process.returncode != -signal.SIGKILL:
        return None
    path = out / "metrics.jsonl"
    return time.monotonic() - began, len(path.read_text().splitlines()) if path.is_file() else 0


def main() -> None:
    parser = common.arguments(__doc__, data=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("build/kill"), help="folder of the runs")
    words = parser.parse_args()
    shutil.rmtree(words.work, ignore_errors=True)
    words.work.mkdir(parents=True)
    (words.work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(400)))
    whole = words.work / "whole"
    began = time.monotonic()
    subprocess.run(command(words.work, whole), check=True)
    seconds, expected = time.monotonic() - began, left(whole)
    rng = random.Random(0)
    found: list[dict[str, Any]] = []
    for n in range(words.kills):
        kind = "store" if n % 10 == 1 else "checkpoint" if n % 10 in (2, 5, 8) else "any moment"
        out, done = words.work / f"run-{n}", None
        while done is None:  # a run may be faster than the first one, and end before its moment
            shutil.rmtree(out, ignore_errors=True)
            for stored in words.work.glob(f"{out.name}.sqlite*"):
                stored.unlink()
            moment: Any = {"store": in_store, "checkpoint": in_checkpoint}.get(kind, rng.uniform(0.2, 1.0) * seconds)
            late = 0.6 * seconds if kind == "checkpoint" else 0.0  # the store is written once, early
            done = killed(command(words.work, out), out, moment, rng.uniform(0.0, 1.0) * late)
        at, steps = done
        if (out / "evaluation.json").is_file():  # complete but for its page
            again = [sys.executable, "-m", "preftune", "report", str(out), "--quiet"]
        elif (out / "config.yaml").is_file():
            again = [sys.executable, "-m", "preftune", "train", f"resume={out}", "--quiet"]
        else:  # before the folder was there: nothing had been begun
            shutil.rmtree(out, ignore_errors=True)
            again = command(words.work, out)
        subprocess.run(again, check=True)
        same = left(out) == expected
        found.append({"moment": kind, "seconds": round(at, 2), "steps": steps, "same": same})
        print(
            f"{n + 1:3} {kind:12} killed after {at:6.2f} s, step {steps:3}: {'the same' if same else 'DIFFERENT'}", flush=True
        )
        shutil.rmtree(out)
    good = sum(f["same"] for f in found)
    print(f"{good} of {len(found)} the same to the bit; uninterrupted {seconds:.1f} s")
    common.write(words, "kill", {"steps": STEPS, "seconds": seconds, "same": good, "kills": found})


if __name__ == "__main__":
    main()
