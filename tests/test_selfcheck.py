"""What a run checks of its own numbers before it trains, and `preftune doctor`, which says it."""

from __future__ import annotations

import json
import logging
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import PAIRS, call, write_model, write_rows

import preftune
from preftune.data.render import Batch, Rendered, render
from preftune.errors import RunFailed
from preftune.scoring import attention, exact, layout, product, selfcheck, trie
from preftune.scoring.scorer import Scorer
from preftune.scoring.selfcheck import Difference, check_path, check_start, difference, few, one_by_one, shortened
from preftune.scoring.sharing import cannot_share

pytestmark = pytest.mark.usefixtures("short_answers", "no_report")


def mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = layout.Layout.mask

    def wrong(self: Any, *given: Any) -> Any:
        mask = right(self, *given)
        return None if mask is None else mask.roll(1, 1)

    patch.setattr(layout.Layout, "mask", wrong)


def positions_not_continued(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trie.Trie, "positions", property(lambda self: [i for n in self.nodes for i in range(n.end - n.begin)]))


def head_forgets_a_chunk(patch: pytest.MonkeyPatch) -> None:
    """Values right, gradients not."""
    right = product.LinearLogp.backward

    def wrong(ctx: Any, *gradients: Any) -> Any:
        d_hidden, *others = right(ctx, *gradients)
        return (None if d_hidden is None else d_hidden * (torch.arange(len(d_hidden)) > 0)[:, None], *others)

    patch.setattr(product.LinearLogp, "backward", staticmethod(wrong))


def another_prompt_is_seen(patch: pytest.MonkeyPatch) -> None:
    """Of several prompts in one pass, all see the first: a model is asked with one."""
    right = trie.Trie.path

    def wrong(self: Any, node: int) -> list[int]:
        path = right(self, node)
        return path if path[0] == 0 else [0, *path]

    patch.setattr(trie.Trie, "path", wrong)
    patch.setattr(
        trie.Trie, "places", lambda self, n: [i for p in right(self, self.ends[n]) for i in range(*self.nodes[p][1:3])]
    )


def heads_mixed_up_in_bf16(patch: pytest.MonkeyPatch) -> None:
    """In code that no other precision runs."""
    right = attention._products

    def wrong(q: Any, k: Any, v: Any, *others: Any) -> Any:
        return right(q, k.flip(1), v.flip(1), *others)

    patch.setattr(attention, "_products", wrong)


def one_answer_of_two_has_no_gradient(patch: pytest.MonkeyPatch) -> None:
    """The first of a pair, in whatever order they come."""
    right = Scorer.forward

    def wrong(self: Any, rows: Any, want: Any = ()) -> Any:
        found = right(self, rows, want)
        first = torch.tensor([s.response == 0 for s in rows for _ in range(s.length)])
        return replace(found, token_logp=torch.where(first, found.token_logp.detach(), found.token_logp))

    patch.setattr(Scorer, "forward", wrong)


