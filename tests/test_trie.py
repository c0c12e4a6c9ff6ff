"""The token trie: values and gradients of every response by itself, on every kind of model, or a line that says why not."""

from __future__ import annotations

import copy
import itertools
import math
import random
from typing import Any

import pytest
import tiny
import tolerances
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import preftune
from preftune.data.render import Batch, Rendered
from preftune.errors import Refusal
from preftune.models.adapters import add_adapter
from preftune.models.options import AdapterOptions
from preftune.scoring import attention, layout, scorer, selfcheck
from preftune.scoring.scorer import Scorer
from preftune.scoring.sharing import cannot_share
from preftune.scoring.trie import Node, grow

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

V, W = 120, 5
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": W, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {f"linear_{name}": n for name, n in (("num_key_heads", 2), ("num_value_heads", 4), ("key_head_dim", 8))}

SHARING: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {**WINDOWS, "use_sliding_window": True},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": W},
    "Gemma2": {**WINDOWS, "head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3Text": {**WINDOWS, "head_dim": 8},
    "Phi3": {"sliding_window": W},
    "SmolLM3": {},
    "Olmo2": {},
    "GPTNeoX": {},
    "GptOss": {**WINDOWS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {"sliding_window": W, "num_local_experts": 4},
    "Cohere2": {**WINDOWS, "head_dim": 8, "logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0, "attention_multiplier": 0.25},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    # take a view of what attention gives
    "Afmoe": {**EXPERTS, "num_dense_layers": 1, "head_dim": 8, "sliding_window": W, "global_attn_every_n_layers": 2},
    "JetMoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
}
ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "Bloom": ({"n_layer": 2, "n_head": 4}, "does not go through transformers' interface"),
    "Mamba": ({}, "layers of linear_attention"),
    "Qwen3Next": (
        {**EXPERTS, **LINEAR, "head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
        | {"layer_types": ["linear_attention", "full_attention"] * 2},
        "layers of linear_attention",
    ),
    "StableLm": ({}, "0 of its 4 attention layers read the trie"),
    # windows that live in the mask alone, wider than the sequences by which a model is asked
    "Qwen2Moe": (
        {**WINDOWS, **EXPERTS, "sliding_window": 20, "use_sliding_window": True, "shared_expert_intermediate_size": 16},
        "layer 0 does not say its window",
    ),
    "Phimoe": ({"sliding_window": 20, "num_local_experts": 4}, "layer 0 does not say its window"),
    "Doge": ({"sliding_window": 20}, "ValueError: its attention has a mask of its own"),
    "Llama4Text": (
        {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
        "layers of chunked_attention",
    ),
}


@pytest.fixture(autouse=True)
def _every_shared_token_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows this short the shortest node worth its call would leave nothing to share."""
    monkeypatch.setattr(scorer, "SHORTEST", 1)


def build(name: str, keys: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **keys})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def rows(seed: int = 1) -> list[Rendered]:
    """Prompts and responses of odd sizes: 1-token answers, an empty prompt, a group of 9 answers, one of 1, answers that begin
    alike; longer and shorter than the windows."""
    draw = random.Random(seed)

    def some(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, V) for _ in range(count))

    made: list[Rendered] = []
    system = some(4)
    for group, (prompt, answers) in enumerate(((9, (1, 4, 12)), (1, (7, 3)), (0, (1,)), (14, (2, 2, 1, 3, 6, 8, 1, 9, 5)))):
        before = (1, *system, *some(prompt)) if prompt else (1,)
        begin = some(3)
        for n, count in enumerate(answers):
            after = (*begin, *some(count)) if n % 2 and count > 3 else some(count)
            made.append(Rendered(group, n, (*before, *after), len(before)))
    return made


def one_by_one(model: Any, sequences: list[Rendered]) -> Tensor:
    """logp of each response, by transformers alone."""
    found: list[Tensor] = []
    for s in sequences:
        logp = model(input_ids=torch.tensor([s.ids]), use_cache=False).logits[0].float().log_softmax(-1)
        found.append(torch.stack([logp[t - 1, s.ids[t]] for t in range(s.start, len(s.ids))]).sum())
    return torch.stack(found)


def same_gradients(
    ours: Any, theirs: Any, whole: float = tolerances.RELATIVE, each: float = tolerances.TENSOR, faint: float = 1e-2
) -> None:
    """All of them by the length of all, each by its own; one that is little but rounding (that of a key's bias) by a hundredth
    of the longest."""
    found = {name: (a.grad, b.grad) for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True)}
    assert all((a is None) == (b is None) for a, b in found.values())
    apart = {name: float((a.float() - b.float()).norm()) for name, (a, b) in found.items() if a is not None}
    length = {name: float(found[name][1].float().norm()) for name in apart}
    assert math.hypot(*apart.values()) <= whole * math.hypot(*length.values())
    for name, off in apart.items():
        assert off <= each * max(length[name], faint * max(length.values())), name


def rounding(model: Any, sequences: list[Rendered], weight: Tensor) -> float:
    """How far the last bit of the weights moves a model's gradient, by its length: that of gated delta rules, which multiply
    what they remember with every token, by 1e-4."""
    near, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
    near.zero_grad()
    with torch.no_grad():
        for parameter in near.parameters():
            way = torch.where(torch.rand(parameter.shape, generator=draw) < 0.5, math.inf, -math.inf)
            parameter.copy_(parameter.nextafter(way))
    (one_by_one(near, sequences) * weight).sum().backward()
    pairs = [(a.grad, b.grad) for a, b in zip(near.parameters(), model.parameters(), strict=True) if b.grad is not None]
    moved = math.hypot(*(float((a - b).norm()) for a, b in pairs)) / math.hypot(*(float(b.norm()) for _, b in pairs))
    assert moved < tolerances.TREMBLES
    return moved


# -- the trie itself ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortest", [1, 3, 8])
def test_every_sequence_is_a_path_with_its_own_positions(shortest: int) -> None:
    draw = random.Random(0)
    for _ in range(200):
        sequences: list[tuple[int, ...]] = []
        for _ in range(draw.randint(1, 9)):
            begin = draw.choice(sequences)[: draw.randint(0, 20)] if sequences else ()
            sequences.append((*begin, *draw.choices(range(3), k=draw.randint(not begin, 12))))
        trie = grow(sequences, shortest)
        for n, sequence in enumerate(sequences):
            places = trie.places(n)
            assert tuple(trie.ids[i] for i in places) == sequence
            assert [trie.positions[i] for i in places] == list(range(len(sequence)))
        assert all(node.parent < n and node.begin < node.end for n, node in enumerate(trie.nodes))
        if shortest == 1:  # nothing stands twice
            assert len(trie.ids) == len({s[:k] for s in sequences for k in range(1, len(s) + 1)})


def test_a_first_child_follows_its_parent_and_short_beginnings_stay_apart() -> None:
    prompt = tuple(range(10))
    trie = grow([(*prompt, 20, 21), (*prompt, 30), (*prompt, 20, 22)], 3)
    assert trie.nodes == (Node(-1, 0, 10, 0), Node(0, 10, 12, 10), Node(0, 12, 14, 10), Node(0, 14, 15, 10))
    assert grow([(1, 2, 3), (1, 2, 3)]).nodes == (Node(-1, 0, 3, 0),), "equal sequences are one, however short"
    assert grow([]).nodes == ()


def test_equal_tokens_of_different_pictures_are_not_shared() -> None:
    """Nor is anything after them; what stands before them is, and what belongs to the same picture."""
    prompt, picture = (1, 2, 7, 3, 4), 2
    sequences = [(*prompt, 5), (*prompt, 6), (*prompt, 5), (*prompt, 6)]
    one, other = ((picture, b"one"),), ((picture, b"other"),)
    trie = grow(sequences, 1, [one, one, other, other])
    assert [trie.ids[i] for n in range(4) for i in trie.places(n)] == [i for s in sequences for i in s]
    assert sorted(n.attachments for n in trie.nodes if n.attachments) == [one, other]
    assert [n.end - n.begin for n in trie.nodes] == [2, 3, 1, 1, 3, 1, 1]
    assert len(grow(sequences, 1, [one] * 4).ids) == len(grow(sequences, 1).ids) == 7


# -- models ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARING)
def test_shared_equals_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients; windows shorter than prompts, than responses, and across the boundary of nodes; a call of attention
    for each node, for some subtrees and for all; the fused one and two products."""
    model = build(name, SHARING[name])
    plain = copy.deepcopy(model)
    sequences = rows()
    score = Scorer(model)
    assert score.shares, cannot_share(model)
    expected, weight = one_by_one(plain, sequences), torch.linspace(-1, 1, len(sequences))
    (expected * weight).sum().backward()
    monkeypatch.setattr(layout, "by_products", lambda *_: True)
    for worth, products in itertools.product((0, 30, layout.WORTH), (False, True)):
        monkeypatch.setattr(layout, "WORTH", worth)
        monkeypatch.setattr(attention, "by_products", lambda *_, how=products: how)
        model.zero_grad()
        found = score(sequences)
        assert found.tokens == len(grow([s.ids for s in sequences], 1).ids) < sum(len(s.ids) for s in sequences) / 2
        torch.testing.assert_close(found.logp, expected, atol=0, rtol=tolerances.RELATIVE)
        (found.logp * weight).sum().backward()
        same_gradients(model, plain)


@pytest.mark.parametrize("name", ALONE)
def test_models_that_cannot_share_are_right_and_say_so_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    keys, why = ALONE[name]
    model = build(name, keys)
    plain = copy.deepcopy(model)
    sequences = rows()
    for _ in range(2):
        score = Scorer(model)
        assert not score.shares
        found = score(sequences)
    (line,) = [r.message for r in caplog.records if r.name == "preftune"]
    assert why in line and "its own copy of the prompt" in line
    expected, weight = one_by_one(plain, sequences), torch.linspace(-1, 1, len(sequences))
    torch.testing.assert_close(found.logp, expected, atol=0, rtol=tolerances.RELATIVE)
    (found.logp * weight).sum().backward()
    (expected * weight).sum().backward()
    whole = max(tolerances.RELATIVE, rounding(plain, sequences, weight))
    same_gradients(model, plain, whole, whole / tolerances.RELATIVE * tolerances.TENSOR)


def test_a_wrong_mask_is_found_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were attention over a trie wrong on a model, its hidden states would tell."""
    right = layout.Layout.mask

    def off_by_one(self: Any, *given: Any) -> Any:
        mask = right(self, *given)
        return None if mask is None else mask.roll(1, 1)

    monkeypatch.setattr(layout.Layout, "mask", off_by_one)
    assert "differ by" in str(cannot_share(build("Llama", {})))


def test_a_window_that_is_not_the_configs_is_found() -> None:
    """On layers with a window and without."""
    model = build("Qwen2", {**SHARING["Qwen2"], "sliding_window": 20})
    for layer, window in ((0, 21), (1, 20)):
        other = copy.deepcopy(model)
        other.model.layers[layer].self_attn.sliding_window = window
        assert cannot_share(other) == f"layer {layer} does not say its window"
    assert cannot_share(model) is None
    off = build("Mistral", {"sliding_window": 20})
    off.config.use_sliding_window = False
    assert cannot_share(off) == "layer 0 does not say its window"


@pytest.mark.parametrize(("small", "worth"), [(0, 0), (2**18, 0), (2**18, 2**12)])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])  # windows, soft-caps, sinks
def test_bf16_is_as_near_to_float32_as_bf16_one_by_one(
    name: str, share: bool, small: int, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, along a trie and padded, by the fused attention and by products, node by node and not; weights and
    activations cost the digits, not the path."""
    monkeypatch.setattr(layout, "SMALL", small)
    monkeypatch.setattr(layout, "WORTH", worth)
    sequences, weight = rows(), torch.linspace(-1, 1, len(rows()))
    exact = build(name, SHARING[name])
    model, plain = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    score = Scorer(model, share=share)
    assert score.shares == share
    values: list[Tensor] = []
    for logp in (one_by_one(exact, sequences), score(sequences).logp, one_by_one(plain, sequences)):
        assert logp.dtype == torch.float32
        (logp * weight).sum().backward()
        values.append(logp.detach())
    errors = [float((logp - values[0]).abs().mean()) for logp in values[1:]]
    assert 0 < errors[0] < tolerances.BF16_FARTHER * errors[1] < 1.0
    off = [
        torch.stack([(p.grad.float() - q.grad).norm() for p, q in zip(m.parameters(), exact.parameters(), strict=True)]).norm()
        for m in (model, plain)
    ]
    assert off[0] < tolerances.BF16_FARTHER * off[1]


def test_bf16_gradients_by_products_are_those_of_the_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Mistral", SHARING["Mistral"]).bfloat16()
    fused = copy.deepcopy(model)
    exact = copy.deepcopy(model).float()
    sequences, weight = rows(), torch.linspace(-1, 1, len(rows()))
    for each, small in ((model, 2**18), (fused, 0), (exact, 0)):
        monkeypatch.setattr(layout, "SMALL", small)
        score = Scorer(each)
        assert score.shares
        (score(sequences).logp * weight).sum().backward()
    off = [
        torch.stack([(p.grad.float() - q.grad).norm() for p, q in zip(m.parameters(), exact.parameters(), strict=True)]).norm()
        for m in (model, fused)
    ]
    size = torch.stack([q.grad.norm() for q in exact.parameters()]).norm()
    # products round the scores to bfloat16 too, which costs more or less by how the processor sums; a wrong mask costs it all
    assert off[0] < tolerances.BF16_FARTHER * off[1] < 0.2 * size


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_and_two_tries_in_one_graph(reentrant: bool, lora: bool) -> None:
    """Layers run again in the backward pass, after another trie has been through the model: each must find its own."""
    model = build("Gemma3Text", SHARING["Gemma3Text"])
    if lora:
        model = add_adapter(model, AdapterOptions(type="lora", r=4, target_modules=["q_proj", "v_proj", "lm_head"]), seed=0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(model)
    first, second = rows(1), rows(2)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    score = Scorer(model)
    assert score.shares and score.head.plain != lora
    found = torch.cat([score(first).logp, score(second).logp])
    expected = torch.cat([one_by_one(plain, part) for part in (first, second)])
    weight = torch.linspace(-1, 1, len(found))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(found, expected, atol=0, rtol=tolerances.RELATIVE)
    same_gradients(model, plain)


def test_without_a_trie_the_model_is_what_it_was(tmp_path: Any) -> None:
    """Generation, plain calls and saved files know nothing of the trie."""
    model = build("Gemma2", SHARING["Gemma2"])
    model.set_attn_implementation("eager")
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 8, 9, 10, 11]])
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    before = model(input_ids=ids, attention_mask=real).logits
    told = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        Scorer(model)(rows())
    assert model.config._attn_implementation == "preftune_eager"
    assert torch.equal(model(input_ids=ids, attention_mask=real).logits, before)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=real, max_new_tokens=5, do_sample=False), told)
    model.save_pretrained(tmp_path)
    assert "preftune" not in (tmp_path / "config.json").read_text()


