"""preftune demo"""

from __future__ import annotations

import logging
from typing import Any

from preftune.cli.console import Watch
from preftune.config import resolve
from preftune.keys import DemoKeys
from preftune.runs import folder as files

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    keys = resolve(DemoKeys, words)
    out = files.choose_out(keys.out, "demo", overwrite=keys.overwrite)
    from preftune.demo.experiment import run as experiment
    from preftune.training.memory import keep_freed_memory

    keep_freed_memory()
    with Watch() as watch:
        result = experiment(keys, out, progress=watch)
    if not as_json:
        _show(result)
    log.info(f"report: {out / 'report.html'}")
    return {**result, "out": str(out)}


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    best = max(result["runs"], key=lambda one: one["win_rate"]["sentiment"]["win_rate"])
    samples = Table("opening", "base", "aligned", title=f"Held-out openings, beta {best['beta']:g}", show_lines=True)
    for s in best["samples"][:6]:
        samples.add_row(*(_one_line(s[side]) for side in ("prompt", "before", "after")))
    console.print(samples)
    table = Table(title=f"Aligned against base, one sample each on {result['prompts']} held-out openings")
    for column in ("beta", "wins by sentiment", "wins by lexicon", "KL (nats)", "reward", "distinct bigrams"):
        table.add_column(column, justify="right")
    base = result["base"]
    table.add_row("base", "", "", "0", f"{base['reward']:+.2f}", f"{base['distinct_2']:.2f}")
    for one in result["runs"]:
        wins = (_share(one["win_rate"][name]) for name in ("sentiment", "lexicon"))
        table.add_row(f"{one['beta']:g}", *wins, f"{one['kl']:.1f}", f"{one['reward']:+.2f}", f"{one['distinct_2']:.2f}")
    console.print(table)
    console.print("Ties count one half; 95 % intervals over prompts. The lexicon labelled nothing in training.", style="dim")


def _share(one: dict[str, Any]) -> str:
    low, high = one["win_rate_interval"]
    return f"{one['win_rate']:.1%} [{low:.1%}, {high:.1%}]"


def _one_line(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
