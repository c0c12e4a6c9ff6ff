"""Breaks the source on purpose, one small change at a time: the test that a change is listed with must fail.

    python tests/mutate.py            every change in mutations.toml
    python tests/mutate.py KL span    those whose name holds one of the words

Works on a copy of src/ and tests/ in a temporary folder. Exit 1 if a change survives, if the test fails without it too, or
if its text does not stand exactly once in the file; 2 if no change has such a name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copied(folder: Path) -> Path:
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # no .pyc files: a change of the same length within the same second would not be seen
    own = {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    return subprocess.run([sys.executable, *words], cwd=copy, env={**os.environ, **own}, capture_output=True, text=True)


def tested(copy: Path, *tests: str) -> tuple[str, str]:
    """('passed' | 'failed' | 'broken', last lines); a skipped test is broken: it can notice nothing."""
    done = run(copy, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rs", *tests)
    tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
    if done.returncode == 0 and "SKIPPED" not in done.stdout:
        return "passed", tail
    return ("failed" if done.returncode == 1 else "broken"), tail


def verdict(copy: Path, mutation: dict[str, str]) -> str:
    path = copy / mutation["file"]
    text = path.read_text(encoding="utf-8")
    if (count := text.count(mutation["find"])) != 1:
        return f"STALE: its text stands {count} times in {mutation['file']}"
    changed = text.replace(mutation["find"], mutation["replace"])
    try:
        compile(changed, mutation["file"], "exec")
        path.write_text(changed, encoding="utf-8")
        outcome, tail = tested(copy, mutation["test"])
    except SyntaxError as error:
        return f"NO PYTHON: {error}"
    finally:
        path.write_text(text, encoding="utf-8")
    return {"failed": "killed", "passed": "SURVIVED"}.get(outcome, f"BROKEN: {tail}")


def main(words: list[str]) -> int:
    mutations = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text(encoding="utf-8"))["mutation"]
    chosen = [m for m in mutations if not words or any(w.lower() in m["name"].lower() for w in words)]
    for mutation in [m for m in chosen if "needs" in m and find_spec(m["needs"]) is None]:
        print(f"left out, {mutation['needs']} is not installed: {mutation['name']}")
        chosen.remove(mutation)
    if not chosen:
        print(f"no change is left whose name holds {' or '.join(words)}; mutations.toml lists them", file=sys.stderr)
        return 2
    started, bad = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(prefix="preftune-mutate-") as folder:
        copy = copied(Path(folder))
        where = run(copy, "-c", "import preftune; print(preftune.__file__)").stdout.strip()
        if not where.startswith(str(copy)):
            print(f"the tests would not see the copy, but {where}", file=sys.stderr)
            return 1
        outcome, tail = tested(copy, *dict.fromkeys(m["test"] for m in chosen))
        if outcome != "passed":
            print(f"the tests do not pass before anything is changed:\n{tail}", file=sys.stderr)
            return 1
        width = max((len(m["name"]) for m in chosen), default=0)
        for mutation in chosen:
            said = verdict(copy, mutation)
            bad += said != "killed"
            print(f"{mutation['name']:{width}}  {said:8}  {mutation['test'].removeprefix('tests/')}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} killed in {time.perf_counter() - started:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
