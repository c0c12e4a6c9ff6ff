"""Everything that is refused: exit code, one line that says what to do, the parts of it for a program, nothing left behind."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import PAIRS, Answer, call, tree, write_model, write_rows
from safetensors.torch import load_file, save_file

BLANK = {"prompt": "x", "chosen": "", "rejected": "b"}
SCORERS = """
def length(prompts, responses): return [float(len(r)) for r in responses]
def short(prompts, responses): return [1.0]
def words(prompts, responses): return ["good"] * len(responses)
def nan(prompts, responses): return [float("nan")] * len(responses)
def none(prompts, responses): return None
def breaks(prompts, responses): raise RuntimeError("out of ideas")
def breaks_later(prompts, responses): return [1.0] * len(responses) if prompts[0] == "Hello" else [1.0]
number = 3
"""


def changed_model(folder: Path, base: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    shutil.copytree(base, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def one_token_too_many(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 5000, "content": "<new>"})


def two_tokens_swapped(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the cases name. No case may change it."""
    here = tmp_path_factory.mktemp("refusals")
    m = write_model(here / "m")
    changed_model(here / "more_tokens", m, "tokenizer.json", one_token_too_many)
    changed_model(here / "other_tokens", m, "tokenizer.json", two_tokens_swapped)
    changed_model(here / "unknown_kind", m, "config.json", lambda c: c.update(model_type="nosuch", architectures=None))
    for name, gone in (("no_weights", "model.safetensors"), ("no_tokenizer", "tokenizer*"), ("empty_model", "*")):
        shutil.copytree(m, here / name)
        for file in (here / name).glob(gone):
            file.unlink()
    for name, file, content in (
        ("torn_config", "config.json", b"{"),
        ("list_config", "config.json", b"[]"),
        ("hollow_tokenizer", "tokenizer.json", b"{}"),
        ("torn_weights", "model.safetensors", (m / "model.safetensors").read_bytes()[:2000]),
    ):
        shutil.copytree(m, here / name)
        (here / name / file).write_bytes(content)
    shutil.copytree(m, here / "one_tensor_less")
    tensors = load_file(m / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, here / "one_tensor_less" / "model.safetensors")
    write_rows(here / "pairs.jsonl", PAIRS[:12])
    write_rows(here / "renamed.jsonl", [{"prompt": p["prompt"], "better": p["chosen"], "worse": "w"} for p in PAIRS[:3]])
    write_rows(here / "shown.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS[:3]])
    write_rows(here / "rated.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"], "label": True} for p in PAIRS[:3]])
    write_rows(here / "prompts.jsonl", [{"prompt": p["prompt"]} for p in PAIRS[:3]])
    write_rows(here / "long.jsonl", [{"prompt": "and so on " * 20}])
    write_rows(here / "ties.jsonl", [{**p, "preference": 0.5} for p in PAIRS[:3]])
    write_rows(here / "weightless.jsonl", [{**p, "weight": 0} for p in PAIRS[:3]])
    write_rows(here / "odd.jsonl", [{"question": "q", "good": "a", "bad": "b"}])
    write_rows(here / "one_bad.jsonl", [*PAIRS[:3], BLANK])
    write_rows(here / "most_bad.jsonl", [*PAIRS[:3], BLANK, BLANK, BLANK, BLANK])
    write_rows(here / "all_bad.jsonl", [BLANK, BLANK])
    roles = (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    chats = [{key: [{"role": role, "content": pair[key]}] for key, role in roles} for pair in PAIRS[:12]]
    write_rows(here / "chats.jsonl", chats)
    for name, content in {
        "latin1.jsonl": b'{"prompt":"a","chosen":"b","rejected":"c"}\n{"prompt":"caf\xe9","chosen":"b","rejected":"c"}\n',
        "not_gzip.jsonl.gz": b"plain text\n",
        "cut.jsonl.gz": gzip.compress((here / "pairs.jsonl").read_bytes())[:60],
        "broken.json": json.dumps(PAIRS[:3]).encode()[:-30],
        "odd.csv": b"q,a,b\n1,2,3\n",
        "nothing.jsonl": b"",
        "pairs.pdf": b"%PDF",
        "taken.txt": b"keep me\n",
        "syntax.yaml": b"model: [m\ndata: x\n",
        "tab.yaml": b"model: m\n\tdata: x\n",
        "twice.yaml": b"model: m\nmodel: n\n",
        "list.yaml": b"- model: m\n",
        "empty.yaml": b"",
        "latin1.yaml": b"model: caf\xe9\n",
        "lost_base.yaml": b"base: gone.yaml\nmodel: m\n",
        "two_bases.yaml": b"base: lost_base.yaml\n",
        "typo.yaml": b"model: m\ndata: pairs.jsonl\nlearning_rte: 1e-6\n",
        "good.yaml": b"model: m\ndata: pairs.jsonl\nsteps: 1\n",
        "bad.jinja": b"{% for %}",
        "latin1.jinja": b"caf\xe9",
        "my_scorers.py": SCORERS.encode(),
        "torn_scorer.py": b"def f(:\n",
    }.items():
        (here / name).write_bytes(content)
    for folder in ("empty", "a_run", "notes"):
        (here / folder).mkdir()
    (here / "a_run" / "config.yaml").write_text("model: m\n")
    (here / "notes" / "readme.txt").write_text("x")
    return here


def refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, code: int = 2
) -> Answer:
    """The answer to a command that has to fail, after what holds for all of them."""
    monkeypatch.chdir(place)
    before = tree(place)
    words = [word.replace("\N{NO-BREAK SPACE}", " ") for word in line.split(" ")]
    answer = call(capsys, *words, "--json", *(["--quiet"] if words[0][:1].islower() else []))
    assert tree(place) == before, "something was left behind or changed"
    assert answer.code == code, answer.err
    assert set(answer.json) == {"error"}
    assert set(answer.error) == {"code", "message", "file", "row", "column", "key"}
    assert answer.err == f"preftune: {answer.error['message']}\n", "one line, the same for a person and for a program"
    assert len(answer.err) < 900
    return answer


