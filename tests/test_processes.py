"""Two processes are one: the same gradient and the same steps, whoever computed which example."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import processes_case
import pytest
import tiny
import torch
from command import PAIRS, call, quietly, repeated, write_model, write_rows
from safetensors.torch import load_file
from test_trie import HEADS, ROPES, build
from torch import Tensor

import preftune
from preftune import processes
from preftune.config import resolve
from preftune.data.render import Batch, Rendered
from preftune.errors import Refusal, RunFailed
from preftune.keys import TrainKeys
from preftune.runs import checkpoint, metrics
from preftune.runs.conduct import _with_budget
from preftune.scoring.parts import put_in_parts
from preftune.scoring.plan import shares
from preftune.scoring.score import passes
from preftune.scoring.scorer import Scorer
from preftune.training import estimate
from preftune.training.memory import finer_if_needed
from preftune.training.signals import Stop

TESTS = Path(__file__).parent
SOURCE = Path(preftune.__file__).parents[1]


def start(count: int, *words: str, folders: Sequence[Path] = ()) -> list[subprocess.Popen[str]]:
    """Processes that find each other as torchrun's do, each in its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found: list[subprocess.Popen[str]] = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        own["PYTHONUNBUFFERED"] = ""  # what is said waits for being flushed, as it does for people
        own["PYTHONPATH"] = os.pathsep.join((str(SOURCE), str(TESTS)))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        where = folders[rank] if folders else None
        found.append(subprocess.Popen([sys.executable, *words], env={**os.environ, **own}, text=True, cwd=where, **pipes))
    return found


def ended(started: list[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each."""
    try:
        said = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *own) for process, own in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes came to."""
    out = tmp_path_factory.mktemp("two")
    for code, _, err in ended(start(2, str(TESTS / "processes_case.py"), str(out))):
        assert code == 0, err[-3000:]
    return out


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], kind: str) -> float:
    """The largest over all parameters of |a - b| / |a|."""
    assert a.keys() == b.keys()
    names = [name for name in a if name.startswith(kind)]
    assert names
    return max(float((a[name] - b[name]).detach().norm() / a[name].detach().norm().clamp(min=1e-12)) for name in names)


@pytest.mark.parametrize(("method", "adapter", "sharing"), processes_case.CASES)
def test_two_processes_take_the_steps_of_one(computed: Path, method: str, adapter: str, sharing: str) -> None:
    one = processes_case.case(method, adapter, sharing, in_parts=False)
    for how in ("replicate", "fsdp"):
        two = load_file(computed / f"{method}-{adapter}-{sharing}-{how}.safetensors")
        assert distance(one, two, "gradient.") < 1e-5, how
        assert distance(one, two, "change.") < 1e-4, how
        torch.testing.assert_close(one["loss"], two["loss"], rtol=1e-5, atol=1e-6)


# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model")
    write_rows(folder / "pairs.jsonl", PAIRS[:24])
    return folder


def words(files: Path, *more: str) -> list[str]:
    own = [f"model={files / 'model'}", f"data={files / 'pairs.jsonl'}", "batch_size=4", "steps=4", "learning_rate=1e-3"]
    return ["-m", "preftune", "train", *own, "reference.store=off", *more]


