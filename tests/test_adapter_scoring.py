"""Adapters along a trie: values and gradients of peft's own forward pass, response by response."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tolerances
import torch
from test_trie import ALONE, ROPES, SHARING, build, one_by_one, rows, same_gradients, short_and_long
from torch import Tensor

from preftune.data.render import Rendered
from preftune.errors import Refusal
from preftune.models.adapters import adapter_off, add_adapter, checkpointing_on
from preftune.models.options import AdapterOptions
from preftune.scoring import scorer
from preftune.scoring.score import passes
from preftune.scoring.scorer import Scorer, check_recomputed
from preftune.scoring.selfcheck import one_by_one as by_peft
from preftune.training.estimate import kept_bytes, pass_tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),  # peft reads it by its older name
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),  # GPT-2's layers; peft sets it right itself
]

# every kind, and what may be asked of it
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 4},
    "rslora": {"type": "lora", "r": 4, "rslora": True},
    "dora": {"type": "dora", "r": 4},
    "prompt": {"type": "prompt", "tokens": 7},
    "prefix": {"type": "prefix", "tokens": 7},
}
WIDELY = ("Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "GptOss", "OPT", "GPTNeoX", "Cohere2")
CASES = [(name, kind) for kind in ("prompt", "prefix") for name in WIDELY]
CASES += [(name, kind) for kind in ("lora", "rslora", "dora") for name in ("Llama", "Gemma2", "GPTNeoX")]
PLAIN = ("OPT", "GPTNeoX", "Bloom")  # as many key-value heads as heads
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _every_shared_token_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "SHORTEST", 1)


def adapted(model: Any, kind: str, **more: Any) -> Any:
    """The model with an adapter of this kind, moved off its start."""
    made = add_adapter(model, AdapterOptions(**(KINDS[kind] | more)), seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.empty_like(parameter).normal_(std=0.03, generator=draw))
    return made


def check_exact(model: Any, sequences: list[Rendered], *, share: bool = True) -> None:
    """Values and gradients of the scorer, against peft's forward on one sequence at a time."""
    plain = copy.deepcopy(model)
    score = Scorer(model, share=share)
    found, expected = score(sequences).logp, by_peft(plain, sequences)
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = torch.linspace(-1, 1, len(sequences))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in model.named_parameters() if p.grad is not None]
    same_gradients(model, plain)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_along_a_trie_it_is_what_peft_computes_one_by_one(name: str, kind: str) -> None:
    heads = {"num_key_value_heads": 4} if name in PLAIN else {}
    model = adapted(build(name, SHARING[name] | heads), kind)
    assert Scorer(model).shares
    check_exact(model, rows())


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["Bloom", "StableLm", "Llama4Text"])
def test_so_it_is_with_a_prompt_copy_for_every_response(name: str, kind: str) -> None:
    heads = {"num_key_value_heads": 4} if name in PLAIN else {}
    model = adapted(build(name, ALONE[name][0] | heads), kind)
    assert not Scorer(model).shares
    check_exact(model, rows())


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("rope", ROPES)
def test_virtual_tokens_count_where_frequencies_follow_from_the_length(rope: str, kind: str, share: bool) -> None:
    """Rows within the limit are beyond it with the virtual tokens before them."""
    check_exact(adapted(build(*ROPES[rope]), kind), short_and_long(), share=share)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_layers_that_compute_again_see_the_virtual_tokens_too(kind: str) -> None:
    """Where prompts are not shared, keys and values would be lost: that is refused."""
    model = adapted(build("Llama", {}), kind)
    plain = copy.deepcopy(model)
    gradients = [gradient(made, rows()) for made in (plain, checkpointing_on(model))]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=tolerances.GRADIENT * float(gradients[0].abs().max()))
    check_recomputed(model, share=True)
    with pytest.raises(Refusal, match="leave one of the two away") if kind == "prefix" else nullcontext():
        check_recomputed(model, share=False)


