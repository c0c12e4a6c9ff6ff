"""Every verb of the command line from end to end, on a tiny random model."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import PAIRS, Answer, call, quietly, repeated, tree, write_model, write_rows

import preftune
from preftune.cli.app import VERBS, WORDS
from preftune.cli.console import Watch, setup
from preftune.config import all_keys
from preftune.keys import VERB_KEYS

LINE = {
    *("step", "epoch", "loss", "grad_norm", "learning_rate", "margin", "accuracy", "reward/chosen", "reward/rejected"),
    *("logp/chosen", "logp/rejected", "log_ratio/chosen", "log_ratio/rejected", "length/chosen", "length/rejected"),
    *("pairs_per_s", "tokens_per_s", "memory_gb"),
}
EVALUATED = {
    *("comparisons", "demonstrations", "prompts", "accuracy", "accuracy_interval", "logp_accuracy", "logp_accuracy_interval"),
    *("margin", "loss", "kl", "kl_samples", "kl_interval", "method", "beta"),
}
RUN_FILES = {"config.yaml", "metrics.jsonl", "model", "report.html", "environment.json", "samples.jsonl"}
TRAIN = ["train", "model=m", "data=pairs.jsonl", "dtype=float32", "batch_size=8", "steps=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models, data and a finished run `done`, in the working folder."""
    here = tmp_path_factory.mktemp("cli")
    write_model(here / "m", positions=128)
    write_model(here / "b", seed=1, positions=128)
    write_rows(here / "pairs.jsonl", PAIRS)
    write_rows(here / "few.jsonl", PAIRS[:4])
    write_rows(here / "shown.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS[:6]])
    write_rows(here / "prompts.jsonl", [{"prompt": p["prompt"]} for p in PAIRS[:3]])
    sides = (("chosen", True), ("rejected", False))
    rated = [{"prompt": p["prompt"], "completion": p[side], "label": label} for p in PAIRS for side, label in sides]
    write_rows(here / "rated.jsonl", rated)
    (here / "my_scorer.py").write_text("def length(prompts, responses): return [float(len(r)) for r in responses]\n")
    before = os.getcwd()
    os.chdir(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preftune.runs.answers.NEW_TOKENS", 3)
        assert quietly(*TRAIN, "learning_rate=1e-3", "out=done", "--quiet") == 0
    yield here
    os.chdir(before)


@pytest.fixture
def preftune_(place: Path, capsys: pytest.CaptureFixture[str], short_answers: None) -> Any:
    """preftune_("score", ...) in `place`."""
    return lambda *words: call(capsys, *words)


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def numbers(path: str | Path) -> list[dict[str, Any]]:
    return repeated(lines(path))


# -- train ------------------------------------------------------------------------------------------------------------------


def test_train_leaves_the_run_folder_of_the_contract(place: Path) -> None:
    done = place / "done"
    assert {p.name for p in done.iterdir()} >= RUN_FILES
    assert not list(done.rglob("*.tmp"))
    first, second = lines(done / "metrics.jsonl")
    assert set(first) == set(second) == LINE
    assert (first["step"], second["step"]) == (1, 2)
    assert abs(first["loss"] - math.log(2)) < 1e-6
    assert second["loss"] < first["loss"]
    environment = json.loads((done / "environment.json").read_text())
    assert {"torch", "transformers", "preftune"} <= set(environment["versions"])
    read = {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "pairs.jsonl",
    }
    assert {Path(name).name for name in environment["sha256"]} == read
    assert all(Path(name).is_absolute() for name in environment["sha256"]), "a run is resumed from anywhere"
    data = json.loads((done / "data.json").read_text())
    assert data["rows"] == data["kept"] + sum(data["dropped"].values()) == len(PAIRS)
    evaluation = json.loads((done / "evaluation.json").read_text())
    assert set(evaluation["before"]) == set(evaluation["after"]) == EVALUATED
    assert evaluation["after"]["kl"] > 0
    assert set(lines(done / "samples.jsonl")[0]) == {"prompt", "before", "after", "chosen", "tokens_before", "tokens_after"}


def test_the_model_of_a_run_loads_in_transformers(place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained, start = (AutoModelForCausalLM.from_pretrained(place / name).state_dict() for name in ("done/model", "m"))
    assert set(trained) == set(start)
    assert any((trained[name] != start[name]).any() for name in start)
    assert AutoTokenizer.from_pretrained(place / "done/model")("abc").input_ids


def test_config_yaml_holds_absolute_paths(place: Path) -> None:
    config = (place / "done" / "config.yaml").read_text()
    for name in ("m", "pairs.jsonl", "done"):
        assert str(place / name) in config
    assert re.search(r"^learning_rate: 0\.001$", config, re.M)
    assert "max_length: 128" in config, "what was filled in is written down"


def test_a_rerun_gives_the_same_numbers(preftune_: Any, no_report: None) -> None:
    answer = preftune_("train", "done/config.yaml", "out=again", "--json", "--quiet")
    assert set(answer.json) == {"out", "method", "before", "after", "diagnosis"}
    assert (answer.code, answer.json["out"], answer.json["method"], answer.err) == (0, "again", "dpo", "")
    assert numbers("again/metrics.jsonl") == numbers("done/metrics.jsonl")
    assert lines("again/samples.jsonl") == lines("done/samples.jsonl")
    assert Path("again/evaluation.json").read_text() == Path("done/evaluation.json").read_text()


@pytest.mark.parametrize(
    ("words", "written", "roles"),
    [
        (["data=rated.jsonl", "method.desirable_weight=1.2"],
         ["beta: 0.1", "name: kto", "desirable_weight: 1.2", "undesirable_weight: 1.0", "learning_rate: 5e-06"],
         ["desirable", "undesirable"]),
        (["method=simpo"], ["beta: 2.0", "gamma: 1.0"], ["chosen", "rejected"]),
        (["method.mix={dpo: 0.8, sft: 0.2}"], ["beta: 0.1", "name: null", "dpo: 0.8"], ["chosen", "rejected"]),
        (["method=ld-dpo", "reference.sync_steps=1"], ["name: ld_dpo", "alpha: 0.5", "sync_steps: 1"], ["chosen", "rejected"]),
        (["method=plackett_luce"], ["name: plackett_luce"], ["place 1", "place 2"]),
        (["method=sft"], ["beta: null", "name: sft"], ["response"]),
    ],
    ids=lambda value: value[0],
)  # fmt: skip
def test_every_kind_of_method_from_words_to_its_rerun(
    words: list[str], written: list[str], roles: list[str], preftune_: Any, no_report: None, tmp_path: Path
) -> None:
    words = [*TRAIN, *words]
    plan = preftune_(*words, "dry_run=true", "--json", "--quiet").json
    shown = {line.partition(":")[0].strip() for row in plan["rows"] for line in row.splitlines()[1:]}
    assert shown <= set(roles) and shown and plan["memory_gb"] > 0
    first, again = tmp_path / "first", tmp_path / "again"
    answer = preftune_(*words, f"out={first}", "--json", "--quiet")
    assert answer.code == 0 and answer.json["method"] == plan["method"], answer.err
    config = (first / "config.yaml").read_text()
    assert all(text in config for text in written), config
    assert preftune_("train", str(first / "config.yaml"), f"out={again}", "--quiet").code == 0
    assert numbers(again / "metrics.jsonl") == numbers(first / "metrics.jsonl")
    assert (again / "config.yaml").read_text() == config.replace(str(first), str(again))
    figures = preftune_("evaluate", str(first / "config.yaml"), f"model={first}", "reference=m", "kl_samples=0", "--json").json
    assert figures["method"] == plan["method"] and figures["loss"] is not None
    told = preftune_("doctor", str(first / "config.yaml"), "--json", "--quiet").json
    assert (told["healthy"], told["method"]) == (True, plan["method"]) and told["run"]["tokens"] > 0


def test_what_is_chosen_for_the_user_is_said(preftune_: Any, no_report: None) -> None:
    answer = preftune_("train", "model=m", "data=pairs.jsonl", "steps=1", "epochs=3")
    assert (answer.code, answer.out) == (0, "")
    for text in (
        f"pairs.jsonl: {len(PAIRS)} rows read as preference pairs",
        "method: dpo, by the kind of marks",
        "learning_rate: 1e-06, the default for dpo",
        "steps and epochs are both given: steps=1 counts",
        "step 1 of 1  loss 0.6931",
    ):
        assert text in answer.err
    (out,) = Path("runs").iterdir()
    assert re.fullmatch(r"dpo-\d{4}-\d\d-\d\d-1", out.name)
    assert f"run: {Path('runs') / out.name}" in answer.err


def test_the_end_of_a_run_says_what_is_wrong_with_it(preftune_: Any, no_report: None) -> None:
    answer = preftune_(*TRAIN, "reference=b", "steps=1", "out=against")
    assert "diagnosis: The reference is not where the policy starts: at step 1" in answer.err
    assert "docs/diagnosis/reference_mismatch.md" in answer.err


def test_overwrite_moves_the_old_run_aside(preftune_: Any, no_report: None) -> None:
    words = ["train", "model=m", "data=few.jsonl", "steps=1", "method=sft", "out=over", "--quiet"]
    old: list[dict[str, bytes | None]] = []
    for n in range(3):
        assert preftune_(*words, f"seed={n}", *(["overwrite=true"] if n else [])).code == 0
        old.append(tree(Path("over")))
    assert sorted(p.name for p in Path().glob("over*")) == ["over", "over.old-1", "over.old-2"]
    assert [tree(Path(f"over.old-{n}")) for n in (1, 2)] == old[:2]


def test_a_dry_run_shows_rows_and_writes_nothing(preftune_: Any, place: Path) -> None:
    before = tree(place)
    answer = preftune_(*TRAIN, "dry_run=true", "out=new")
    assert (answer.code, answer.out, tree(place)) == (0, "", before)
    assert f"{len(PAIRS)} rows" in answer.err
    shown = [line for line in answer.err.splitlines() if line.startswith(("  chosen: ", "  rejected: "))]
    assert len(shown) == 6 and answer.err.count("pairs.jsonl:") >= 3
    assert all(line.count("⟦") == line.count("⟧") == 1 and line.endswith("</s>⟧") for line in shown)


def test_the_plan_of_a_dry_run_is_its_document(preftune_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.runs.train.train", lambda keys, **_: {"steps": 2})
    assert preftune_(*TRAIN, "dry_run=true", "--json").json == {"steps": 2}


def test_held_out_data_and_checkpoints(preftune_: Any) -> None:
    words = ["train.eval_every=2", "train.save_every=1", "train.keep_checkpoints=2", "steps=4", "learning_rate=1e-3"]
    answer = preftune_(*TRAIN, *words, "eval_data=few.jsonl", "out=held", "--json")
    assert answer.json["before"]["comparisons"] == 4
    assert answer.json["before"]["loss"] == pytest.approx(math.log(2))
    assert "eval_data shares 4 of its 4 prompts with the training data" in answer.err
    evaluated = [line["step"] for line in lines("held/metrics.jsonl") if "eval/loss" in line]
    assert evaluated == [2, 4]
    assert sorted(p.name for p in Path("held/checkpoints").glob("[bs]*")) == [
        *("best", "best.safetensors", "start.json", "step-000003", "step-000004")
    ]
    best = min((line["eval/loss"], line["step"]) for line in lines("held/metrics.jsonl") if "eval/loss" in line)
    assert f"kept: the weights of step {best[1]}" in answer.err
    assert answer.json["after"]["loss"] == pytest.approx(best[0])
    page = Path("held/report.html").read_text()
    assert "eval" in page or "held-out" in page


def test_pairs_of_messages_train_too(preftune_: Any, no_report: None) -> None:
    """LLaMA-Factory's own columns; one of the rows is faulty."""
    rows = [
        {
            "conversations": [{"from": "human", "value": pair["prompt"]}],
            "chosen": {"from": "gpt", "value": pair["chosen"]},
            "rejected": {"from": "gpt", "value": pair["rejected"] if n else ""},
        }
        for n, pair in enumerate(PAIRS[:20])
    ]
    Path("lf.json").write_text(json.dumps(rows))
    answer = preftune_("train", "model=m", "data=lf.json", "steps=1", "out=lf")
    assert answer.code == 0
    assert "20 rows read as LLaMA-Factory preference pairs, 1 dropped: empty_answer 1 (row 1)" in answer.err
    assert "data.template=plain" in answer.err
    assert json.loads(Path("lf/data.json").read_text())["kept"] == 19


# -- adapters ---------------------------------------------------------------------------------------------------------------


def test_adapter_then_merge(preftune_: Any, no_report: None) -> None:
    words = [*TRAIN, "adapter=lora", "adapter.r=2", "learning_rate=1e-2", "out=lora"]
    assert preftune_(*words, "--quiet").code == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        p.name for p in Path("lora/model").iterdir()
    }
    assert "model.safetensors" not in {p.name for p in Path("lora/model").iterdir()}
    answer = preftune_("merge", "lora", "out=merged", "--json")
    assert (answer.code, answer.json) == (0, {"out": "merged"})
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in Path("merged").iterdir()}
    found = [scores(preftune_, model) for model in ("m", "lora", "merged")]
    assert max(abs(a - b) for a, b in zip(found[1], found[2], strict=True)) < 1e-4
    assert max(abs(a - b) for a, b in zip(found[0], found[1], strict=True)) > 1e-2
    again = preftune_("merge", "lora", "out=merged", "--json")
    assert (again.code, again.error["code"]) == (2, "out_holds_run")
    assert preftune_("merge", "lora", "out=merged", "overwrite=true").code == 0
    assert Path("merged.old-1/model.safetensors").is_file()


def test_a_merged_model_keeps_the_precision_of_its_base(preftune_: Any, no_report: None) -> None:
    """The sum is taken in float32, and rounded once."""
    import torch
    from safetensors.torch import load_file

    from preftune.models.load import load_model

    tiny.model(positions=128).to(torch.bfloat16).save_pretrained("half")
    tiny.tokenizer().save_pretrained("half")
    said = json.loads(Path("half/config.json").read_text())
    Path("half/config.json").write_text(json.dumps(said | {"dtype": "float16"}))  # what is stored counts, not what is said
    words = ["train", "model=half", "data=few.jsonl", "dtype=float32", "batch_size=4", "steps=2", "learning_rate=1e-2"]
    assert preftune_(*words, "adapter=lora", "adapter.r=2", "out=on_half", "--quiet").code == 0
    exact = load_model("on_half").merge_and_unload().state_dict()
    for out, dtype, more in (("as_stored", torch.bfloat16, []), ("as_asked", torch.float32, ["dtype=float32"])):
        assert preftune_("merge", "on_half", f"out={out}", *more, "--quiet").code == 0
        merged = load_file(f"{out}/model.safetensors")
        assert {tensor.dtype for tensor in merged.values()} == {dtype}
        assert all(torch.equal(tensor, exact[name].to(dtype)) for name, tensor in merged.items())
        assert json.loads(Path(out, "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_merged_at_the_end_of_training(preftune_: Any, no_report: None) -> None:
    assert preftune_(*TRAIN, "adapter=lora", "adapter.r=2", "adapter.merge=true", "out=folded", "--quiet").code == 0
    assert "model.safetensors" in {p.name for p in Path("folded/model").iterdir()}


# -- score ------------------------------------------------------------------------------------------------------------------


def scores(preftune_: Any, model: str, data: str = "few.jsonl") -> list[float]:
    answer = preftune_("score", f"model={model}", f"data={data}", "out=scores.jsonl", "overwrite=true", "--quiet")
    assert answer.code == 0, answer.err
    return [line["logp"] for line in lines("scores.jsonl")]


def test_score_writes_a_line_per_distinct_response(preftune_: Any) -> None:
    a, b = PAIRS[0], PAIRS[1]
    rows = [a, {**b, "chosen": " yes", "rejected": " no"}, {**a, "chosen": a["rejected"], "rejected": " third"}]
    write_rows(Path("shared.jsonl"), rows)
    answer = preftune_("score", "model=m", "data=shared.jsonl", "out=deep/s.jsonl", "--json")
    assert answer.json == {"out": "deep/s.jsonl", "responses": 5, "groups": 2}
    found = lines("deep/s.jsonl")
    assert [(line["group"], line["response"]) for line in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
    assert set(found[0]) == {"group", "response", "group_id", "response_id", "from", "logp", "length"}
    place = [{"file": "shared.jsonl", "row": 1, "column": "rejected"}, {"file": "shared.jsonl", "row": 3, "column": "chosen"}]
    assert found[1]["from"] == place
    assert len({line["response_id"] for line in found}) == 5
    assert found[2]["length"] == len(" yes") + 1, "a token a letter, and the end token"
    assert not Path("deep/s.jsonl.tmp").exists()


def test_dropped_rows_leave_no_trace_in_the_scores(preftune_: Any) -> None:
    """Order and numbers are those of a file without them; only the row numbers tell that they were there."""
    long = " and so on" * 40
    prompts = [" A", " B", " C"]
    rows = [
        {"prompt": prompts[p], "chosen": chosen, "rejected": rejected}
        for p, chosen, rejected in [
            (0, " yes", " no"),
            (1, long, " no"),  # too long, and the first of its prompt
            (2, " one", " two"),
            (1, " yes", " no"),
            (0, " three", " no"),
            (0, " no", long),  # too long; its chosen answer stands in other rows too
            (0, long, " four"),
            (2, " two", " five"),
        ]
    ]
    write_rows(Path("z.jsonl"), rows[:5])
    write_rows(Path("a.jsonl"), rows[5:])  # files in the order given, not of their names
    assert preftune_("score", "model=m", "data=[z.jsonl, a.jsonl]", "out=kept.jsonl").code == 0
    found = lines("kept.jsonl")
    assert [(line["group"], line["response"]) for line in found] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
        (0, 2),
        (1, 2),
    ]
    assert [[(o["file"], o["row"], o["column"]) for o in line["from"]] for line in found] == [
        [("z.jsonl", 1, "chosen")],
        [("z.jsonl", 1, "rejected"), ("z.jsonl", 5, "rejected")],
        [("z.jsonl", 3, "chosen")],
        [("z.jsonl", 3, "rejected"), ("a.jsonl", 3, "chosen")],
        [("z.jsonl", 4, "chosen")],
        [("z.jsonl", 4, "rejected")],
        [("z.jsonl", 5, "chosen")],
        [("a.jsonl", 3, "rejected")],
    ]
    write_rows(Path("clean.jsonl"), [row for row in rows if long not in row.values()])
    assert preftune_("score", "model=m", "data=clean.jsonl", "out=clean.out.jsonl", "--quiet").code == 0
    clean = lines("clean.out.jsonl")
    assert [line | {"from": None} for line in found] == [line | {"from": None} for line in clean]


def test_scores_that_are_not_finite_are_no_scores(preftune_: Any) -> None:
    broken = tiny.model(positions=128)
    broken.model.layers[0].mlp.up_proj.weight.data.fill_(math.nan)
    broken.save_pretrained("broken")
    tiny.tokenizer().save_pretrained("broken")
    answer = preftune_("score", "model=broken", "data=few.jsonl", "out=broken.jsonl", "--json")
    assert (answer.code, answer.error["code"]) == (1, "not_finite")
    assert not Path("broken.jsonl").exists()


def test_score_against_a_reference_with_tokens(preftune_: Any) -> None:
    words = ["score", "model=done", "reference=m", "data=few.jsonl", "beta=0.5", "token_logps=true", "out=r.jsonl", "--quiet"]
    assert preftune_(*words).code == 0
    for line, logp, reference in zip(lines("r.jsonl"), scores(preftune_, "done"), scores(preftune_, "m"), strict=True):
        assert (line["logp"], line["reference_logp"]) == pytest.approx((logp, reference))
        assert line["reward"] == pytest.approx(0.5 * (logp - reference))
        assert sum(line["token_logps"]) == pytest.approx(logp, abs=1e-4)
        assert len(line["token_logps"]) == line["length"]


def test_every_file_kind_gives_the_same_scores(preftune_: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = PAIRS[:4]
    Path("k.json").write_text(json.dumps(rows))
    Path("k.jsonl.gz").write_bytes(gzip.compress(Path("few.jsonl").read_bytes()))
    Path("windows.jsonl").write_bytes(Path("few.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    with open("k.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "k.parquet")
    expected = scores(preftune_, "m")
    for name in ("k.json", "k.jsonl.gz", "windows.jsonl", "k.csv", "k.parquet"):
        assert scores(preftune_, "m", name) == expected, name


def test_own_column_names(preftune_: Any) -> None:
    write_rows(Path("own.jsonl"), [{"prompt": p["prompt"], "better": p["chosen"], "worse": p["rejected"]} for p in PAIRS[:4]])
    words = ["data=own.jsonl", "data.columns.chosen=better", "data.columns={rejected: worse}", "out=own.out.jsonl", "--quiet"]
    assert preftune_("score", "model=m", *words).code == 0
    assert [line["logp"] for line in lines("own.out.jsonl")] == scores(preftune_, "m")


# -- evaluate ---------------------------------------------------------------------------------------------------------------


def test_evaluate_a_run_against_a_reference(preftune_: Any) -> None:
    words = ["evaluate", "model=done", "reference=m", "data=few.jsonl", "kl_samples=2", "max_new_tokens=3", "beta=0.2"]
    result = preftune_(*words, "--json", "--quiet").json
    assert set(result) == EVALUATED
    assert (result["comparisons"], result["prompts"], result["beta"], result["kl_samples"]) == (4, 4, 0.2, 2)
    assert result["accuracy_interval"][0] <= result["accuracy"] <= result["accuracy_interval"][1]
    printed = preftune_(*words).out
    assert re.search(rf"^accuracy +{result['accuracy']:.4f}   \[", printed, re.M)
    assert "interval" not in printed


def test_evaluate_without_a_reference(preftune_: Any) -> None:
    result = preftune_("evaluate", "model=m", "data=few.jsonl", "--json").json
    nothing = {name for name, value in result.items() if value is None}
    assert nothing == EVALUATED - {"comparisons", "prompts", "logp_accuracy", "logp_accuracy_interval", "method", "beta"}
    shown = preftune_("evaluate", "model=m", "data=shown.jsonl", "--json").json
    assert (shown["method"], shown["demonstrations"]) == ("sft", 6)
    assert shown["perplexity"] == pytest.approx(math.exp(shown["loss"]))


def test_win_rate(preftune_: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(place)
    words = ["prompts=prompts.jsonl", "scorer=my_scorer:length", "max_new_tokens=4", "--json", "--quiet"]
    tied = preftune_("evaluate", "model=m", "against=m", *words).json
    assert set(tied) == {
        *("prompts", "win_rate", "win_rate_interval", "wins", "ties", "losses", "length", "length_against", "scorer")
    }
    assert (tied["win_rate"], tied["ties"], tied["scorer"], tied["prompts"]) == (0.5, 3, "my_scorer:length", 3)
    other = preftune_("evaluate", "model=m", "against=b", *words).json
    assert other["wins"] + other["ties"] + other["losses"] == 3
    assert other["win_rate"] == (other["wins"] + other["ties"] / 2) / 3


def test_what_a_scorer_prints_stays_out_of_the_document(preftune_: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(place)
    (place / "loud_scorer.py").write_text("def one(prompts, responses): print('judging'); return [1.0] * len(responses)\n")
    words = ["evaluate", "model=m", "against=m", "prompts=prompts.jsonl", "scorer=loud_scorer:one", "max_new_tokens=2"]
    answer = preftune_(*words, "--json", "--quiet")
    assert answer.json["ties"] == 3
    assert set(answer.err.splitlines()) == {"judging"}
    assert "judging" in preftune_(*words, "--quiet").out, "without --json it is the user's own standard output"


def test_what_an_evaluation_does_not_use_of_a_file_is_said(
    preftune_: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(place)
    Path("both.yaml").write_text("model: m\nbeta: 0.5\nprompts: prompts.jsonl\nscorer: my_scorer:length\nmax_new_tokens: 2\n")
    win_rate, held_out = (preftune_("evaluate", "both.yaml", word) for word in ("against=m", "data=few.jsonl"))
    assert (win_rate.code, held_out.code) == (0, 0)
    assert "not used by a win rate: beta\n" in win_rate.err
    assert "not used by held-out data: prompts, scorer\n" in held_out.err


# -- generate, chat, report, demo ----------------------------------------------------------------------------------------------


def test_generate(preftune_: Any) -> None:
    words = ["generate", "model=done", "prompts=prompts.jsonl", "samples=2", "max_new_tokens=3", "seed=1"]
    answer = preftune_(*words, "out=g.jsonl", "--json")
    assert answer.json == {"out": "g.jsonl", "prompts": 3, "responses": 6, "left_out": 0}
    found = lines("g.jsonl")
    assert set(found[0]) == {"prompt_index", "sample", "prompt", "response", "tokens", "finish"}
    assert [(line["prompt_index"], line["sample"]) for line in found] == [(p, s) for p in range(3) for s in range(2)]
    assert found[0]["prompt"] == PAIRS[0]["prompt"]
    assert all(line["finish"] == "stop" or line["tokens"] == 3 for line in found)
    printed = preftune_(*words, "--quiet")
    assert [json.loads(line) for line in printed.out.splitlines()] == found, "the same seed, the same samples"
    assert printed.err == ""
    greedy = [preftune_(*words, "temperature=0", f"seed={n}", "--quiet").out for n in (1, 2)]
    assert greedy[0] == greedy[1]
    assert preftune_(*words, "seed=2", "--quiet").out != printed.out


def test_prompts_without_room_are_left_out_and_named(preftune_: Any) -> None:
    long = "and so on " * 13  # over 128 positions
    write_rows(Path("room.jsonl"), [{"prompt": p} for p in ["a", *(f"{n}{long}" for n in range(6)), "b"]])
    words = ["generate", "model=m", "max_new_tokens=3", "out=room.out.jsonl", "overwrite=true", "--json"]
    answer = preftune_(*words, "prompts=room.jsonl", "samples=2")
    assert answer.json == {"out": "room.out.jsonl", "prompts": 2, "responses": 4, "left_out": 6}
    found = lines("room.out.jsonl")
    assert [(line["prompt_index"], line["prompt"]) for line in found] == [(0, "a"), (0, "a"), (7, "b"), (7, "b")]
    named = ", ".join(f"prompt_index {n}" for n in range(1, 6))
    assert re.search(rf"^warning: 6 of 8 prompts left out, .*128 positions .*: {named}, \.\.\.$", answer.err, re.M)
    write_rows(Path("rows.jsonl"), [PAIRS[0], {**PAIRS[1], "prompt": long}])
    assert re.search(r"1 of 2 prompts left out.*: rows\.jsonl row 2$", preftune_(*words, "prompts=rows.jsonl").err, re.M)
    exact = 1 + len("xy")  # the start token, and a token a letter
    write_rows(Path("exact.jsonl"), [{"prompt": "xy"}])
    assert preftune_(*words, "prompts=exact.jsonl", f"max_new_tokens={128 - exact}").code == 0
    over = preftune_(*words, "prompts=exact.jsonl", f"max_new_tokens={128 - exact + 1}")
    assert (over.code, over.error["key"]) == (2, "max_new_tokens")


def test_chat(preftune_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["chat", "model=m", "max_new_tokens=3", "temperature=0"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n\n/reset\nabc\n"))
    answer = preftune_(*words)
    assert answer.code == 0
    assert "/reset" in answer.err
    assert "no chat template" in answer.err
    text = answer.out
    assert text
    assert text[: len(text) // 2] == text[len(text) // 2 :], "after /reset it begins anew"
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 200 + "\n/quit\nnever asked\n"))
    full = preftune_(*words)
    assert (full.code, full.out) == (0, "")
    assert "128 positions" in full.err


def test_chat_carries_the_conversation(preftune_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    tokenizer = tiny.tokenizer(template=template)
    if not Path("chatty").exists():
        write_model(Path("chatty"), template=template)
    asked: list[str] = []

    def answer(model: Any, own: Any, ids: tuple[int, ...], *rest: Any, **keys: Any) -> str:
        asked.append(tokenizer.decode(ids))
        return f"answer{len(asked)}"

    monkeypatch.setattr("preftune.cli.chat._answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n two \n/reset\nthree\n"))
    assert preftune_("chat", "model=chatty", "system=Be brief").code == 0
    assert asked == [
        "[system]Be brief[user]one",
        "[system]Be brief[user]one[assistant]answer1[user]two",
        "[system]Be brief[user]three",
    ]


def test_chat_speaks_the_template_that_is_named(preftune_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.tokenizer()
    asked: list[str] = []

    def answer(model: Any, own: Any, ids: tuple[int, ...], *rest: Any, **keys: Any) -> str:
        asked.append(tokenizer.decode(ids, skip_special_tokens=True))
        return " yes"

    monkeypatch.setattr("preftune.cli.chat._answer", answer)
    Path("short.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    for template in ("plain", "short.jinja"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
        said = preftune_("chat", "model=m", f"template={template}")
        assert (said.code, "no chat template" in said.err) == (0, False)
    assert asked == [
        "\n\nHuman: one\n\nAssistant:",
        "\n\nHuman: one\n\nAssistant:  yes\n\nHuman: two\n\nAssistant:",
        "[one]",
        "[one][ yes][two]",
    ]
    refused = preftune_("chat", "model=m", "template=gone.jinja")
    assert refused.code == 2
    assert refused.err.startswith("preftune: template: the chat template gone.jinja cannot be read")
    Path("bad.jinja").write_text("{% for %}")
    refused = preftune_("chat", "model=m", "template=bad.jinja")
    assert (refused.code, "Type a message" in refused.err) == (2, False)


def test_report_writes_the_page_again(preftune_: Any) -> None:
    Path("done/report.html").unlink()
    answer = preftune_("report", "done", "--json")
    assert answer.json == {"reports": ["done/report.html"], "diagnosis": {"done": []}}
    assert "<html" in Path("done/report.html").read_text()


def test_demo(preftune_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.demo import experiment

    if not (Path(experiment.model_folder()) / "model.safetensors").is_file():
        pytest.skip("the packaged film-review model is not built here")
    for name, value in (("TRAIN_PROMPTS", 6), ("HELD_PROMPTS", 5), ("NEW_TOKENS", 4)):
        monkeypatch.setattr(experiment, name, value)
    monkeypatch.setitem(experiment.SETTINGS, "epochs", 1.0)
    result = preftune_("demo", "betas=[0.1, 0.5]", "out=demo", "--json", "--quiet").json
    assert result["out"] == "demo"
    assert [one["beta"] for one in result["runs"]] == [0.1, 0.5]
    for one in result["runs"]:
        assert set(one["win_rate"]) == {"sentiment", "lexicon"}
        assert one["win_rate"]["sentiment"]["prompts"] == one["kl_samples"] == 5
        assert {"kl", "kl_interval", "distinct_2", "samples"} <= set(one)
    assert {"report.html", "demo.json", "beta-0.1", "beta-0.5"} <= {p.name for p in Path("demo").iterdir()}


# -- help -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, verb, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(f"Usage: preftune {verb} {WORDS[verb]} [OPTIONS]\n")
    assert VERBS[verb].split(".")[0] in " ".join(answer.out.split())  # lines are as long as the terminal is wide
    for key in all_keys(VERB_KEYS[verb]) if verb in VERB_KEYS else ():
        assert re.search(rf"^ +{re.escape(key)} ", answer.out, re.M), key
    assert {flag for flag in re.findall(r"^ +(--\w+)", answer.out, re.M)} == {"--help", "--json", "--quiet"}


def test_help_lists_the_methods_by_their_marks(capsys: pytest.CaptureFixture[str]) -> None:
    lines = call(capsys, "train", "--help").out.splitlines()
    (pairs,) = (line for line in lines if line.startswith("    comparisons or rankings: "))
    assert {"dpo", "simpo", "plackett_luce"} <= set(pairs.split())
    assert (
        "    ratings: kto bco_unpaired apo_zero_unpaired" in lines
        and len({word for line in lines[-4:] for word in line.split()}) > 29
    )


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    bare, asked = call(capsys), call(capsys, "--help")
    assert bare == asked
    assert all(verb in asked.out for verb in VERBS)
    assert call(capsys, "--version") == Answer(0, f"preftune {preftune.__version__}\n", "")


# -- progress ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "score model=m reference=b data=few.jsonl out=p.jsonl overwrite=true",
            ["scoring: 8 of 8", "scoring the reference: 8 of 8"],
        ),
        (
            "evaluate model=m reference=b data=few.jsonl kl_samples=3 max_new_tokens=2",
            ["scoring held-out data: 8 of 8", "scoring the reference: 8 of 8", "sampling: 3 of 3", "measuring the KL: 3 of 3"],
        ),
        ("evaluate model=m against=b prompts=prompts.jsonl scorer=my_scorer:length max_new_tokens=2", ["sampling: 3 of 3"] * 2),
        ("generate model=m prompts=prompts.jsonl samples=2 max_new_tokens=2", ["sampling: 6 of 6"]),
    ],
)
def test_long_work_shows_how_far_it_is(
    line: str, said: list[str], preftune_: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(place)
    assert " of " not in preftune_(*line.split(), "--quiet").err
    assert not re.search(r": \d+ of \d+$", preftune_(*line.split()).err, re.M), "what takes a moment is not reported"
    monkeypatch.setattr("preftune.cli.console.EVERY", -1.0)
    shown = re.findall(r"^[\w -]+: (\d+) of \1$", preftune_(*line.split()).err, re.M)
    assert len(shown) == len(said)
    assert [text for text in preftune_(*line.split()).err.splitlines() if text in said] == said


def test_where_nobody_watches_a_line_is_said_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("preftune.cli.console.time.monotonic", lambda: clock[0])
    caplog.set_level("INFO", logger="preftune")
    with Watch() as watch:
        for clock[0], phase, done in (
            *((1.0, "sample", 1), (14.0, "sample", 2), (16.0, "sample", 3), (30.0, "sample", 4), (32.0, "kl", 4)),
            *((33.0, "train", 1), (34.0, "train", 2), (49.0, "train", 3), (50.0, "train", 4)),
        ):
            watch(phase, done, 4, {"loss": 0.5} if phase == "train" else {})
    assert caplog.messages == [
        "sampling: 3 of 4",
        "measuring the KL: 4 of 4",
        "step 1 of 4  loss 0.5000",
        "step 3 of 4  loss 0.5000",
        "step 4 of 4  loss 0.5000",
    ]


def test_what_is_said_stands_above_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    log = logging.getLogger("preftune")
    before = log.handlers[:], log.level, log.propagate
    try:
        with warnings.catch_warnings():
            setup(quiet=False)
        with Watch() as watch:
            watch("sample", 1, 4, {})
            log.info("a line")
            watch("sample", 2, 4, {})
    finally:
        log.handlers[:], log.level, log.propagate = before
    shown = screen.getvalue()
    assert "sampling" in shown
    assert re.search(r"(\r|\n|\x1b\[2K)a line *\n", shown), repr(shown)


def test_a_bar_of_80_columns_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(logging.getLogger("preftune"), "level", logging.INFO)
    figures = {"loss": 0.6931, "accuracy": 0.5, "pairs_per_s": 1234.5, "tokens_per_s": 1234567.0, "memory_gb": 123.4}
    with Watch() as watch:
        for done in (1, 2, 3):
            watch("train", done, 100_000, figures | ({"loss": None} if done == 2 else {}))
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    assert "loss 0.6931  accuracy 0.50  1234.5 pairs/s  1,234,567 tokens/s  123.4 GB" in shown
    assert re.search(r"training .* 3/100000 left [-\d:]+", shown)


# -- signals ----------------------------------------------------------------------------------------------------------------


def test_signals_save_and_exit(place: Path) -> None:
    """Two real processes, each stopped when its first step is on disk."""
    jobs: list[tuple[signal.Signals, int, Path, subprocess.Popen[str]]] = []
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = place / number.name
        words = ["model=m", "data=pairs.jsonl", "steps=20000", "batch_size=2", f"out={out}", "--json"]
        command = [sys.executable, "-m", "preftune", "train", *words]
        process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        jobs.append((number, code, out, process))
    try:
        for number, code, out, process in jobs:
            deadline = time.monotonic() + 120
            while not ((out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text().count("\n")):
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline, "no step in two minutes"
                time.sleep(0.02)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=120)
            assert process.returncode == code, stderr
            (saved,) = (out / "checkpoints").glob("step-*")
            steps = len(lines(out / "metrics.jsonl"))
            assert saved.name == f"step-{steps:06d}"
            error = json.loads(stdout)["error"]
            assert error["code"] == "interrupted"
            assert f"stopped by {number.name} after step {steps}" in error["message"]
            assert str(saved) in error["message"]
            assert "Traceback" not in stderr
            preftune.score(load(saved), render(saved))
            assert not (out / "model").exists()
    finally:
        for *_, process in jobs:
            process.kill()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def render(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return preftune.render(preftune.read(PAIRS[:1]), AutoTokenizer.from_pretrained(folder))
