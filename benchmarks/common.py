"""What the benchmarks share: their arguments, arms in processes of their own, and results with machine and versions."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import rows

HERE = Path(__file__).parent
CAN = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}  # of a processor's flags, those that decide the rates
DTYPES = ("float32", "bfloat16")


def arguments(text: str | None, *, data: bool = True) -> argparse.ArgumentParser:
    """The arguments of every benchmark; `data`: it needs rows and a model."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON results")
    if data:
        parser.add_argument("--hh", type=Path, required=True, help="harmless-base-test.jsonl.gz of HH-RLHF")
        parser.add_argument("--dtype", default="float32", choices=DTYPES)
        parser.add_argument("--tokens", type=int, default=4096, help="preftune's tokens per micro-batch")
        parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder of the model and the rows")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON: other sizes of the model, for a quick look")
    return parser


def prepared(words: argparse.Namespace, profile: str = "hh", steps: int = rows.WARM + rows.STEPS) -> Path:
    """The folder of a profile's model and tokenizer, and of the rows of some steps."""
    folder: Path = words.work / f"{profile}-{steps}"
    rows.prepare(folder, profile, steps, words.hh, rows.SHAPE | words.shape)
    return folder


def run_arm(name: str, folder: Path, how: Mapping[str, Any], python: str = sys.executable) -> dict[str, Any]:
    """What arm.py prints for `module:function`, with the settings under `how`; `failed` says why where it printed nothing."""
    done = subprocess.run([python, str(HERE / "arm.py"), name, str(folder), json.dumps(how)], capture_output=True, text=True)
    said = done.stderr.strip().splitlines()
    if done.returncode:
        killed = done.returncode == -signal.SIGKILL
        why = "killed: out of memory" if killed else next(reversed(said), f"exit {done.returncode}")[:300]
        print(f"{name} {how} failed:", *said[-20:], why, sep="\n", file=sys.stderr, flush=True)
        return {"how": dict(how), "failed": why}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    figures = "  ".join(f"{key} {value:.3f}" for key, value in found.items() if isinstance(value, float))
    print(f"{name} {how}  {figures}", file=sys.stderr, flush=True)
    return {"how": dict(how), **found}


def listed(ratios: Iterable[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def environment(trl: str | None = None) -> dict[str, Any]:
    """Machine and versions; `trl` is the interpreter that TRL's version is asked of."""
    versions = {name: metadata.version(name) for name in ("preftune", "torch", "transformers")}
    if trl:
        asked = subprocess.run([trl, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True)
        versions["trl"] = asked.stdout.strip()
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        facts = {key.strip(): value for key, _, value in (line.strip().partition(":") for line in lines)}
    return {
        "date": date.today().isoformat(),
        "machine": {
            "processor": facts.get("model name", "").strip(),
            "flags": sorted(CAN.intersection(facts.get("flags", "").split())),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": {**versions, "python": platform.python_version()},
    }


def write(words: argparse.Namespace, name: str, result: Mapping[str, Any], trl: str | None = None) -> None:
    """NAME.json: the settings that are no paths, the result, machine and versions."""
    settings = {key: value for key, value in vars(words).items() if not isinstance(value, Path) and key != "trl"}
    words.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, **result, **environment(trl)}, indent=1)
    (words.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
