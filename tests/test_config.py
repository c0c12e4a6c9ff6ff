"""From words and files to one resolved run: layers, short forms, YAML 1.2, what is written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preftune.config import all_keys, build, dump, resolve
from preftune.config_errors import ELSEWHERE
from preftune.config_files import parse_word
from preftune.data.options import Source
from preftune.errors import Refusal, nearest
from preftune.keys import VERB_KEYS, DemoKeys, DoctorKeys, EvaluateKeys, GenerateKeys, Keys, ScoreKeys, TrainKeys

NEEDED = ["model=m", "data=d.jsonl"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*words: str) -> TrainKeys:
    return resolve(TrainKeys, [*NEEDED, *words])


def written(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


# -- words ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # YAML 1.1 reads this as text
        ("1E3", 1000.0),
        ("5", 5),
        ("-0.5", -0.5),
        ("0o17", 15),
        ("010", 10),  # not octal
        ("true", True),
        ("yes", "yes"),  # not a truth value
        ("no", "no"),
        ("off", "off"),
        ("on", "on"),
        ("null", None),
        ("", None),
        ("~", None),
        ("text", "text"),
        ("a b", "a b"),
        ("'5'", "5"),
        ("2026-01-31", "2026-01-31"),
        ("2026-01-31 10:20:30", "2026-01-31T10:20:30"),
        ("12:30", "12:30"),  # not base 60
        ("a=b", "a=b"),
        ("[a, 1, 2.5]", ["a", 1, 2.5]),
        ("{chosen: better, 1: one}", {"chosen": "better", "1": "one"}),
        ("/path/to/it.jsonl", "/path/to/it.jsonl"),
        ("owner/name", "owner/name"),
    ],
)
def test_the_text_after_the_sign_is_yaml_1_2(text: str, value: Any) -> None:
    read = parse_word(f"key={text}")["key"]
    assert (read, type(read)) == (value, type(value))


def test_dots_make_groups() -> None:
    assert parse_word("data.columns.chosen=better") == {"data": {"columns": {"chosen": "better"}}}


@pytest.mark.parametrize("word", ["=5", "1a=5", "a..b=1", "a b=1", ".a=1", "a.=1"])
def test_a_word_without_a_key(word: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse_word(word)
    assert refused.value.code == "usage"


def test_hyphens_are_answered_with_underscores() -> None:
    with pytest.raises(Refusal, match=r"write train\.eval_every=\.\.\."):
        parse_word("--train.eval-every=5")


# -- layers -----------------------------------------------------------------------------------------------------------------


def test_later_words_win_over_earlier_ones_and_over_the_file() -> None:
    file = written("run.yaml", "model: m\ndata: d.jsonl\nbeta: 0.2\nsteps: 7\ntrain: {eval_every: 5, save_every: 6}\n")
    keys = resolve(TrainKeys, ["beta=0.3", file, "train.eval_every=8", "beta=0.4"])
    assert (keys.beta, keys.steps, keys.train.eval_every, keys.train.save_every) == (0.4, 7, 8, 6)


def test_a_base_file_stands_below_the_file() -> None:
    written("base.yaml", "model: m\nsteps: 3\nbeta: 0.5\ntrain: {eval_every: 5}\n")
    file = written("run.yaml", "base: base.yaml\ndata: d.jsonl\nbeta: 0.2\ntrain:\n  save_every: 6\n")
    keys = resolve(TrainKeys, [file, "steps=9"])
    assert (keys.model, keys.steps, keys.beta, keys.train.eval_every, keys.train.save_every) == ("m", 9, 0.2, 5, 6)


def test_null_brings_the_default_back() -> None:
    file = written("run.yaml", "model: m\ndata: d.jsonl\nsteps: 7\nbeta: 0.5\nmethod: sft\ntrain: {eval_every: 5}\n")
    keys = resolve(TrainKeys, [file, "steps=null", "beta=", "method=~", "train.eval_every=null"])
    assert (keys.steps, keys.beta, keys.method.name, keys.train.eval_every) == (None, None, None, 0)


def test_one_file_serves_every_verb() -> None:
    file = written("run.yaml", "model: m\ndata: d.jsonl\nsteps: 7\nbeta: 0.5\nagainst: b\n")
    assert resolve(EvaluateKeys, [file]).against == "b"
    assert resolve(ScoreKeys, [file, "out=s.jsonl"]).beta == 0.5
    assert resolve(TrainKeys, [file]).steps == 7
    with pytest.raises(Refusal) as refused:  # a key of no verb is refused all the same
        resolve(ScoreKeys, [written("typo.yaml", "model: m\ndata: d\nout: s\nbta: 1\n")])
    assert (refused.value.key, refused.value.file) == ("bta", "typo.yaml")


def test_what_a_verb_does_not_use_of_a_file_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="preftune")
    written("base.yaml", "model: m\nlearning_rate: 1e-6\nout: null\nagainst: null\n")
    file = written("run.yaml", "base: base.yaml\nprompts: p\nbeta: 0.1\nepochs: 2\n")
    resolve(GenerateKeys, [file])
    assert caplog.messages == [
        "base.yaml: not used by generate: learning_rate",
        "run.yaml: not used by generate: beta, epochs",
    ]
    caplog.clear()
    resolve(TrainKeys, [written("train.yaml", "model: m\ndata: d\nbeta: 0.1\n")])
    assert caplog.messages == []
    words = ["model=m", "data=d", "seed=7", "reference={model: r, store: s, sync_steps: 2, sync_alpha: 0.5}"]
    moving = "reference.store, reference.sync_steps, reference.sync_alpha"
    resolve(EvaluateKeys, words)
    resolve(ScoreKeys, [*words, "out=s.jsonl"])
    resolve(DoctorKeys, words)
    assert caplog.messages == [
        f"not used by evaluate: {moving}",
        f"not used by score: {moving}, seed",
        f"not used by doctor: {moving.replace('store', 'model')}",
    ]
    caplog.clear()
    resolve(ScoreKeys, ["model=m", "data=d", "seed=0", "reference=r", "out=s.jsonl"])
    assert caplog.messages == []
    with pytest.raises(Refusal, match="It is a key of train, evaluate, score"):
        resolve(GenerateKeys, [file, "beta=0.1"])


def test_a_refusal_names_the_file_that_said_it_last() -> None:
    written("base.yaml", "model: m\ndata: d\nbeta: 0\n")
    file = written("run.yaml", "base: base.yaml\nsteps: 0\n")
    for words, place in (
        ([file, "steps=1"], ("base.yaml", "beta")),
        ([file, "beta=1"], ("run.yaml", "steps")),
        ([file, "steps=1", "beta=-1"], (None, "beta")),  # the word, not the file
    ):
        with pytest.raises(Refusal) as refused:
            resolve(TrainKeys, words)
        assert (refused.value.file, refused.value.key) == place


# -- short forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("data=d.jsonl", "data={sources: [d.jsonl]}"),
        ("data=[a.jsonl, b.jsonl]", "data.sources=[a.jsonl, b.jsonl]"),
        ("data=d.jsonl", "data.path=d.jsonl"),
        ("data={path: d.jsonl, limit: 3}", "data={sources: [{path: d.jsonl, limit: 3}]}"),
        ("method=dpo", "method={name: dpo}"),
        ("method=dpo", "method.name=dpo"),
        ("reference=R", "reference={model: R}"),
        ("adapter=lora", "adapter={type: lora}"),
    ],
)
def test_a_short_form_is_its_group(short: str, long: str) -> None:
    assert resolve(TrainKeys, ["model=m", "data=x", short]) == resolve(TrainKeys, ["model=m", "data=x", long])


def test_short_form_and_group_stand_together() -> None:
    for words in (["adapter=lora", "adapter.r=4"], ["adapter.r=4", "adapter=lora"]):
        adapter = train(*words).adapter
        assert (adapter.type, adapter.r) == ("lora", 4)
    keys = train("method=sft", "method.name=dpo", "data.limit=5", "data.columns.chosen=better")
    assert keys.method.name == "dpo"
    assert (keys.data.limit, keys.data.columns, keys.data.sources) == (5, {"chosen": "better"}, [Source(path="d.jsonl")])


def test_what_belongs_to_a_source_stays_with_it() -> None:
    keys = train("data={path: a.jsonl, limit: 3, strict: true}")
    assert (keys.data.sources, keys.data.strict, keys.data.limit) == ([Source(path="a.jsonl", limit=3)], True, None)
    mixed = train("data=[a.jsonl, {path: b.jsonl, format: pairs}]").data.sources
    assert mixed == [Source(path="a.jsonl"), Source(path="b.jsonl", format="pairs")]


def test_prompts_have_the_short_form_too() -> None:
    assert resolve(GenerateKeys, ["model=m", "prompts=p.jsonl"]).prompts.sources == [Source(path="p.jsonl")]


def test_a_home_folder_in_a_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    keys = resolve(TrainKeys, [written("run.yaml", "model: ~/m\ndata: d\nout: ~/runs/1\nreference: ~/r\n")])
    assert (keys.model, keys.out, keys.reference.model) == ("/home/someone/m", "/home/someone/runs/1", "/home/someone/r")


@pytest.mark.parametrize("keys", [TrainKeys, EvaluateKeys])
def test_a_beta_that_is_not_read_is_refused_as_a_word_and_said_of_a_file(
    keys: type[Keys], caplog: pytest.LogCaptureFixture
) -> None:
    """One file may serve several methods, and what an earlier version wrote for SFT names a beta."""
    file = written("run.yaml", "model: m\ndata: d.jsonl\nbeta: 0.2\n")
    with caplog.at_level("INFO", "preftune"):
        found = resolve(keys, [file, "method=sft"])
    assert found.beta is None and caplog.messages == ["run.yaml: not used by this method: beta"]  # type: ignore[attr-defined]
    assert resolve(keys, [file, "method=simpo"]).beta == 0.2  # type: ignore[attr-defined]
    for words in ([file, "method=sft", "beta=0.3"], [*NEEDED, "method=sft", "beta=0.3"]):
        with pytest.raises(Refusal, match="sft does not read it") as refused:
            resolve(keys, words)
        assert (refused.value.key, refused.value.file) == ("beta", None)


def test_a_mix_in_a_file_and_in_words() -> None:
    file = written("run.yaml", "model: m\ndata: d\nmethod: {mix: {dpo: 0.8, sft: 0.2}, pairs: best_vs_rest}\n")
    assert resolve(TrainKeys, [file]).method.mix == {"dpo": 0.8, "sft": 0.2}
    assert resolve(TrainKeys, [file, "method.mix.sft=0.5"]).method.mix == {"dpo": 0.8, "sft": 0.5}
    assert resolve(TrainKeys, [file, "method.mix=null", "method=simpo"]).method.name == "simpo"
    with pytest.raises(Refusal, match=r"method\.name=null or method\.mix=null"):
        resolve(TrainKeys, [file, "method=simpo"])


def test_the_same_beta_is_run_once() -> None:
    assert resolve(DemoKeys, ["betas=[0.1, 0.05, 0.1]"]).betas == [0.1, 0.05]


def test_keys_of_an_adapter_need_one() -> None:
    with pytest.raises(Refusal, match=r"adapter\.dropout: .*adapter=lora"):
        train("adapter.dropout=0.1")
    assert train("adapter.merge=true").adapter.merge  # an adapter that is trained on may be merged
    assert train("adapter=none", "adapter.r=16").adapter.type == "none"  # as config.yaml writes the defaults


# -- what is written back -----------------------------------------------------------------------------------------------------

EVERYTHING = [
    "model=m",
    "data=[d.jsonl, {path: e.jsonl, limit: 3}, owner/name]",
    "data.columns.chosen=better",
    "data.template=t.jinja",
    "eval_data=d.jsonl",
    "reference=r",
    "method=rpo",
    "method.alpha=0.5",
    "beta=0.2",
    "adapter=lora",
    "adapter.target_modules=[q_proj, 'no', '1e3']",
    "learning_rate=1e-6",
    "steps=3",
    "train.trackers=[tensorboard]",
    "out=runs/x",
    "dtype=bfloat16",
    "trust_remote_code=true",
]


def test_what_is_written_resolves_to_the_same_run(here: Path) -> None:
    for name in ("m", "r"):
        Path(name).mkdir()
    for name in ("d.jsonl", "e.jsonl", "t.jinja"):
        Path(name).touch()
    keys = resolve(TrainKeys, [*EVERYTHING, "overwrite=true", "dry_run=true"])
    again = resolve(TrainKeys, [written("config.yaml", dump(keys))])
    assert (again.model, again.reference.model, again.out) == (str(here / "m"), str(here / "r"), str(here / "runs/x"))
    paths = [source.path for source in again.data.sources]
    assert paths == [str(here / "d.jsonl"), str(here / "e.jsonl"), "owner/name"]
    assert again.eval_data == [Source(path=str(here / "d.jsonl"))]
    assert again.data.template == str(here / "t.jinja")
    assert (again.overwrite, again.dry_run) == (False, False), "a rerun does not move things away by itself"
    assert dump(again) == dump(keys)
    left = {"model", "reference", "out", "data", "eval_data", "overwrite", "dry_run"}
    assert again.model_dump(exclude=left) == keys.model_dump(exclude=left)
    assert again.data.sources[1].limit == 3
    assert again.data.columns == {"chosen": "better"}


def test_a_model_in_memory_has_no_path() -> None:
    """fit() names a model that was never saved with an empty text: the working folder is not its place."""
    text = dump(build(TrainKeys, {"model": "", "data": {}}))
    assert "model: ''\n" in text


def test_plain_is_a_template_and_no_path() -> None:
    Path("plain").touch()
    assert "template: plain\n" in dump(train("data.template=plain"))


def test_a_dump_without_words_is_all_defaults() -> None:
    keys = resolve(TrainKeys, [written("config.yaml", dump(train()))])
    assert keys.model_dump() == {**train().model_dump(), "out": None}
    assert (keys.beta, keys.batch_size, keys.epochs, keys.steps, keys.seed) == (None, 32, 1.0, None, 0)
    assert keys.train.eval_every == 0


# -- what is wrong, in words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "keys"), VERB_KEYS.items(), ids=VERB_KEYS)
def test_every_key_says_what_it_is(verb: str, keys: type[Keys]) -> None:
    for key, text in all_keys(keys).items():
        assert len(text.removesuffix("]").split(" [")[0]) > 8, f"{verb}: {key} has no description"


def test_help_names_defaults() -> None:
    keys = all_keys(TrainKeys)
    assert keys["batch_size"].endswith(" [32]")
    assert keys["overwrite"].endswith(" [false]")
    assert keys["train.schedule"].endswith(" [cosine]")
    assert not keys["steps"].endswith("]")


def test_all_keys_of_a_group_are_listed() -> None:
    keys = all_keys(TrainKeys)
    assert {"data", "data.sources", "data.strict", "method.name", "adapter.r", "train.eval_every", "out"} <= set(keys)


@pytest.mark.parametrize(("theirs", "ours"), ELSEWHERE.items())
def test_other_tools_keys_are_answered_with_ours(theirs: str, ours: str) -> None:
    with pytest.raises(Refusal) as refused:
        train(f"{theirs}=1")
    assert f"Here that is {ours}." in refused.value.message
    assert ours.split("=")[0].split(" ")[0] in all_keys(TrainKeys), "a key that is there"


def test_everything_wrong_is_counted() -> None:
    with pytest.raises(Refusal) as refused:
        resolve(TrainKeys, ["nonsense=1", "beta=x"])
    assert "(also needed: model=..., data=...) (and 1 more)" in str(refused.value)


def test_nearest() -> None:
    assert nearest("chosn", ["rejected", "chosen"]) == " Did you mean chosen?"
    assert nearest("xyz", ["rejected", "chosen"]) == ""


def test_an_error_in_words_and_in_parts() -> None:
    error = Refusal("is wrong", code="c", file="f", row=3, column="text", key="k")
    assert str(error) == "f, row 3, column text, k: is wrong"
    assert error.as_dict() == {
        "code": "c", "message": "f, row 3, column text, k: is wrong", "file": "f", "row": 3, "column": "text", "key": "k",
    }  # fmt: skip
    assert str(Refusal("is wrong", code="c")) == "is wrong"
    assert str(Refusal("is wrong", code="c", row=0, key="k")) == "row 0, k: is wrong"