@pytest.mark.parametrize("kind", KINDS)
def test_off_it_is_the_base(kind: str) -> None:
    base = build("Gemma3Text", SHARING["Gemma3Text"])
    expected = one_by_one(base, rows()).detach()
    model = adapted(base, kind)
    with torch.no_grad():
        assert (Scorer(model)(rows()).logp - expected).abs().max() > 0.1
        with adapter_off(model):
            torch.testing.assert_close(Scorer(model)(rows()).logp, expected, **CLOSE)
            torch.testing.assert_close(Scorer(model, share=False)(rows()).logp, expected, **CLOSE)


def ids_of(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_virtual_tokens_start_as_the_text_that_they_are_given(name: str, kind: str) -> None:
    """So the model begins as it would after that text."""
    tokenizer, text = tiny.tokenizer(), "be kind. "
    start = tuple(ids_of(text))
    made = add_adapter(tiny.model(name), AdapterOptions(type=kind, tokens=len(start), text=text), seed=0, tokenizer=tokenizer)
    sequences = [Rendered(0, n, (9, 30, *range(40, 43 + n)), 2) for n in range(3)]
    after = [Rendered(0, n, (*start, *s.ids), 2 + len(start)) for n, s in enumerate(sequences)]
    with torch.no_grad():
        torch.testing.assert_close(Scorer(made)(sequences).logp, one_by_one(tiny.model(name), after), **CLOSE)


def head_kinds() -> list[Any]:
    from peft import LoraConfig

    low = {"task_type": "CAUSAL_LM", "r": 3}
    return [
        pytest.param(LoraConfig(**low, target_modules=["lm_head"]), id="lora"),
        pytest.param(LoraConfig(**low, target_modules=["lm_head"], use_dora=True), id="dora"),
        pytest.param(LoraConfig(**low, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True), id="saved"),
    ]


@pytest.mark.parametrize("config", head_kinds())
@pytest.mark.parametrize("name", ["untied", "phi", "cohere", "gemma2"])
def test_an_adapter_on_the_head(name: str, config: Any) -> None:
    from peft import get_peft_model

    model: Any = get_peft_model(tiny.model(name), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "magnitude" in key:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    assert not Scorer(model).head.plain
    check_exact(model, [Rendered(0, n, (9, 30, *range(40, 43 + n)), 2) for n in range(3)])


def gradient(made: Any, sequences: list[Rendered]) -> Tensor:
    Scorer(made)(sequences).logp.sum().backward()
    found = made.prompt_encoder["default"].embedding.weight.grad.clone()
    made.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_gradient_of_virtual_tokens_is_summed_over_the_batch(kind: str) -> None:
    made = adapted(build("Llama", {}), kind)
    together = gradient(made, rows())
    alone = torch.stack([gradient(made, [s]) for s in rows()]).sum(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerances.GRADIENT * float(alone.abs().max()))
    assert Scorer(made)(rows()).tokens == 7 + Scorer(build("Llama", {}))(rows()).tokens, "they stand in a pass once"


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [60, 150, 10_000])
def test_virtual_tokens_count_in_a_pass(share: bool, budget: int) -> None:
    """Once where they are shared, and once for every padded row."""
    made, sequences = adapted(build("Llama", {}), "prompt"), rows()
    score = Scorer(made, share=share)
    batch: Any = SimpleNamespace(sequences=sequences)
    cut = passes(score, batch, [[row] for row in range(len(sequences))], budget)
    sizes = [pass_tokens(sequences, own, shares=share, before=7) for own in cut]
    assert sorted(row for own in cut for row in own) == list(range(len(sequences)))
    assert max(sizes) <= budget
    if share:
        assert sizes[0] >= score([sequences[row] for row in cut[0]]).tokens


def test_the_activations_of_virtual_tokens_are_those_of_the_whole_model() -> None:
    """Nothing of the backbone trains, and yet all of it stands between them and the loss."""
    low, virtual = (kept_bytes(adapted(build("Llama", {}), kind), torch.float32) for kind in ("lora", "prompt"))
    assert low / 3 < virtual < low
