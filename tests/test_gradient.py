"""A step's gradient by any cut, for losses that look at the whole batch too; and what happens where memory is short."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tolerances
import torch
from command import PAIRS, write_model, write_rows
from test_trie import ALONE, SHARING, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import preftune
from preftune import losses, methods
from preftune.config import resolve
from preftune.data.render import Batch, render
from preftune.errors import RunFailed
from preftune.keys import TrainKeys
from preftune.methods.pairs import Pairwise
from preftune.models import randomness
from preftune.models.adapters import adapter_dropout_on, add_adapter, inside
from preftune.models.options import AdapterOptions
from preftune.runs.doctor import expect
from preftune.runs.train import train
from preftune.scoring import head, product
from preftune.scoring.score import default_budget, passes, score
from preftune.scoring.scorer import Scorer
from preftune.training import estimate, memory, precision
from preftune.training.estimate import BESIDE, Estimate, kept_bytes, pass_tokens
from preftune.training.gradient import Step, backward
from preftune.training.method import ExampleScores
from preftune.training.options import TrainOptions
from preftune.training.precision import Weights
from preftune.training.steps import Plan, begin, steps


class AgainstTheMean(Pairwise):
    """Every margin against the mean margin of the batch: no example's loss is its own."""

    def __init__(self, beta: float) -> None:
        super().__init__("dpo", losses.dpo, beta=beta)
        self.separable = False

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        assert scored.reference_logp is not None
        ratio = scored.policy_logp - scored.reference_logp
        margin = ratio[scored.index[:, 0]] - ratio[scored.index[:, 1]]
        loss = scored.weight * torch.nn.functional.softplus(-(margin - 0.5 * margin.mean()) * (1 + margin.var()))
        return loss, {"margin": margin.detach()}


def stepped(model: Any, batch: Batch, budget: int) -> tuple[dict[str, Tensor], dict[str, float], int]:
    method = AgainstTheMean(0.3)
    reference = score(tiny.model(seed=1), batch).logp.detach()
    scorer = Scorer(model)
    model.zero_grad()
    step = Step.of(scorer, batch, method, method.examples(batch.groups), reference, budget)
    line, _ = backward(scorer, step)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, line, len(step.cut)


def test_two_passes_are_exact_for_a_loss_over_the_whole_batch(model: Any, tokenizer: Any) -> None:
    batch = render(tiny.pairs(7, weight=2.0), tokenizer)
    whole, told, _ = stepped(model, batch, 10**6)
    for budget in (1, 90):
        cut, line, passes_ = stepped(model, batch, budget)
        assert passes_ > 1 and line == pytest.approx(told, abs=tolerances.FIGURE)
        size = max(float(g.abs().max()) for g in whole.values())
        for name, gradient in whole.items():
            torch.testing.assert_close(cut[name], gradient, atol=tolerances.GRADIENT * size, rtol=0)


