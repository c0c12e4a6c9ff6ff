"""A run that was stopped anywhere and goes on is the run that was not stopped: weights, metrics, samples, to the bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import PAIRS, call, repeated, write_model, write_rows
from safetensors import SafetensorError
from safetensors.torch import load_file

from preftune.config import resolve
from preftune.errors import Interrupted, Refusal, RunFailed
from preftune.keys import TrainKeys
from preftune.models import load
from preftune.models.load import save_model
from preftune.runs import checkpoint, course, metrics
from preftune.runs.resume import keys_of
from preftune.runs.train import train
from preftune.training import optimizers
from preftune.training.guards import Guards
from preftune.training.state import Saved

pytestmark = pytest.mark.usefixtures("short_answers", "no_report")

STEPS = 6
KINDS = {
    "full": ["train.eval_every=2"],
    "lora": ["adapter=lora", "adapter.dropout=0.3", "dtype=bfloat16", "train.eval_every=3"],
    "checkpointed": ["train.checkpointing=true", "adapter=lora", "adapter.dropout=0.3"],
    "moving": ["reference.sync_steps=2", "reference.sync_alpha=0.5"],
}


class Killed(BaseException):
    """As kill -9: nothing in a run answers it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    here, before = tmp_path_factory.mktemp("resume"), os.getcwd()
    write_model(here / "m", positions=128)
    write_rows(here / "pairs.jsonl", PAIRS[:24])
    os.chdir(here)
    yield here
    os.chdir(before)


