"""A dry run: the plan, its memory, and rows as they are trained on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import PAIRS, write_model, write_rows

from preftune.config import build
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.models.options import AdapterOptions
from preftune.models.size import structure
from preftune.runs import preview
from preftune.runs.prepare import read_data, render_data


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("m"), positions=128)
    write_rows(Path("pairs.jsonl"), PAIRS[:10])


def shown(**words: Any) -> dict[str, Any]:
    keys = build(
        TrainKeys, {"model": "m", "data": "pairs.jsonl", "method": "dpo", "dtype": "float32", "learning_rate": 1e-6, **words}
    )
    data = read_data(keys.data.sources, keys.data, keys.eval_data, keys.method.name)
    tokenizer = tiny.tokenizer()
    return preview.show(keys, render_data(data, tokenizer, max_length=128, too_long="drop", template=None), tokenizer)


def test_the_plan_is_said_and_returned(caplog: pytest.LogCaptureFixture) -> None:
    write_rows(Path("held.jsonl"), PAIRS[10:14])
    with caplog.at_level(logging.INFO, "preftune"):
        plan = shown(eval_data="held.jsonl", batch_size=4, epochs=2, max_length=128)
    tokenizer = tiny.tokenizer()
    lengths = [len(tokenizer(p["prompt"] + p[side]).input_ids) + 1 for p in PAIRS[:10] for side in ("chosen", "rejected")]
    estimates = {"fixed_gb", "memory_gb", "free_gb", "seconds", "tokens_per_microbatch"}
    assert {k: v for k, v in plan.items() if k not in {"rows", *estimates}} == {
        "method": "dpo", "examples": 10, "groups": 10, "held_out": 4, "steps": 6, "batch_size": 4,
        "tokens_per_epoch": sum(lengths), "longest": max(lengths), "max_length": 128,
    }  # fmt: skip
    said = "\n".join(r.message for r in caplog.records)
    assert f"dry run: dpo on 10 examples in 10 groups, 4 groups held out; 6 steps of 4; {sum(lengths):,} tokens" in said
    assert "memory: about" in said and "time: about" in said and all(plan[name] > 0 for name in estimates)
    for row in plan["rows"]:
        assert row in said


def test_three_rows_are_shown_with_both_answers() -> None:
    rows = shown(eval_data="pairs.jsonl")["rows"]
    assert len(rows) == 3
    for n, row in enumerate(rows, start=1):
        place, chosen, rejected = row.splitlines()
        assert place == f"pairs.jsonl:{n}"
        for line, side in ((chosen, "chosen"), (rejected, "rejected")):
            assert line.startswith(f"  {side}: <s>·") and line.endswith("</s>⟧")
            scored = line.partition("⟦")[2]
            assert scored.replace("·", "").replace("Ġ", " ") == PAIRS[n - 1][side] + "</s>⟧"
    (row, *_) = shown(method="sft", eval_data="pairs.jsonl")["rows"]
    assert [line.partition(":")[0] for line in row.splitlines()] == ["pairs.jsonl", "  response"]


def test_only_what_is_trained_on_counts() -> None:
    whole, sft = shown(eval_data="pairs.jsonl"), shown(eval_data="pairs.jsonl", method="sft")
    assert 0 < sft["tokens_per_epoch"] < whole["tokens_per_epoch"]


def test_without_sharing_every_answer_has_its_prompt_in_the_estimate_too() -> None:
    shared, alone = (shown(eval_data="pairs.jsonl", train={"sharing": how}) for how in ("auto", "off"))
    assert alone["memory_gb"] > shared["memory_gb"] and alone["fixed_gb"] == shared["fixed_gb"]


PARAMETERS = 8192  # of tiny's llama, whose embedding is tied


@pytest.mark.parametrize(
    ("words", "per_trained", "per_frozen", "trained"),
    [
        ({}, 16, 4, PARAMETERS),
        ({"dtype": "bfloat16"}, 18, 2, PARAMETERS),
        ({"train": {"eval_every": 1}}, 20, 4, PARAMETERS),
        ({"train": {"eval_every": 1, "keep_best": False}}, 16, 4, PARAMETERS),
        ({"adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj"]}}, 16, 4, 2 * 2 * (16 + 16)),
        ({"adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj"]}, "dtype": "bfloat16"}, 18, 2, 2 * 2 * (16 + 16)),
    ],
)
def test_memory_by_hand(words: dict[str, Any], per_trained: int, per_frozen: int, trained: int) -> None:
    """Per trained parameter: float32 weight and gradient, two moments; in bfloat16 a copy."""
    frozen = PARAMETERS if "adapter" in words else 0
    plan = shown(eval_data="pairs.jsonl", **words)
    assert plan["fixed_gb"] == pytest.approx((trained * per_trained + frozen * per_frozen) / 1e9)


def test_memory_is_that_of_the_tensors_of_a_run(model: Any) -> None:
    """The same sum over what the trainer holds."""
    import torch

    from preftune.training.precision import Weights

    model.requires_grad_(True)
    weights = Weights(model, torch.bfloat16)
    optimizer = torch.optim.AdamW(weights.masters, lr=1e-3)
    with weights.collecting():
        weights.compute(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    gradients = [m.grad for m in weights.masters if m.grad is not None]
    held = [*weights.masters, *weights.compute.parameters(), *moments, *gradients]
    size = sum(t.nbytes for t in held)
    assert shown(eval_data="pairs.jsonl", dtype="bfloat16")["fixed_gb"] == pytest.approx(size / 1e9)


def counted(name: str, adapter: AdapterOptions) -> tuple[int, int]:
    sizes = [(p.numel(), p.requires_grad) for p in structure(name, adapter).parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def test_parameters_of_models_and_of_an_adapter_that_is_trained_on(tmp_path: Path) -> None:
    from preftune.models.adapters import add_adapter

    none, lora = AdapterOptions(), AdapterOptions(type="lora", r=2)
    for name in ("llama", "untied", "gpt2"):
        made = tiny.model(name)
        made.save_pretrained(name)
        count = sum(p.numel() for p in made.parameters())
        assert counted(name, none) == (count, count)
        adapted = add_adapter(tiny.model(name), lora, seed=0)
        own = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert counted(name, lora) == (count + own, own)
    again = add_adapter(__import__("transformers").AutoModelForCausalLM.from_pretrained("gpt2"), lora, seed=0)
    again.save_pretrained("adapter")
    assert counted("adapter", none) == (count + own, own)


def test_a_model_that_cannot_be_counted_still_has_a_plan(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **keys: Any) -> None:
        raise NotImplementedError("no meta device")

    monkeypatch.setattr("preftune.models.size.structure", broken)
    with caplog.at_level(logging.INFO, "preftune"):
        plan = shown(eval_data="pairs.jsonl")
    assert plan["memory_gb"] is None and len(plan["rows"]) == 3
    assert "memory: not known" in caplog.text
    monkeypatch.undo()


def test_what_cannot_be_counted_is_left_out_and_the_rest_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(model: Any, dtype: Any) -> int:
        raise RuntimeError("no such product on this device")

    monkeypatch.setattr("preftune.training.estimate.kept_bytes", fails)
    with caplog.at_level(logging.INFO, "preftune"):
        plan = shown(eval_data="pairs.jsonl")
    assert plan["memory_gb"] is plan["tokens_per_microbatch"] is None and plan["fixed_gb"] > 0 and plan["seconds"] > 0
    assert "an amount per token that is not known" in caplog.text and "no such product" in caplog.text


def test_an_adapter_without_layers_is_refused_here_already() -> None:
    with pytest.raises(Refusal, match="no layer is named nosuch"):
        shown(eval_data="pairs.jsonl", adapter={"type": "lora", "target_modules": ["nosuch"]})