# -- frequencies that follow from the longest row of a pass ------------------------------------------------------------------

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "dynamic": (
        "Llama",
        {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
}


def short_and_long() -> list[Rendered]:
    """Rows at the limit of 32 tokens, below and above it, some of which begin alike; the long ones not in order."""
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(3, V) for _ in range(n)) for n in (15, 29)]
    answers = [(prompts[g], draw.choices(range(3, V), k=n)) for g, n in ((0, 5), (0, 30), (1, 3), (1, 4), (1, 20), (1, 9))]
    return [Rendered(prompts.index(p), n, (*p, *answer), len(p)) for n, (p, answer) in enumerate(answers)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ROPES)
def test_a_long_row_does_not_change_the_short_ones_beside_it(kind: str, share: bool) -> None:
    """Nor does a row that the model has seen before."""
    name, keys = ROPES[kind]
    model = build(name, keys)
    sequences = short_and_long()
    plain = [copy.deepcopy(model) for _ in sequences]
    expected = torch.cat([one_by_one(each, [s]) for each, s in zip(plain, sequences, strict=True)])
    score = Scorer(model, share=share)
    assert score.shares == share
    weight = torch.linspace(-1, 1, len(sequences))
    for size in (6, 3, 2, 1, 6):  # rows of a pass
        cut = [list(range(n, min(n + size, 6))) for n in range(0, 6, size)]
        found = torch.cat([score([sequences[n] for n in rows], ("entropy",)).logp for rows in cut])
        torch.testing.assert_close(found, expected, atol=0, rtol=tolerances.RELATIVE)
    torch.testing.assert_close(selfcheck.one_by_one(model, sequences), expected, atol=0, rtol=tolerances.RELATIVE)
    (found * weight).sum().backward()
    for each, factor in zip(plain, weight, strict=True):
        (one_by_one(each, [sequences[plain.index(each)]]) * factor).sum().backward()
    for name, parameter in model.named_parameters():
        total = sum(dict(each.named_parameters())[name].grad for each in plain)
        torch.testing.assert_close(parameter.grad, total, atol=tolerances.GRADIENT * float(total.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("kind", ROPES)
def test_scores_do_not_depend_on_the_budget_across_the_limit(kind: str) -> None:
    name, keys = ROPES[kind]
    model, sequences = build(name, keys), short_and_long()
    groups = tuple(tiny.pair("", "", "") for _ in range(2))
    batch = Batch(groups, tuple(sequences))
    expected = torch.cat([one_by_one(copy.deepcopy(model), [s]) for s in sequences]).detach()
    for budget in (1, 60, 100, 10**6):
        found = preftune.score(model, batch, tokens_per_microbatch=budget, want=("entropy", "top1"))
        torch.testing.assert_close(found.logp.detach(), expected, atol=0, rtol=tolerances.RELATIVE)


# -- the head ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 600, 2**25])
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in ("phi", "untied") for how in ("frozen", "kept", "partly kept", "computed again")]
    + [(name, how) for name in ("gemma2", "cohere") for how in ("frozen", "trained")],
)
def test_chunked_equals_plain(name: str, how: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bias, untied, soft-capped and scaled heads, in blocks of one entry, of some, of all; frozen ones, and those that train
    with their softmax kept for the backward pass, or made again."""
    from preftune.scoring import product

    monkeypatch.setattr(product, "CPU_BLOCK", block)
    monkeypatch.setattr(product, "FEWEST", 1)
    monkeypatch.setattr(product, "WIDE", 1)
    monkeypatch.setattr(product, "ROWS", 2)
    monkeypatch.setattr(product, "KEPT", {"kept": product.KEPT, "partly kept": 3 * tiny.VOCABULARY}.get(how, 0))
    model = tiny.model(name)
    model.get_output_embeddings().requires_grad_(how != "frozen")
    plain = copy.deepcopy(model)
    sequences = [Rendered(0, n, (9, 30, *range(40, 43 + n)), 2) for n in range(3)]
    score = Scorer(model)
    assert score.head.plain == (name in ("phi", "untied"))
    found, expected = score(sequences).logp, one_by_one(plain, sequences)
    torch.testing.assert_close(found, expected, atol=0, rtol=tolerances.RELATIVE)
    weight = torch.tensor([1.0, -2.0, 0.5])
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    same_gradients(model, plain)


HEADS: dict[str, tuple[dict[str, Any], bool, str]] = {
    # get_decoder gives its last product; a layer stands between backbone and that
    "ModernBertDecoder": ({"global_attn_every_n_layers": 2, "local_attention": 8}, True, "by the model's own code"),
    # calls its backbone by place, and reads padding as something else
    "CpmAnt": ({"num_hidden_layers": 2, "dim_head": 8, "dim_ff": 48, "prompt_length": 4}, False, "response by response"),
    "RemBert": ({"input_embedding_size": 16, "output_embedding_size": 24}, False, "by the model's own code"),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_unknown_make_are_run_by_the_models_own_code_and_said_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys, shares, how = HEADS[name]
    model = build(name, keys)
    plain = copy.deepcopy(model)
    sequences = rows()
    with caplog.at_level("INFO", "preftune"):
        for _ in range(2):
            score = Scorer(model)
    assert score.shares == shares and not score.head.plain
    (line,) = [r.message for r in caplog.records if r.name == "preftune" and "own copy" not in r.message]
    assert line.startswith(f"{name}ForCausalLM: the head ") and how in line
    found, expected = score(sequences, ("entropy", "top1")), one_by_one(plain, sequences)
    assert found.values["entropy"].shape == found.token_logp.shape
    torch.testing.assert_close(found.logp, expected, atol=0, rtol=tolerances.RELATIVE)
    weight = torch.linspace(-1, 1, len(sequences))
    (found.logp * weight).sum().backward()
    (expected * weight).sum().backward()
    same_gradients(model, plain)


def test_a_plain_head_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "preftune"):
        assert Scorer(build("Llama", {})).head.plain
    assert not caplog.messages


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["FalconMamba", "Mamba"])
def test_float32_states_before_a_bf16_head(name: str, frozen: bool) -> None:
    model = build(name, {}).bfloat16()
    model.get_output_embeddings().requires_grad_(not frozen)
    plain = copy.deepcopy(model)
    sequences = rows()
    found, expected = Scorer(model)(sequences).logp, one_by_one(plain, sequences)
    torch.testing.assert_close(found, expected, atol=tolerances.BF16_LOGP, rtol=0.01)
    found.sum().backward()
    expected.sum().backward()
    same_gradients(model, plain, tolerances.BF16_GRADIENT, tolerances.BF16_GRADIENT)


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2"])
def test_a_head_of_zeros_is_still_seen_to_be_scaled_or_capped(name: str) -> None:
    """It will not stay at zero."""
    model = tiny.model(name)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert not Scorer(model).head.plain
    sound = tiny.model("untied")
    torch.nn.init.zeros_(sound.lm_head.weight)
    assert Scorer(sound).head.plain


def test_a_frozen_head_takes_no_gradient_and_saved_modules_do(tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.model("untied"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    plain = copy.deepcopy(model)
    sequences = [Rendered(0, n, (9, 30, *range(40, 43 + n)), 2) for n in range(3)]
    found, expected = Scorer(model)(sequences).logp, one_by_one(plain, sequences)
    found.sum().backward()
    expected.sum().backward()
    same_gradients(model, plain)
    assert {name for name, p in model.named_parameters() if p.grad is not None and "lm_head" in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


def test_top1_and_entropy_come_through_the_same_pass() -> None:
    model = build("Llama", {})
    sequences = rows()
    found = Scorer(model)(sequences, ("entropy", "top1"))
    at = 0
    for s in sequences:
        p = model(input_ids=torch.tensor([s.ids])).logits[0, s.start - 1 : -1].double().softmax(-1)
        these = slice(at, at + s.length)
        torch.testing.assert_close(found.values["entropy"][these].double(), -(p * p.log()).sum(-1), atol=1e-4, rtol=0)
        assert torch.equal(found.values["top1"][these], p.argmax(-1))
        at += s.length


def test_sharing_can_be_required_or_left_off(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"steps": 1, "dtype": "float32"}
    with pytest.raises(Refusal) as refused:
        preftune.fit(tiny.model("gptj"), tokenizer, tiny.pairs(2), train={"sharing": "require"}, **keys)
    assert refused.value.code == "cannot_share" and "transformers' interface" in str(refused.value)
    required = preftune.fit(tiny.model(), tokenizer, tiny.pairs(2), train={"sharing": "require"}, **keys)
    monkeypatch.setattr(scorer, "along", None)  # would fail if it were called
    off = preftune.fit(tiny.model(), tokenizer, tiny.pairs(2), train={"sharing": "off"}, **keys)
    assert off.metrics[0]["grad_norm"] == pytest.approx(required.metrics[0]["grad_norm"], rel=1e-4)
