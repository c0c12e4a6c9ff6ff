"""The tables of docs/scoring.md, made of the results.

    python benchmarks/tables.py --dtype bfloat16

Ratios are of median steps; those in brackets of each run, or each pair of runs, by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import common

RESULTS = common.HERE / "results"
PROFILES = {
    "hh": "HH dialogues, 8 pairs a step",
    "hh-ones": "HH dialogues, beside TRL's micro-batches of 1",
    "four": "four answers to a prompt, all six pairs, 48 pairs a step",
    "summaries": "long prompts with short answers, 8 pairs a step",
    "chat": "short prompts with long answers, 8 pairs a step",
    "long": "a prompt of 4,100 tokens with two answers of 64",
}
KINDS = {"full": "all weights", "lora": "LoRA"}
HEADS = {
    "plain": "one matrix product",
    "capped": "soft-capped, by the model's own code",
    "scaled": "scaled, by the model's own code",
    "saved": "saved beside an adapter",
}
COUNTS = (256, 1024, 4096, 8192)

Cells = tuple[str, ...]


def steps(dtype: str) -> Iterator[Cells]:
    """Of each profile: preftune, what it is compared with, the ratio of speed, that of memory. Its other settings beside TRL's
    best alone."""
    for profile, name in PROFILES.items():
        found = read(f"dpo_step-{profile}-{dtype}")
        for pair, own in found.get("against", {}).items():
            ours, other = pair.split(" against ")
            if ours != "preftune" and other != "TRL's best":
                continue
            mine, their = (f"{pace(own['pairs_per_s'][s])}, {own['peak_gb'][s]:.1f} GB" for s in ("preftune", "other"))
            against = f"{rival(other, own['how'], found['grid'])}: {their}"
            yield (
                name + setting(ours, found["settings"]["tokens"]),
                mine,
                against,
                ratio(own["ratio"], own["ratios"]),
                f"{own['memory']:.2f}x",
            )


def stores(dtype: str) -> Iterator[Cells]:
    """Of each kind of run: the second one, which finds its reference in the store, and the first."""
    found = read(f"store_sweep-{dtype}")
    for kind, name in KINDS.items():
        if kind in found and "failed" not in found[kind]:
            own = found[kind]
            first, second = (statistics.median([arm["total"] for arm in own[run]]) for run in ("first", "second"))
            spent = f"s for {found['settings']['steps']} steps"
            against = f"the run before it: {first:.1f} {spent}"
            yield f"a full reference store, {name}", f"{second:.1f} {spent}", against, ratio(own["ratio"], own["ratios"]), ""


def rates(dtype: str) -> Iterator[Cells]:
    """What a step has to compute in its time, beside the rate of the products that it is made of."""
    found = read(f"rates-{dtype}")
    if found:
        rate, share = found["rate_gflops_per_s"], found["share"]
        against = f"its matrix products alone: {rate:.0f} GFLOP/s"
        yield "HH dialogues, what a step has to compute", f"{share * rate:.0f} GFLOP/s", against, f"{share:.0%}", ""


def heads(dtype: str) -> Iterator[Cells]:
    """Of each kind of head, frozen and trained: GB by positions."""
    for kind, name in HEADS.items():
        cases = read(f"head_memory-{kind}-{dtype}").get("cases", [])
        for weight, trained in (("frozen", False), ("trained", True)):
            own = [case for case in cases if case["how"]["trained"] == trained]
            grown = {case["how"]["count"]: case.get("failed") or f"{case['growth_gb']:.2f}" for case in own}
            if grown:
                yield f"{name}, {weight}", *(grown.get(count, "") for count in COUNTS)


def pace(pairs_per_s: float) -> str:
    return f"{pairs_per_s:.2f} pairs/s" if pairs_per_s >= 0.1 else f"{1 / pairs_per_s:.1f} s a pair"


def setting(ours: str, usual: int) -> str:
    """A side of preftune's, by the keys of a run that make it: "preftune", "512 tokens at once" or "512 tokens, recomputed"."""
    tokens = "" if ours == "preftune" or ours.split()[0] == str(usual) else f", `train.tokens_per_microbatch={ours.split()[0]}`"
    return tokens + (", `train.checkpointing=true`" if "recomputed" in ours else "")


def rival(other: str, how: dict[str, Any], grid: list[Any]) -> str:
    if other == "unshared":
        return "preftune with a copy of the prompt for each answer"
    if other == "TRL padded":
        return f"TRL's whole padded batch of {how['batch']}"
    searched = f"TRL's best in a search of {len(grid)} settings" if len(grid) > 1 else "TRL"
    return f"{searched}, micro-batches of {how['batch']}" + (" with checkpointing" if how["checkpointing"] else "")


def ratio(middle: float, each: list[float]) -> str:
    return f"{middle:.2f}x" + (f" ({common.listed(each)})" if len(each) > 1 else "")


def read(name: str) -> dict[str, Any]:
    """A result, or nothing where there is none."""
    place = RESULTS / f"{name}.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}


def table(*parts: Iterable[Cells]) -> str:
    head, *rows = (cells for part in parts for cells in part)
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    dtype = parser.parse_args().dtype
    print(table([("", "preftune", "against", "speed", "memory")], steps(dtype), stores(dtype), rates(dtype)))
    print()
    print(table([("GB, by positions", *(f"{count:,}" for count in COUNTS))], heads(dtype)))


if __name__ == "__main__":
    main()
