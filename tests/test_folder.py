"""The run folder: whose commit it names, what it never moves, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from preftune.errors import Refusal, RunFailed
from preftune.runs import folder

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize(("package", "named"), [("src/preftune", True), ("venv/site-packages/preftune", False)])
def test_the_commit_is_that_of_preftunes_own_checkout(
    package: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / package / "runs"
    here.mkdir(parents=True)
    (here / "folder.py").touch()
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*GIT, *words], cwd=tmp_path, check=True, capture_output=True)
    commit = subprocess.run([*GIT, "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(folder, "__file__", str(here / "folder.py"))
    assert folder.environment([])["commit"] == (commit.strip() if named else None)


def test_a_run_that_began_meanwhile_is_not_moved_away(tmp_path: Path) -> None:
    out = folder.choose_out(str(tmp_path / "run"), "dpo", overwrite=False)
    folder.make(out)
    (out / "config.yaml").write_text("of another run")
    with pytest.raises(Refusal) as refused:
        folder.make(out)
    assert refused.value.code == "out_holds_run"
    assert (out / "config.yaml").read_text() == "of another run"
    folder.make(out, overwrite=True)
    assert not any(out.iterdir())
    assert (tmp_path / "run.old-1/config.yaml").read_text() == "of another run"


def test_a_file_stands_apart_from_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    for name in ("rows.jsonl", "m/config.json", "m2.json"):
        Path(name).write_text("{}")
    Path("link.jsonl").symlink_to("rows.jsonl")
    for out, read in (
        ("rows.jsonl", "./rows.jsonl"), ("link.jsonl", "rows.jsonl"), ("rows.jsonl", "~/rows.jsonl"), ("m/config.json", "m"),
    ):  # fmt: skip
        with pytest.raises(Refusal, match=f"{out} is read") as refused:
            folder.check_file_apart(Path(out), ["owner/name", read])
        assert (refused.value.code, refused.value.key) == ("out_is_input", "out")
    Path("m/page.html").touch()
    for out in ("new.jsonl", "m/new.jsonl", "m/page.html", "m2.json", "m"):
        folder.check_file_apart(Path(out), ["m", "rows.jsonl", "no/such/*.jsonl"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_an_error_and_no_broken_file(value: float, tmp_path: Path) -> None:
    for write, content in ((folder.write_json, {"loss": value}), (folder.write_lines, [{"loss": 1.0}, {"loss": value}])):
        with pytest.raises(RunFailed) as failed:
            write(tmp_path / "figures", content)
        assert (failed.value.code, failed.value.file) == ("not_finite", str(tmp_path / "figures"))
    assert not any(tmp_path.iterdir())
    folder.write_lines(tmp_path / "figures", [{"text": "é"}, {"loss": 0.1}])
    assert [json.loads(line) for line in (tmp_path / "figures").read_text().splitlines()] == [{"text": "é"}, {"loss": 0.1}]