T = "train model=m data=pairs.jsonl"
E = "evaluate model=m against=m prompts=prompts.jsonl"
# the command; its error code; what the line has to say, and `place=` parts: file, row, column or key
TABLE: list[tuple[str, str, list[str], dict[str, Any]]] = [
    # -- keys and values
    (f"{T} learning_rte=1e-6", "unknown_key", ["Did you mean learning_rate?"], {"key": "learning_rte"}),
    (f"{T} train.eval_evry=5", "unknown_key", ["Did you mean train.eval_every?"], {"key": "train.eval_evry"}),
    (f"{T} eval_every=5", "unknown_key", ["Did you mean train.eval_every?"], {"key": "eval_every"}),
    (f"{T} train.nonsense=5", "unknown_key", ["Known: eval_every, "], {"key": "train.nonsense"}),
    (f"{T} nonsense=5", "unknown_key", ["preftune train --help lists the keys"], {"key": "nonsense"}),
    (f"{T} per_device_train_batch_size=8", "unknown_key", ["Here that is batch_size."], {}),
    ("train resume=a_run", "missing_key", ["data=..."], {"key": "data", "file": "a_run/config.yaml"}),
    ("score model=m data=pairs.jsonl out=s.jsonl steps=5", "unknown_key", ["It is a key of train."], {"key": "steps"}),
    ("generate model=m data=prompts.jsonl", "unknown_key", ["prompts=..."], {"key": "data"}),
    ("train model=m data=[{path:\N{NO-BREAK SPACE}a,\N{NO-BREAK SPACE}lmit:\N{NO-BREAK SPACE}3}]", "unknown_key",
     ["Did you mean data.sources.0.limit?"], {"key": "data.sources.0.lmit"}),
    ("train typo.yaml", "unknown_key", ["Did you mean learning_rate?"], {"file": "typo.yaml", "key": "learning_rte"}),
    (f"{T} beta=high", "wrong_type", ["a number, not 'high'"], {"key": "beta"}),
    (f"{T} batch_size=2.5", "wrong_type", ["a whole number, not 2.5"], {"key": "batch_size"}),
    (f"{T} overwrite=yes", "wrong_type", ["true or false, not 'yes'"], {"key": "overwrite"}),
    (f"{T} learning_rate=abc", "wrong_type", ["a number"], {"key": "learning_rate"}),
    (f"{T} beta=.inf", "wrong_type", ["a finite number"], {"key": "beta"}),
    (f"{T} train=5", "wrong_type", ["keys and values"], {"key": "train"}),
    (f"{T} train.trackers=tensorboard", "wrong_type", ["write train.trackers=[tensorboard]"], {"key": "train.trackers"}),
    ("train model=5 data=pairs.jsonl", "wrong_type", ["text, not 5"], {"key": "model"}),
    (f"{T} beta=-0.1", "bad_value", ["greater than 0"], {"key": "beta"}),
    (f"{T} batch_size=0", "bad_value", ["greater than or equal to 1"], {"key": "batch_size"}),
    (f"{T} steps=0", "bad_value", ["greater than or equal to 1"], {"key": "steps"}),
    (f"{T} seed=-1", "bad_value", ["greater than or equal to 0"], {"key": "seed"}),
    (f"{T} dtype=float16", "bad_value", ["'float32' or 'bfloat16'"], {"key": "dtype"}),
    (f"{T} adapter=ia3", "bad_value", ["'none', 'lora', 'dora'"], {"key": "adapter.type"}),
    (f"{T} data.too_long=cut", "bad_value", ["'truncate_response'"], {"key": "data.too_long"}),
    (f"{T} train.trackers=[tensorbord]", "bad_value", ["'tensorboard' or 'wandb'", "Did you mean tensorboard?"],
     {"key": "train.trackers.0"}),
    (f"{T} train.optimizer=adamw8bit", "bad_value", ["Did you mean adamw_8bit?"], {"key": "train.optimizer"}),
    (f"{T} train.kl_budget=5", "unused_key", ["train.eval_every"], {"key": "train.kl_budget"}),
    (f"{T} data=[a", "bad_value", ["not a YAML value", "quotes"], {"key": "data"}),
    (f"{T} adapter.r=4", "no_adapter", ["adapter=lora"], {"key": "adapter.r"}),
    (f"{T} adapter.merge=true", "no_adapter", ["adapter=lora"], {"key": "adapter.merge"}),
    (f"{T} adapter.tokens=4", "no_adapter", ["adapter=prompt"], {"key": "adapter.tokens"}),
    (f"{T} adapter=dora adapter.tokens=4", "unused_key", ["adapter=dora does not use it", "rslora"], {"key": "adapter.tokens"}),
    (f"{T} adapter=prefix adapter.r=4", "unused_key", ["it has tokens, text"], {"key": "adapter.r"}),
    ("doctor model=m data=pairs.jsonl adapter=prompt adapter.dropout=0.1", "unused_key", ["tokens, text"],
     {"key": "adapter.dropout"}),
    (f"{T} adapter=prompt adapter.merge=true", "cannot_merge", ["virtual tokens"], {"key": "adapter.merge"}),
    (f"{T} adapter=prompt adapter.tokens=64", "too_long", ["64 positions"], {"key": "adapter.tokens"}),
    (f"{T} adapter=prompt adapter.tokens=2 adapter.text=''", "bad_value", ["no token"], {"key": "adapter.text"}),
    ("generate model=m prompts=prompts.jsonl top_p=0", "bad_value", ["greater than 0"], {"key": "top_p"}),
    ("generate model=m prompts=prompts.jsonl temperature=-1", "bad_value", ["or equal to 0"], {"key": "temperature"}),
    ("demo betas=[]", "bad_value", ["at least one"], {"key": "betas"}),
    ("demo betas=0.1", "wrong_type", ["write betas=[0.1]"], {"key": "betas"}),
    ("train", "missing_key", ["model=...", "data=..."], {"key": "model"}),
    ("train model=m", "missing_key", ["data=..."], {"key": "data"}),
    ("score model=m data=pairs.jsonl", "missing_key", ["out=..."], {"key": "out"}),
    ("evaluate model=m", "missing_key", ["data=...", "against=..."], {"key": "data"}),
    (E, "missing_key", ["scorer=package.module:function"], {"key": "scorer"}),
    ("evaluate model=m against=m scorer=my_scorers:length", "missing_key", ["prompts=..."], {"key": "prompts"}),
    ("evaluate model=m data=pairs.jsonl scorer=my_scorers:length", "unused_key", ["against=..."], {"key": "scorer"}),
    ("evaluate model=m data=pairs.jsonl prompts.limit=3", "unused_key", ["against=..."], {"key": "prompts"}),
    (f"{E} scorer=my_scorers:length data=pairs.jsonl", "unused_key", ["against=...", "data=null"], {"key": "data"}),
    (f"{E} scorer=my_scorers:length reference.model=m", "unused_key", ["win rate", "data=..."], {"key": "reference"}),
    (f"{E} scorer=my_scorers:length method=dpo", "unused_key", ["win rate", "data=..."], {"key": "method"}),
    (f"{E} scorer=my_scorers:length beta=0.1", "unused_key", ["win rate", "data=..."], {"key": "beta"}),
    (f"{E} scorer=my_scorers:length max_length=9", "unused_key", ["win rate", "data=..."], {"key": "max_length"}),
    (f"{E} scorer=my_scorers:length kl_samples=3", "unused_key", ["win rate", "data=..."], {"key": "kl_samples"}),
    (f"{E} scorer=my_scorers:length prompts.too_long=drop", "unknown_key", ["data.too_long"], {"key": "prompts.too_long"}),
    ("generate model=m prompts=prompts.jsonl prompts.too_long=drop", "unknown_key", ["Known: sources"],
     {"key": "prompts.too_long"}),
    ("generate model=m prompts=prompts.jsonl beams=2 temperature=0.5", "unused_key", ["beams=1"], {"key": "temperature"}),
    ("generate model=m prompts=prompts.jsonl beams=2 top_k=5", "unused_key", ["beam search"], {"key": "top_k"}),
    ("generate model=m prompts=prompts.jsonl beams=2 top_p=0.5", "unused_key", ["beam search"], {"key": "top_p"}),
    ("generate model=m prompts=prompts.jsonl", "missing_key", ["out=..."], {"key": "out"}),  # with --json
    # -- words
    ("tran model=m", "unknown_verb", ["Did you mean train?", "evaluate"], {}),
    ("judge model=m", "unknown_verb", ["not in this version", "train"], {}),
    (f"{T} --beta 0.1", "unknown_flag", ["beta=..."], {}),
    (f"{T} -v", "unknown_flag", ["--quiet"], {}),
    ("--json", "usage", ["preftune VERB --json"], {}),
    (f"{T} beta = 0.1", "usage", ["without spaces"], {}),
    (f"{T} learning-rate=1", "usage", ["learning_rate=..."], {}),
    ("train good.yaml twice.yaml", "usage", ["one YAML file at most"], {}),
    ("merge out=new", "usage", ["merge RUN out=DIR"], {}),
    ("report", "usage", ["report RUN"], {}),
    ("chat model=m", "usage", ["generate"], {}),  # with --json
    # -- the run's own file
    ("train gone.yaml", "missing_file", ["YAML", "model=..."], {"file": "gone.yaml"}),
    ("train a_run", "missing_file", ["a_run/config.yaml"], {"file": "a_run"}),
    ("train lost_base.yaml", "missing_file", ["gone.yaml"], {"file": "lost_base.yaml", "key": "base"}),
    ("train two_bases.yaml", "nested_base", ["another base"], {"file": "lost_base.yaml", "key": "base"}),
    ("train syntax.yaml", "bad_yaml", ["not YAML"], {"file": "syntax.yaml", "row": 2}),
    ("train tab.yaml", "bad_yaml", ["not YAML"], {"file": "tab.yaml", "row": 2}),
    ("train twice.yaml", "bad_yaml", ['duplicate key "model"'], {"file": "twice.yaml", "row": 2}),
    ("train list.yaml", "bad_yaml", ["'key: value'"], {"file": "list.yaml"}),
    ("train empty.yaml", "bad_yaml", ["'key: value'"], {"file": "empty.yaml"}),
    ("train latin1.yaml", "not_utf8", ["UTF-8"], {"file": "latin1.yaml"}),
    # -- names that no file can have
    (f"{T} out={'a' * 300}", "os_error", ["name too long"], {}),
    (f"{T} reference={'a' * 300}/b", "os_error", ["name too long"], {}),
    # -- data
    ("train model=m data=gone.jsonl", "not_found", ["no such file"], {"file": "gone.jsonl"}),
    ("train model=m data=pairs.jsnol", "not_found", ["Did you mean pairs.jsonl?"], {"file": "pairs.jsnol"}),
    (f"{T} eval_data=gone.jsonl", "not_found", ["no such file"], {"file": "gone.jsonl"}),
    ("train model=m data=empty", "not_found", ["no data files"], {"file": "empty"}),
    ("train model=m data=pairs.pdf", "unknown_kind", [".jsonl"], {"file": "pairs.pdf"}),
    ("train model=m data=latin1.jsonl", "not_utf8", ["save it as UTF-8"], {"file": "latin1.jsonl", "row": 2}),
    ("train model=m data=not_gzip.jsonl.gz", "bad_gzip", ["gzip"], {"file": "not_gzip.jsonl.gz"}),
    ("train model=m data=cut.jsonl.gz", "bad_gzip", ["cut short"], {"file": "cut.jsonl.gz"}),
    ("train model=m data=broken.json", "bad_json", ["ends too early"], {"file": "broken.json", "row": 3}),
    ("train model=m data=odd.csv", "no_known_columns", ["Found: q, a, b.", "prompt + chosen + rejected"], {"file": "odd.csv"}),
    ("train model=m data=odd.jsonl", "no_known_columns", ["question", "data.columns"], {"file": "odd.jsonl"}),
    ("train model=m data=nothing.jsonl", "empty", ["no rows"], {"file": "nothing.jsonl"}),
    ("train model=m data=all_bad.jsonl", "nothing_kept", ["empty_answer 2", "blank"],
     {"file": "all_bad.jsonl", "row": 1, "column": "chosen"}),
    ("train model=m data=most_bad.jsonl", "too_many_dropped", ["4 of 7", "data.allow_drops=true"], {"file": "most_bad.jsonl"}),
    ("train model=m data=one_bad.jsonl data.strict=true", "faulty_row", ["blank"],
     {"file": "one_bad.jsonl", "row": 4, "column": "chosen"}),
    (f"{T} eval_data=most_bad.jsonl", "too_many_dropped", ["4 of 7"], {"file": "most_bad.jsonl"}),
    (f"{T} data.columns.chosen=better", "unknown_column", ["no column better", "Found: "], {"file": "pairs.jsonl"}),
    ("train model=m data=renamed.jsonl data.columns.chosn=better", "unknown_column", ["Did you mean chosen?"], {}),
    (f"{T} data.format=pair", "unknown_format", ["Did you mean pairs?"], {"key": "data.format"}),
    (f"{T} data.template=gone.jinja", "bad_template", ["gone.jinja", "plain"], {"key": "data.template"}),
    (f"{T} data.template=latin1.jinja", "bad_template", ["UTF-8"], {"key": "data.template"}),
    ("score model=m data=chats.jsonl out=s.jsonl data.template=bad.jinja", "nothing_kept", ["template refuses"],
     {"file": "chats.jsonl"}),
    (f"{T} max_length=5", "nothing_kept", ["too_long 12", "over max_length 5"], {"file": "pairs.jsonl", "row": 1}),
    ("score model=m data=pairs.jsonl out=s.jsonl max_length=5", "nothing_kept", ["too_long 12"], {"file": "pairs.jsonl"}),
    ("train model=m data=weightless.jsonl", "nothing_kept", ["weight 0"], {}),
    ("train model=m data=ties.jsonl method=sft", "nothing_kept", ["ties"], {}),
    ("score model=m data=prompts.jsonl out=s.jsonl", "no_marks", ["prompts only"], {"key": "data"}),
    ("generate model=m prompts=nothing.jsonl out=g.jsonl", "empty", ["no rows"], {"file": "nothing.jsonl"}),
    # -- methods
    (f"{T} method=sigmoid", "unknown_method", ["method=dpo"], {"key": "method"}),
    (f"{T} method=dop", "unknown_method", ["Did you mean dpop?"], {"key": "method"}),
    (f"{T} method.constraints.drift.wieght=1", "unknown_key", ["Did you mean method.constraints.drift.weight?"],
     {"key": "method.constraints.drift.wieght"}),
    (f"{T} method=mm_dpo", "method_without_marks", ["a column strength"], {"key": "method"}),
    ("train model=m data=shown.jsonl method=dpo", "method_without_marks", ["comparisons", "method=sft"], {"key": "method"}),
    ("train model=m data=rated.jsonl method=dpo", "method_without_marks", ["ratings"], {"key": "method"}),
    ("train model=m data=prompts.jsonl", "no_marks", ["prompts only"], {"key": "data"}),
    ("train model=m data=[pairs.jsonl,shown.jsonl]", "mixed_marks", ["method=..."], {"key": "method"}),
    (f"{T} eval_data=shown.jsonl", "method_without_marks", ["demonstrations"], {"key": "method"}),
    ("evaluate model=m data=shown.jsonl method=dpo", "method_without_marks", ["method=sft"], {"key": "method"}),
    ("evaluate model=m data=rated.jsonl method=simpo", "method_without_marks", ["method=kto"], {"key": "method"}),
    # -- models
    ("train model=gone data=pairs.jsonl", "missing_model", ["no folder gone", "owner/name"], {"key": "model"}),
    ("train model=./mm data=pairs.jsonl", "missing_model", ["Did you mean m?"], {"key": "model"}),
    ("train model=notes data=pairs.jsonl", "no_model", ["config.json"], {"key": "model"}),
    ("train model=empty_model data=pairs.jsonl", "no_model", ["config.json"], {"key": "model"}),
    ("train model=taken.txt data=pairs.jsonl", "no_model", ["a file"], {"key": "model"}),
    ("train model=a_run data=pairs.jsonl", "unfinished_run", ["checkpoint"], {"key": "model"}),
    ("train model=torn_config data=pairs.jsonl", "bad_model_file", ["JSON"], {"file": "torn_config/config.json"}),
    ("train model=list_config data=pairs.jsonl", "bad_model_file", ["JSON"], {"file": "list_config/config.json"}),
    ("train model=hollow_tokenizer data=pairs.jsonl", "bad_model_file", [], {"file": "hollow_tokenizer/tokenizer.json"}),
    ("train model=no_weights data=pairs.jsonl", "no_weights", [".safetensors"], {"key": "model"}),
    ("train model=no_tokenizer data=pairs.jsonl", "no_tokenizer", ["tokenizer.json"], {"key": "model"}),
    ("train model=torn_weights data=pairs.jsonl", "cannot_load", ["torn_weights"], {"key": "model"}),
    ("train model=one_tensor_less data=pairs.jsonl", "incomplete_model", ["lack model.norm.weight"], {"key": "model"}),
    ("train model=unknown_kind data=pairs.jsonl", "cannot_load", ["nosuch"], {"key": "model"}),
    ("train model=more_tokens data=pairs.jsonl", "vocabulary_mismatch", ["5,000", "267"], {"key": "model"}),
    (f"{T} reference=other_tokens", "vocabulary_mismatch", ["'A'", "different vocabularies"], {"key": "reference"}),
    ("evaluate model=m reference=other_tokens data=pairs.jsonl", "vocabulary_mismatch", ["'A'"], {"key": "reference"}),
    (f"{T} reference=gone", "missing_model", ["no folder gone"], {"key": "reference"}),
    (f"{E} scorer=my_scorers:length against=gone", "missing_model", ["no folder gone"], {"key": "against"}),
    ("chat model=gone", "usage", ["generate"], {}),
    (f"{T} adapter=lora adapter.target_modules=[nosuch]", "no_target_modules", ["nosuch", "q_proj"],
     {"key": "adapter.target_modules"}),
    ("merge m out=new", "no_adapter", ["plain model"], {"key": "RUN"}),
    ("merge gone out=new", "missing_model", ["no folder gone"], {"key": "RUN"}),
    # -- places
    (f"{T} out=a_run", "out_holds_run", ["holds a run", "overwrite=true", "a_run.old-1"], {"key": "out"}),
    (f"{T} out=notes", "out_holds_run", ["not empty", "overwrite=true"], {"key": "out"}),
    ("demo out=a_run", "out_holds_run", ["holds a run"], {"key": "out"}),
    (f"{T} out=taken.txt", "out_is_file", ["name a folder"], {"key": "out"}),
    (f"{T} out=taken.txt/run", "out_under_file", ["taken.txt is a file"], {"key": "out"}),
    ("score model=m data=pairs.jsonl out=taken.txt", "out_exists", ["overwrite=true"], {"key": "out"}),
    ("score model=m data=pairs.jsonl out=notes", "out_is_folder", [".jsonl file"], {"key": "out"}),
    ("generate model=m prompts=prompts.jsonl out=taken.txt/g.jsonl", "out_under_file", ["is a file"], {"key": "out"}),
    ("report notes", "no_run", ["config.yaml"], {"key": "RUN"}),
    # -- samples and their judges
    ("generate model=m prompts=long.jsonl out=g.jsonl", "too_long", ["64 positions", "lower max_new_tokens"],
     {"key": "max_new_tokens"}),
    ("evaluate model=m data=pairs.jsonl max_length=500", "too_long", ["64 positions"], {"key": "max_length"}),
    (f"{E} scorer=my_scorers.length", "bad_scorer", ["package.module:function"], {"key": "scorer"}),
    (f"{E} scorer=nosuch_module:f", "bad_scorer", ["cannot be imported", "nosuch_module"], {"key": "scorer"}),
    (f"{E} scorer=my_scorers:nosuch", "bad_scorer", ["cannot be imported", "nosuch"], {"key": "scorer"}),
    (f"{E} scorer=torn_scorer:f", "bad_scorer", ["SyntaxError", "torn_scorer.py, line 1"], {"key": "scorer"}),
    (f"{E} scorer=my_scorers:number", "bad_scorer", ["not a function"], {"key": "scorer"}),
    (f"{E} scorer=my_scorers:short", "bad_scorer", ["1 values for 2 responses"], {"key": "scorer"}),
    (f"{E} scorer=my_scorers:words", "bad_scorer", ["'good'", "number"], {"key": "scorer"}),
    (f"{E} scorer=my_scorers:nan", "bad_scorer", ["nan", "finite"], {"key": "scorer"}),
    (f"{E} scorer=my_scorers:none", "bad_scorer", ["None", "list"], {"key": "scorer"}),
    (f"{E} scorer=my_scorers:breaks", "bad_scorer", ["out of ideas", "my_scorers.py, line 7"], {"key": "scorer"}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "says", "where"), TABLE, ids=[row[0].replace(" ", "_") for row in TABLE])
