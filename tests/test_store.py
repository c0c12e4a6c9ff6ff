"""The reference store: what it takes, what it must not take, and that nothing wrong with its file touches a run."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from command import PAIRS, call, repeated, tree, write_model, write_rows

import preftune
from preftune.config import dump, resolve
from preftune.data.render import Batch, render
from preftune.errors import Interrupted, Refusal, RunFailed
from preftune.keys import TrainKeys
from preftune.models.load import load_model
from preftune.runs.train import train
from preftune.scoring import store as module
from preftune.scoring.score import score_logp
from preftune.scoring.store import Store, Stored, digest_of, open_store

pytestmark = pytest.mark.usefixtures("short_answers", "no_report")

KEYS: dict[str, Any] = {"dtype": "float32", "learning_rate": 1e-3, "steps": 3, "batch_size": 2}


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="preftune")


def fit(model: Any, tokenizer: Any, **keys: Any) -> list[dict[str, Any]]:
    """The lines of a run over six pairs and two held-out ones, without what depends on the machine. `reference`: a seed."""
    held = tiny.pairs(8)[6:]
    if "reference" in keys:
        keys["reference"] = tiny.model(seed=keys["reference"])
    run = preftune.fit(model, tokenizer, tiny.pairs(6), **(KEYS | {"eval_groups": held, "train": {"eval_every": 1}} | keys))
    return repeated(run.metrics)


def taken(caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """How many responses the last run took from the store, and of how many, as it said."""
    said = [m for m in map(re.compile(r"reference: (\d+) of (\d+) responses from ").match, caplog.messages) if m]
    return int(said[-1][1]), int(said[-1][2])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def filled(store: Store, model: Any, batch: Batch) -> Stored:
    stored = Stored(store, digest_of(model) or b"", torch.float32, "cpu")
    score_logp(model, batch, range(len(batch)), keep=lambda rows, tokens: stored.put(batch, rows, tokens))
    return stored


@pytest.fixture
def batch(tokenizer: Any) -> Batch:
    return render(tiny.pairs(3), tokenizer)


# -- what is taken ------------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_what_was_scored_bit_by_bit(tmp_path: Path, model: Any, batch: Batch) -> None:
    live: dict[int, torch.Tensor] = {}
    values = score_logp(model, batch, range(len(batch)), keep=lambda r, t: live.update(zip(r, t, strict=True)))
    filled(Store(tmp_path / "s"), model, batch).store.close()
    stored = Stored(Store(tmp_path / "s"), digest_of(model) or b"", torch.float32, "cpu").find(batch, range(len(batch)))
    assert stored.keys() == live.keys() == set(range(len(batch)))
    for row, tokens in stored.items():
        assert tokens.dtype == torch.float32 and len(tokens) == batch.sequences[row].length
        assert torch.equal(tokens, live[row]) and tokens.sum() == values[row]


@pytest.mark.parametrize("keys", [{}, {"adapter": "lora"}, {"dtype": "bfloat16"}, {"reference": 1}], ids=str)
def test_a_second_run_takes_everything_and_gives_the_same_numbers(
    keys: dict[str, Any], tokenizer: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = fit(tiny.model(), tokenizer, reference_store="off", **keys)
    first = fit(tiny.model(), tokenizer, **keys)
    assert taken(caplog) == (0, 16)
    phases: list[str] = []
    second = fit(tiny.model(), tokenizer, progress=lambda phase, *_: phases.append(phase), **keys)
    assert taken(caplog) == (16, 16) and str(cache / "preftune" / "reference.sqlite") in caplog.text
    assert "reference" not in phases and "check" in phases
    assert first == second == live


@pytest.mark.parametrize(
    "keys",
    [
        {"beta": 0.5},
        {"batch_size": 3},
        {"seed": 7},
        {"learning_rate": 1e-2},
        {"max_length": 60},
        {"train": {"tokens_per_microbatch": 1}},
        {"adapter": "lora"},  # its reference is the model without it
        {"adapter": "lora", "seed": 7},
    ],
    ids=str,
)
def test_other_settings_make_nothing_stale(keys: dict[str, Any], tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    fit(tiny.model(), tokenizer)
    fit(tiny.model(), tokenizer, **keys)
    found, total = taken(caplog)
    assert found == total == 16


def test_only_rows_that_changed_are_scored(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    fit(tiny.model(), tokenizer, eval_groups=[])
    last = tiny.pairs(6)[-1]
    groups = [*tiny.pairs(5), tiny.pair(last.prompt, last.responses[0].content, "another answer")]
    counted: list[tuple[int, int]] = []

    def count(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if phase == "reference":
            counted.append((done, total))

    preftune.fit(tiny.model(), tokenizer, groups, eval_groups=[], progress=count, **KEYS)
    assert taken(caplog) == (11, 12) and counted == [(1, 1)]


@pytest.mark.parametrize("keys", [{"model": 1}, {"dtype": "bfloat16"}, {"reference": 1}], ids=str)
def test_another_model_or_precision_is_a_miss(keys: dict[str, Any], tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    fit(tiny.model(), tokenizer)
    other = dict(keys)
    fit(tiny.model(seed=other.pop("model", 0)), tokenizer, **other)
    assert taken(caplog) == (0, 16)


@pytest.mark.parametrize(
    ("of_model", "of_row"),
    [
        ({"identity": b"another model"}, {}),
        ({"dtype": torch.bfloat16}, {}),
        ({"device": "cuda"}, {}),
        ({}, {"ids": -1}),
        ({}, {"start": 1}),
        ({}, {"mask": True}),
        ({}, {"attachments": True}),
    ],
    ids=str,
)
def test_each_part_of_the_key_counts(
    of_model: dict[str, Any], of_row: dict[str, Any], tmp_path: Path, model: Any, batch: Batch
) -> None:
    stored = filled(Store(tmp_path / "s"), model, batch)
    one = batch.sequences[0]
    changed = {
        "ids": lambda: (*one.ids[:-1], one.ids[-1] - 1),
        "start": lambda: one.start + 1,
        "mask": lambda: (False, *[True] * (one.length - 1)),
        "attachments": lambda: ((1, b"a picture"),),
    }
    row = replace(one, **{name: changed[name]() for name in of_row})
    other = replace(batch, sequences=(row, *batch.sequences[1:]))
    assert set(stored.find(batch, [0])) == {0} and stored.has(batch, [0])
    assert replace(stored, **of_model).find(other, [0]) == {} and not replace(stored, **of_model).has(other, [0])


@pytest.mark.parametrize(("name", "changed"), [("NUMERICS", module.NUMERICS + 1), ("LIBRARIES", "torch 9.0 transformers 5.0")])
def test_other_arithmetic_is_a_miss(
    name: str, changed: Any, tmp_path: Path, model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = filled(Store(tmp_path / "s"), model, batch)
    monkeypatch.setattr(module, name, changed)
    assert stored.find(batch, range(len(batch))) == {}


def test_libraries_are_known_by_their_minor_versions() -> None:
    words = module.LIBRARIES.split()
    assert words[::2] == ["torch", "transformers"] and all(re.fullmatch(r"\d+\.\d+", version) for version in words[1::2])
    assert torch.__version__.startswith(words[1] + ".") and transformers.__version__.startswith(words[3] + ".")


def test_rows_with_the_same_tokens_are_one(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    twice = render([*tiny.pairs(1), *tiny.pairs(1)], tokenizer)
    stored = filled(Store(tmp_path / "s"), model, twice)
    found = stored.find(twice, range(4))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_what_was_scored_before_a_stop_is_there(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    def stop(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if phase == "reference" and (done, total) == (3, 8):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        fit(tiny.model(), tokenizer, train={"tokens_per_microbatch": 1}, progress=stop)
    fit(tiny.model(), tokenizer)
    assert taken(caplog) == (4 + 3, 16), "the first batch, and three of the rest"


# -- another reference --------------------------------------------------------------------------------------------------------


def test_another_reference_is_loaded_only_where_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a full store it is loaded for the KL after training alone. One whose files changed is loaded, and refused, before
    a folder is made."""
    model, reference = write_model(tmp_path / "m"), write_model(tmp_path / "r", seed=1)
    data = write_rows(tmp_path / "d.jsonl", PAIRS[:6])
    words = [f"model={model}", f"reference={reference}", f"data={data}", "steps=2", "batch_size=2", "dtype=float32"]
    events: list[str] = []

    def watched(ref: str, **how: Any) -> Any:
        events.append("load " + how.get("key", "model"))
        return load_model(ref, **how)

    monkeypatch.setattr("preftune.models.load.load_model", watched)

    def run(out: str) -> tuple[list[dict[str, Any]], list[str]]:
        events.clear()
        keys = resolve(TrainKeys, [*words, f"eval_data={data}", f"out={tmp_path / out}"])
        done: Any = train(keys, progress=lambda phase, *_: events.append(phase))
        return repeated(done.metrics), list(dict.fromkeys(events))

    first, before = run("a")
    assert before.index("load reference") < before.index("reference") < before.index("train")
    second, before = run("b")
    assert taken(caplog) == (20, 20) and "reference" not in before
    assert before.index("load reference") > before.index("train")
    assert first == second
    (reference / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(Refusal):
        run("c")
    assert not (tmp_path / "c").exists() and "load reference" in events


@pytest.mark.parametrize(("off", "kind"), [(5e-5, r"5(\.\d)?e-05 .* \(rounding\)"), (1e-2, r"0\.01 .* \(more than rounding\)")])
@pytest.mark.parametrize("of", ["one", "all"])
def test_values_that_are_not_the_policys_are_scored_anew(
    of: str, off: float, kind: str, tokenizer: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another way to the same sums had filled the store, or something damaged it: the whole run goes by its own values, and
    leaves them there."""
    batch = render(tiny.pairs(6), tokenizer)
    right = fit(tiny.model(), tokenizer)
    stored = Stored(Store(cache / "preftune" / "reference.sqlite"), digest_of(tiny.model()) or b"", torch.float32, "cpu")
    before = stored.find(batch, range(12))
    changed = [0] if of == "one" else list(range(12))
    stored.put(batch, changed, [before[row] + off for row in changed])
    caplog.clear()
    assert fit(tiny.model(), tokenizer, batch_size=6, steps=1)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    (said,) = warnings(caplog)
    assert re.match(f"{cache}/preftune/reference.sqlite: its values differ by {kind} from those of this run", said)
    assert taken(caplog) == (0, 16)
    after = stored.find(batch, range(12))
    assert all(torch.equal(after[row], before[row]) for row in range(12))
    assert fit(tiny.model(), tokenizer) == right and taken(caplog) == (16, 16)


def test_a_policy_that_does_not_start_at_its_reference_is_refused_whatever_is_stored(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that were stored by a sound run do not help one that is not."""
    from preftune.models import adapters

    fit(tiny.model(), tokenizer)
    at_zero = adapters.add_adapter

    def off_zero(*given: Any, **keys: Any) -> Any:
        made = at_zero(*given, **keys)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        return made

    monkeypatch.setattr(adapters, "add_adapter", off_zero)
    with pytest.raises(RunFailed, match="differ before the first step") as stopped:
        fit(tiny.model(), tokenizer, adapter="lora")
    assert stopped.value.code == "start_check" and warnings(caplog) == []


def test_what_fails_the_start_check_is_not_kept(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preftune.runs.trainer.check_path", lambda *_, **__: None)  # it would see it first
    model = tiny.model()
    model.model.embed_tokens.register_forward_hook(lambda layer, given, out: torch.nn.functional.dropout(out, 0.1, True))
    with pytest.raises(RunFailed) as stopped:
        fit(model, tokenizer)
    assert stopped.value.code == "start_check" and "reference.store" not in str(stopped.value)
    fit(tiny.model(), tokenizer)
    assert taken(caplog) == (0, 16)


def test_a_run_keeps_the_values_it_used_whatever_becomes_of_the_store(
    tmp_path: Path, tokenizer: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that it scored and those that it found; with them a run needs neither the store nor the reference."""
    fit(tiny.model(), tokenizer)
    right = fit(tiny.model(), tokenizer, out=tmp_path / "run")
    assert taken(caplog) == (16, 16)
    own = tmp_path / "run" / "checkpoints" / "reference.sqlite"
    assert sorted(path.name for path in own.parent.iterdir()) == ["best", "best.safetensors", own.name, "start.json"]
    shutil.rmtree(cache / "preftune")
    assert fit(tiny.model(), tokenizer, reference_store=own) == right
    assert taken(caplog) == (16, 16)
    fit(tiny.model(), tokenizer, out=tmp_path / "off", reference_store="off")
    assert (tmp_path / "off" / "checkpoints" / "reference.sqlite").is_file() and not (cache / "preftune").exists()


def test_doctor_looks_at_what_earlier_runs_stored(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = write_model(tmp_path / "m"), write_rows(tmp_path / "d.jsonl", PAIRS[:4])
    words = [f"model={model}", f"data={data}", "dtype=float32"]
    named = "stored by earlier runs = live"

    def examined(*more: str) -> tuple[int, dict[str, Any] | None]:
        found = call(capsys, "doctor", *words, *more, "--json")
        checks = found.json["checks"] if found.code == 0 else []
        return found.code, next((line for line in checks if line["check"] == named), None)

    assert examined() == (0, None) and list(cache.iterdir()) == [], "no store is made for it"
    train(resolve(TrainKeys, [*words, f"eval_data={data}", "steps=1", f"out={tmp_path / 'run'}"]))
    for more in ((), ("adapter=lora",)):
        code, line = examined(*more)
        assert code == 0 and line and line["passed"] and "8 responses from" in line["note"]
    path = cache / "preftune" / "reference.sqlite"
    own, new = shutil.copy(path, tmp_path / "own.sqlite"), tmp_path / "new.sqlite"
    for store, note in (("off", None), (new, None), (own, f"8 responses from {own}")):
        code, line = examined(f"reference.store={store}")
        assert (code, line and line["note"]) == (0, note)
    assert not new.exists() and examined(f"reference.store={data}") == (2, None)
    (said,) = [line for line in call(capsys, "doctor", *words).err.splitlines() if line.startswith(named)]
    assert said.endswith(f"8 responses from {path}")
    groups = preftune.read(str(data))
    batch = render(groups, tiny.tokenizer())
    stored = Stored(Store(path), Store(path).digest(str(model)) or b"", torch.float32, "cpu")
    stored.put(batch, [3], [stored.find(batch, [3])[3] + 1e-3])
    assert examined() == (1, None)
    assert examined("method=reward") == (0, None), "a reward model's numbers are no log-probabilities"


def test_a_rerun_of_a_config_begins_with_the_values_of_its_run(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever became of the user's store; and with `off` it takes none."""
    model, reference = write_model(tmp_path / "m"), write_model(tmp_path / "r", seed=1)
    data = write_rows(tmp_path / "d.jsonl", PAIRS[:6])
    words = [f"model={model}", f"reference={reference}", f"data={data}", f"eval_data={data}", "steps=1", "dtype=float32"]
    loaded: list[str] = []
    monkeypatch.setattr("preftune.models.load.load_model", lambda ref, **how: loaded.append(ref) or load_model(ref, **how))
    monkeypatch.setattr("preftune.runs.trainer.kl", lambda *arguments: {})  # which takes the reference itself
    assert call(capsys, "train", *words, f"out={tmp_path / 'a'}").code == 0
    before = tree(tmp_path / "a")
    for out, more, there in (("b", [], 24), ("c", ["reference.store=off"], 0)):
        shutil.rmtree(cache / "preftune", ignore_errors=True)
        loaded.clear()
        said = call(capsys, "train", str(tmp_path / "a" / "config.yaml"), f"out={tmp_path / out}", *more)
        assert said.code == 0 and loaded == [str(model), *([] if there else [str(reference)])]
        assert (f"reference: {there} of 24 responses from {tmp_path / out}/checkpoints" in said.err) == bool(there)
    assert tree(tmp_path / "a") == before, "it is left as it was"


def test_values_that_cannot_be_taken_over_are_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = write_model(tmp_path / "m"), write_rows(tmp_path / "d.jsonl", PAIRS[:4])
    words = [f"model={model}", f"data={data}", f"eval_data={data}", "steps=1", "dtype=float32"]
    assert call(capsys, "train", *words, f"out={tmp_path / 'a'}").code == 0

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    said = call(capsys, "train", str(tmp_path / "a" / "config.yaml"), f"out={tmp_path / 'b'}")
    assert said.code == 0 and "cannot be taken over, and are scored again: [Errno 28]" in said.err
    lines = [json.loads((tmp_path / out / "metrics.jsonl").read_text()) for out in "ab"]
    assert lines[0]["loss"] == lines[1]["loss"]


# -- where it is --------------------------------------------------------------------------------------------------------------


def test_off_writes_no_file_and_what_needs_no_reference_neither(tokenizer: Any, cache: Path) -> None:
    fit(tiny.model(), tokenizer, reference_store="off")
    fit(tiny.model(), tokenizer, method="sft")
    assert list(cache.iterdir()) == []


def test_a_path_is_taken_and_the_cache_left_alone(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    fit(tiny.model(), tokenizer, reference_store=tmp_path / "deep" / "s.sqlite")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.sqlite"] and list(cache.iterdir()) == []


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    def place(setting: str | None) -> Path | None:
        store = open_store(setting)
        return store and store.path

    assert place(None) == cache / "preftune" / "reference.sqlite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert place(None) == Path("/home/someone/.cache/preftune/reference.sqlite")
    assert (place("off"), place("x/y")) == (None, Path("x/y"))

    def nowhere() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", nowhere)
    assert place(None) is None and "reference.store=PATH" in caplog.text


def test_the_key_is_written_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word, written in (("x.sqlite", f"{tmp_path}/x.sqlite"), ("off", "off"), ("~/x", str(Path.home() / "x"))):
        keys = resolve(TrainKeys, ["model=m", "data=d", "reference=r", f"reference.store={word}"])
        Path("c.yaml").write_text(dump(keys))
        again = resolve(TrainKeys, ["c.yaml"]).reference
        assert (again.model, again.store) == ("r", written)
    assert resolve(TrainKeys, ["model=m", "data=d"]).reference.store is None


# -- what the model is --------------------------------------------------------------------------------------------------------


def test_a_folder_is_known_by_what_is_in_its_files(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "s"), write_model(tmp_path / "m")
    known = store.digest(str(folder))
    shutil.copytree(folder, tmp_path / "copy")
    assert known is not None and store.digest(str(tmp_path / "copy")) == known
    assert store.digest(str(write_model(tmp_path / "other", seed=1))) != known
    (folder / "tokenizer.json").write_text("{}")
    assert store.digest(str(folder)) == known, "rows say what the tokenizer made of them"
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("1e-06", "1e-05"))
    assert store.digest(str(folder)) not in (None, known)
    assert store.digest("owner/name") is store.digest("") is None


def test_an_adapter_is_known_with_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    store, base, folder = Store(tmp_path / "s"), write_model(tmp_path / "m"), tmp_path / "a"
    model = get_peft_model(load_model(str(base)), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder)
    known = store.digest(str(folder))
    assert known is not None and known != store.digest(str(base))
    write_model(base, seed=1)
    assert store.digest(str(folder)) not in (None, known)
    shutil.rmtree(base)
    assert store.digest(str(folder)) is None, "a base from the hub is known once it is loaded"


def on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    """The folder of a model's newest snapshot in a cache of the hub; nothing is asked of the hub itself."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = root / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("b" * 40)
    return place / "snapshots" / ("b" * 40)


def test_a_hub_name_is_known_by_its_cached_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = Store(tmp_path / "s"), on_the_hub("owner/name", monkeypatch, tmp_path / "hub")
    assert store.digest("owner/name") is None
    write_model(folder)
    known = store.digest(str(write_model(tmp_path / "m")))
    assert store.digest("owner/name") == known is not None
    for ref in ("owner/other", "name", "a/b/c", "..", "owner/--"):
        assert store.digest(ref) is None
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert store.digest("owner/name") is None, "a part is not there yet"
    (folder / "model-2.safetensors").touch()
    assert store.digest("owner/name") not in (None, known)
    (folder.parents[1] / "refs" / "main").write_text("c" * 40)
    assert store.digest("owner/name") is None, "another revision, of which nothing is here"


def test_code_elsewhere_on_the_hub_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, code = Store(tmp_path / "s"), on_the_hub("owner/code", monkeypatch, tmp_path / "hub")
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["tokens.Tokens", None]}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    assert store.digest(str(folder)) is not None
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "owner/code--own.Own"}}))
    assert store.digest(str(folder)) is None, "its code is not here"
    code.mkdir(parents=True)
    (code / "own.py").write_text("x = 1")
    known = store.digest(str(folder))
    (code / "own.py").write_text("x = 2")
    assert known is not None and store.digest(str(folder)) not in (None, known)


def test_a_models_own_code_counts_in_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("transformers_modules.owner.own")
    own.__file__ = str(tmp_path / "own.py")
    monkeypatch.setitem(sys.modules, own.__name__, own)
    model = tiny.model()
    model.__class__ = type(type(model).__name__, (type(model),), {"__module__": own.__name__})
    digests = {digest_of(tiny.model())}
    for text in ("x = 1", "x = 2"):
        (tmp_path / "own.py").write_text(text)
        digests.add(digest_of(model))
    assert len(digests - {None}) == 3


def test_a_full_store_loads_no_reference_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(tmp_path / "m")
    write_model(on_the_hub("owner/name", monkeypatch, tmp_path / "hub"), seed=1)
    data = write_rows(tmp_path / "d.jsonl", PAIRS[:6])
    words = [f"model={model}", "reference=owner/name", f"data={data}", f"eval_data={data}", "steps=2", "dtype=float32"]
    loaded: list[str] = []
    monkeypatch.setattr("preftune.models.load.load_model", lambda ref, **how: loaded.append(ref) or load_model(ref, **how))
    # the KL after training takes the reference itself: left out, as it loads it by its nature
    monkeypatch.setattr("preftune.runs.trainer.kl", lambda *arguments: {})
    for out, others in (("a", ["owner/name"]), ("b", [])):
        loaded.clear()
        train(resolve(TrainKeys, [*words, f"out={tmp_path / out}"]))
        assert loaded == [str(model), *others]
    assert taken(caplog) == (24, 24)


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = write_model(tmp_path / "m"), list[str]()
    right = module.file_digest
    monkeypatch.setattr(module, "file_digest", lambda file, how: read.append(Path(file.name).name) or right(file, how))

    def digest() -> tuple[bytes | None, list[str]]:
        read.clear()
        return Store(tmp_path / "s").digest(str(folder)), sorted(read)

    both = ["config.json", "model.safetensors"]
    known, files = digest()
    assert files == both and digest() == (known, both), "just written: it may change again within the same tick of the clock"
    for name in both:
        os.utime(folder / name, ns=(0, 10**18))
    assert digest() == (known, both) and digest() == (known, [])
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    os.utime(folder / "model.safetensors", ns=(0, 10**18))
    again, files = digest()
    assert again != known and files == both[1:], "the same size and time, and other weights"


def test_a_model_in_memory_is_known_by_what_it_computes_with(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    known = digest_of(tiny.model())
    moved = tiny.model()
    moved.save_pretrained(tmp_path / "m")
    moved.config.name_or_path = moved.name_or_path = "elsewhere"
    assert digest_of(moved) == known
    with torch.no_grad():
        moved.model.norm.weight[3] += 1e-3
    adapters = [
        get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj", "k_proj"], lora_alpha=alpha, init_lora_weights=False))
        for alpha in (1, 2)
    ]
    with torch.no_grad():
        for a, b in zip(*(adapter.parameters() for adapter in adapters), strict=True):
            a.copy_(b)
    others = [moved, tiny.model(seed=1), tiny.model().bfloat16(), tiny.model(rms_norm_eps=1e-5), *adapters]
    assert len({known, *map(digest_of, others)}) == 1 + len(others)


def test_weights_that_cannot_be_read_leave_the_store_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert digest_of(tiny.model().to("meta")) is None and len(warnings(caplog)) == 1


# -- a file that is not as it should be ---------------------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(b"these are not the pages of a database " * 500)


def of_something_else(path: Path) -> None:
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()


def cut_off(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def a_bit_fell_over(path: Path) -> None:
    content = bytearray(path.read_bytes())
    connection = sqlite3.connect(path)
    (value,) = connection.execute("SELECT logp FROM responses ORDER BY id LIMIT 1").fetchone()
    connection.close()
    content[content.index(value) + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [garbage, of_something_else, cut_off, a_bit_fell_over])
def test_a_damaged_file_is_moved_aside_and_said(
    damage: Any, tokenizer: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right, path = fit(tiny.model(), tokenizer), cache / "preftune" / "reference.sqlite"
    for number in (1, 2):
        caplog.clear()
        damage(path)
        content = path.read_bytes()
        assert fit(tiny.model(), tokenizer) == right
        (said,) = warnings(caplog)
        assert f"{path} is damaged" in said and f"reference.sqlite.damaged-{number}" in said
        assert path.with_name(f"reference.sqlite.damaged-{number}").read_bytes() == content
        assert fit(tiny.model(), tokenizer) == right and taken(caplog) == (16, 16), "the new one serves"


def test_a_place_that_cannot_be_made_is_said_once(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    right = fit(tiny.model(), tokenizer, reference_store="off")
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "s.sqlite"
    assert fit(tiny.model(), tokenizer, reference_store=place) == right
    (said,) = warnings(caplog)
    assert str(place) in said and "neither taken from here nor kept" in said


def a_file_of_rows(path: Path) -> None:
    path.write_text('{"prompt": "my data"}\n' * 100)


@pytest.mark.parametrize("other", [a_file_of_rows, lambda path: of_something_else(path), lambda path: path.mkdir()])
def test_what_is_no_store_is_refused_and_left_alone(other: Any, tmp_path: Path, tokenizer: Any) -> None:
    other(place := tmp_path / "x")
    before = tree(tmp_path)
    with pytest.raises(Refusal, match=r"x is (no store of preftune: name another file|a folder)") as refused:
        fit(tiny.model(), tokenizer, reference_store=place)
    assert (refused.value.code, refused.value.key) == ("not_a_store", "reference.store") and tree(tmp_path) == before
    # nor is it moved by one who asks no one
    assert not Store(place).has([b"key"]) and not Store(place).get([b"key"]) and tree(tmp_path) == before


def test_an_empty_file_and_a_damaged_store_may_be_named(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (place := tmp_path / "x").touch()
    right = fit(tiny.model(), tokenizer, reference_store=place)
    cut_off(place)
    assert fit(tiny.model(), tokenizer, reference_store=place) == right
    assert fit(tiny.model(), tokenizer, reference_store=place) == right and taken(caplog) == (16, 16)
    assert (tmp_path / "x.damaged-1").is_file()


@pytest.mark.parametrize("at", [0, 3, 15, 50, 69, "cut 10", "cut 50", "cut 90", "cut 5000"])
def test_a_store_is_known_wherever_it_is_damaged(
    at: int | str, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "x"
    right = fit(tiny.model(), tokenizer, reference_store=place)
    data = bytearray(place.read_bytes())
    if isinstance(at, int):
        data[at] ^= 1
        place.write_bytes(data)
    else:
        os.truncate(place, int(at.removeprefix("cut ")))
    caplog.clear()
    assert fit(tiny.model(), tokenizer, reference_store=place) == right
    assert fit(tiny.model(), tokenizer, reference_store=place) == right and taken(caplog) == (16, 16)
    said = [line for line in warnings(caplog) if "is damaged" in line]
    assert len(said) == len(list(tmp_path.glob("x.damaged-*"))) <= 1, "some bits of a head mean nothing"


def test_a_store_that_may_not_be_read_stops_nothing(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "x"
    right = fit(tiny.model(), tokenizer, reference_store=place)

    def denied(*path: Any, **how: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    def closed(*path: Any, **how: Any) -> Any:
        raise sqlite3.OperationalError("unable to open database file")

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *how, **more: (denied if self == place else opened)(self, *how, **more))
    monkeypatch.setattr(sqlite3, "connect", closed)
    assert fit(tiny.model(), tokenizer, reference_store=place) == right
    assert [line for line in warnings(caplog) if str(place) in line and "neither taken from here nor kept" in line]


def test_a_store_in_the_folder_of_its_run_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(Refusal, match="in the run's own folder") as refused:
        fit(tiny.model(), tokenizer, reference_store=tmp_path / "run" / "s.sqlite", out=tmp_path / "run")
    assert refused.value.code == "store_in_run" and not list(tmp_path.iterdir())


def test_a_store_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "m")
    monkeypatch.setattr("preftune.runs.train.read_data", None)
    words = [f"model={tmp_path / 'm'}", "data=d.jsonl", f"reference.store={tmp_path}", f"out={tmp_path / 'out'}"]
    with pytest.raises(Refusal, match="is a folder"):
        train(resolve(TrainKeys, words))


@pytest.mark.parametrize("inside", ["m/reference.sqlite", "r/reference.sqlite", "d.jsonl", "held.jsonl"])
def test_a_store_among_the_files_of_a_run_is_refused(inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded."""
    model, reference = write_model(tmp_path / "m"), write_model(tmp_path / "r", seed=1)
    data, held = (write_rows(tmp_path / name, PAIRS[:3]) for name in ("d.jsonl", "held.jsonl"))
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setattr("preftune.models.load.load_model", None)
    words = [f"model={model}", f"data={data}", f"eval_data={held}", f"reference={reference}", f"out={tmp_path / 'out'}"]
    before = tree(tmp_path)
    for place in (tmp_path / inside, tmp_path / "link" / inside):
        with pytest.raises(Refusal, match="is among the files that this run reads") as refused:
            train(resolve(TrainKeys, [*words, f"reference.store={place}"]))
        assert refused.value.code == "store_is_input" and tree(tmp_path) == before


def opened(monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
    right = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **keys: how(right, path, keys))


def test_a_file_that_may_only_be_read_is_read(
    tokenizer: Any, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, path = fit(tiny.model(), tokenizer), cache / "preftune" / "reference.sqlite"
    content = path.read_bytes()
    opened(monkeypatch, lambda connect, path, keys: connect(f"file:{path}?mode=ro", uri=True, **keys))
    assert fit(tiny.model(), tokenizer) == right and taken(caplog) == (16, 16)
    (said,) = warnings(caplog)
    assert "no more" in said and "readonly" in said
    assert path.read_bytes() == content


@pytest.mark.parametrize("there", [0, 12])
def test_a_full_disk_is_said_once_and_what_is_there_is_taken(
    there: int, tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fit(tiny.model(), tokenizer, reference_store="off")

    def pages(connect: Any, path: Path, keys: dict[str, Any], most: int) -> Any:
        connection = connect(path, **keys)
        connection.execute("PRAGMA page_size = 512")
        connection.execute(f"PRAGMA max_page_count = {most}")  # never fewer than there are
        return connection

    opened(monkeypatch, partial(pages, most=1000 if there else 1))
    fit(tiny.model(), tokenizer, eval_groups=[])
    caplog.clear()
    opened(monkeypatch, partial(pages, most=1))
    assert fit(tiny.model(), tokenizer) == right and taken(caplog) == (there, 16)
    (said,) = warnings(caplog)
    assert "disk is full" in said and ("no more" in said) == bool(there)


WRITER = """
import sys, time
from pathlib import Path
from preftune.scoring.store import Store
path, name = Path(sys.argv[1]), sys.argv[2]
path.with_name(name).touch()
while not path.with_name("go").exists():
    time.sleep(0.001)
store = Store(path)
for n in range(200):
    store.put({f"{name} {n} {k}".encode(): bytes(1000) for k in range(5)})
"""


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path, names = tmp_path / "s.sqlite", ("a", "b")
    both = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stderr=subprocess.PIPE, text=True) for name in names
    ]
    while not all(path.with_name(name).exists() for name in names):
        assert all(process.poll() is None for process in both)
    path.with_name("go").touch()
    assert [process.communicate()[1] for process in both] == ["", ""]
    assert Store(path).has([f"{name} {n} {k}".encode() for name in names for n in range(200) for k in range(5)])


def test_over_the_limit_those_go_that_were_not_used_for_longest(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", limit=500_000)
    used, others = [f"used {n}".encode() for n in range(10)], [f"other {n}".encode() for n in range(300)]
    store.put({key: bytes(4000) for key in used})
    for n in range(0, 300, 10):
        store.put({key: bytes(4000) for key in others[n : n + 10]})
        assert store.get(used).keys() == set(used)
    kept = [store.has([key]) for key in others]
    assert kept == sorted(kept) and 50 < sum(kept) < 120
    store.close()
    assert (tmp_path / "s").stat().st_size < 700_000
