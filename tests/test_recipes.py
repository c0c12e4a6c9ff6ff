"""Every recipe is read, and takes two steps on a small model with data of its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import call

from preftune import methods
from preftune.config import resolve
from preftune.keys import TrainKeys

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"prompt": f"Question {n}?", "chosen": f" Yes {n}.", "rejected": f" No, {n}."} for n in range(40)],
    "answers": [{"prompt": f"Question {n}?", "completion": f" Yes {n}."} for n in range(40)],
    "ratings": [{"prompt": f"Question {n}?", "completion": f" Yes {n}.", "label": n % 2 == 0} for n in range(40)],
}


def test_there_are_twelve() -> None:
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(path), "model=m", "data=rows.jsonl", "eval_data=[]", "steps=2", "batch_size=4", "max_length=64", "out=run"]
    keys = resolve(TrainKeys, [*words, "dtype=float32"])
    tiny.model().save_pretrained("m")
    tiny.tokenizer().save_pretrained("m")
    rows = ROWS[methods.needs(keys.method).kind]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = call(capsys, "train", *words, "dtype=float32", "--quiet")
    assert answer.code == 0, answer.err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_head_says_what_it_is_for_and_how_it_is_run(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[:4] if line.startswith("# ")]
    assert len(head) >= 2 and any(f"preftune train examples/recipes/{path.name}" in line for line in head)