def test_an_adapters_dropout_falls_the_same_way_in_both_passes(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = AdapterOptions(type="lora", r=4, dropout=0.5, target_modules=["q_proj"])
    model = adapter_dropout_on(add_adapter(tiny.model(), options, seed=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = render(tiny.pairs(5), tokenizer)
    seen: list[Tensor] = []
    plain = Scorer.forward

    def spy(self: Scorer, sequences: Any, want: Any = ()) -> Any:
        found = plain(self, sequences, want)
        seen.append(found.logp.detach())
        return found

    monkeypatch.setattr(Scorer, "forward", spy)
    scorer, method = Scorer(model), AgainstTheMean(0.3)
    reference = torch.zeros(len(batch))
    backward(scorer, Step.of(scorer, batch, method, method.examples(batch.groups), reference, 1))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(scorer([batch.sequences[0]]).logp, scorer([batch.sequences[0]]).logp), "there is dropout"


class Other:
    """A device's module with a generator of its own, as torch has one for every kind of accelerator."""

    def __init__(self) -> None:
        self.state, self.asked = torch.zeros(2, dtype=torch.uint8), list[torch.device]()

    def get_rng_state(self, device: torch.device) -> Tensor:
        self.asked.append(device)
        return self.state.clone()

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        self.asked.append(device)
        self.state = state


@pytest.mark.parametrize("name", ["cuda:1", "mps", "xpu"])
def test_random_states_are_those_of_the_device_whatever_its_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of no other: of a machine with many, each would have to be asked."""
    device, module = torch.device(name), Other()
    monkeypatch.setattr(torch, "get_device_module", {device: module}.__getitem__)
    before = torch.get_rng_state()
    with randomness.random_state_kept(device):
        torch.manual_seed(3)
        module.state += 1
        told = randomness.random_state(device)
        module.state += 1
        torch.rand(2)
        randomness.set_random_state(device, told)
        assert module.state.tolist() == [1, 1] and torch.equal(torch.get_rng_state(), told[0])
    assert module.state.tolist() == [0, 0] and torch.equal(torch.get_rng_state(), before)
    assert set(module.asked) == {device}


@pytest.mark.usefixtures("short_answers", "no_report")
def test_a_run_draws_from_no_generator_of_the_user(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", None)  # without names it asks all devices, and warns where there are many
    before = torch.get_rng_state()
    assert preftune.fit(model, tokenizer, tiny.pairs(2), adapter="lora", steps=1, eval_groups=[], dtype="float32").metrics
    assert torch.equal(torch.get_rng_state(), before)


# -- where gradients go -----------------------------------------------------------------------------------------------------


def with_head(name: str) -> Any:
    """`saved`: a head that peft trains beside an adapter, in a wrapper of its own."""
    from peft import LoraConfig, get_peft_model

    if name != "saved":
        return tiny.model(name)
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny.model("untied"), lora)


def loss_of(scorer: Scorer, batch: Batch, rows: list[int]) -> Tensor:
    logp = scorer([batch.sequences[row] for row in rows]).logp
    return (torch.linspace(0.5, 2.0, len(rows)) * logp).sum() / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "untied", "phi", "gemma2", "cohere", "saved"])  # llama, gemma2, cohere: tied
@pytest.mark.parametrize("kept", [0, product.KEPT])
def test_a_heads_blocks_add_up_to_the_gradient_that_autograd_adds_up(
    kept: int, name: str, dtype: torch.dtype, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several micro-batches, and of a weight that is used twice both parts; outside, autograd has it as before."""
    monkeypatch.setattr(product, "KEPT", kept)
    monkeypatch.setattr(product, "CPU_BLOCK", 500)
    monkeypatch.setattr(product, "PART", 40)
    monkeypatch.setattr(product, "FEWEST", 1)
    monkeypatch.setattr(product, "WIDE", 1)
    monkeypatch.setattr(product, "ROWS", 7)
    monkeypatch.setattr(precision, "_PART", 100)
    batch = render(tiny.pairs(6), tokenizer)
    cuts = [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]]
    found: list[list[Tensor]] = []
    for handed in (True, False):
        weights = Weights(with_head(name).to(dtype), dtype)
        scorer = Scorer(weights.compute)
        assert isinstance(scorer.head, head.Head)
        with weights.collecting(scorer.head if handed else None):
            assert (scorer.head.into is not None) == handed
            for rows in cuts:
                loss_of(scorer, batch, rows).backward()
        assert scorer.head.into is None
        found.append([g for m in weights.masters if (g := m.grad) is not None])
        assert all(g.dtype == torch.float32 for g in found[-1]) and len(found[-1]) == len(weights.masters)
    size = max(float(g.abs().max()) for g in found[1])
    bound = {torch.float32: tolerances.GRADIENT, torch.bfloat16: tolerances.BF16_SUM}[dtype]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=bound * size, rtol=0)
    assert scorer.head.layer is not None
    weight = scorer.head.layer.weight
    (own,) = torch.autograd.grad(loss_of(scorer, batch, cuts[0]), [weight])
    assert own.shape == weight.shape and own.abs().max() > 0


class Largest(TorchDispatchMode):
    """The most bytes of any storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.kept = 0, list[Tensor]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = operation(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given]
        self.kept += made  # a storage that is freed gives its place to the next
        self.bytes = max([self.bytes, *(t.untyped_storage().nbytes() for t in made)])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["untied", "gemma2", "cohere", "saved"])
def test_a_second_micro_batch_makes_no_tensor_as_large_as_the_weight(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, size in (("CPU_BLOCK", 800), ("PART", 800), ("FEWEST", 1), ("WIDE", 1)):
        monkeypatch.setattr(product, key, size)
    weights = Weights(with_head(name), dtype)
    own = head.Head(inside(weights.compute))
    hidden, targets = torch.randn(30, 16, dtype=dtype, requires_grad=True), torch.arange(30)
    assert own.layer is not None and own.plain == (name == "untied")
    small = own.layer.weight.nbytes // 2
    for handed in (own, None):
        for master in weights.masters:
            master.grad = None
        with weights.collecting(handed):
            own(hidden, targets).sum().backward()
            loss = own(hidden, targets).sum()
            with Largest() as largest:
                loss.backward()
        assert (largest.bytes < small) == (handed is own)


@pytest.mark.parametrize("kept", [0, 30 * tiny.VOCABULARY - 1, 30 * tiny.VOCABULARY])
def test_no_more_logits_are_held_than_may_be_kept(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("CPU_BLOCK", 400), ("FEWEST", 1), ("WIDE", 1), ("KEPT", kept)):
        monkeypatch.setattr(product, name, size)
    model = tiny.model("untied")
    hidden, targets = torch.randn(30, 16, requires_grad=True), torch.arange(30)
    for trained in (True, False):
        own = head.Head(model.requires_grad_(trained))
        with Largest() as largest:
            own(hidden, targets).sum().backward()
        assert (largest.bytes >= 4 * 30 * tiny.VOCABULARY) == (trained and kept == 30 * tiny.VOCABULARY)


@pytest.mark.parametrize("trained", [True, False])
def test_many_positions_have_no_gradient_in_float32_at_once(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("CPU_BLOCK", 400), ("FEWEST", 1), ("WIDE", 1), ("KEPT", 0), ("ROWS", 16)):
        monkeypatch.setattr(product, name, size)
    own = head.Head(tiny.model("untied").requires_grad_(trained).bfloat16())
    hidden, targets = torch.randn(600, 16, dtype=torch.bfloat16, requires_grad=True), torch.zeros(600, dtype=torch.long)
    loss = own(hidden, targets).sum()
    with Largest() as largest:
        loss.backward()
    assert largest.bytes == hidden.nbytes


@pytest.mark.parametrize(
    ("vocabulary", "entries", "rows"),
    [
        (49_152, product.CPU_BLOCK, product.WIDE),
        (2**18, product.CPU_BLOCK, 128),  # 128 MiB
        (512, product.CPU_BLOCK, 2048),  # what the caches hold
        (49_152, product.BLOCK, 682),
        (2**26, product.CPU_BLOCK, 1),
    ],
)
def test_a_forward_pass_takes_wide_blocks_as_far_as_one_may_hold(vocabulary: int, entries: int, rows: int) -> None:
    assert product.rows_of_logits(vocabulary, entries, product.WIDE) == rows


def test_a_heads_own_code_takes_fewer_rows_of_a_large_vocabulary() -> None:
    """It holds many tensors of them, in 1 GB."""
    own: Any = Scorer(with_head("gemma2")).head
    for vocabulary, rows in ((2**17, 32), (49_152, 64)):
        own.output = torch.nn.Linear(16, vocabulary, device="meta")
        assert own._rows(torch.zeros(1, 16)) == rows


def test_a_run_hands_its_head_over(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, seen = render(tiny.pairs(4), tokenizer), list[bool]()
    right = product.LinearLogp.backward

    def watched(ctx: Any, *gradients: Tensor) -> Any:
        seen.append(ctx.into is not None)
        return right(ctx, *gradients)

    monkeypatch.setattr(product.LinearLogp, "backward", staticmethod(watched))
    run_steps(model, batch, 100)
    assert len(seen) > 3 and all(seen)


# -- memory -----------------------------------------------------------------------------------------------------------------


def run_steps(model: Any, batch: Batch, budget: int, count: int = 3) -> list[dict[str, Any]]:
    method = methods.make("dpo", beta=0.1)
    weights = Weights(model, torch.float32)
    with torch.no_grad():
        reference = score(model, batch).logp
    options = TrainOptions(tokens_per_microbatch=budget, warmup=0.0, schedule="constant")
    the_plan = Plan(tuple((0, tuple(method.examples(batch.groups))) for _ in range(count)), 1e-3, options)
    return list(steps(begin(weights, the_plan), batch, method, the_plan, reference))


NO_ROOM = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.22 GB, other allocations: 1.10 GB)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, limit: int, error: Exception = NO_ROOM[0]) -> None:
    """A scorer that has room for so many tokens."""
    plain = Scorer.forward

    def forward(self: Scorer, sequences: Any, want: Any = ()) -> Any:
        found = plain(self, sequences, want)
        if found.tokens > limit and torch.is_grad_enabled():
            raise error
        return found

    monkeypatch.setattr(Scorer, "forward", forward)


@pytest.mark.parametrize("error", NO_ROOM, ids=lambda error: str(error)[:4])
def test_what_does_not_fit_is_cut_finer_before_the_first_step(
    error: Exception, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = render(tiny.pairs(6), tokenizer)
    roomy = tiny.model()
    told = run_steps(roomy, batch, 10**6)
    short_of_memory(monkeypatch, 100, error)
    tight = tiny.model()
    lines = run_steps(tight, batch, 400)
    assert caplog.messages == [
        f"out of memory: going on with train.tokens_per_microbatch={n}, which gives the same gradient" for n in (200, 100)
    ]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in told], abs=tolerances.FIGURE)
    for a, b in zip(roomy.parameters(), tight.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=tolerances.WEIGHTS, rtol=0)


def test_a_step_that_runs_out_of_memory_half_way_is_begun_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its half gradient is cleared away: the restarted step takes the whole one once."""
    batch = render(tiny.pairs(6), tokenizer)
    roomy, tight = tiny.model(), tiny.model()
    told = run_steps(roomy, batch, 100, count=1)
    plain, calls = Scorer.forward, 0

    def forward(self: Scorer, sequences: Any, want: Any = ()) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == 3 and torch.is_grad_enabled():  # one for the trial, one micro-batch of the step that went well
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, sequences, want)

    reference = score(tight, batch).logp.detach()
    monkeypatch.setattr(Scorer, "forward", forward)
    method, weights = methods.make("dpo", beta=0.1), Weights(tight, torch.float32)
    options = TrainOptions(tokens_per_microbatch=100, warmup=0.0, schedule="constant")
    the_plan = Plan(((0, tuple(method.examples(batch.groups))),), 1e-3, options)
    (line,) = steps(begin(weights, the_plan), batch, method, the_plan, reference)
    assert "tokens_per_microbatch=" in caplog.text
    assert line["grad_norm"] == pytest.approx(told[0]["grad_norm"], rel=tolerances.FIGURE)


