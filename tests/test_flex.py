"""Attention along a trie in one call of FlexAttention: the same as node by node, or node by node instead."""

from __future__ import annotations

import copy
import random
from functools import partial
from typing import Any

import pytest
import tolerances
import torch
import torch.nn.attention.flex_attention as torch_flex
from test_adapter_scoring import adapted, check_exact
from test_trie import SHARING, build, one_by_one, rows, same_gradients
from torch import Tensor

from preftune.scoring import attention, flex, scorer
from preftune.scoring.layout import Layout
from preftune.scoring.scorer import Scorer
from preftune.scoring.trie import Trie, grow

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _every_shared_token_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "SHORTEST", 1)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention is tried on the CPU too, as its own mathematics, which is what its kernels are made from."""
    monkeypatch.setattr(flex, "usable", lambda device: True)
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)  # refuses gradients on the CPU


def tries(count: int, seed: int = 0) -> list[Trie]:
    """Of one to several blocks, filled up or not, with deep and wide ones among them."""
    draw = random.Random(seed)
    made: list[Trie] = []
    for n in range(count):
        sequences: list[tuple[int, ...]] = []
        for _ in range(draw.randint(1, 12)):
            begin = draw.choice(sequences) if sequences else ()
            begin = begin[: draw.randint(0, len(begin))]
            sequences.append((*begin, *draw.choices(range(9), k=draw.randint(not begin, draw.choice((3, 40, 300))))))
        made.append(grow(sequences, (1, 3, 8)[n % 3]))
    return made


def seen(trie: Trie, window: int | None) -> Tensor:
    """[T, T] True where the token of the row sees that of the column: on a path of its own, not after it, within the window."""
    size, place = len(trie.ids), torch.tensor(trie.positions)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for number, node in enumerate(trie.nodes):
        for above in trie.path(number):
            mask[node.begin : node.end, trie.nodes[above].begin : trie.nodes[above].end] = True
    mask &= torch.arange(size) <= torch.arange(size)[:, None]
    return mask if window is None else mask & (place[:, None] - place < window)


def blocks_of(mask: torch_flex.BlockMask) -> tuple[Tensor, Tensor]:
    """[n, n] each: blocks of which the mask function is asked, and blocks that are seen in full."""
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    found: list[Tensor] = []
    for counts, places in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        dense = torch.zeros(counts.shape[-1], counts.shape[-1], dtype=torch.bool)
        for row, (count, columns) in enumerate(zip(counts[0, 0].tolist(), places[0, 0].tolist(), strict=True)):
            dense[row, columns[:count]] = True
        found.append(dense)
    return found[0], found[1]


# -- the mask ----------------------------------------------------------------------------------------------------------------


def test_a_node_and_all_below_it_are_one_slice_of_the_row() -> None:
    for trie in tries(200):
        ends = flex.ends(trie)
        paths = [trie.path(n) for n in range(len(trie.nodes))]
        for number, node in enumerate(trie.nodes):
            below = [i for n, path in enumerate(paths) if number in path for i in range(*trie.nodes[n][1:3])]
            assert below == list(range(node.begin, ends[node.begin]))
            assert len({ends[i] for i in range(node.begin, node.end)}) == 1


def test_filler_makes_whole_blocks_and_no_new_positions() -> None:
    for trie in (*tries(50), grow([tuple(range(256))]), grow([(1,)])):
        whole = flex.filled(trie)
        size = len(trie.ids)
        assert len(whole.ids) == max(256, -(-size // 128) * 128) == len(whole.positions)
        assert whole.ids[:size] == trie.ids and whole.nodes[: len(trie.nodes)] == trie.nodes and whole.ends == trie.ends
        assert max(whole.positions) == max(trie.positions)
        assert not seen(whole, None)[size:, :size].any() and not seen(whole, None)[:size, size:].any()


@pytest.mark.parametrize("window", [None, 1, 7, 300])
def test_the_block_mask_is_the_dense_mask(window: int | None) -> None:
    sizes: set[int] = set()
    line = grow([tuple(range(1024))])
    for trie in (*map(flex.filled, tries(30)), line):
        size, row = len(trie.ids), torch.arange(len(trie.ids))
        sizes.add(size // 128)
        mask = flex.Blocks(trie, CPU).mask(window)
        asked, full = blocks_of(mask)
        of_tokens = mask.mask_mod(row, row, row[:, None], row)
        assert mask.shape == (1, 1, size, size) and not (asked & full).any()
        assert torch.equal(of_tokens, seen(trie, window))
        whole = full.repeat_interleave(128, 0).repeat_interleave(128, 1)
        either = (asked | full).repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(whole | (either & of_tokens), of_tokens)
        # torch's own, from all pairs of tokens
        theirs, theirs_full = blocks_of(torch_flex.create_block_mask(mask.mask_mod, None, None, size, size, "cpu"))
        assert torch.equal(full, theirs_full)
        if window is None or trie is line:  # else it may ask of more blocks than it need
            assert torch.equal(asked, theirs)
    assert len(sizes) > 5


# -- models ------------------------------------------------------------------------------------------------------------------


def several_blocks() -> list[Any]:
    """Rows whose trie has more tokens than two blocks."""
    return [s for seed in (1, 2, 3) for s in rows(seed)]


def backward(score: Scorer, sequences: list[Any]) -> Tensor:
    """logp of each; the gradients are in the model."""
    found = score(sequences).logp
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    return found.detach()


def node_by_node(model: Any) -> Scorer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "usable", lambda device: False)
        score = Scorer(model)
    assert score.shares and not score.fused
    return score


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_one_call_equals_call_by_call(name: str, fused: None) -> None:
    """Values and gradients: windows shorter than prompts, than responses, across the boundary of nodes; soft-caps; sinks."""
    model = build(name, SHARING[name])
    plain = copy.deepcopy(model)
    score = Scorer(model)
    assert score.fused
    found, expected = backward(score, several_blocks()), backward(node_by_node(plain), several_blocks())
    torch.testing.assert_close(found, expected, atol=0, rtol=tolerances.RELATIVE)
    same_gradients(model, plain)


def test_with_checkpointing_a_layer_finds_the_blocks_of_its_own_trie(fused: None) -> None:
    model = build("Mistral", SHARING["Mistral"])
    plain = copy.deepcopy(model)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    score, nodes = Scorer(model), node_by_node(plain)
    assert score.fused
    for each in (score, nodes):
        torch.cat([each(rows(1)).logp, each(several_blocks()).logp]).sum().backward()
    same_gradients(model, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_one_call_of_attention_is_call_by_call(
    dtype: torch.dtype, window: int | None, softcap: float | None, sinks: bool, fused: None
) -> None:
    """Heads that share keys, values wider than keys; the gradient of sinks too; the precision stays."""
    layout = Layout.of(tries(4, seed=5)[3], CPU, torch.float32, fused=True)
    size, draw = len(layout.trie.ids), torch.Generator().manual_seed(0)
    shapes = [(1, 6, size, 8), (1, 2, size, 8), (1, 2, size, 16), *([(6,)] if sinks else [])]
    leaves = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
    how: dict[str, Any] = {"scaling": 0.4, "sliding_window": window, "softcap": softcap, "s_aux": leaves[3] if sinks else None}
    assert layout.blocks is not None
    ways = (flex.attend(*leaves[:3], layout.blocks, **how), attention._call_by_call(*leaves[:3], layout, **how))
    slope = torch.randn(ways[0].shape, generator=draw).to(dtype)
    found, expected = ([out.detach(), *torch.autograd.grad(out, leaves, slope)] for out in ways)
    assert all(out.is_contiguous() for out in ways)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and attention.apart(ours, theirs) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_changing_lengths_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for CUDA, without its kernels: no length, trie or layer has another call compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    flex._compiled.cache_clear()
    how: dict[str, Any] = {"scaling": 0.4, "softcap": 2.0, "s_aux": torch.randn(14)}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, trie in enumerate(tries(4, seed=1)):
            layout = Layout.of(trie, CPU, torch.float32, fused=True)
            assert layout.blocks is not None
            size, draw = len(layout.trie.ids), torch.Generator().manual_seed(seed)
            # heads: not as many as there are blocks, since torch takes sizes that are equal at first for one
            q, k, v = (torch.randn(1, size, n, 8, generator=draw).transpose(1, 2).requires_grad_() for n in (14, 7, 7))
            for window in (3, 50):
                out = flex.attend(q, k, v, layout.blocks, sliding_window=window, **how)
                expected = attention._call_by_call(q, k, v, layout, sliding_window=window, **how)
                torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
                out.sum().backward()
    flex._compiled.cache_clear()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_virtual_tokens_stand_before_the_whole_row(name: str, kind: str, fused: None) -> None:
    model = adapted(build(name, SHARING[name]), kind)
    assert Scorer(model).fused
    check_exact(model, rows())


# -- where it cannot be used -------------------------------------------------------------------------------------------------


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("no C compiler\nfor the backward pass")


def _raises(query: Tensor, key: Tensor, value: Tensor, *args: Any, **how: Any) -> Tensor:
    raise RuntimeError("no triton")


right = flex.attend
BROKEN: dict[str, tuple[Any, str]] = {
    "raises": (_raises, "FlexAttention fails (RuntimeError: no triton)"),
    "raises in the backward pass": (
        lambda *args, **how: _NoBackward.apply(right(*args, **how)),
        "FlexAttention fails (RuntimeError: no C compiler for the backward pass)",
    ),
    "is wrong": (
        lambda *args, **how: right(*args, **{**how, "softcap": None}),
        "FlexAttention fails (ValueError: its output differs by 0.",
    ),
    "is not finite": (lambda *args, **how: right(*args, **how) * torch.nan, "its output differs by inf)"),
    "has a wrong gradient": (
        lambda query, key, *args, **how: right(query, key.detach() + 0 * key, *args, **how),
        "FlexAttention fails (ValueError: its gradient of k differs by 1",
    ),
    "is wrong on the model's own": (  # not where gradients are, on numbers of its own
        lambda *args, **how: right(*args, **how).roll(0 if torch.is_grad_enabled() else 1, 1),
        "its hidden states along a trie differ by",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_where_it_fails_attention_runs_call_by_call_and_says_so_once(
    what: str, fused: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attend, why = BROKEN[what]
    monkeypatch.setattr(flex, "attend", attend)
    model = build("Gemma2", SHARING["Gemma2"])
    plain = copy.deepcopy(model)
    for _ in range(2):
        score = Scorer(model)
    assert score.shares and not score.fused
    (line,) = [r.message for r in caplog.records if r.name == "preftune"]
    assert line.startswith("Gemma2ForCausalLM: attention runs node by node: ") and why in line and "\n" not in line
    torch.testing.assert_close(score(rows()).logp, one_by_one(plain, rows()), atol=0, rtol=tolerances.RELATIVE)


def test_a_model_that_cannot_share_says_only_that(fused: None, caplog: pytest.LogCaptureFixture) -> None:
    score = Scorer(build("StableLm", {}))
    score(rows())
    assert not score.shares
    (line,) = [r.message for r in caplog.records if r.name == "preftune"]
    assert "its own copy of the prompt" in line


def test_it_is_tried_on_blocks_seen_in_part_and_in_full(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the model has positions for it, and never beyond them: on CUDA that would be the end of the process."""
    layouts: list[Layout] = []
    compared = attention._compared

    def spy(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: dict[str, Any]) -> Tensor:
        layouts.append(layout)
        return compared(query, key, value, layout, how)

    monkeypatch.setattr(attention, "_compared", spy)
    for positions, longest in ((64, 64), (512, 306)):
        layouts.clear()
        assert Scorer(build("OPT", {**SHARING["OPT"], "max_position_embeddings": positions})).fused
        blocks = layouts[0].blocks
        assert blocks is not None and max(layouts[0].trie.positions) == longest - 1
    assert all(kind.tril(-1).any() for kind in blocks_of(blocks.mask(None)))


def test_dropout_in_attention_is_left_to_the_nodes(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama", {"attention_dropout": 0.5})
    score = Scorer(model)
    assert score.fused
    monkeypatch.setattr(flex, "attend", None)  # would fail if it were called
    model.train()
    with torch.no_grad():
        first, second = score(rows()).logp, score(rows()).logp
    assert not torch.equal(first, second)


def test_only_cuda_tries_it() -> None:
    assert [flex.usable(torch.device(name)) for name in ("cuda", "cuda:1", "cpu", "mps")] == [True, True, False, False]
    model = build("Llama", {})
    assert Scorer(model).shares and not Scorer(model).fused
