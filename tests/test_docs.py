"""The documents against the code: commands and YAML resolve, Python runs, tables agree, links lead somewhere."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import tolerances

import preftune
from preftune import methods
from preftune.checks.codes import CHECKS
from preftune.cli.app import VERBS
from preftune.config import all_keys, build, resolve
from preftune.config_files import expand, merge, parse_word
from preftune.data.faults import CODES
from preftune.data.formats import FORMATS, fitting, understand
from preftune.data.targets import TARGETS
from preftune.errors import Refusal
from preftune.keys import VERB_KEYS, TrainKeys
from preftune.records import Ranking, Rating

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
FLAGS = {"--help", "--json", "--quiet", "--version"}
SITES = {"arxiv.org", "download.pytorch.org", "keepachangelog.com", "semver.org"}
EVERY_KEY = {key for keys in VERB_KEYS.values() for key in all_keys(keys)}
# what the pages of methods tell of methods to come, by the names in their losses; refused until these are here

# TRL 1.16.0: the fields that these two add to TrainingArguments
DPO_CONFIG = """
    learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length
    truncation_mode padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights
    ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau activation_offloading
    sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token"""
SFT_CONFIG = """
    learning_rate chat_template_path dataset_text_field dataset_kwargs eos_token max_length truncation_mode shuffle_dataset
    packing packing_strategy padding_free eval_packing completion_only_loss assistant_only_loss loss_type
    activation_offloading"""


class Block(NamedTuple):
    page: str
    language: str
    text: str


class Row(NamedTuple):
    page: str
    section: str
    cells: dict[str, str]  # by the words of the table's head


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def blocks(language: str, pages: list[Path] = PAGES) -> list[Block]:
    fence = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    found = [Block(p.name, *m) for p in pages for m in fence.findall(p.read_text(encoding="utf-8"))]
    return [b for b in found if b.language == language]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def rows(page: Path) -> Iterator[Row]:
    section, head = "", None
    for line in prose(page).splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        if not line.startswith("|"):
            head = None
            continue
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if head is None:
            head = cells
        elif set("".join(cells)) - set("-: "):
            assert len(cells) == len(head), f"{page.name}: {line}"
            yield Row(page.name, section, dict(zip(head, cells, strict=True)))


def table(name: str, column: str) -> list[Row]:
    found = [row for row in rows(ROOT / name) if column in row.cells]
    assert found, f"{name} has no table with a column {column}"
    return found


def commands() -> list[tuple[str, str]]:
    """(page, line) of every line in a shell block that starts with preftune."""
    lines = [(b.page, line) for b in blocks("bash") for line in b.text.splitlines()]
    return [(page, line) for page, line in lines if line.startswith("preftune ")]


def mentions() -> list[tuple[str, str]]:
    """The same for commands inside sentences and tables."""
    return [(page.name, span) for page in PAGES for span in spans(prose(page)) if span.startswith("preftune ")]


def yaml_files() -> dict[str, str]:
    """The YAML blocks by the name in their first line, `# name.yaml`."""
    found: dict[str, str] = {}
    for block in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block.text)
        assert name, f"{block.page}: a YAML block starts with '# name.yaml'"
        assert name[1] not in found, f"two blocks are called {name[1]}"
        found[name[1]] = block.text
    return found


def check_words(line: str) -> tuple[str, list[str]]:
    """The verb and its words; fails for an unknown verb, flag or key."""
    words = shlex.split(line, comments=True)[1:]
    verb, words = words[0], words[1:]
    if verb in FLAGS:
        return verb, words
    assert verb in VERBS, f"no verb {verb}"
    assert not [w for w in words if w.startswith("-") and w not in FLAGS], "an unknown flag"
    words = [w for w in words if w not in FLAGS]
    known = all_keys(VERB_KEYS[verb]) if verb in VERB_KEYS else {}
    for word in words:
        if "=" in word:
            parse_word(word)
            assert word.partition("=")[0] in known, f"{verb} has no key {word.partition('=')[0]}"
    return verb, words


def resolved(keys: Any, words: list[str]) -> None:
    """Skips what is refused as a thing of a later version."""
    try:
        resolve(keys, words)
    except Refusal as refusal:
        if "not in this version" not in str(refusal):
            raise
        pytest.skip(f"not in this version: {' '.join(words)}")


# -- commands and files -------------------------------------------------------------------------------------------------


def test_there_is_something_to_check() -> None:
    assert len(commands()) >= 10
    assert {verb for _, line in commands() for verb in [line.split()[1]]} >= {"train", "evaluate", "chat", "generate", "merge"}
    assert len(yaml_files()) >= 3


@pytest.mark.parametrize(("page", "line"), commands())
def test_shell_lines_resolve(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in yaml_files().items():
        Path(name).write_text(text, encoding="utf-8")
    verb, words = check_words(line)
    if verb in ("merge", "report", "convert", "check"):
        assert [w for w in words if "=" not in w], "a run or a file has to be named"
        words = [w for w in words if "=" in w]
    if verb in VERB_KEYS:
        resolved(VERB_KEYS[verb], words)


@pytest.mark.parametrize(("page", "line"), mentions())
def test_commands_in_sentences_name_known_keys(page: str, line: str) -> None:
    check_words(line)


@pytest.mark.parametrize("name", yaml_files())
def test_yaml_blocks_resolve(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(yaml_files()[name], encoding="utf-8")
    resolved(TrainKeys, [str(path)])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda p: p.name)
def test_yaml_files_of_examples_resolve(path: Path) -> None:
    resolve(TrainKeys, [str(path)])


@pytest.mark.parametrize(
    "line",
    ["preftune trian model=m", "preftune train modle=m data=d", "preftune train model=m --out=x", "preftune chat beta=1"],
)
def test_a_wrong_line_is_seen(line: str) -> None:
    with pytest.raises(AssertionError):
        check_words(line)


# -- Python ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's examples name: a model, pairs (the README's own among them), held-out pairs."""
    folder = tmp_path_factory.mktemp("home")
    tiny.model(positions=256).save_pretrained(folder / "my-model")
    tiny.tokenizer().save_pretrained(folder / "my-model")
    shown = blocks("json", [ROOT / "README.md"])[0].text
    more = [{"prompt": f"Is {n} odd?", "chosen": " yes" * (n % 2), "rejected": " no"} for n in range(1, 80, 2)]
    (folder / "pairs.jsonl").write_text(shown + "".join(json.dumps(row) + "\n" for row in more), encoding="utf-8")
    (folder / "held_out.jsonl").write_text(shown, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ran(home: Path) -> dict[str, Any]:
    """What the README's Python blocks leave behind, run one after the other in one folder."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr("preftune.runs.answers.NEW_TOKENS", 3)
        for block in blocks("python", [ROOT / "README.md"]):
            exec(compile(block.text, "README.md", "exec"), names)
    return names


def test_the_example_rows_are_read_as_pairs(home: Path) -> None:
    groups = preftune.read(home / "held_out.jsonl")
    assert [len(g.marks) for g in groups] == [1, 1]
    assert groups[0].responses[0].content == " Air scatters blue light more than red."


def test_python_of_the_readme_runs(ran: dict[str, Any], home: Path) -> None:
    # the README asks for no precision: on hardware that computes in bfloat16 the first digits come from there
    assert ran["run"].metrics[0]["loss"] == pytest.approx(math.log(2), abs=tolerances.BF16)
    assert callable(ran["ask"])
    assert (home / "runs/python/model/config.json").is_file()


def test_python_of_the_data_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cast = [f"i{n},{who},{'ab'[(n * who) % 2]},Q{n}:, yes, no" for n in range(6) for who in (1, 2, 3)]
    Path("votes.csv").write_text("\n".join(["item,annotator,choice,prompt,response_a,response_b", *cast]), encoding="utf-8")
    (block,) = blocks("python", [ROOT / "docs/data.md"])
    names: dict[str, Any] = {}
    exec(compile(block.text, "data.md", "exec"), names)
    assert [len(group.marks) for group in names["groups"]] == [1] * 6


def test_a_run_folder_holds_what_the_readme_says(ran: dict[str, Any], home: Path) -> None:
    named = {spans(row.cells["path"])[0].rstrip("/") for row in table("README.md", "path")}
    assert named == {path.name for path in (home / "runs/python").iterdir()}


def test_every_metric_and_figure_is_explained(ran: dict[str, Any], home: Path) -> None:
    groups = preftune.read(home / "pairs.jsonl")
    rated = [replace(g, marks=(Rating(0, True), Rating(1, False))) for g in groups]
    ranked = [replace(g, marks=(Ranking(((0,), (1,))),)) for g in groups]
    others = {"sft": groups, "simpo": groups, "kto": rated, "plackett_luce": ranked}
    runs = [ran["run"]]
    runs += [preftune.fit(tiny.model(), tiny.tokenizer(), own, method=name, steps=1) for name, own in others.items()]
    metrics = {span for row in table("docs/methods/README.md", "metric") for span in spans(row.cells["metric"])}
    assert metrics == {name for run in runs for name in run.metrics[0]}
    figures = {span for row in table("docs/training.md", "figure") for span in spans(row.cells["figure"])}
    measured = {name for run in runs for name in run.after or {}}
    assert figures == {name for name in measured if not name.endswith("_interval")}


# -- tables ---------------------------------------------------------------------------------------------------------------


def keys_named() -> list[tuple[str, str]]:
    return [
        (row.page, span)
        for page in PAGES
        for row in rows(page)
        for head, cell in row.cells.items()
        if head == "preftune" and row.section != "What behaves differently"
        for span in spans(cell)
        if not span.startswith("preftune ")
    ]


def check_key(span: str) -> None:
    """A key, key=value that a run accepts, or a name of the Python package."""
    if span.startswith("preftune."):
        assert hasattr(preftune, span.partition(".")[2]), span
    elif "=" in span:
        merge(raw := {"model": "m", "data": {"sources": "d"}}, expand(parse_word(span)))
        name = build(TrainKeys, raw).method.name
        assert name is None or methods.check_name(name) == name
    else:
        assert span in EVERY_KEY, f"no key {span}"


@pytest.mark.parametrize(("page", "span"), sorted(set(keys_named())))
def test_tables_name_keys_that_exist(page: str, span: str) -> None:
    check_key(span)


@pytest.mark.parametrize("span", ["lora.r", "method=dop", "beta=0", "train.scedule=cosine", "preftune.train"])
def test_a_wrong_key_is_seen(span: str) -> None:
    with pytest.raises((AssertionError, Refusal)):
        check_key(span)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_keys_in_sentences_are_keys(page: Path) -> None:
    """Dotted names of our groups, and key=value, wherever they stand between backticks."""
    for span in spans(prose(page)):
        if re.fullmatch(r"(data|train|adapter|method|reference)\.(?!json\b)\w+", span):
            assert span in EVERY_KEY, span
        elif re.fullmatch(r"[a-z_.]+=\S+", span) and span != "key=value":
            assert span.partition("=")[0] in EVERY_KEY, span


@pytest.mark.parametrize(("section", "fields"), [("DPOConfig", DPO_CONFIG), ("SFTConfig", SFT_CONFIG)])
def test_every_field_of_trl_has_a_row(section: str, fields: str) -> None:
    found = [s for row in table("docs/from-trl.md", "TRL") if row.section == section for s in spans(row.cells["TRL"])]
    assert set(fields.split()) <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize(("page", "column"), [("docs/from-trl.md", "TRL"), ("docs/from-llama-factory.md", "LLaMA-Factory")])
def test_tables_and_refusals_give_the_same_answer(page: str, column: str) -> None:
    """What the refusal of another tool's key points to stands in the row of that key."""
    answered = 0
    for row in table(page, column):
        for theirs in spans(row.cells[column]) if "preftune" in row.cells else []:
            try:
                build(TrainKeys, {"model": "m", "data": "d", theirs: "?"})
            except Refusal as refusal:
                if hint := re.search(r"Here that is ([\w.]+\w)", str(refusal)):
                    answered += 1
                    assert hint[1] in {s.split("=")[0] for s in spans(row.cells["preftune"])}, (theirs, hint[1])
    assert answered >= 10


def test_metrics_named_are_ours(ran: dict[str, Any]) -> None:
    named = {s for row in table("docs/from-trl.md", "preftune metric") for s in spans(row.cells["preftune metric"])}
    assert {s for s in named if not s.startswith("eval/")} <= set(ran["run"].metrics[0])


def test_defaults_are_those_of_the_code() -> None:
    written = {spans(row.cells["key"])[0]: row.cells["default"] for row in table("docs/training.md", "default")}
    resolved = build(TrainKeys, {"model": "m", "data": "d"}).model_dump()
    for key, default in written.items():
        value: Any = resolved
        for part in key.split("."):
            value = value[part]
        assert str(value) == default, key


def test_formats_are_those_of_the_code() -> None:
    written = [(spans(r.cells["format"])[0], r.cells["columns"], r.cells["read as"]) for r in table("docs/data.md", "columns")]
    assert written == [(f.name, f.columns or "–", f.title) for f in FORMATS.values()]
    targets = [
        (spans(r.cells["`to`"])[0], r.cells["what it is"], spans(r.cells["read back as"])[0])
        for r in table("docs/data.md", "`to`")
    ]
    assert targets == [(t.name, t.title, t.reads_as) for t in TARGETS.values()]


def example_rows() -> list[tuple[str, dict[str, Any]]]:
    """(format, row) of the block that shows one row of each: a line with the name, then the row."""
    (block,) = blocks("jsonl", [ROOT / "docs/data.md"])
    lines = block.text.splitlines()
    return [(name.removeprefix("# "), json.loads(row)) for name, row in zip(lines[::2], lines[1::2], strict=True)]


def test_every_format_has_its_row() -> None:
    assert [name for name, _ in example_rows()] == [*FORMATS]


@pytest.mark.parametrize(("name", "row"), example_rows())
def test_the_example_row_is_of_its_format(name: str, row: dict[str, Any]) -> None:
    example = understand(FORMATS[name], row)
    assert not example.notes
    assert example.marks or FORMATS[name].kind == "prompts"
    if FORMATS[name].automatic:
        assert [format.name for format in fitting(row)] == [name]


def test_reasons_for_drops_are_those_of_the_code() -> None:
    written = {spans(row.cells["code"])[0] for row in table("docs/data.md", "code")}
    render = (ROOT / "src/preftune/data/render.py").read_text(encoding="utf-8")
    of_render = {"template_error", "too_long", "identical_tokens"}
    assert all(f'"{code}"' in render for code in of_render)
    assert written == set(CODES) | of_render


def test_findings_of_the_check_are_those_of_the_code() -> None:
    written = {
        spans(row.cells["finding"])[0]: (row.cells["severity"], row.cells["what was found"])
        for row in table("docs/data.md", "finding")
    }
    assert written == CHECKS


def test_every_room_has_its_floor() -> None:
    written = {span.rstrip("/") for row in table("CONTRIBUTING.md", "room") for span in spans(row.cells["room"])}
    found = {p.name for p in (ROOT / "src/preftune").iterdir() if not p.name.startswith("__") and p.name != "py.typed"}
    assert written == found


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {m for page in PAGES for m in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)}
    assert named and named <= targets


def test_the_changelog_speaks_of_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "### Numerics" in text.partition(f"## [{preftune.__version__}]")[2]


# -- links ----------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of its headings, as they are made of Markdown."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            found = page.parent / path if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_sites_are_few_and_no_path_is_absolute(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://([^/\s)`]+)", text)) <= SITES
    assert not re.findall(r"(?:^|[\s`'\"(=])(?:/[\w.-]+/|~/|[A-Z]:\\)\S*", text, flags=re.MULTILINE)


def test_measured_tables_are_those_of_the_results() -> None:
    def made(dtype: str) -> str:
        command = [sys.executable, ROOT / "benchmarks" / "tables.py", "--dtype", dtype]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    tables = [line for dtype in ("bfloat16", "float32") for line in made(dtype).splitlines() if line]
    page = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8").partition("## Measured")[2]
    assert len(tables) > 20 and [line for line in page.splitlines() if line.startswith("|")] == tables
