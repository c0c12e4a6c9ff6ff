"""`preftune check` on generated pairs: rows per second and peak memory, for several numbers of rows.

    python benchmarks/check.py --rows 10000 100000 1000000
    python benchmarks/check.py --rows 10000 100000 --model path/to/model

The pairs are made of English words in random order (seeded), about 1,000 bytes a row of JSONL, with a few faults, duplicates
and contradictions strewn in. Each number of rows is read by a process of its own, whose peak memory is the figure; the time is
that of the pass, with the analysis at its end and without the start of Python. With a model every row is tokenized as well.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

SEED = 0


def known_words() -> list[str]:
    """English words, those that are a token of the packaged model: tokenizers know most words of the texts that they read."""
    from preftune.demo.experiment import model_folder
    from preftune.models.load import load_tokenizer

    tokenizer = load_tokenizer(model_folder())
    texts = (tokenizer.decode([n]) for n in sorted(tokenizer.get_vocab().values()))
    return sorted({text.strip() for text in texts if text.startswith(" ") and text.strip().isalpha() and len(text) > 2})


def write(path: Path, rows: int) -> None:
    """Pairs of about a kilobyte; one row in a thousand is faulty, one a duplicate, one contradicts the row before it."""
    draw, words = random.Random(SEED), known_words()
    with path.open("w", encoding="utf-8") as lines:
        before: dict[str, Any] = {}
        for n in range(rows):
            prompt, chosen, rejected = (
                " ".join(draw.choices(words, k=k)) for k in (50, draw.randint(30, 70), draw.randint(30, 70))
            )
            row: dict[str, Any] = {
                "prompt": prompt,
                "chosen": " " + chosen,
                "rejected": " " + rejected,
                "category": words[n % 7],
            }
            if before and n % 1000 == 999:
                row = before
            elif before and n % 1000 == 499:
                row = {**before, "chosen": before["rejected"], "rejected": before["chosen"]}
            elif n % 1000 == 249:
                row["chosen"] = ""
            lines.write(json.dumps(row) + "\n")
            before = row


def measured(path: Path, model: str | None) -> dict[str, Any]:
    """One pass, in this process."""
    from preftune.checks.check import check
    from preftune.checks.tokens import Tokens

    tokens = None
    if model:
        from preftune.models.load import load_tokenizer

        tokens = Tokens(load_tokenizer(model), limit=None, too_long="drop", template=None)
    began, busy = time.perf_counter(), time.process_time()
    report = check(str(path), tokens=tokens).report
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    size = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"rows": report["rows"], "dropped": report["dropped"], "repeats": report["repeats"]}
    if tokens:
        found["tokens"] = report["tokens"]["one_by_one"]
    return {
        **found,
        "bytes": size,
        "seconds": seconds,
        "cpu_seconds": busy,
        "rows_per_s": report["rows"] / seconds,
        "peak_gb": peak / 1e9,
    }


def main() -> None:
    parser = common.arguments(__doc__, data=False)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--model", help="folder or hub name: tokenize as well")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder of the generated rows")
    parser.add_argument("--one", type=Path, help="read this file here and print the figures as JSON")
    words = parser.parse_args()
    if words.one:
        print(json.dumps(measured(words.one, words.model)))
        return
    words.work.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for rows in words.rows:
        path = words.work / f"pairs-{rows}.jsonl"
        if not path.exists():
            write(path, rows)
        ask = [sys.executable, __file__, "--one", str(path), *(["--model", words.model] if words.model else [])]
        runs.append(json.loads(subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout))
        found = runs[-1]
        print(
            f"{rows:>9,} rows, {found['bytes'] / 1e9:.3f} GB: {found['seconds']:.1f} s, "
            f"{found['cpu_seconds']:.1f} s of one core, {found['rows_per_s']:,.0f} rows/s, peak {found['peak_gb']:.2f} GB",
            flush=True,
        )
    common.write(words, "check-tokens" if words.model else "check", {"runs": runs})


if __name__ == "__main__":
    main()