def test_a_run_in_parts_is_saved_whole_and_goes_on_in_one_process(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    alone, parted = tmp_path / "alone", tmp_path / "parted"
    # the bounds are float32's: in bfloat16 another order of sums is another loss in the third digit
    with_eval = ["dtype=float32", "train.eval_every=2", "train.save_every=2"]
    assert quietly(*words(files, *with_eval, f"out={alone}")[2:]) == 0
    for code, out, err in ended(start(2, *words(files, *with_eval, "train.parallel=fsdp", f"out={parted}"))):
        assert code == 0 and not out, err
    lines = [metrics.read(folder / "metrics.jsonl") for folder in (alone, parted)]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("eval/loss", 0.0) == pytest.approx(b.get("eval/loss", 0.0), rel=1e-4)
    first, second = (dict(AutoModelForCausalLM.from_pretrained(f / "model").named_parameters()) for f in (alone, parted))
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=1e-3, atol=1e-5)
    again = call(capsys, "train", f"resume={parted}", "steps=6")
    assert again.code == 0 and "going on after step 4 of 6" in again.err
    assert [line["step"] for line in metrics.read(parted / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_two_processes_go_on_as_they_would_have(files: Path, tmp_path: Path) -> None:
    """To the bit, with evaluations between the steps; what dropout drops in one is none of the other's."""
    how = ["adapter=lora", "adapter.dropout=0.5", "train.eval_every=2", "train.save_every=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for code, _, err in ended(start(2, *words(files, *how, f"out={whole}"))):
        assert code == 0, err
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000004")
    (parts / "evaluation.json").unlink()
    for code, _, err in ended(start(2, "-m", "preftune", "train", f"resume={parts}")):
        assert code == 0, err
    one, two = (repeated(metrics.read(folder / "metrics.jsonl")) for folder in (whole, parts))
    assert [line["step"] for line in one] == [1, 2, 3, 4] and one == two
    first, second = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (whole, parts))
    assert first and all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_two_processes_go_on_after_the_last_step(files: Path, tmp_path: Path) -> None:
    """Stopped within the last evaluation: no step is left, and each knows those that were taken."""
    out = tmp_path / "run"
    assert quietly(*words(files, "train.save_every=2", f"out={out}")[2:]) == 0
    before = (out / "evaluation.json").read_text()
    (out / "evaluation.json").unlink()
    for code, _, err in ended(start(2, "-m", "preftune", "train", f"resume={out}")):
        assert code == 0, err
    assert json.loads((out / "evaluation.json").read_text())["kept_step"] == json.loads(before)["kept_step"] == 4


@pytest.mark.parametrize(
    ("parallel", "said"), [("replicate", "goes on from there"), ("fsdp", "begins anew: there is no checkpoint yet")]
)
def test_a_process_that_dies_ends_the_run_with_what_was_trained(parallel: str, said: str, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    running = start(2, *words(files, "steps=2000", f"train.parallel={parallel}", f"out={out}"))
    until = time.monotonic() + 120
    while not metrics.read(out / "metrics.jsonl"):
        assert time.monotonic() < until and running[0].poll() is None
        time.sleep(0.05)
    running[1].send_signal(signal.SIGKILL)
    (code, _, err), _ = ended(running, seconds=60)
    assert code == 1 and "Traceback" not in err, err
    assert "another process of this run has ended" in err and f"train resume={out} {said}" in err


FAILS = """
import os, torch
from preftune.cli.app import run
from preftune.training import steps
given, backward = [], steps.backward
def fails(*words):
    given.append(words)
    if os.environ["RANK"] == "0" and len(given) == 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return backward(*words)
steps.backward = fails
run()
"""


def test_a_process_that_fails_alone_saves_alone(files: Path, tmp_path: Path) -> None:
    """Without the others, who are elsewhere; also what each needs to go on."""
    out = tmp_path / "run"
    (code, _, err), _ = ended(start(2, "-c", FAILS, *words(files, f"out={out}")[2:]), seconds=60)
    assert code == 1 and "Traceback" not in err, err
    assert "out of memory in process 0 of 2" in err and f"train resume={out} goes on from there" in err, err
    saved = load_file(out / "checkpoints" / "step-000002" / checkpoint.TENSORS)
    assert not torch.equal(saved["random.0.0"], saved["random.1.0"])


DIES = """
import os
from preftune.cli.app import run
from preftune.models import load
if os.environ["RANK"] == "1":
    load.load_model = lambda *given, **more: os._exit(9)
run()
"""


def test_a_process_that_dies_while_it_loads_ends_the_run_too(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (code, _, err), (died, _, _) = ended(start(2, "-c", DIES, *words(files, f"out={out}")[2:]), seconds=60)
    assert (code, died) == (1, 9) and "Traceback" not in err, err
    assert "another process of this run has ended" in err and not out.exists()


ENDS = """
import atexit, os
from preftune.cli.app import run
atexit.register(os._exit, 9)
run()
"""


@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_processes_that_are_done_leave_at_once(parallel: str, files: Path, tmp_path: Path) -> None:
    """Python does not end around threads of torch that still run; nothing that was said or written is lost."""
    own = words(files, "steps=1", f"train.parallel={parallel}", f"out={tmp_path / 'run'}", "--json")[2:]
    (first, said, _), (second, nothing, _) = ended(start(2, "-c", ENDS, *own))
    assert (first, second) == (0, 0) and json.loads(said) and not nothing
    assert metrics.read(tmp_path / "run" / "metrics.jsonl")


def test_the_first_process_alone_speaks_of_a_refusal(files: Path, tmp_path: Path) -> None:
    (first, _, said), (second, _, nothing) = ended(start(2, *words(files, "batch_size=1", f"out={tmp_path / 'run'}")))
    assert first == second == 2
    line = "preftune: batch_size: 2 processes cannot share 1 examples of a step: start fewer, or raise it\n"
    assert said.endswith(line) and not nothing
    assert not (tmp_path / "run").exists()


def test_what_one_process_cannot_read_the_first_one_names(files: Path, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "pairs.jsonl").symlink_to(files / "pairs.jsonl")
    own = ["-m", "preftune", "train", f"model={files / 'model'}", "data=pairs.jsonl", "batch_size=2", f"out={tmp_path / 'run'}"]
    (first, _, said), (second, _, nothing) = ended(start(2, *own, folders=[tmp_path / "0", tmp_path / "1"]))
    assert first == second == 2
    assert said.endswith("preftune: process 1 of 2: pairs.jsonl: no such file.\n") and not nothing
    assert not (tmp_path / "run").exists()


def test_other_verbs_are_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = call(capsys, "check", "pairs.jsonl")
    assert answer.code == 2 and "check is one process" in answer.err


# -- in this process --------------------------------------------------------------------------------------------------------


def test_shares_keep_groups_whole_and_balance_tokens() -> None:
    lengths = [(0, 9), (0, 5), (1, 4), (2, 12), (3, 3)]  # distinct tokens of the groups: 12, 4, 12, 3
    sequences = [Rendered(group, n, (0, 0, *[n + 1] * (length - 2)), 2) for n, (group, length) in enumerate(lengths)]
    needs = [[n] for n in range(len(sequences))]
    assert shares(sequences, needs, 1) == [[0, 1, 2, 3, 4]]
    found = shares(sequences, needs, 2)
    assert sorted(place for own in found for place in own) == [0, 1, 2, 3, 4]
    assert [[sequences[place].group for place in own] for own in found] == [[0, 0, 1], [2, 3]]
    assert shares(sequences[:2], needs[:2], 3) == [[0, 1], [], []]


def test_what_a_process_has_to_say_stands_where_the_others_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(value: object) -> NoReturn:
        raise RuntimeError("gloo: Connection closed by peer")

    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "gathered", lost)
    with pytest.raises(Refusal, match="its own"), processes.agreeing():
        raise Refusal("its own", code="bad_value")
    with pytest.raises(RuntimeError, match="gloo"), processes.agreeing():
        pass


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_an_environment_that_says_no_number(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "two")
    answer = call(capsys, "train", "model=m")
    assert answer.code == 2 and f"preftune: {name}: of the environment is 'two' and no number" in answer.err


def test_where_several_share_a_step_memory_that_is_short_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def work(budget: int) -> None:
        tried.append(budget)
        raise MemoryError

    monkeypatch.setattr(processes, "size", lambda: 2)
    with pytest.raises(MemoryError):
        finer_if_needed(work, 1024, 64, clear=lambda: None)
    assert tried == [1024]


@pytest.mark.parametrize(("parallel", "free"), [("fsdp", True), ("replicate", False)])
def test_what_is_in_parts_takes_a_part_of_the_memory(parallel: str, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four processes, each with room for the weights twice: with gradients and AdamW's state they are four times as much."""
    model = tiny.model()
    monkeypatch.setattr(processes, "size", lambda: 4)
    monkeypatch.setattr(processes, "gathered", lambda value: [value] * 4)
    monkeypatch.setattr(estimate, "free_bytes", lambda device: sum(p.nbytes for p in model.parameters()))
    keys = resolve(TrainKeys, ["model=m", "data=d.jsonl", "method=dpo", f"train.parallel={parallel}"])
    with nullcontext() if free else pytest.raises(RunFailed, match=r"parameters, .* of them trained"):
        _with_budget(keys, model, torch.float32, passing=0)


def test_every_process_has_the_budget_of_the_one_with_the_least_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts are made by each for itself, and have to be the same."""
    model, free = tiny.model(), [4 * 10**9, 85 * 10**7, 2 * 10**9]
    keys = resolve(TrainKeys, ["model=m", "data=d.jsonl", "method=dpo"])
    found: list[int | None] = []
    for rank, own in enumerate(free):
        monkeypatch.setattr(estimate, "free_bytes", lambda device, own=own: own)

        def gathered(value: int, rank: int = rank) -> list[int]:
            return [value + other - free[rank] for other in free]

        monkeypatch.setattr(processes, "gathered", gathered)
        found.append(_with_budget(keys, model, torch.float32, passing=0).train.tokens_per_microbatch)
    monkeypatch.setattr(processes, "gathered", lambda value: [value])
    monkeypatch.setattr(estimate, "free_bytes", lambda device: free[1])
    assert found == [_with_budget(keys, model, torch.float32, passing=0).train.tokens_per_microbatch] * 3
    assert found[0] is not None and estimate.SMALLEST < found[0] < estimate.LARGEST


def test_layers_that_processes_would_gather_another_number_of_times_are_refused() -> None:
    """Before anything is cut: of a model that runs response by response, and of rows that cannot go through one together."""
    with pytest.raises(Refusal, match="CpmAntForCausalLM can only be run response by response") as refused:
        put_in_parts(build("CpmAnt", HEADS["CpmAnt"][0]), torch.float32)
    assert refused.value.key == "train.parallel"
    groups = tuple(tiny.pair("", "", "") for _ in range(2))
    for rope, before, lengths in (("longrope", 0, [20, 33]), ("dynamic", 0, [33, 34]), ("longrope", 9, [20, 30])):
        scorer = Scorer(build(*ROPES[rope]))
        scorer.before = before
        for in_parts, own, whole in (
            (False, lengths, True),
            (True, [20, 20], True),
            (True, [40, 40], True),
            (True, lengths, False),
        ):
            scorer.in_parts = in_parts
            rows = tuple(Rendered(0, n, (n,) * length, 1) for n, length in enumerate(own))
            with nullcontext() if whole else pytest.raises(RunFailed, match="at 32 tokens, and rows of"):
                assert passes(scorer, Batch(groups, rows), [[0, 1]], 1000) == [[0]]
            assert len(passes(scorer, Batch(groups, rows), [[0], [1]], 1)) == 2, (
                "alone in its pass each may be as long as it is"
            )


def test_a_second_signal_stops_at_once_where_nobody_else_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop()
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop.ask(signal.SIGINT, None)
    stop.ask(signal.SIGTERM, None)
    assert stop.signal == signal.SIGINT
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGTERM, None)


def test_one_process_tells_itself_what_it_says() -> None:
    assert processes.gathered(3) == [3] and processes.of_first("a") == "a"
    assert (processes.rank(), processes.size()) == (0, 1)
