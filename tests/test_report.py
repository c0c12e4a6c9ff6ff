"""The report: what a made-up run folder says on the page, and that nothing in or missing from it can break the page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from preftune import report
from preftune.cli import report as verb
from preftune.errors import Refusal
from preftune.report import compare, curves, folder, svg, tables, words
from preftune.report.page import render
from preftune.report.verdicts import demo_sentence, run_sentence

HOSTILE = "<script>alert('x')</script><img src=https://evil.example/a.png onerror=alert(1)>\n\n  </div> & \"quoted\""
NAN = float("nan")
VOID = {"meta", "path", "circle", "img", "br", "link"}


def metrics(steps: int, every: int = 50) -> list[dict[str, Any]]:
    """A plausible DPO run of `steps` steps, with held-out values at step 0 and every `every` steps."""
    noise = random.Random(0)
    lines: list[dict[str, Any]] = [{"step": 0, "eval/loss": 0.6931, "eval/accuracy": 0.5, "eval/logp_accuracy": 0.518}]
    for step in range(1, steps + 1):
        share = step / steps
        rise = 1 - math.exp(-3 * share)
        chosen, rejected = -0.2 * rise + noise.gauss(0, 0.06), -1.1 * rise + noise.gauss(0, 0.08)
        line: dict[str, Any] = {
            "step": step,
            "epoch": share,
            "loss": 0.693 - 0.13 * rise + noise.gauss(0, 0.03),
            "grad_norm": 2.5 + 1.5 * rise + abs(noise.gauss(0, 0.6)),
            "learning_rate": 1e-6 * (1 - share),
            "margin": (chosen - rejected) / 0.1,
            "accuracy": min(1.0, max(0.0, 0.5 + 0.2 * rise + noise.gauss(0, 0.08))),
            "length/chosen": 82 + noise.gauss(0, 9),
            "length/rejected": 78 + noise.gauss(0, 9),
            "pairs_per_s": 5.1 + noise.gauss(0, 0.2),
            "tokens_per_s": 1860 + noise.gauss(0, 60),
            "memory_gb": 3.42,
        }
        for side, reward in (("chosen", chosen), ("rejected", rejected)):
            line |= {f"reward/{side}": reward, f"log_ratio/{side}": reward / 0.1, f"logp/{side}": -190 + reward / 0.1}
        if step % every == 0:
            line |= {
                "eval/loss": 0.693 - 0.08 * rise,
                "eval/accuracy": 0.5 + 0.13 * rise,
                "eval/logp_accuracy": 0.518 + 0.116 * rise,
                "eval/margin": 6 * rise,
            }
        lines.append(line)
    return lines


EVALUATION: dict[str, Any] = {
    "before": {
        "comparisons": 112,
        "prompts": 98,
        "accuracy": 0.5,
        "accuracy_interval": [0.5, 0.5],
        "logp_accuracy": 0.518,
        "logp_accuracy_interval": [0.42, 0.61],
        "margin": 0.0,
        "loss": 0.69315,
        "kl": None,
        "kl_samples": None,
        "kl_interval": None,
        "method": "dpo",
        "beta": 0.1,
    },
    "after": {
        "comparisons": 112,
        "prompts": 98,
        "accuracy": 0.652,
        "accuracy_interval": [0.561, 0.738],
        "logp_accuracy": 0.634,
        "logp_accuracy_interval": [0.58, 0.687],
        "margin": 5.71,
        "loss": 0.6122,
        "kl": 4.934,
        "kl_samples": 256,
        "kl_interval": [4.61, 5.27],
        "method": "dpo",
        "beta": 0.1,
    },
}
FINDINGS = [
    ("empty_response", "error", 87, "chosen", "the chosen answer is empty: the row is dropped"),
    ("prompts_differ", "error", 1255, None, "chosen and rejected begin with different prompts: the row is dropped"),
    ("too_long", "warning", 14, "rejected", "611 tokens, more than the 512 of the model: the row is dropped"),
]
DATA: dict[str, Any] = {
    "rows": 2312,
    "kept": 2294,
    "dropped": {"empty_response": 4, "prompts_differ": 5, "too_long": 9},
    "groups": 2283,
    "findings": [
        {
            "code": code,
            "severity": severity,
            "file": "/data/hh/train.jsonl",
            "row": row,
            "column": column,
            "message": text,
        }
        for code, severity, row, column, text in FINDINGS
    ],
    "sources": [{"path": "/data/hh/train.jsonl", "format": "hh dialogue", "rows": 2312, "kept": 2294}],
    "train": {"groups": 2169, "examples": 2182},
    "eval": {"groups": 98, "examples": 112},
}
SAMPLES: list[dict[str, Any]] = [
    {"prompt": HOSTILE, "before": "Sure.\n\n  1. indented", "after": HOSTILE, "chosen": "I would rather not."},
    {
        "prompt": "Human: How do I boil an egg?\n\nAssistant:",
        "before": "The egg is a egg. " * 12,
        "after": "Ten minutes.",
    },
    {"prompt": "Human: " + "long" * 300, "before": "", "after": "A word without a space: " + "x" * 400},
]
ENVIRONMENT: dict[str, Any] = {
    "preftune": "0.1.0",
    "device": "cpu (2 threads)",
    "seconds": 1284.6,
    "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
    "hashes": {"model": "9f86d081884c7d659a2feaa0c55ad015", "data": ["b1946ac92492d2347c6235b4d2611184"]},
}
CONFIG = "model: models/stories260k\nmethod:\n  name: dpo\nbeta: 0.1\nlearning_rate: 1.0e-06\n"


def _win(rate: float, low: float, high: float) -> dict[str, Any]:
    return {"win_rate": rate, "win_rate_interval": [low, high], "wins": 400, "ties": 12, "losses": 100}


def demo(betas: int = 3) -> dict[str, Any]:
    figures = [(0.5, 0.61, 0.35, 0.9), (0.1, 0.742, 0.86, 2.7), (0.05, 0.801, 1.24, 5.13)][-betas:]
    runs = [
        {
            "beta": beta,
            "win_rate": {
                "sentiment": _win(rate, rate - 0.034, rate + 0.031),
                "lexicon": _win(rate - 0.13, rate - 0.17, rate - 0.09),
            },
            "reward": reward,
            "kl": kl,
            "kl_interval": [kl - 0.2, kl + 0.25],
            "distinct_2": 0.61 - 0.02 * kl,
            "samples": [{"prompt": "the film is", "before": "a film .", "after": f"a joy at beta {beta} ."}],
        }
        for beta, rate, reward, kl in figures
    ]
    return {"prompts": 512, "base": {"reward": 0.02, "distinct_2": 0.63}, "runs": runs}


def make_run(run: Path, steps: int = 400, **changed: Any) -> Path:
    """A run folder; a keyword replaces a file's content, None leaves the file out."""
    run.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "metrics.jsonl": metrics(steps),
        "evaluation.json": EVALUATION,
        "data.json": DATA,
        "samples.jsonl": SAMPLES,
        "environment.json": ENVIRONMENT,
        "config.yaml": CONFIG,
    }
    for name in changed:
        named = {name: f"{name}.jsonl" for name in ("metrics", "warnings", "samples")} | {"config": "config.yaml"}
        content[named.get(name, f"{name}.json")] = changed[name]
    for name, value in content.items():
        if value is not None:
            lines = isinstance(value, list)
            text = "".join(json.dumps(line) + "\n" for line in value) if lines else json.dumps(value)
            (run / name).write_text(value if isinstance(value, str) else text, encoding="utf-8")
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "dpo-1")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PNG files take their second, and have a test of their own."""
    monkeypatch.setattr("preftune.report.png.draw", lambda plot: b"")


def page_of(run: Path) -> str:
    """The page without the PNG files, which take their second."""
    files = folder.read(run)
    return render(files, curves.plots(files.metrics))


class Page(HTMLParser):
    """The page as a browser takes it: text without tags, the tags, their attributes, and whether all are closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)