def test_an_example_that_does_not_fit_is_refused_with_what_to_lower(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = render(tiny.pairs(6), tokenizer)
    short_of_memory(monkeypatch, 10)
    before = tiny.state(model := tiny.model())
    method = methods.make("dpo")
    least = memory.indivisible(Scorer(model), batch, method.examples(batch.groups))
    with pytest.raises(RunFailed, match=f"a micro-batch of {least} tokens does not fit .* lower max_length") as failed:
        run_steps(model, batch, 400)
    assert failed.value.code == "out_of_memory" and tiny.same(tiny.state(model), before)


def test_of_several_processes_a_smaller_micro_batch_was_not_tried(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing is said of an example that cannot be cut: the run says what to set."""
    batch, method, scorer = render(tiny.pairs(6), tokenizer), methods.make("dpo"), Scorer(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    short_of_memory(monkeypatch, 10)
    monkeypatch.setattr("preftune.processes.size", lambda: 2)
    with pytest.raises(torch.OutOfMemoryError):
        memory.fits(scorer, optimizer, batch, method, [method.examples(batch.groups)], 400)


def test_another_error_is_no_lack_of_memory(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = render(tiny.pairs(6), tokenizer)
    short_of_memory(monkeypatch, 100, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        run_steps(tiny.model(), batch, 400)


def test_the_trial_runs_the_largest_micro_batch_of_the_whole_run(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one with the most tokens, wherever it stands; its rows, once."""
    groups = [*tiny.pairs(4), tiny.pair("A longer prompt than any other: ", "the longest answer", "no"), *tiny.pairs(3)]
    batch, seen = render(groups, tokenizer), list[list[Any]]()
    plain = Scorer.forward
    monkeypatch.setattr(Scorer, "forward", lambda self, rows, want=(): seen.append(list(rows)) or plain(self, rows, want))
    method, scorer = methods.make("dpo"), Scorer(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    examples = method.examples(batch.groups)
    memory.fits(scorer, optimizer, batch, method, [examples[:3], examples[3:6], examples[6:]], 1)
    assert seen == [[batch.sequences[8], batch.sequences[9]]]


def test_the_trial_leaves_weights_state_and_random_numbers_as_they_were(model: Any, tokenizer: Any) -> None:
    batch = render(tiny.pairs(4), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    before, random = tiny.state(model), torch.get_rng_state()
    scorer, method = Scorer(model), methods.make("dpo", beta=0.1)
    assert memory.fits(scorer, optimizer, batch, method, [method.examples(batch.groups)], 100) == 100
    assert tiny.same(tiny.state(model), before) and torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    for state in optimizer.state.values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and not any(bool(value.any()) for value in state.values())


# -- estimates --------------------------------------------------------------------------------------------------------------


def test_tokens_of_a_pass_are_those_that_go_through_the_model(model: Any, tokenizer: Any) -> None:
    batch = render(tiny.pairs(5), tokenizer)
    for share in (True, False):
        scorer = Scorer(model, share=share)
        for places in passes(scorer, batch, [[row] for row in range(len(batch))], 100):
            found = pass_tokens(batch.sequences, places, shares=share)
            width = max(len(batch.sequences[row].ids) for row in places) * len(places)
            exact = scorer([batch.sequences[row] for row in places]).tokens if share else width
            # shared beginnings of fewer than eight tokens stand apart, and answers that begin alike with more stand together
            assert abs(found - exact) <= (8 if share else 0) * len(places)


KINDS = SHARING | {name: keys for name, (keys, _) in ALONE.items()} | {"FalconMamba": {}}


@pytest.mark.usefixtures("short_answers", "no_report")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_takes_a_step(name: str, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its memory is counted, on the way there, by a call that it takes; and without its weights by one that it takes there."""
    keys = KINDS[name] | {"vocab_size": tiny.VOCABULARY}
    model = build(name, keys)
    run = preftune.fit(model, tokenizer, tiny.pairs(2), steps=1, dtype="float32", eval_groups=[], reference_store="off")
    assert abs(run.metrics[0]["loss"] - math.log(2)) < tolerances.FIRST_LOSS
    assert "memory per token" not in caplog.text
    if name not in (
        "Afmoe",
        "GptOss",
        "JetMoe",
        "Mixtral",
        "Phimoe",
        "Qwen2Moe",
        "Qwen3Next",
    ):  # torch computes no product of experts in float32 on that device
        with torch.device("meta"):
            assert kept_bytes(build(name, keys), torch.float32) > 0


def test_where_counting_fails_the_budget_is_the_usual_one(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(model: Any, dtype: torch.dtype) -> int:
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(estimate, "kept_bytes", fails)
    found = Estimate.of(tiny.model(), torch.float32, best=False, reference=True)
    assert found.token_bytes is None and found.peak_bytes(100, [100], 10) is None
    assert found.tokens(10**12) == found.tokens(None) == default_budget(tiny.model())
    (said,) = caplog.messages
    assert "memory per token is not known" in said and "too many values" in said
    batch = render(tiny.pairs(3), tokenizer)
    examples = methods.make("dpo").examples(batch.groups)[:1]
    told = expect(tiny.model(), batch, [[0, 1]], examples, dtype=torch.float32, reference=True)
    assert told["memory_gb"] is None and told["tokens_per_microbatch"] == default_budget(tiny.model())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_kept_bytes_are_those_that_a_longer_pass_adds(name: str) -> None:
    """Against the difference of two passes of other lengths, counted apart; on the meta device much the same."""
    model = tiny.model(name, positions=512)
    found, half = kept_bytes(model, torch.float32), kept_bytes(model, torch.bfloat16)

    def saved(length: int) -> int:
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
            state = model.get_decoder()(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=False)
            total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
        del state
        return total

    each = (saved(68) - saved(60)) / 8  # a mask's square term grows by 128 of these per token, both here and there
    assert 0.5 * each < found < 1.5 * each and 0.4 * found < half < 0.75 * found


def test_budgets_follow_the_free_memory() -> None:
    each = Estimate(
        parameters=10,
        trained=10,
        fixed_bytes=10**9,
        late_bytes=10**8,
        token_bytes=10**6,
        operations=1.0,
        usual=1024,
        scored_bytes=0,
    )
    assert each.tokens(None) == 1024 and each.tokens(10**12) == estimate.LARGEST
    assert each.tokens(10**8) == estimate.SMALLEST
    free = 5 * 10**9
    assert each.tokens(free) % 256 == 0
    budget = each.tokens(free)
    peak = each.peak_bytes(budget, [9 * budget, 10], 10) or 0
    assert 0.9 * free < peak / 0.8 < 1.2 * free and peak < free
    # in a step's only pass there is no gradient yet when the activations are most
    assert each.peak_bytes(budget, [budget], 10) == peak - 10**8
    assert each.peak_bytes(budget, [10], 10) == 10**9 + BESIDE  # too few to free that much
    assert each.peak_bytes(100, [101], 10) == 10**9 + 51 * 10**6 + BESIDE  # two about equal ones
    # one example is not cut, whatever the budget
    assert each.peak_bytes(100, [101], 70) == 10**9 + 70 * 10**6 + BESIDE
    assert each.peak_bytes(60, [100], 120) == 10**9 + 100 * 10**6 + BESIDE
    # the softmax of a head that trains, as long as it is kept
    trained = replace(each, scored_bytes=10**5)
    assert trained.tokens(free) < budget and (trained.peak_bytes(trained.tokens(free), [9 * budget], 10) or 0) < 0.85 * free
    assert trained.peak_bytes(100, [101], 10) == 10**9 + 51 * 10**6 + 51 * 10**5 + BESIDE
    much = 10_000, [20_001], 10
    assert (trained.peak_bytes(*much) or 0) == (each.peak_bytes(*much) or 0) + 4 * product.KEPT


def test_weights_that_a_run_copies_are_no_free_memory(tokenizer: Any) -> None:
    """Under an adapter in bfloat16 the caller's float32 base stays where it is."""
    model = add_adapter(tiny.model(), AdapterOptions(type="lora"), seed=0)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    every = sum(p.nbytes for p in model.parameters())
    assert precision.reused_bytes(model, torch.float32) == every
    assert precision.reused_bytes(model, torch.bfloat16) == trained < every
    assert precision.reused_bytes(tiny.model(), torch.bfloat16) == sum(p.nbytes for p in tiny.model().parameters())


@pytest.mark.parametrize(("most", "set_"), [(2**31, [2**31 - 1]), (2**25, [2**31 - 1, 2**25]), (0, [2**31 - 1, 2**25])])
def test_freed_memory_is_kept_as_far_as_glibc_lets(most: int, set_: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it takes no threshold for mapping, the one for trimming stays its own too."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_of_glibc", lambda name, which, size: asked.append((which, size)) or int(size <= most))
    memory.keep_freed_memory()
    assert [size for which, size in asked if which == -3] == set_
    assert [size for which, size in asked if which == -1] == ([2**31 - 1] if most else [])


def test_free_memory_is_what_the_tighter_of_machine_and_container_leaves(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:     40 kB\n")
    assert estimate._available(tmp_path / "meminfo") == 40 * 1024 and estimate._available(tmp_path / "none") is None


def group(folder: Path, limit: int | str, used: int, *, first: bool = False) -> None:
    """A control group of version 2, or of the first version, in which 500 bytes of cached files can go."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
    for name, text in (*zip(names, (limit, used), strict=True), ("stat", f"x 9\n{'total_' * first}inactive_file 500")):
        (folder / f"memory.{name}").write_text(f"{text}\n")


def test_the_tightest_control_group_counts_wherever_it_stands(tmp_path: Path) -> None:
    """A container's own is mounted at the root; those of a batch system or a service lie deeper; version 1 has other names."""
    member, root = tmp_path / "self", tmp_path / "groups"

    def left(*lines: str) -> int | None:
        member.write_text("".join(f"{line}\n" for line in lines))
        return estimate._left_in_group(root, member)

    assert left("0::/") is None and estimate._left_in_group(root, tmp_path / "none") is None
    group(root / "slurm" / "job_7", 10_000, 7000)
    group(root / "slurm" / "job_7" / "step_0", "max", 6000)
    group(root / "memory" / "docker" / "box", 5000, 4000, first=True)
    group(root / "memory" / "docker", 2**63 - 4096, 4000, first=True)
    assert left("0::/slurm/job_7/step_0") == 3500
    assert left("0::/slurm/job_8") is None and left("0::/../../slurm") is None
    assert left("3:cpu,cpuacct:/docker/box", "5:memory:/docker/box", "0::/") == 1500
    assert left("3:cpu,cpuacct:/docker/box") is None
    group(root, 9000, 7000)
    assert left("0::/slurm/job_7/step_0") == left("0::/a/path/of/the/host") == 2500


def test_the_budget_is_recorded_and_weights_that_do_not_fit_are_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("preftune.runs.answers.NEW_TOKENS", 2)
    monkeypatch.setattr("preftune.report.write", lambda folder: None)
    keys: dict[str, Any] = {"dtype": "float32", "steps": 1, "eval_groups": []}
    monkeypatch.setattr(estimate, "matrix_rate", None)  # a run reads no time, and measures nothing for it
    with caplog.at_level(logging.INFO, "preftune"):
        preftune.fit(tiny.model(), tokenizer, tiny.pairs(), out=tmp_path / "a", **keys)
        monkeypatch.setattr(estimate, "free_bytes", lambda device: 90_000)
        with pytest.raises(RunFailed, match=r"8,192 parameters, 8,192 of them trained, take 0\.000131 GB"):
            preftune.fit(tiny.model(), tokenizer, tiny.pairs(), out=tmp_path / "b", **keys)
    assert f"tokens_per_microbatch: {estimate.LARGEST}" in (tmp_path / "a" / "config.yaml").read_text()
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("short_answers", "no_report")
def test_what_is_loaded_already_counts_as_free(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is a part of what the run will hold, and another reference is gone before there are gradients; but one that
    the user holds stays. By hand: a run holds 16 bytes for each parameter, a model 4."""
    count = 8192
    keys: dict[str, Any] = {"dtype": "float32", "steps": 1, "eval_groups": [], "reference_store": "off"}

    def free(parameters: int) -> None:
        monkeypatch.setattr(estimate, "free_bytes", lambda device: parameters * count)

    free(12)
    assert preftune.fit(tiny.model(), tokenizer, tiny.pairs(2), **keys).metrics
    for less, reference in ((11, None), (8, tiny.model(seed=1))):
        free(less)
        with pytest.raises(RunFailed, match="are free: train an adapter"):
            preftune.fit(tiny.model(), tokenizer, tiny.pairs(2), reference=reference, **keys)
    model, other, data = write_model(tmp_path / "m"), write_model(tmp_path / "r", seed=1), tmp_path / "d.jsonl"
    write_rows(data, PAIRS[:4])
    words = [f"model={model}", f"reference={other}", f"data={data}", f"eval_data={data}", "steps=1", "dtype=float32"]
    free(8)
    assert train(resolve(TrainKeys, [*words, f"out={tmp_path / 'a'}"]))
    free(7)
    with pytest.raises(RunFailed, match="are free: train an adapter"):
        train(resolve(TrainKeys, [*words, f"out={tmp_path / 'b'}", "reference.store=off"]))