def test_is_refused(
    line: str,
    code: str,
    says: list[str],
    where: dict[str, Any],
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(place, capsys, monkeypatch, line).error
    assert error["code"] == code, error["message"]
    for text in says:
        assert text in error["message"]
    assert {part: error[part] for part in where} == where
    for part in where.values():
        assert str(part) in error["message"], "the line a person reads names the place too"


# -- failures after the work began: exit 1 ------------------------------------------------------------------------------------


def test_a_scorer_that_breaks_later_is_a_failure(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(place)
    answer = refused(place, capsys, monkeypatch, f"{E} scorer=my_scorers:breaks_later max_new_tokens=2", code=1)
    assert answer.error["code"] == "bad_scorer"
    assert "1 values for 3 responses" in answer.error["message"]


def test_an_adapter_that_does_not_start_at_its_base_stops_the_run_and_names_rows(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from preftune.models import adapters

    add_adapter = adapters.add_adapter

    def moved(*given: Any, **keys: Any) -> Any:
        model = add_adapter(*given, **keys)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        return model

    monkeypatch.setattr(adapters, "add_adapter", moved)
    out = tmp_path / "run"
    answer = refused(place, capsys, monkeypatch, f"{T} adapter=lora dtype=float32 out={out}", code=1)
    assert answer.error["code"] == "start_check"
    assert "pairs.jsonl row " in answer.error["message"]
    assert not (out / "metrics.jsonl").exists()
    assert not (out / "model").exists()


def test_a_step_that_is_not_finite_stops_the_run_and_names_rows(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, short_answers: None
) -> None:
    words = f"{T} dtype=float32 learning_rate=1e30 train.max_grad_norm=1e30 train.warmup=0 steps=4 out={tmp_path / 'run'}"
    answer = refused(place, capsys, monkeypatch, words, code=1)
    assert answer.error["code"] == "not_finite"
    assert "pairs.jsonl row " in answer.error["message"]
    assert "learning_rate" in answer.error["message"]


@pytest.mark.parametrize(("fault", "code"), [(OSError(28, "No space left on device", "x/model"), "os_error"),
                                             (RuntimeError("a bug"), "internal")])  # fmt: skip
def test_what_nobody_foresaw_is_one_document_too(
    fault: Exception, code: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str], as_json: bool) -> None:
        raise fault

    monkeypatch.setattr("preftune.cli.report.run", fail)
    if code == "internal":  # the trace is shown to the person who has to mend it
        with pytest.raises(RuntimeError, match="a bug"):
            call(capsys, "report", "a_run", "--json")
        assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    else:
        answer = call(capsys, "report", "a_run", "--json")
        assert (answer.code, answer.error["code"], answer.error["file"]) == (1, code, "x/model")
        assert answer.err == "preftune: x/model: No space left on device\n"


def test_a_figure_that_is_not_finite_is_an_error_and_no_broken_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preftune.cli.report.run", lambda words, as_json: {"loss": float("nan")})
    answer = call(capsys, "report", "a_run", "--json")
    assert (answer.code, answer.error["code"]) == (1, "not_finite")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_verb_that_saves_nothing(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(words: list[str], as_json: bool) -> None:
        try:
            signal.raise_signal(number)
        except Exception:
            pytest.fail("somebody's code took the signal for an error of its own")

    monkeypatch.setattr("preftune.cli.report.run", stopped)
    before = signal.getsignal(signal.SIGTERM)
    started = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    try:
        answer = call(capsys, "report", "a_run", "--json")
    finally:
        signal.signal(signal.SIGINT, started)
    assert (answer.code, answer.error["code"]) == (code, "interrupted")
    assert answer.err == f"preftune: stopped by {number.name}\n"
    assert signal.getsignal(signal.SIGTERM) == before


# -- nothing heavy is imported before it is needed -----------------------------------------------------------------------------

# refused, or answered, without the tokenizer
LIGHT = [
    "--help", "train --help", "demo --help", "--version", "tran", T + " learning_rte=1", "train gone.yaml",
    "train model=m data=gone.jsonl", "train model=m data=odd.jsonl", "train model=m data=one_bad.jsonl data.strict=true",
    "train model=more_tokens data=pairs.jsonl", T + " reference=other_tokens", T + " out=a_run", T + " method=sigmoid",
    "train model=m data=shown.jsonl method=dpo", T + " eval_data=gone.jsonl", "evaluate model=m data=odd.jsonl",
    "evaluate model=m data=shown.jsonl method=dpo", E + " scorer=my_scorers:short", E + " scorer=nosuch:f",
    "score model=m data=pairs.jsonl out=taken.txt", "generate model=gone prompts=prompts.jsonl",
    "generate model=m prompts=nothing.jsonl", "chat model=gone", "merge m out=new", "report notes", "demo out=a_run",
]  # fmt: skip
SCRIPT = """
import json, sys
from preftune.cli.app import run
heavy = ("torch", "transformers", "datasets", "pyarrow", "peft", "matplotlib")
found = {}
for line in json.load(sys.stdin):
    try:
        run(line.split())
    except SystemExit as done:
        if done.code not in (0, 2, None):
            found[line] = done.code
    for name in heavy:
        if name in sys.modules and name not in found.values():
            found[line] = name
json.dump(found, open("found.json", "w"))
"""


def test_help_and_refusals_import_nothing_heavy(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(LIGHT), text=True, cwd=tmp_path, check=True, capture_output=True
    )
    assert json.loads((tmp_path / "found.json").read_text()) == {}


def test_a_run_does_not_overwrite_what_it_reads(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in ("train model=m data=pairs.jsonl out=m", "train model=m data=nested/pairs.jsonl out=nested"):
        (place / "nested").mkdir(exist_ok=True)
        shutil.copy(place / "pairs.jsonl", place / "nested")
        error = refused(place, capsys, monkeypatch, f"{line} overwrite=true").error
        assert (error["code"], error["key"]) == ("out_holds_input", "out")


@pytest.mark.parametrize(
    "line",
    [
        "score model=m data=pairs.jsonl out=./pairs.jsonl",
        "score model=m data=pairs.jsonl out=m/config.json",
        "score model=m data=pairs.jsonl reference=other out=other/config.json",
        "score good.yaml out=good.yaml",
        "score model=m data=nested out=nested/pairs.jsonl",
        "score model=m data=pairs.jsonl data.template=plain.jinja out=plain.jinja",
        "generate model=m prompts=prompts.jsonl out=prompts.jsonl",
        "generate model=link prompts=prompts.jsonl out=m/config.json",
        "generate sample.yaml out=sample.yaml",
        "check pairs.jsonl out=pairs.jsonl",
        "check data.sources=[pairs.jsonl] out=pairs.jsonl",
        "check pairs.jsonl eval_data=ties.jsonl out=ties.jsonl",
        "check pairs.jsonl model=m out=m/config.json",
        "check pairs.jsonl check.yaml out=check.yaml",
        "convert nested nested/pairs.jsonl to=pairs",
    ],
)
def test_a_file_that_is_read_is_not_written_over(
    line: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nested").mkdir()
    for name in ("pairs.jsonl", "prompts.jsonl", "ties.jsonl", "good.yaml", "nested/pairs.jsonl"):
        shutil.copy(place / Path(name).name, tmp_path / name)
    for name in ("m", "other"):
        shutil.copytree(place / "m", tmp_path / name)
    (tmp_path / "plain.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "sample.yaml").write_text("model: m\nprompts: prompts.jsonl\n")
    (tmp_path / "check.yaml").write_text("near_duplicates: false\n")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    error = refused(tmp_path, capsys, monkeypatch, f"{line} overwrite=true").error
    assert (error["code"], error["key"]) == ("out_is_input", "out")


def test_a_run_that_is_not_there_is_no_name_on_the_hub(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "runs" / "first").mkdir(parents=True, exist_ok=True)
    error = refused(place, capsys, monkeypatch, "train model=runs/frist data=pairs.jsonl").error
    assert error["code"] == "missing_model" and "runs/first" in error["message"]