FAULTS = (mask_off_by_one, positions_not_continued, head_forgets_a_chunk, another_prompt_is_seen)
OF_SHARING = (mask_off_by_one, positions_not_continued, another_prompt_is_seen)


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        *((fault, "float32") for fault in (*FAULTS, one_answer_of_two_has_no_gradient)),
        *((fault, "bfloat16") for fault in (*OF_SHARING, heads_mixed_up_in_bf16)),
    ],
)
def test_a_planted_fault_stops_training_before_it_begins(
    fault: Any, dtype: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fault(monkeypatch)
    model = tiny.model()
    before = tiny.state(model)
    groups = tiny.pairs(1 if fault is one_answer_of_two_has_no_gradient else 3)
    with pytest.raises(RunFailed, match=r"LlamaForCausalLM: .* differ by .*train\.sharing=off") as stopped:
        preftune.fit(model, tokenizer, groups, steps=1, dtype=dtype, eval_groups=[])
    assert stopped.value.code == "self_check" and tiny.same(before, tiny.state(model))
    assert "float32" in str(stopped.value) or dtype == "float32"
    assert "own copy" not in caplog.text, "nothing was scored"


def test_the_probe_does_not_see_what_only_several_prompts_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what the user's own rows are for."""
    another_prompt_is_seen(monkeypatch)
    assert cannot_share(tiny.model()) is None


@pytest.mark.parametrize("fault", OF_SHARING)
def test_without_sharing_a_fault_of_sharing_is_none(fault: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    keys: dict[str, Any] = {"steps": 1, "dtype": "float32", "eval_groups": [], "train": {"sharing": "off"}}
    assert preftune.fit(tiny.model(), tokenizer, tiny.pairs(3), **keys).metrics


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gptj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_of_a_sound_model_passes(name: str, dtype: torch.dtype, tokenizer: Any) -> None:
    batch, model = render(tiny.pairs(5), tokenizer), tiny.model(name).to(dtype)
    for share in (True, False):
        check_path(Scorer(model, share=share), batch, range(len(batch)), dtype=dtype)


# -- rounding ---------------------------------------------------------------------------------------------------------------


def test_bf16_rounding_of_answers_is_no_fault(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Logits of 16 and more come in steps of an eighth: here every difference is too large."""
    monkeypatch.setitem(selfcheck.VALUES, torch.bfloat16, -1.0)
    batch, model = render(tiny.pairs(4), tokenizer), tiny.model().bfloat16()
    before = {name: id(p) for name, p in model.named_parameters()}
    with caplog.at_level(logging.INFO, "preftune"):
        check_path(Scorer(model), batch, range(len(batch)), dtype=torch.bfloat16)
    assert "in float32, where in bfloat16 by" in caplog.text
    assert {name: id(p) for name, p in model.named_parameters()} == before and model.dtype == torch.bfloat16


def test_bf16_rounding_along_a_trie_is_no_fault(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of layers that choose their experts it can be large: here every difference is too large."""
    right = attention.bound
    monkeypatch.setattr(attention, "bound", lambda dtype: right(dtype) if dtype == torch.float32 else -1.0)
    with caplog.at_level(logging.INFO, "preftune"):
        assert cannot_share(tiny.model().bfloat16()) is None
    assert "by rounding, since by" in caplog.text
    mask_off_by_one(monkeypatch)
    assert "in float32" in str(cannot_share(tiny.model().bfloat16()))


def test_where_float32_cannot_be_tried_gradients_decide_and_that_is_said(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "bound", lambda dtype: -1.0)
    monkeypatch.setitem(selfcheck.VALUES, torch.bfloat16, -1.0)
    monkeypatch.setattr(exact, "_room", lambda device: 10)
    batch, model = render(tiny.pairs(4), tokenizer), tiny.model().bfloat16()
    with caplog.at_level(logging.INFO, "preftune"):
        check_path(Scorer(model), batch, range(len(batch)), dtype=torch.bfloat16)
    assert caplog.text.count("there is no memory for a copy of it in float32") == 2 and "gradients decide" in caplog.text
    right = product.LinearLogp.backward
    monkeypatch.setattr(product.LinearLogp, "backward", staticmethod(lambda ctx, g: (None, *right(ctx, g)[1:])))
    with pytest.raises(RunFailed, match="gradients decide"):
        check_path(Scorer(tiny.model().bfloat16()), batch, range(len(batch)), dtype=torch.bfloat16)


def test_a_kernel_that_knows_bf16_only_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = attention.attend

    def attend(query: Any, *others: Any, **how: Any) -> Any:
        if query.dtype == torch.float32:
            raise RuntimeError("only fp16 and bf16")
        return right(query, *others, **how)

    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention, "bound", lambda dtype: -1.0)
    model = tiny.model().bfloat16()
    assert cannot_share(model) is None and model.dtype == torch.bfloat16
    assert "only fp16 and bf16" in caplog.text and "is not known" in caplog.text


def test_a_model_in_float32_is_a_copy_and_a_tied_weight_one_of_it() -> None:
    model = tiny.model().bfloat16()
    before = tiny.state(model)
    with exact.in_float32(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.lm_head.weight is model.model.embed_tokens.weight
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
        logits.sum().backward()
    assert logits.dtype == torch.float32 and all(p.grad is None for p in model.parameters())
    assert tiny.same(before, tiny.state(model)) and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_no_numbers_are_said_to_be_that(dtype: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(
        RunFailed, match=r"no finite log-probability to 6 of 6 responses .*pairs.jsonl row 1.*weights sound"
    ) as said:
        preftune.fit(model, tokenizer, tiny.pairs(3), steps=1, dtype=dtype, eval_groups=[])
    assert said.value.code == "not_finite"


def test_out_of_memory_says_nothing_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    model = tiny.model()
    monkeypatch.setattr(attention, "attend", full)
    with pytest.raises(torch.OutOfMemoryError):
        cannot_share(model)
    monkeypatch.setattr(attention, "attend", right)
    assert cannot_share(model) is None


def test_a_start_is_judged_by_the_length_of_its_answers(tokenizer: Any) -> None:
    """In bfloat16 short answers may be off by a step of their logits, long ones by that times the root of their length."""
    batch = render([tiny.pair("Q: ", "a", "b" * 199)], tokenizer)
    short, long = batch.sequences[0].length, batch.sequences[1].length
    assert (short, long) == (2, 200)

    def start(at: int, off: float, dtype: torch.dtype) -> float:
        other = torch.zeros(2)
        other[at] = off
        return check_start(torch.zeros(2), other, batch, [0, 1], dtype=dtype)

    assert start(0, 0.3, torch.bfloat16) == pytest.approx(0.15) and start(1, 3.9, torch.bfloat16) == pytest.approx(0.0195)
    for at, off, dtype in (
        (0, 0.4, torch.bfloat16),
        (1, 4.1, torch.bfloat16),
        (0, 1e-3, torch.float32),
        (1, math.nan, torch.bfloat16),
    ):
        with pytest.raises(RunFailed, match="differ before the first step"):
            start(at, off, dtype)


# -- which rows ------------------------------------------------------------------------------------------------------------


def test_the_logits_of_one_response_are_there_at_once(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their graph: that of one is gone before the next is made."""
    batch = render(tiny.pairs(5), tokenizer)
    sizes = {(len(s.ids) - 1) * tiny.VOCABULARY for s in batch.sequences} - {model.lm_head.weight.numel()}
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    most = 0

    def keep(tensor: Any) -> Kept:
        nonlocal most
        kept = Kept(tensor)
        if tensor.numel() in sizes and tensor.dtype == torch.float32:
            alive.add(kept)
            most = max(most, len(alive))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        found = difference(model, batch.sequences, lambda rows: Scorer(model)(rows).logp, dtype=torch.float32)
    assert found.small and most == 2, "log-softmax and gather keep the same tensor"


class Kept:
    """What a graph keeps of one tensor."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def test_it_takes_no_more_tokens_than_a_pass_of_the_run(model: Any, tokenizer: Any) -> None:
    batch = render(tiny.pairs(6), tokenizer)
    taken: list[int] = []
    scorer = Scorer(model)
    right = scorer.forward

    def spy(sequences: Any, want: Any = ()) -> Any:
        taken.append(sum(len(s.ids) for s in sequences))
        return right(sequences, want)

    scorer.forward = spy  # type: ignore[method-assign]
    check_path(scorer, batch, range(len(batch)), dtype=torch.float32, budget=40)
    assert taken and max(taken) <= 40


def test_pictures_move_with_their_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_room", lambda model, budget: 40)
    attached = ((3, b"first"), (35, b"second"), (41, b"third"))
    rows = [Rendered(0, n, (*range(20, 60), *range(n, n + 12)), 40, attachments=attached) for n in range(2)]
    for cut in shortened(model, rows):
        assert cut.attachments == ((35 - 30, b"second"), (41 - 30, b"third")) and cut.start == 10
        assert [cut.ids[place] for place, _ in cut.attachments] == [rows[cut.response].ids[place] for place in (35, 41)]
    assert Scorer(model)(shortened(model, rows)).logp.isfinite().all()


def test_it_is_done_once_per_model_and_path(model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    batch = render(tiny.pairs(5), tokenizer)
    with caplog.at_level(logging.INFO, "preftune"):
        for share in (True, True, False):
            check_path(Scorer(model, share=share), batch, range(len(batch)), dtype=torch.float32)
    assert sum("self-check: 10 responses" in line for line in caplog.messages) == 2


def test_masks_and_gradients_at_hand_are_respected(model: Any, tokenizer: Any) -> None:
    batch = render(tiny.pairs(2), tokenizer)
    one = batch.sequences[0]
    masked = replace(one, mask=(False, *[True] * (len(one.ids) - one.start - 1)))
    found = difference(model, [masked, batch.sequences[1]], lambda rows: Scorer(model)(rows).logp, dtype=torch.float32)
    assert found.small and all(p.grad is None for p in model.parameters())
    assert not torch.equal(one_by_one(model, [masked]), one_by_one(model, [one]))


def test_what_is_not_a_number_is_not_small() -> None:
    assert Difference(0.0, 0.0, torch.float32).small
    for values, gradients in ((math.nan, 0.0), (0.0, math.nan), (1.0, 0.0), (0.0, 1.0)):
        assert not Difference(values, gradients, torch.float32).small


def test_only_a_few_rows_are_looked_at(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = render(tiny.pairs(6), tokenizer)
    assert few(model, batch, range(len(batch))) == list(range(12))
    monkeypatch.setattr(selfcheck, "_room", lambda model, budget: 64)
    chosen = few(model, batch, [4, 5, 2, 3, 0, 1])
    assert chosen[:2] == [4, 5] and len(chosen) % 2 == 0 and tokens(batch, chosen) <= 64
    monkeypatch.setattr(selfcheck, "_room", lambda model, budget: 16)
    assert few(model, batch, [4, 5, 2, 3]) == [4, 5], "one group at least"
    cut = shortened(model, [batch.sequences[row] for row in (4, 5)])
    for short, whole in zip(cut, (batch.sequences[row] for row in (4, 5)), strict=True):
        assert 0 < short.start < len(short.ids) <= 8 and short.length > 0
        assert short.ids == whole.ids[whole.start - short.start : whole.start - short.start + len(short.ids)]
    assert cut[0].ids[: cut[0].start] == cut[1].ids[: cut[1].start], "they still begin alike"


def tokens(batch: Batch, rows: list[int]) -> int:
    return sum(len(batch.sequences[row].ids) for row in rows)


# -- doctor -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(Path("m"), positions=128)
    write_rows(Path("pairs.jsonl"), PAIRS[:10])
    return tmp_path


@pytest.mark.parametrize(
    "words", [["adapter=lora", "adapter.target_modules=[q_proj]"], ["dtype=bfloat16"], ["method=sft"]], ids=str
)
def test_doctor_says_that_all_is_the_same_and_what_a_run_takes(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: set[int] = set()
    right = product._product

    def spy(hidden: Any, *others: Any, **out: Any) -> Any:
        chunks.add(len(hidden))
        return right(hidden, *others, **out)

    monkeypatch.setattr(product, "_product", spy)
    words = ["doctor", "model=m", "data=pairs.jsonl", "batch_size=4", *words]
    said = call(capsys, *words)
    assert 8 in chunks and max(chunks) > 8, "one of the checks takes the head in chunks"
    assert said.code == 0 and said.out == "" and said.err.count(" same ") == 5 and "DIFFERENT" not in said.err
    assert "memory: about" in said.err and "time: about" in said.err and "fewer than one by one" in said.err
    quiet = call(capsys, *words, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    told = call(capsys, *words, "--json").json
    assert told["healthy"] and len(told["checks"]) == 5
    run = told["run"]
    assert run["steps"] == 3 and run["saved"] == 1 - run["tokens"] / run["tokens_one_by_one"]
    assert (run["saved"] > 0.2) == (told["method"] == "dpo")
    assert not list(here.glob("runs*"))


SHARED = [{"prompt": "A cat", "chosen": " sang.", "rejected": text} for text in (" left.", " met a dog.")]
RANKING = {"prompt": "A cat", "responses": [" sang.", " left.", " met a dog."], "ranks": [1, 2, 3]}


@pytest.mark.parametrize("rows", [SHARED, [RANKING]], ids=["pairs", "ranking"])
def test_doctor_takes_comparisons_that_share_an_answer(
    rows: list[dict[str, Any]], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("shared.jsonl"), rows)
    said = call(capsys, "doctor", "model=m", "data=shared.jsonl", "method=dpo", "dtype=float32", "--json")
    assert said.code == 0, said.err
    assert all(line["passed"] for line in said.json["checks"])
    answers = preftune.render(preftune.read("shared.jsonl"), tiny.tokenizer()).sequences
    assert len(answers) == 3 and said.json["run"]["tokens_one_by_one"] == sum(len(answer.ids) for answer in answers)


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_finds_planted_faults(
    fault: Any, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    said = call(capsys, "doctor", "model=m", "data=pairs.jsonl", "dtype=float32", "--quiet")
    assert said.code == 1 and "DIFFERENT" in said.err
    assert "preftune: not the same: answers together on a trie = one by one" in said.err


def test_doctor_judges_a_start_as_a_run_does(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 a short answer may be off by more than the tolerance of a long one's tokens."""
    monkeypatch.setitem(selfcheck.TOLERANCE, torch.bfloat16, 1e-9)
    said = call(capsys, "doctor", "model=m", "data=pairs.jsonl", "adapter=prompt", "dtype=bfloat16", "--json")
    assert said.code == 0, said.err
    (start,) = [line for line in said.json["checks"] if "one by one" in line["check"] and "adapter" in line["check"]]
    assert start["passed"] and start["values"] > 1e-9


def test_doctor_names_free_memory_with_the_model_that_is_loaded(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preftune.runs.doctor.free_bytes", lambda device: 10**9)
    said = call(capsys, "doctor", "model=m", "data=pairs.jsonl", "dtype=float32", "--json")
    weights = sum(p.nbytes for p in tiny.model().parameters())
    assert said.json["run"]["free_gb"] == pytest.approx(1 + weights / 1e9, abs=1e-9)


def test_doctor_takes_a_reward_model_that_pads_with_its_end_token(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers reads a classifier before the tokens that pad, and an answer ends with one of them."""
    config = json.loads((here / "m" / "config.json").read_text())
    (here / "m" / "config.json").write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))
    said = call(capsys, "doctor", "model=m", "data=pairs.jsonl", "dtype=float32", "method=reward", "--json")
    assert said.code == 0, said.err
