"""The second run of a sweep, which finds every reference value in the store, against the first, which scores them.

    python benchmarks/store_sweep.py --hh harmless-base-test.jsonl.gz --dtype bfloat16

Both are `preftune.fit` with the same settings, on a store that is new for the first; every run is a process of its own. The
time is that of the reference (scored, or looked up), the check of the first batch and the optimizer steps, not of samples.
Bounds: with the reference forward as one part of a step's time, backward as two, and, under LoRA, as one: 4/3 and 3/2.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import rows

KINDS = {"full": {"bound": 4 / 3, "at_least": 1.2}, "lora": {"bound": 3 / 2, "at_least": 1.35}}


def sweep(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one run's reference and of its steps; `store` is the file, `kind` is full or lora."""
    from preftune import fit, read
    from preftune.models.load import load_model, load_tokenizer
    from preftune.runs import answers
    from preftune.scoring.store import Stored
    from preftune.training.memory import keep_freed_memory
    from preftune.training.precision import DTYPES

    keep_freed_memory()
    answers.NEW_TOKENS = 1  # answers before and after are not what is timed
    events: list[float] = []
    find = Stored.find

    def timed(self: Stored, *given: Any) -> Any:  # the reference begins with a look into the store
        events.append(time.perf_counter())
        found = find(self, *given)
        events.append(time.perf_counter())
        return found

    def progress(phase: str, *_: Any) -> None:
        if phase in ("reference", "check"):
            events.append(time.perf_counter())

    Stored.find = timed
    lora = how["kind"] == "lora"
    ref, dtype = str(folder / "model"), how["dtype"]
    run = fit(
        load_model(ref, **({"dtype": DTYPES[dtype]} if lora else {})),  # under an adapter weights stay in the compute precision
        load_tokenizer(ref),
        read(str(folder / "rows.jsonl")),
        eval_groups=[],
        reference_store=how["store"],
        progress=progress,
        dtype=dtype,
        batch_size=rows.BATCH,
        steps=how["steps"],
        learning_rate=rows.LEARNING_RATE,
        beta=rows.BETA,
        train={"tokens_per_microbatch": how["tokens"], "schedule": "constant", "warmup": 0.0},
        **({"adapter": "lora"} if lora else {}),
    )
    reference = events[-1] - events[0]
    steps = [rows.BATCH / line["pairs_per_s"] for line in run.metrics]
    losses = [line["loss"] for line in run.metrics]
    return {"total": reference + sum(steps), "reference": reference, "steps": steps, "losses": losses}


def compare(folder: Path, how: dict[str, Any], repeats: int) -> dict[str, Any]:
    """First and second run in turn, each first one with a store of its own."""
    runs: dict[str, list[dict[str, Any]]] = {"first": [], "second": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as place:
            for arms in runs.values():
                arm = common.run_arm("store_sweep:sweep", folder, {**how, "store": f"{place}/reference.sqlite"})
                arms.append({**arm, "how": how})
    if failed := [arm["failed"] for arms in runs.values() for arm in arms if "failed" in arm]:
        return {**KINDS[how["kind"]], **runs, "failed": failed[0]}
    totals = [[arm["total"] for arm in arms] for arms in runs.values()]
    first, second = map(statistics.median, totals)
    ratios = [a / b for a, b in zip(*totals, strict=True)]
    differ = max(abs(a - b) for a, b in zip(*(arms[0]["losses"] for arms in runs.values()), strict=True))
    return {"ratio": first / second, "ratios": ratios, **KINDS[how["kind"]], "largest_loss_difference": differ, **runs}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    words = parser.parse_args()
    folder = common.prepared(words, steps=words.steps)
    result: dict[str, Any] = {}
    for kind in words.kinds:
        how = {"dtype": words.dtype, "tokens": words.tokens, "steps": words.steps, "kind": kind}
        result[kind] = found = compare(folder, how, words.repeats)
        if "failed" in found:
            print(f"{kind}, {words.dtype}: {found['failed']}")
            continue
        print(
            f"{kind}, {words.dtype}: {found['ratio']:.2f}x (by pair {common.listed(found['ratios'])}) "
            f"of at most {found['bound']:.2f}x (to reach: {found['at_least']}x); "
            f"losses differ by at most {found['largest_loss_difference']:.1e}"
        )
    common.write(words, f"store_sweep-{words.dtype}", result)


if __name__ == "__main__":
    main()
