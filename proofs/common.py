"""What the proofs share: where their figures go, and the machine that they were taken on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "proofs"
INKS = ("#2f6db3", "#c8553d", "#4f8a5b", "#8a6bb0", "#b8860b", "#3c4047", "#c76b98", "#7a7f87")


def workers() -> ProcessPoolExecutor:
    """A process for each core, with one thread: small models gain nothing from more."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("preftune", "torch", "transformers"))
    return f"{date.today().isoformat()}, {os.cpu_count()} cores of {model}, {versions}, Python {platform.python_version()}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write(name: str, title: str, text: str, figures: Mapping[str, Any]) -> None:
    """docs/proofs/NAME.md with command, machine and text, and NAME.json with the figures."""
    DOCS.mkdir(parents=True, exist_ok=True)
    head = f"# {title}\n\n`python proofs/{name}.py`. {machine()}.\n\n"
    (DOCS / f"{name}.md").write_text(head + text.strip() + "\n", encoding="utf-8")
    (DOCS / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(text)


def picture(name: str, draw: Callable[[Any], None], *, size: tuple[float, float] = (9, 3.6)) -> None:
    """docs/proofs/NAME.png, drawn on a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=size, dpi=110, layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e4e6", linewidth=0.8)
        axes.set_axisbelow(True)
    DOCS.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(DOCS / f"{name}.png"))