@pytest.fixture(scope="module")
def whole(place: Path) -> Callable[[str], Path]:
    """The folder of a run that nothing stopped, by kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preftune.runs.answers.NEW_TOKENS", 3)
        patch.setattr("preftune.report.write", lambda folder: None)
        for kind in KINDS:
            begin(kind, place / f"whole-{kind}")
    return lambda kind: place / f"whole-{kind}"


def words(kind: str, out: Path) -> list[str]:
    usual = ["model=m", "data=pairs.jsonl", "batch_size=8", f"steps={STEPS}", "learning_rate=3e-3", "train.save_every=2"]
    return [*usual, "reference.store=off", *KINDS[kind], f"out={out}"]


def begin(kind: str, out: Path, progress: Any = None) -> None:
    train(resolve(TrainKeys, words(kind, out)), progress=progress)


def go_on(out: Path, *more: str, progress: Any = None) -> Any:
    return train(keys_of([f"resume={out}", *more]), config=out / "config.yaml", progress=progress)


def same(out: Path, other: Path) -> bool:
    """Whether two runs left the same: weights, metrics of every step, figures and samples."""
    (one, two) = (load_file(next((folder / "model").glob("*.safetensors"))) for folder in (out, other))
    weights = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    files = ("evaluation.json", "samples.jsonl")
    return weights and lines(out) == lines(other) and all((out / f).read_bytes() == (other / f).read_bytes() for f in files)


def lines(out: Path) -> list[dict[str, Any]]:
    return repeated(json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines())


def at(phase: str, done: int | None) -> Any:
    def watch(now: str, count: int, total: int, line: dict[str, Any]) -> None:
        if now == phase and done in (count, None):
            raise Killed

    return watch


POINTS = [("full", 1), ("full", 5), *((kind, n) for kind in KINDS for n in (3, 6))]


@pytest.mark.parametrize(("kind", "step"), POINTS)
def test_killed_after_any_step(kind: str, step: int, whole: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        begin(kind, out, at("train", step))
    assert len(list((out / "checkpoints").glob("step-*"))) == min(2, (step - 1) // 2), "the checkpoint is written after that"
    go_on(out)
    assert same(out, whole(kind))
    assert "\nresume" not in (out / "config.yaml").read_text()
    assert json.loads((out / "environment.json").read_text())["resumed"][0]["started"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("preftune.runs.checkpoint.save_file", 1),
        ("preftune.runs.checkpoint._flush", 2),
        ("preftune.runs.checkpoint.os.replace", 2),
        ("preftune.runs.course.Best._write", 2),
        ("preftune.runs.checkpoint.write_tensors", 2),
        ("preftune.runs.metrics.Sink.__call__", 3),
        ("preftune.runs.conduct.files.write_json", 1),
        ("preftune.runs.trainer.files.write_json", 2),
        ("preftune.runs.conduct.files.write_lines", 2),
        ("preftune.runs.conduct.files.write_json", 5),
    ],
)
def test_killed_within_any_write(
    name: str, count: int, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the calls of what is written have gone well by then; the same file may be written in two places."""
    out, seen = tmp_path / "run", 0
    parent, _, last = name.rpartition(".")
    right = getattr(pytest.importorskip("pydoc").locate(parent), last)

    def breaks(*arguments: Any, **more: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == count:
            raise Killed
        return right(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(name, breaks)
        with pytest.raises(Killed):
            begin("full", out)
    assert seen == count
    go_on(out)
    assert same(out, whole("full"))
    assert not list((out / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("phase", ["reference", "evaluate", "kl"])
def test_stopped_by_a_signal_in_any_phase(phase: str, whole: Callable[[str], Path], tmp_path: Path) -> None:
    """Two times: the first and the last pass of that kind, if the run has several. The second goes on from the first."""
    out, passes = tmp_path / "run", 0

    def count(now: str, done: int, total: int, line: dict[str, Any]) -> None:
        nonlocal passes
        passes += now == phase

    begin("full", tmp_path / "counted", count)
    for number in dict.fromkeys((1, passes)):
        seen = 0

        def stops(now: str, done: int, total: int, line: dict[str, Any], number: int = number) -> None:
            nonlocal seen
            seen += now == phase
            if now == phase and seen == number:
                raise KeyboardInterrupt

        shutil.rmtree(out, ignore_errors=True)
        with pytest.raises(Interrupted, match=f"train resume={out}"):
            begin("full", out, stops)
        go_on(out)
        assert same(out, whole("full")), number


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_update_that_was_begun_is_not_saved(
    error: type[BaseException], whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of no step then, and the checkpoint of the step before stays what it is."""
    out, right, seen = tmp_path / "run", optimizers.step_at, 0

    def breaks(*arguments: Any) -> None:
        nonlocal seen
        seen += 1
        right(*arguments)
        if seen == 3:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "step_at", breaks)
        with pytest.raises((Interrupted, RuntimeError)):
            begin("full", out)
    go_on(out)
    assert same(out, whole("full"))


def test_stopped_again_before_the_checkpoint_is_taken_up(
    whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the evaluation that was cut short the first time: the checkpoint stays the newest, and no other is made."""
    out, right = tmp_path / "run", course.method_metrics

    def stops(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    def watch(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        monkeypatch.setattr(course, "method_metrics", stops if (phase, done) == ("train", 3) else course.method_metrics)

    with pytest.raises(Interrupted):
        begin("full", out, watch)
    with pytest.raises(Interrupted, match="goes on from step-000004"):
        go_on(out)
    assert [path.name for path in sorted((out / "checkpoints").glob("step-*"))] == ["step-000002", "step-000004"]
    monkeypatch.setattr(course, "method_metrics", right)
    go_on(out)
    assert same(out, whole("full"))


def test_a_run_may_go_on_for_longer(whole: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole("full"), out)
    go_on(out, f"steps={STEPS + 3}", "train.trackers=[tensorboard]")
    assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 4))
    assert "steps: 9" in (out / "config.yaml").read_text() and (out / "tensorboard").is_dir()
    with pytest.raises(Refusal, match="begun for 9 steps, and 7 are asked for"):
        go_on(out, "steps=7")


def test_it_ends_early_once_the_held_out_loss_does_not_fall(tmp_path: Path, place: Path, caplog: Any) -> None:
    """A learning rate that is far too high; killed on the way, it ends at the same step."""
    said = [
        "model=m",
        "data=pairs.jsonl",
        "batch_size=4",
        "steps=12",
        "learning_rate=0.5",
        "train.save_every=1",
        "dtype=float32",
    ]
    said += ["train.eval_every=1", "train.early_stop=2", "train.schedule=constant"]
    with caplog.at_level("INFO", "preftune"):
        result = train(resolve(TrainKeys, [*said, f"out={tmp_path / 'whole'}"]))
    assert result.kept_step + 2 == len(lines(tmp_path / "whole")) < 12 and "train.early_stop: ended after step" in caplog.text
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train(resolve(TrainKeys, [*said, f"out={out}"]), progress=at("kl", None))
    go_on(out)
    assert same(out, tmp_path / "whole")


# -- checkpoints that are not whole -------------------------------------------------------------------------------------------


def saved(folder: Path) -> list[Path]:
    return sorted(next(iter(sorted(folder.glob("checkpoints/step-*"), reverse=True))).iterdir())


@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    how: str, whole: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [path.name for path in saved(whole("full"))]
    assert {"manifest.json", "state.safetensors", "state.json", "model.safetensors", "best.safetensors"} <= {*names}
    for name in names:
        out = tmp_path / f"{how}-{name}"
        shutil.copytree(whole("full"), out)
        newest, older = (out / "checkpoints" / f"step-00000{n}" for n in (6, 4))
        path = newest / name
        data = bytearray(path.read_bytes())
        if how == "missing":
            path.unlink()
        else:
            data[len(data) // 2] ^= 1
            path.write_bytes(data[:-1] if how == "cut" else data)
        assert checkpoint.latest(out / "checkpoints") == older, name
        assert str(newest) in caplog.text and (name in caplog.text)
        caplog.clear()


def test_any_bit_of_a_manifest_may_fall_over(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """None is taken for whole; all but one bit, which makes another version's number of this one's, leave the one before it."""
    shutil.copytree(next((whole("full") / "checkpoints").glob("step-*6")), folder := tmp_path / "step-000006")
    path = folder / checkpoint.MANIFEST
    data, newer = path.read_bytes(), 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert checkpoint.damage(folder) or same_json(flipped, data), bit
        except Refusal as refused:
            newer += 1
            assert refused.code == "newer_checkpoint"
    assert newer == 1


def same_json(one: bytes | bytearray, other: bytes) -> bool:
    """Another blank between the same words is no damage."""
    return json.loads(one) == json.loads(other)


def test_figures_of_the_start_that_are_damaged_are_measured_again(
    whole: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        begin("full", out, at("train", 3))
    start = out / "checkpoints" / "start.json"
    text = start.read_text()
    for damaged in (text.replace('"loss": 0.6', '"loss": 0.7', 1), text.replace("before", "befose"), text[:-9], "[]"):
        assert damaged != text
        shutil.rmtree(again := tmp_path / "again", ignore_errors=True)
        shutil.copytree(out, again)
        (again / "checkpoints" / "start.json").write_text(damaged)
        go_on(again)
        assert same(again, whole("full")) and "start.json is damaged: what stands in it is measured again" in caplog.text
        caplog.clear()


def test_what_is_done_when_none_is_whole(whole: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole("full"), out)
    for path in (out / "checkpoints").glob("step-*/state.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(Refusal, match="none of its 2 checkpoints is whole: start anew") as refused:
        go_on(out, "steps=9")
    assert refused.value.code == "damaged_checkpoints"


@pytest.mark.parametrize(
    ("number", "said"), [(checkpoint.FORMAT + 1, "newer preftune"), (checkpoint.FORMAT - 1, "older preftune")]
)
def test_a_checkpoint_of_another_format_is_refused(
    number: int, said: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole("full"), out)
    path = out / "checkpoints" / "step-000006" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": number}
    if number < checkpoint.SEALED:
        del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(Refusal, match=said):
        go_on(out, "steps=9")


def test_the_best_of_a_checkpoint_is_that_of_its_step(whole: Callable[[str], Path]) -> None:
    """A later best evaluation replaces the file beside the checkpoints, and not what they hold of it."""
    found = [checkpoint.facts_of(folder)["best"] for folder in sorted((whole("full") / "checkpoints").glob("step-*"))]
    assert [step for step, *_ in found] == [4, 6]
    kept = [load_file(p) for p in sorted((whole("full") / "checkpoints").glob("step-*/best.safetensors"))]
    states = [load_file(p) for p in sorted((whole("full") / "checkpoints").glob("step-*/state.safetensors"))]
    for best, state in zip(kept, states, strict=True):
        assert all(torch.equal(best[name], state[f"weight.{name}"]) for name in best)


def test_a_full_disk_stops_nothing(
    whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right, seen = checkpoint.save_file, 0

    def full(*arguments: Any, **more: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 4:  # the second checkpoint: before it one of each evaluation
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        right(*arguments, **more)

    monkeypatch.setattr(checkpoint, "save_file", full)
    begin("full", tmp_path / "run")
    assert same(tmp_path / "run", whole("full"))
    (said,) = [r.getMessage() for r in caplog.records if "was not written" in r.getMessage()]
    assert "step 4" in said and "GB are free: free some in" in said and "step-000002 is there" in said
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").glob("step-*"))] == ["step-000002", "step-000006"]


def test_a_full_disk_at_the_end_costs_the_steps_since_the_last_checkpoint(
    whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = load.save_model

    def full(model: Any, tokenizer: Any, folder: Path, **more: Any) -> None:
        def save(place: Path) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "save_pretrained", save)
            right(model, tokenizer, folder, **more)

    with monkeypatch.context() as patch:
        patch.setattr(load, "save_model", full)
        with pytest.raises(RunFailed, match=r"model/ was not written .*free some in .* goes on from step-000006") as failed:
            begin("full", tmp_path / "run")
    assert failed.value.code == "os_error"
    assert not list((tmp_path / "run").glob("model*"))
    go_on(tmp_path / "run")
    assert same(tmp_path / "run", whole("full"))


def one(parent: Path, step: int, write: Callable[[Path], None] | None = None, keep: int = 2) -> Path:
    """A checkpoint of one number, the step."""

    def plain(folder: Path) -> None:
        folder.mkdir(parents=True)

    saved = Saved({"random.0.0": torch.tensor([step])}, {"step": step})
    return checkpoint.save(parent, step, saved, write or plain, keep=keep)


def test_the_folders_of_a_model_belong_to_its_checkpoint(tmp_path: Path) -> None:
    """A tokenizer with several templates writes them into one."""

    def write(folder: Path) -> None:
        (folder / "templates").mkdir(parents=True)
        (folder / "templates" / "tool_use.jinja").write_text("{{ messages }}")

    folder = one(tmp_path, 1, write)
    assert checkpoint.damage(folder) is None
    (folder / "templates" / "tool_use.jinja").unlink()
    assert checkpoint.damage(folder) == "templates/tool_use.jinja is missing"


def test_nothing_is_left_of_what_was_not_written_to_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither by a disk that is full, of which tokenizers has an error of its own, nor by a process that was killed."""

    def full(folder: Path) -> None:
        save_model(tiny.model(), Tokenizer(), folder)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    one(tmp_path, 1)
    (tmp_path / "step-000002.tmp.tmp").mkdir()
    assert checkpoint.tried("the checkpoint of step 3", tmp_path, lambda: one(tmp_path, 3, full)) is None
    assert "GB are free: free some in" in caplog.text and [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_steps_are_counted_beyond_six_digits(tmp_path: Path) -> None:
    found = [one(tmp_path, step, keep=1) for step in (999_999, 1_000_000)]
    assert checkpoint.newest(tmp_path) == checkpoint.latest(tmp_path) == found[1] and not found[0].exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_checkpoint_of_the_same_step_stays_until_the_new_one_is_there(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before either of the two names is given."""
    one(tmp_path, 5, keep=1)
    right, seen = os.replace, 0

    def breaks(*arguments: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            raise Killed
        right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("preftune.runs.checkpoint.os.replace", breaks)
        with pytest.raises(Killed):
            one(tmp_path, 5, keep=1)
    found = checkpoint.latest(tmp_path)
    assert found is not None and checkpoint.facts_of(found) == {"step": 5}
    one(tmp_path, 5, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


@pytest.mark.parametrize("times", [1, 2])
def test_best_weights_that_found_no_room_are_written_with_the_checkpoint(
    times: int, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or there is no checkpoint: none holds the best weights of an earlier evaluation under the name of this one."""
    out, right, seen = tmp_path / "run", checkpoint.write_tensors, 0

    def full(path: Path, tensors: Any) -> Path:
        nonlocal seen
        seen += 1
        if 3 <= seen < 3 + times:
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(Killed):
            begin("full", out, at("kl", None))
    assert (out / "checkpoints" / "step-000006").exists() == (times == 1)
    go_on(out)
    assert same(out, whole("full"))


def test_metrics_lose_half_a_line_and_later_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keys = resolve(TrainKeys, ["model=m", "data=pairs.jsonl"])
    with metrics.open_metrics(tmp_path, keys, Guards(), after=2) as sink:
        assert sink.lines == [{"step": 1}, {"step": 2}]
        sink({"step": 3, "x": 1})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "x": 1}\n'


def test_without_a_number_of_steps_time_decides(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 1000))  # seconds: a checkpoint after every second look
    monkeypatch.setattr(course.time, "monotonic", lambda: next(clock))
    train(resolve(TrainKeys, ["model=m", "data=pairs.jsonl", "steps=4", "batch_size=4", f"out={tmp_path / 'run'}"]))
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").glob("step-*"))]


# -- refusals -----------------------------------------------------------------------------------------------------------------


def test_what_is_refused(whole: Callable[[str], Path], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = whole("full")
    write_rows(place / "other.yaml", [{"beta": 0.3, "steps": 8}])
    for said, code, parts in (
        ((f"resume={run}",), "complete", ["steps="]),
        ((f"resume={run}", "learning_rate=1e-5", "beta=0.2"), "another_config",
         ["learning_rate is 0.003 there and 1e-05 here", "beta is 0.1 there and 0.2 here"]),
        (("other.yaml", f"resume={run}"), "another_config", ["beta is 0.1 there and 0.3 here"]),
        ((f"resume={run}", "steps=8", "dry_run=true"), "unused_key", ["dry_run"]),
        ((f"resume={run}", "steps=8", "overwrite=true"), "unused_key", ["overwrite"]),
        ((f"resume={place / 'm'}",), "no_run", ["no config.yaml"]),
        (("resume=nowhere",), "no_run", ["nowhere is not there"]),
        (("resume=",), "missing_key", ["train resume=RUN"]),
        ((f"resume={run}", "steps=2"), "shorter", ["begun for 6 steps, and 2"]),
    ):  # fmt: skip
        answer = call(capsys, "train", *said, "--json")
        assert (answer.code, answer.error["code"]) == (2, code), answer.err
        assert all(part in answer.error["message"] for part in parts), answer.error
    before = (place / "pairs.jsonl").read_text()
    try:
        write_rows(place / "pairs.jsonl", PAIRS[:25])
        answer = call(capsys, "train", f"resume={run}", "steps=8", "--json")
        assert (answer.code, answer.error["code"]) == (2, "changed_file") and "pairs.jsonl" in answer.err
    finally:
        (place / "pairs.jsonl").write_text(before)
    assert lines(run)[-1]["step"] == STEPS, "nothing was touched"


@pytest.mark.parametrize(
    "changed", ["r/model.safetensors", "r/config.json", "m/config.json", "m/tokenizer.json", "data/b.jsonl"]
)
def test_a_run_goes_on_with_the_files_that_it_was_begun_with(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever that is said, and not with others, nor with more of them."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("m"), positions=128)
    write_model(Path("r"), seed=5, positions=128)
    Path("data").mkdir()
    write_rows(Path("data/a.jsonl"), PAIRS[:24])
    own = ["model=m", "reference=r", "data=data", "method=dpo", "batch_size=8", "steps=3", "train.save_every=1"]
    with pytest.raises(Killed):
        train(resolve(TrainKeys, [*own, "reference.store=off", "out=run"]), progress=at("train", 2))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    path = tmp_path / changed
    if path.suffix == ".jsonl":
        write_rows(path, PAIRS[24:30])
    else:
        before = path.read_bytes()
        path.write_bytes(before + b" ")
    with pytest.raises(Refusal) as refused:
        go_on(tmp_path / "run")
    assert (refused.value.code, refused.value.file) == ("changed_file", str(path))
    if path.suffix == ".jsonl":
        path.unlink()
    else:
        path.write_bytes(before)
    go_on(tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 3


def test_two_do_not_train_in_one_folder(whole: Callable[[str], Path], tmp_path: Path) -> None:
    out, other = tmp_path / "run", "another process trains in .*run just now"
    tried: list[str] = []

    def watch(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if (phase, done) == ("train", 3):
            for again in (lambda: go_on(out), lambda: train(resolve(TrainKeys, [*words("full", out), "overwrite=true"]))):
                with pytest.raises(Refusal, match=other) as refused:
                    again()
                tried.append(str(refused.value.key))

    begin("full", out, watch)
    assert tried == ["resume", "out"] and same(out, whole("full"))
    shutil.rmtree(out)
    with pytest.raises(Killed):
        begin("full", out, at("train", 2))
    go_on(out, progress=watch)
    assert tried == ["resume", "out"] * 2 and same(out, whole("full"))


def test_a_run_of_so_many_steps_goes_on_by_epochs(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """21 rows are three steps an epoch."""
    shutil.copytree(whole("full"), out := tmp_path / "run")
    with pytest.raises(Refusal, match="begun for 6 steps, and 3 are asked for") as refused:
        go_on(out, "epochs=1")
    assert refused.value.key == "epochs"
    go_on(out, "epochs=3")
    assert len(lines(out)) == 9
    with pytest.raises(Refusal, match="complete"):
        go_on(out, "train.trackers=[tensorboard]")


def test_stopped_before_it_took_up_where_it_was(whole: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        begin("full", out, at("train", 5))

    def stops(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"after step 4 of 6; train resume=.*run goes on from step-000004"):
        go_on(out, progress=stops)
    go_on(out)
    assert same(out, whole("full"))


@pytest.mark.parametrize("how", ["cut", "a folder", "another file"])
def test_whatever_became_of_the_store_a_run_goes_on_with_its_own_values(
    how: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    store, own = tmp_path / "s.sqlite", [word for word in words("full", tmp_path / "run") if "store" not in word]
    with pytest.raises(Killed):
        train(resolve(TrainKeys, [*own, f"reference.store={store}"]), progress=at("train", 3))
    if how == "cut":
        os.truncate(store, 50)
    else:
        store.unlink()
        store.mkdir() if how == "a folder" else store.write_text("my own notes")
    go_on(tmp_path / "run")
    assert same(tmp_path / "run", whole("full")) and (how != "another file" or store.read_text() == "my own notes")


def test_the_lines_of_the_metrics_are_on_the_disk_before_the_checkpoint_of_their_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine may lose its power, too."""
    done: list[str] = []
    sync = os.fsync

    def watched(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        done.append(name if name != "metrics.jsonl" else (tmp_path / "run" / name).read_text())
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    with pytest.raises(Killed):
        begin("full", tmp_path / "run", at("train", 4))
    manifests = [n for n, name in enumerate(done) if name == checkpoint.MANIFEST]
    counts = [max(text.count('"step"') for text in done[:n]) for n in manifests]
    assert counts == [2]