def test_page_says_the_figures(run: Path) -> None:
    page = Page(page_of(run))
    assert page.open == []  # every tag is closed
    for said in (
        "On 112 held-out comparisons the share ranked right rose from 51.8 % to 63.4 % (95 % interval 58.0–68.7 %).",
        "+11.6 pp",
        "−0.0810",  # the held-out loss, 0.6122 - 0.69315
        "4.61–5.27",
        "nats per sampled response, 256 samples",
        "112 comparisons of 98 prompts",
        "2,312 rows read, 2,294 kept (99.2 %)",
        "2,182 examples of 2,169 prompts for training",
        "train.jsonl:1255",
        "1,284.6 (21 min 25 s)",
        "versions.torch 2.13.0",
        "learning_rate: 1.0e-06",
        "3.42 GB",
    ):
        assert said in page.text, said
    assert "Missing or damaged" not in page.text


def test_order_of_the_page(run: Path) -> None:
    source = page_of(run)
    places = [source.index(mark) for mark in ('class="verdict"', 'class="card tiles"', 'id="held-out"', 'id="curves"')]
    places += [source.index(f'id="{name}"') for name in ("data", "answers", "environment", "config")]
    assert places == sorted(places)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = {**DATA, "findings": [{**DATA["findings"][0], "message": HOSTILE, "code": HOSTILE}], "dropped": {HOSTILE: 1}}
    hostile_demo = demo(1)
    hostile_demo["runs"][0]["beta"] = HOSTILE
    run = make_run(tmp_path / "a", data=evil, environment={HOSTILE: HOSTILE}, config=HOSTILE, demo=hostile_demo)
    page = Page(page_of(run))
    assert page.open == []
    assert not {"img", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("script") == 2  # the values and the page's own, which is named by its hash
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.words.count(HOSTILE) >= 3  # as it was written, spaces and all: prompt, answer, finding


def test_nothing_outside_is_asked_for(run: Path) -> None:
    source = page_of(run)
    pointing = [attributes.get(key) for _, attributes in Page(source).tags for key in ("src", "href", "data", "action")]
    assert all(target.startswith("#") for target in pointing if target)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style and "//" not in style
    assert "default-src 'none'" in source


@pytest.mark.parametrize("name", sorted(folder.WITHOUT))
def test_each_missing_file_is_said(run: Path, name: str) -> None:
    (run / name).unlink()
    page = Page(page_of(run))
    assert f"{name} is missing: {folder.WITHOUT[name]}." in page.text
    assert sum(f"{other} is missing" in page.text for other in folder.WITHOUT) == 1


def test_empty_folder(tmp_path: Path) -> None:
    page = Page(page_of(tmp_path))
    assert "Nothing was trained or measured yet" in page.text
    assert all(f"{name} is missing" in page.text for name in folder.WITHOUT)
    report.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_interrupted_run_says_how_far_it_came(run: Path) -> None:
    (run / "evaluation.json").unlink()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"step": 401, "lo')
    page = Page(page_of(run))
    assert "No final evaluation yet: 400 steps trained" in page.text
    assert "at step 400, 62.8 % of held-out comparisons were ranked right" in page.text
    assert "metrics.jsonl: unreadable and left out: line 402 (1 in all)" in page.text


@pytest.mark.parametrize("damage", ["", "[1, 2]", "{torn", "null", "\x00"])
def test_damaged_files_are_said(run: Path, damage: str) -> None:
    for name in folder.WITHOUT:
        (run / name).write_text(damage, encoding="utf-8")
    page = Page(page_of(run))
    for name in ("evaluation.json", "data.json", "environment.json"):
        assert f"{name} could not be read" in page.text


def test_undecodable_file_is_said(run: Path) -> None:
    (run / "config.yaml").write_bytes(b"\xff\xfe\xff")
    assert "config.yaml could not be read" in Page(page_of(run)).text


def test_nan_and_null_survive(tmp_path: Path) -> None:
    lines = metrics(120)
    for line in lines[50:54]:
        line |= {"loss": NAN, "margin": None, "grad_norm": float("inf")}
    after = {**EVALUATION["after"], "loss": NAN, "kl": None, "margin": float("-inf"), "accuracy_interval": [NAN, 1]}
    run = make_run(tmp_path / "nan", metrics=lines, evaluation={"before": None, "after": after})
    source = page_of(run)
    page = Page(source)
    assert "loss is not a finite number on 4 lines, first at step 50." in page.text
    assert "before training was not measured" in page.text
    assert "not finite" in page.text
    for broken in ("nan", "inf ", "None", "Infinity"):
        assert broken not in "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    drawn = re.search(r'id="loss-title".*?class="line ink0" d="([^"]*)"', source, flags=re.DOTALL)
    assert drawn and drawn.group(1).count("M") == 2  # the line breaks where the loss was not a number


def test_every_value_not_finite(tmp_path: Path) -> None:
    run = make_run(tmp_path / "all", metrics=[{"step": step, "loss": NAN} for step in range(1, 5)], evaluation=None)
    assert "the last with a loss that is not finite" in Page(page_of(run)).text
    report.write(run)
    assert not (run / "plots").exists()


def test_sft_run(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": 3.2 - s / 100, "length/chosen": 61.5, "tokens_per_s": 900.0} for s in range(1, 41)]
    evaluation = {
        "before": {"demonstrations": 500, "prompts": 500, "loss": 3.21, "perplexity": 24.78, "method": "sft"},
        "after": {"demonstrations": 500, "prompts": 500, "loss": 2.8, "perplexity": 16.44, "method": "sft"},
    }
    run = make_run(tmp_path / "sft", metrics=lines, evaluation=evaluation)
    page = Page(page_of(run))
    verdict = "On 500 held-out demonstrations the loss fell from 3.21 to 2.80 nats per token (perplexity 24.8 to 16.4)."
    assert verdict in page.text
    report.write(run)
    assert sorted(path.stem for path in (run / "plots").iterdir()) == ["lengths", "loss", "throughput"]
    assert "Margin" not in page.text


def test_pictures_are_pictures(run: Path) -> None:
    assert report.write(run) == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8") == page_of(run)
    expected = {chart.name for chart in curves.CHARTS}
    assert {path.stem for path in (run / "plots").iterdir()} == expected
    for path in (run / "plots").iterdir():
        head = path.read_bytes()[:24]
        assert path.suffix == ".png" and head[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(head[16:20], "big") == 1080
    assert sorted(path.name for path in run.iterdir() if ".tmp" in path.name) == []


def test_long_run_makes_a_small_page(tmp_path: Path) -> None:
    long = [{"prompt": "p" * 100_000, "before": "b" * 100_000, "after": "a" * 100_000} for _ in range(40)]
    run = make_run(tmp_path / "long", metrics=metrics(10_000), samples=long)
    page = report.write(run)
    assert page.stat().st_size < 3_000_000
    assert "cut after 6,000 of 100,000 characters" in page.read_text(encoding="utf-8")


def values_of(source: str) -> dict[str, Any]:
    """What the script finds under the pointer."""
    found = re.search(r'<script type="application/json" id="values">(.*?)</script>', source, flags=re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_runs_its_own_script_and_no_other(run: Path) -> None:
    source = page_of(run)
    (script,) = re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', source)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "fetch(" not in script and "http" not in script.replace("http://www.w3.org/2000/svg", "")


def test_values_under_the_pointer_are_those_of_the_run(run: Path) -> None:
    lines = metrics(400)
    source = page_of(run)
    values = values_of(source)
    assert values.keys() == set(re.findall(r'data-chart="(\w+)"', source)) == {chart.name for chart in curves.CHARTS}
    held_out = values["accuracy"]["lines"][1]
    assert held_out["x"] == [0, *range(50, 401, 50)]
    assert held_out["y"] == pytest.approx([line["eval/accuracy"] for line in lines if "eval/accuracy" in line], rel=1e-4)
    for name, chart in values.items():
        legend = re.search(rf'data-chart="{name}".*?<ul class="legend">(.*?)</ul>', source, flags=re.DOTALL)
        assert legend and len(re.findall(r"<b>", legend[1])) == len(chart["lines"])
        for drawn in chart["lines"]:
            assert len(drawn["x"]) == len(drawn["y"]) <= curves.MAX_POINTS + 3
            assert drawn["x"] == sorted(drawn["x"])
            assert chart["x"][0] <= drawn["x"][0] and drawn["x"][-1] <= chart["x"][1]
            assert all(chart["y"][0] <= y <= chart["y"][1] for y in drawn["y"])


def falling(steps: int) -> list[dict[str, Any]]:
    """A run that starts at its reference, and whose chosen answers are 40 nats less likely from the second step on."""
    at_start = {"log_ratio/chosen": 0.0, "log_ratio/rejected": 0.0}
    fallen = {"log_ratio/chosen": -40.0, "length/chosen": 80}
    return [line | (fallen if line["step"] > 1 else at_start) for line in metrics(steps)]


def test_the_diagnosis_stands_on_the_page(tmp_path: Path) -> None:
    healthy = Page(page_of(make_run(tmp_path / "healthy")))
    assert (
        "10 patterns looked for, none found. 1 not judged, for want of figures The length of answers drifts: fewer"
        in healthy.text
    )
    ill = Page(page_of(make_run(tmp_path / "ill", metrics=falling(400))))
    for said in (
        "10 patterns looked for, 1 found.",
        "Chosen answers got less likely",
        "Over steps 321–400 the chosen answers have 0.500 nats per token less than under the reference",
        "docs/diagnosis/likelihood_displacement.md",
    ):
        assert said in ill.text, said
    kept = make_run(tmp_path / "kept", evaluation={**EVALUATION, "kept_step": 250})
    assert (
        "none found. The weights kept are those of step 250; curves go on to step 400, and so does" in Page(page_of(kept)).text
    )
    assert "The weights kept" not in healthy.text
    assert "Diagnosis" not in Page(page_of(make_run(tmp_path / "bare", metrics=[]))).text


def test_what_was_warned_of_stands_on_the_page(tmp_path: Path) -> None:
    warned = [{"step": 1250, "kind": "loss_spike", "message": "the loss is <b>9.1</b>, and was about 0.6"}]
    page = Page(page_of(make_run(tmp_path / "warned", warnings=warned)))
    assert "Warned of while it ran" in page.text and "1,250 the loss is <b>9.1</b>, and was about 0.6" in page.text
    calm = Page(page_of(make_run(tmp_path / "calm")))
    assert "Warned of" not in calm.text and "warnings.jsonl" not in calm.text


def test_answers_say_by_how_much_they_changed(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "before": "one two three four", "after": "one two", "tokens_before": 4, "tokens_after": 2},
        {"prompt": "b", "before": "same", "after": "same", "tokens_before": 1, "tokens_after": 1},
        {"prompt": "c", "before": "no lengths", "after": "here at all"},
    ]
    page = Page(page_of(make_run(tmp_path / "run", samples=rows)))
    found = [a for tag, a in page.tags if tag == "article" and a.get("class") == "card sample"]
    assert [(a["data-changed"], a["data-longer"]) for a in found] == [("0.333", "-2.0"), ("0.0", "0.0"), ("1.0", "1")]
    assert "4 to 2 tokens, 33.3 % of the words changed" in page.text
    assert "Answer length tokens, mean of 2 sampled answers 2.50 1.50 −1.00" in page.text


# -- several runs -----------------------------------------------------------------------------------------------------------


def several(folder: Path, count: int = 2) -> list[Path]:
    """Runs with betas 0.1, 0.2, ... of 100, 200, ... steps."""
    configs = [CONFIG.replace("beta: 0.1", f"beta: 0.{n}") + f"out: run-{n}\n" for n in range(1, count + 1)]
    return [make_run(folder / f"run-{n}", steps=100 * n, config=text) for n, text in enumerate(configs, start=1)]


def test_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    runs = several(tmp_path)
    (tmp_path / "pages").mkdir()
    source = compare.write(runs, tmp_path / "pages/both.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["../run-1/report.html", "../run-2/report.html"]
    settings = source[source.index('<section id="settings"') : source.index('<section id="curves"')]
    assert re.findall(r"<code>(.*?)</code>", settings) == ["beta"]
    assert "Key run-1 run-2 beta 0.1 0.2" in Page(settings).text
    values = values_of(source)
    assert [line["ink"] for line in values["loss"]["lines"]] == [0, 0, 1, 1]
    assert [line["x"][-1] for line in values["loss"]["lines"]] == [100, 100, 200, 200]
    assert {"rewards-chosen", "rewards-rejected", "logps-chosen", "accuracy-without-reference"} <= values.keys()
    results = Page(source[source.index('<section id="results"') : source.index('<section id="settings"')]).text
    assert "63.4 % 58.0–68.7 %" in results and "3.42 GB" in results and results.count("nothing") == 2


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert compare._names(paths) == ["a/run", "b/run"]
    assert compare._names([paths[0], tmp_path / "b" / "other"]) == ["run", "other"]


def test_settings_that_differ_are_found_below_their_groups() -> None:
    rows = compare.differing(
        [
            {"train": {"seed": 1, "same": [1]}, "out": "a", "gone": None},
            {"train": {"seed": 2, "same": [1]}, "out": "b", "new": 3},
        ]
    )
    assert rows == [("train.seed", ["1", "2"]), ("new", ["–", "3"])]


def test_a_comparison_of_damaged_runs_says_so(tmp_path: Path) -> None:
    runs = several(tmp_path)
    (runs[1] / "metrics.jsonl").write_text("{torn")
    (runs[0] / "config.yaml").write_text("[1, 2]")
    page = Page(compare.render([folder.read(run) for run in runs], tmp_path))
    assert "run-2: metrics.jsonl: unreadable and left out: line 1" in page.text
    assert "run-1: config.yaml could not be read (not a mapping)" in page.text


@pytest.mark.usefixtures("no_pictures")
def test_the_verb_gives_pages_diagnosis_and_comparison(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = several(tmp_path)
    make_run(runs[1], metrics=falling(60))
    caplog.set_level("INFO", logger="preftune")
    told = verb.run([*map(str, runs), str(runs[0])], True)
    assert told["reports"] == [str(run / "report.html") for run in runs]
    assert Path(told["comparison"]) == tmp_path / "comparison.html" and (tmp_path / "comparison.html").is_file()
    assert told["diagnosis"][str(runs[0])] == []
    (found,) = (f for f in told["diagnosis"][str(runs[1])] if f["name"] == "likelihood_displacement")
    assert found.keys() == {"name", "title", "evidence", "threshold", "change", "page"}
    assert any(message.startswith("diagnosis: Chosen answers got less likely: over steps") for message in caplog.messages)
    assert "comparison" not in verb.run([str(runs[0])], False)
    page = tmp_path / "not" / "there" / "page.html"
    assert verb.run([*map(str, runs), f"out={page}"], True)["comparison"] == str(page) and page.is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run-1", "out=a.html"], "one run is given"),
        (["run-1", "run-2", "out=a.pdf"], "name a .html file"),
        (["run-1", "run-2", "out=run-1/config.yaml/a.html"], "run-1/config.yaml is a file"),
        ([f"run-{n}" for n in range(1, 10)], "9 runs: a comparison shows 8 at most"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(
    tmp_path: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(1, 10):
        (tmp_path / f"run-{n}").mkdir()
        (tmp_path / f"run-{n}" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=re.escape(says)):
        verb.run(words, False)
    assert not list(tmp_path.rglob("*.html"))


# -- a demo -----------------------------------------------------------------------------------------------------------------


def test_demo_opens_with_its_verdict(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", demo=demo(), evaluation=None, samples=None)
    source = report.write(run).read_text(encoding="utf-8")
    page = Page(source)
    assert (
        "On 512 held-out prompts the aligned model's answer beats the base model's in 80.1 % by the sentiment scorer "
        "(95 % interval 76.7–83.2 %) and 67.1 % by the lexicon scorer (95 % interval 63.1–71.1 %), "
        "ties counting one half, at a KL of 5.13 nats per response (beta 0.05, the best of 3)."
    ) in page.text
    assert source.index("reward_kl-title") < source.index('class="card tiles"')
    assert "a joy at beta 0.05 ." in page.text
    assert "Missing or damaged" not in page.text  # a demo has no evaluation.json to miss
    assert (run / "plots" / "reward_kl.png").read_bytes()[:4] == b"\x89PNG"


def test_demo_frontier() -> None:
    several, one = curves.reward_kl(demo(3)), curves.reward_kl(demo(1))
    assert several and one
    assert several.traces[0].points == [(0.0, 0.02), (0.9, 0.35), (2.7, 0.86), (5.13, 1.24)]
    assert not several.traces[0].joined, "runs of their own: a line would claim what lies between"
    assert "base" in svg.draw(one) and "β 0.05" in svg.draw(one)
    no_kl = demo(1)
    no_kl["runs"][0]["kl"] = None  # absent rather than approximated: then no point
    assert curves.reward_kl(no_kl) is None


@pytest.mark.parametrize(
    ("before", "after", "interval", "said"),
    [
        (0.518, 0.634, [0.58, 0.687], "rose from 51.8 % to 63.4 % (95 % interval 58.0–68.7 %)."),
        (
            0.518,
            0.55,
            [0.49, 0.61],
            "the interval includes the figure before training, so that no clear change is shown.",
        ),
        (0.6, 0.5, [0.45, 0.55], "fell from 60.0 % to 50.0 % (95 % interval 45.0–55.0 %)."),
        (0.5, 0.5, [0.45, 0.55], "stayed at 50.0 %"),
        (0.5, 0.6, None, "(no interval was measured)"),
    ],
)
def test_verdict_is_no_surer_than_its_figures(before: float, after: float, interval: Any, said: str) -> None:
    evaluation = {
        "before": {"logp_accuracy": before},
        "after": {"comparisons": 112, "logp_accuracy": after, "logp_accuracy_interval": interval},
    }
    sentence = run_sentence(evaluation, [])
    assert said in sentence
    assert ("no clear change" in sentence) == ("no clear change" in said)


def test_the_verdict_of_a_reward_model_is_of_its_numbers() -> None:
    sides = [{"comparisons": 40, "logp_accuracy": None, "accuracy": share, "method": "reward"} for share in (0.5, 0.75)]
    sides[1]["accuracy_interval"] = [0.6, 0.85]
    said = run_sentence({"before": sides[0], "after": sides[1]}, [])
    told = "On 40 held-out comparisons the share ranked right rose from 50.0 % to 75.0 % (95 % interval 60.0–85.0 %)."
    assert " ".join(said.split()) == told


def test_demo_verdict_says_when_chance_is_not_excluded() -> None:
    unclear = demo(1)
    unclear["runs"][0]["win_rate"]["lexicon"] = _win(0.52, 0.48, 0.56)
    assert "the interval by the lexicon scorer includes 50 %, so that no difference" in demo_sentence(unclear)
    assert "includes 50 %" not in demo_sentence(demo(1))


@pytest.mark.parametrize("length", [1, 2, 599, 600, 601, 9_999, 10_000])
def test_downsampling_keeps_extremes_gaps_and_ends(length: int) -> None:
    noise = random.Random(length)
    points: list[curves.Point] = [(float(i), noise.gauss(0, 1)) for i in range(length)]
    if length > 2:
        points[length // 3] = (points[length // 3][0], 99.0)
        points[length // 2] = (points[length // 2][0], -99.0)
        points[length // 4] = (points[length // 4][0], None)
    if length > 9_000:  # an end that is no extreme of its stretch
        points[-3:] = [(points[i][0], y) for i, y in ((-3, -5.0), (-2, 5.0), (-1, 0.0))]
    kept = curves.downsample(points)
    assert len(kept) <= curves.MAX_POINTS + 3
    assert kept == sorted(kept, key=lambda point: point[0]) and set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    ys, all_ys = ([y for _, y in some if y is not None] for some in (kept, points))
    assert (min(ys), max(ys)) == (min(all_ys), max(all_ys))
    assert any(y is None for _, y in kept) == (length > 2)


def test_running_mean() -> None:
    points: list[curves.Point] = [(1, 1.0), (2, 2.0), (3, None), (4, 6.0), (5, 8.0)]
    assert curves.running_mean(points, 3) == [(1, 1.5), (2, 1.5), (3, None), (4, 7.0), (5, 7.0)]


@pytest.mark.parametrize(
    ("low", "high", "share", "labels"),
    [
        (0, 400, False, ["0", "100", "200", "300", "400"]),
        (-0.31, 0.11, False, ["−0.3", "−0.2", "−0.1", "0.0", "0.1"]),
        (0.41, 0.79, True, ["50 %", "60 %", "70 %"]),
        (0.0, 12_345.0, False, ["0", "5,000", "10,000"]),
        (3.0, 3.0, False, ["2.7", "2.8", "2.9", "3.0", "3.1", "3.2", "3.3"]),
    ],
)
def test_ticks_are_round(low: float, high: float, share: bool, labels: list[str]) -> None:
    assert [text for _, text in curves.axis(low, high, share=share).ticks] == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.69315, "0.693"),
        (12.345, "12.3"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (7, "7"),
        (-0.5, "−0.500"),
        (1e-6, "1.00e-06"),
        (0.0, "0"),
        (-0.0, "0"),
        (None, "–"),
        (NAN, "not finite"),
        (True, "–"),
        ("word", "–"),
    ],
)
def test_figures(value: object, text: str) -> None:
    assert words.figure(value) == text


def test_small_words() -> None:
    assert words.percent(0.63449) == "63.4 %" and words.percent(None) == "–"
    assert words.interval([0.58, 0.687], share=True) == "58.0–68.7 %"
    assert words.interval([-1.5, 2.0]) == "−1.50 to 2.00" and words.interval(None) == "" and words.interval([NAN, 1]) == ""
    assert words.change(0.5, 0.45, share=True) == "−5.0 pp" and words.change(None, 1) == "" and words.change(1, 3) == "+2.00"
    assert words.duration(7.0) == "7.00 s" and words.duration(200.4) == "3 min 20 s" and words.duration(7500) == "2 h 05 min"


def test_importing_costs_nothing() -> None:
    heavy = "[m for m in ('jinja2', 'matplotlib', 'torch', 'numpy') if m in sys.modules]"
    command = [sys.executable, "-c", f"import sys, preftune.report; print({heavy})"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_page_promises_only_what_it_shows(tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", metrics=[{"step": 1, "loss": 1.0}], evaluation={"after": {"loss": 2.0}})
    full = make_run(tmp_path / "full")
    for said in ("95 % interval", "Dots are held out", "Strong lines are means over 13 steps"):
        assert said in Page(page_of(full)).text
        assert said not in Page(page_of(bare)).text
    empty = Page(page_of(tmp_path / "none"))
    assert "plots/" not in empty.text


def test_half_a_page_never_replaces_a_whole_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = report.write(run).read_bytes()
    (run / "samples.jsonl").unlink()

    def full_disk(path: Path, content: bytes) -> int:
        with path.open("wb") as half:
            half.write(content[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        report.write(run)
    assert (run / "report.html").read_bytes() == whole
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]


def test_verdict_for_the_terminal_is_the_one_on_the_page(run: Path) -> None:
    assert report.verdict(run) in Page(page_of(run)).text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_verdict_of_sft_is_its_loss_and_of_ties_not_one_of_tokens() -> None:
    """SFT on preferences has a ranking too, and DPO on ties alone has no ranking: neither may borrow the other's words."""
    sft = {"method": "sft", "demonstrations": 87, "comparisons": 87, "logp_accuracy": 0.6, "loss": 3.2, "perplexity": 24.5}
    told = run_sentence({"before": sft, "after": {**sft, "loss": 2.2, "perplexity": 9.0}}, [])
    assert told == "On 87 held-out demonstrations the loss fell from 3.20 to 2.20 nats per token (perplexity 24.5 to 9.00)."
    ties = {"method": "dpo", "demonstrations": None, "comparisons": 5, "logp_accuracy": None, "accuracy": None, "loss": 0.69}
    told = run_sentence({"before": ties, "after": {**ties, "loss": 0.68}}, [])
    assert "5 held-out comparisons" in told and "per token" not in told
    (row,) = [row for row in tables.held_out({"before": ties, "after": ties}) if row.label == "Loss"]
    assert row.unit == "mean over comparisons"


def test_a_demo_of_several_betas_leads_to_the_page_of_each(tmp_path: Path) -> None:
    """Its folder holds demo.json alone; curves, data and settings are in each beta's own folder, and nothing is missing."""
    for betas, said in ((3, 0), (1, 4)):
        (tmp_path / "demo.json").write_text(json.dumps(demo(betas)))
        files = folder.read(tmp_path)
        assert len(files.remarks) == said
        page = render(files, [])
        assert page.count('href="beta-') == (betas if betas > 1 else 0)
    assert 'href="beta-0.05/report.html"' in render(folder.RunFiles(tmp_path, demo=demo(3)), [])
