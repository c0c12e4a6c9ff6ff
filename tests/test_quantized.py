"""QLoRA: an adapter over a base in 4 bits, through bitsandbytes, which runs on a CPU too."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import tolerances
import torch
from command import PAIRS, call, write_model, write_rows
from test_adapter_scoring import check_exact
from torch import Tensor

import preftune
from preftune.data.render import Rendered
from preftune.errors import Refusal
from preftune.models.adapters import add_adapter, merged
from preftune.models.inspect import QUANTIZED, check_adapter_of, facts
from preftune.models.load import load_model, save_model
from preftune.models.options import AdapterOptions
from preftune.models.quantized import differentiable
from preftune.models.size import structure
from preftune.models.weights import count, frozen_bytes, is_packed
from preftune.scoring.scorer import Scorer
from preftune.scoring.store import Store, digest_of
from preftune.training.estimate import Estimate
from preftune.training.moving import Moving
from preftune.training.precision import Weights

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra qlora)")

pytestmark = [
    pytest.mark.usefixtures("short_answers", "no_report"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]

QLORA = AdapterOptions(type="qlora", r=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("quantized") / "m", positions=96)


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return write_rows(base.parent / "pairs.jsonl", PAIRS[:12])


def packed(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if is_packed(p)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 70, 71, 72, 9, 30]])).logits


def adapted(model: Any) -> Any:
    """With an adapter that is off its start."""
    made = add_adapter(model, QLORA, seed=0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return made


def fit(model: Any, tokenizer: Any, **keys: Any) -> Any:
    given = {"dtype": "float32", "eval_groups": tiny.pairs(2), "learning_rate": 1e-2, "steps": 3, "batch_size": 6}
    return preftune.fit(model, tokenizer, tiny.pairs(6), **(given | keys))


def test_linear_layers_are_packed_and_nothing_else(base: Path) -> None:
    """To the same weights in every compute precision: they come from what is stored."""
    half = load_model(str(base), dtype=torch.bfloat16, quantize=True)
    model = load_model(str(base), quantize=True)
    assert {name.rsplit(".", 2)[1] for name in packed(model)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for name, weight in packed(model).items():
        other = packed(half)[name]
        assert torch.equal(weight.data, other.data) and torch.equal(weight.quant_state.absmax, other.quant_state.absmax)
    assert {p.dtype for p in model.parameters() if not is_packed(p)} == {torch.float32} == {logits(model).dtype}
    assert {p.dtype for p in half.parameters() if not is_packed(p)} == {torch.bfloat16} == {logits(half).dtype}
    assert 0.01 < float((logits(model) - logits(load_model(str(base)))).abs().max()) < 3.0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_along_a_trie_it_is_what_peft_computes_one_by_one(name: str, tmp_path: Path, tokenizer: Any) -> None:
    save_model(tiny.model(name), tokenizer, tmp_path / "m")
    made = adapted(load_model(str(tmp_path / "m"), quantize=True))
    sequences = [Rendered(0, n, (9, 30, *range(40, 43 + n)), 2) for n in range(3)]
    assert Scorer(made).shares
    check_exact(made, sequences)


def test_it_starts_at_its_base_and_only_the_adapter_trains(base: Path, tokenizer: Any) -> None:
    model = load_model(str(base), quantize=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = fit(model, tokenizer, adapter={"type": "qlora", "r": 4})
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=tolerances.FIRST_LOSS)
    assert run.metrics[-1]["loss"] < math.log(2) - 1e-3 and run.after["kl"] > 0
    after = {k.removeprefix("base_model.model.").replace("base_layer.", ""): p for k, p in run.model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {k for k, p in after.items() if p.requires_grad} == {k for k in after if "lora_" in k} == set(after) - set(before)


def test_every_verb_takes_it(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, pairs, keys = tmp_path / "run", f"data={data}", ["adapter=qlora", "adapter.r=4", "dtype=float32", "batch_size=4"]
    words = ["train", f"model={base}", pairs, *keys, "steps=2", "learning_rate=1e-2", "--quiet"]
    assert call(capsys, *words, f"out={run}").code == 0
    assert {"adapter_config.json", "adapter_model.safetensors", QUANTIZED} <= {p.name for p in (run / "model").iterdir()}
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"] == pytest.approx(math.log(2), abs=1e-6)
    verb = ("evaluate", f"model={run}", f"reference={base}", pairs, "kl_samples=2", "max_new_tokens=3", "--json")
    assert call(capsys, *verb).json["kl"] > 0
    for verb in ("score", "generate"):
        told = [pairs] if verb == "score" else [f"prompts={data}", "max_new_tokens=2"]
        assert call(capsys, verb, f"model={run}", *told, f"out={tmp_path / verb}", "--quiet").code == 0
    said = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda *_: next(said, "/quit"))
    assert call(capsys, "chat", f"model={run}", "max_new_tokens=2").code == 0
    for which in ([f"model={base}", *keys], [f"model={run}", "dtype=float32"]):
        assert call(capsys, "doctor", *which, pairs, "--json").json["healthy"]
    plan = call(capsys, *words, f"out={tmp_path / 'none'}", "dry_run=true", "--json").json
    assert plan["fixed_gb"] > 0

    loaded = load_model(str(run))
    assert packed(loaded) and (logits(loaded) - logits(load_model(str(base), quantize=True))).abs().max() > 1e-3
    again = call(capsys, "train", f"model={run}", pairs, "steps=1", "dtype=float32", f"out={tmp_path / 'on'}", "--quiet")
    assert again.code == 0 and packed(load_model(str(tmp_path / "on")))
    answer = call(capsys, "merge", str(run), f"out={tmp_path / 'merged'}")
    assert answer.code == 0 and "4 bits" in answer.err
    plain = load_model(str(tmp_path / "merged"))
    assert not packed(plain) and "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    torch.testing.assert_close(logits(plain), logits(loaded), atol=tolerances.MERGED, rtol=0)
    assert call(capsys, *words, f"out={tmp_path / 'folded'}", "adapter.merge=true").code == 0
    torch.testing.assert_close(logits(load_model(str(tmp_path / "folded"))), logits(loaded), atol=tolerances.MERGED, rtol=0)


def test_merging_what_gpt2_keeps_the_other_way_round(tmp_path: Path, tokenizer: Any) -> None:
    save_model(tiny.model("gpt2"), tokenizer, tmp_path / "m")
    made = adapted(load_model(str(tmp_path / "m"), quantize=True))
    expected = logits(made)
    save_model(merged(made), tokenizer, tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "merged"))), expected, atol=tolerances.MERGED, rtol=0)


def test_the_store_knows_packed_weights_from_plain_ones(base: Path, data: Path, tmp_path: Path, tokenizer: Any) -> None:
    """And from others that are packed to the same codes with other scales."""
    store = Store(tmp_path / "reference.sqlite")
    assert store.digest(str(base)) not in (None, store.digest(str(base), packed=True))
    model = load_model(str(base), quantize=True)
    other, again = copy.deepcopy(model), copy.deepcopy(model)
    for weight in packed(other).values():
        weight.quant_state.offset = weight.quant_state.offset * 2
    assert digest_of(model) == digest_of(again) != digest_of(other)


def test_a_second_run_takes_the_reference_values_of_the_first(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(adapter: str, number: int) -> str:
        keys = [f"adapter={adapter}", "adapter.r=4", "dtype=float32", "batch_size=4", "steps=1"]
        words = ["train", f"model={base}", f"data={data}", *keys, f"reference.store={tmp_path / 'r.sqlite'}"]
        said = call(capsys, *words, f"out={tmp_path / str(number)}")
        assert said.code == 0
        return next(line for line in said.err.splitlines() if line.startswith("reference: ")).split()[1]

    assert [taken(a, n) for n, a in enumerate(("lora", "qlora", "qlora"))][:2] == ["0", "0"]
    assert int(taken("qlora", 3)) > 0


def test_the_base_is_not_copied_to_compute_in_another_precision(base: Path) -> None:
    made = add_adapter(load_model(str(base), quantize=True), QLORA, seed=0)
    weights = Weights(made, torch.bfloat16)
    own, used = packed(made), packed(weights.compute)
    assert own and all(used[name] is weight for name, weight in own.items())


def test_a_reference_that_follows_shares_the_base(base: Path, tokenizer: Any) -> None:
    made = add_adapter(load_model(str(base), quantize=True), QLORA, seed=0)
    moving = Moving(Weights(made, torch.float32), every=1, alpha=1.0)
    own, copied = packed(made), packed(moving.model)
    assert own and all(copied[name] is weight for name, weight in own.items())
    states = [m.quant_state for m in moving.model.modules() if getattr(m, "quant_state", None) is not None]
    assert states and all(any(state is weight.quant_state for weight in own.values()) for state in states)
    run = fit(
        load_model(str(base), quantize=True), tokenizer, adapter="qlora", reference_sync_steps=1, reference_sync_alpha=1.0
    )
    assert [line["loss"] for line in run.metrics] == pytest.approx([math.log(2)] * 3, abs=tolerances.FIRST_LOSS)


def test_memory_is_counted_as_it_is(tmp_path: Path, tokenizer: Any) -> None:
    """By hand of a structure without weights, and of the tensors that are there."""
    save_model(tiny.model(hidden_size=256, intermediate_size=512), tokenizer, tmp_path / "m")
    model = add_adapter(load_model(str(tmp_path / "m"), dtype=torch.bfloat16, quantize=True), QLORA, seed=0)
    linear = 2 * (2 * 256 * 16 + 2 * 256 * 8 + 3 * 256 * 512)
    assert sum(count(p) for p in packed(model).values()) == linear
    bytes_ = sum(frozen_bytes(p, torch.bfloat16) for p in packed(model).values())
    assert 0.5 * linear < bytes_ < 0.6 * linear
    plain = sum(p.numel() for p in model.parameters() if not is_packed(p) and not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = Estimate.of(model, torch.bfloat16, best=False, reference=True)
    assert (found.parameters, found.trained) == (linear + plain + trained, trained)
    assert found.fixed_bytes == bytes_ + 2 * plain + trained * 18
    meta = Estimate.of(structure(str(tmp_path / "m"), QLORA), torch.bfloat16, best=False, reference=True)
    assert (meta.parameters, meta.trained) == (found.parameters, found.trained)
    assert meta.fixed_bytes == pytest.approx(found.fixed_bytes, rel=0.05)
    assert meta.token_bytes == pytest.approx(found.token_bytes, rel=0.3)


def test_what_it_needs_is_asked_before_anything_is_loaded(
    base: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refusal, match="are not in 4 bits: load it with quantization_config"):
        fit(tiny.model(), tokenizer, adapter="qlora")
    with pytest.raises(Refusal, match="cannot be trained: adapter=qlora") as refused:
        fit(load_model(str(base), quantize=True), tokenizer)
    assert refused.value.code == "quantized"
    run = fit(load_model(str(base), quantize=True), tokenizer, adapter="lora", steps=1, out=tmp_path / "run")
    assert packed(run.model), "LoRA over a base that is in 4 bits already is the same"
    monkeypatch.setattr("preftune.models.inspect.find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"pip install 'preftune\[qlora\]'"):
        load_model(str(tmp_path / "run"))


def test_a_folder_that_is_packed_itself(base: Path, tmp_path: Path, tokenizer: Any) -> None:
    model = load_model(str(base), quantize=True)
    expected = logits(model)
    save_model(model, tokenizer, tmp_path / "packed")
    loaded = load_model(str(tmp_path / "packed"))
    assert packed(loaded) and torch.equal(logits(loaded), expected)
    fit(loaded, tokenizer, adapter="lora", steps=1, out=tmp_path / "run")
    assert packed(load_model(str(tmp_path / "run")))
    with pytest.raises(Refusal, match="cannot be trained: adapter=qlora"):
        check_adapter_of(facts(str(tmp_path / "packed"), "model"), AdapterOptions())


def test_weights_that_a_cpu_has_repacked_are_not_trained_on(base: Path) -> None:
    """Layers of them give no gradient, and nothing says so."""
    model = load_model(str(base), quantize=True)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.support_avx512bf16_for_cpu is False
    layer.support_avx512bf16_for_cpu = True
    add_adapter(model, QLORA, seed=0)
    assert layer.support_avx512bf16_for_cpu is False
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(Refusal, match="load it anew"):
        differentiable(model)
