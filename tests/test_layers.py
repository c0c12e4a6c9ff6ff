"""The house of DESIGN.md: a room imports lower floors or itself. Read from the source, not from what happens to be loaded."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import preftune

SOURCE = Path(preftune.__file__).parent
FLOORS = (
    ("losses", "report", "records", "errors", "aside", "functions", "processes"),
    ("data", "labels", "models"),
    ("scoring",),
    ("training", "generation"),
    ("methods",),
    ("evaluation",),
    ("checks",),
    ("config_errors", "config_files", "keys", "config", "runs", "demo"),
    ("cli",),
    ("__init__", "__main__"),
)
# rooms of one floor that stand on each other
STEPS = {
    ("functions", "errors"),
    ("processes", "errors"),
    ("config", "config_errors"),
    ("config", "config_files"),
    ("config", "keys"),
    ("runs", "keys"),
    ("runs", "config"),
    ("runs", "config_files"),
    ("demo", "keys"),
    ("demo", "config"),
    ("demo", "runs"),
}
# besides the standard library and preftune itself
ALONE = {"losses": {"torch"}, "labels": {"numpy", "scipy"}}
HEAVY = {"torch", "transformers", "peft", "datasets", "pyarrow", "safetensors", "tokenizers"}
LIGHT = ("report", "records", "errors", "aside", "keys", "config", "config_errors", "config_files")


def rooms(source: Path) -> Iterator[tuple[str, str, Path]]:
    """(room, dotted name inside the package, file) of every module."""
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        yield parts[0], ".".join(parts), path


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module or name) of every import statement, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            if node.module == package:  # from preftune import methods
                yield from ((node.lineno, f"{package}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def violations(source: Path, package: str = "preftune") -> list[str]:
    floor = {room: number for number, names in enumerate(FLOORS) for room in names}
    found: list[str] = []
    for room, name, path in rooms(source):
        if room not in floor:
            found.append(f"{name} stands on no floor")
            continue
        options_or_light = room in LIGHT or name.endswith(".options")
        for line, target in imports(path, package):
            top, _, rest = target.partition(".")
            other = rest.split(".")[0]
            place = f"{name}:{line} imports {target}"
            if top != package:
                if room in ALONE and top not in {*ALONE[room], *sys.stdlib_module_names}:
                    found.append(f"{place}, beside {', '.join(sorted(ALONE[room]))}")
                if options_or_light and top in HEAVY:
                    found.append(f"{place}: too heavy for it")
            elif other == "__version__":
                continue
            elif other not in floor:
                found.append(f"{place}, which stands on no floor")
            elif floor[other] > floor[room] or (floor[other] == floor[room] and other != room and (room, other) not in STEPS):
                found.append(f"{place}, which is not below it")
    return found


def test_every_room_imports_lower_floors_only() -> None:
    assert violations(SOURCE) == []


def test_every_floor_has_its_rooms() -> None:
    """A room that is gone would leave the rules above without anything to hold."""
    assert {room for room, _, _ in rooms(SOURCE)} == {room for names in FLOORS for room in names}


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("losses/pairwise.py", "from preftune.scoring.score import score", "losses.pairwise:1 imports preftune.scoring.score"),
        ("losses/pairwise.py", "import numpy", "beside torch"),
        ("scoring/score.py", "def f():\n    from preftune.training import steps", "scoring.score:2 imports preftune.training"),
        ("data/read.py", "import preftune.models.load", "not below it"),
        ("models/load.py", "from preftune.data.read import read", "not below it"),
        ("generation/sample.py", "from preftune.training.steps import plan", "not below it"),
        ("training/steps.py", "from preftune import methods", "imports preftune.methods"),
        ("config.py", "from preftune.runs import folder", "not below it"),
        ("runs/train.py", "from preftune.cli import app", "not below it"),
        ("cli/app.py", "from preftune import fit", "stands on no floor"),
        ("training/options.py", "import torch", "too heavy"),
        ("report/page.py", "from transformers import AutoModel", "too heavy"),
        ("labels/votes.py", "import torch", "beside numpy, scipy"),
        ("labels/votes.py", "from preftune.data.read import read", "not below it"),
        ("judging/rules.py", "import json", "judging.rules stands on no floor"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str, says: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line + "\n")
    (found,) = violations(tmp_path)
    assert says in found


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    lines = ["import torch", "from preftune import methods, report", "from preftune.keys import TrainKeys"]
    (tmp_path / "runs" / "train.py").write_text("\n".join([*lines, "from preftune.runs import folder"]))
    assert violations(tmp_path) == []


def test_every_module_imports() -> None:
    names = [module.name for module in pkgutil.walk_packages([str(SOURCE)], "preftune.")]
    assert len(names) > 50
    for name in names:
        import_module(name)


def test_light_rooms_load_nothing_heavy() -> None:
    """What they import may import in turn: asked of a fresh process."""
    options = [f"preftune.{name}" for _, name, _ in rooms(SOURCE) if name.endswith(".options")]
    assert len(options) >= 3
    names = ["preftune", *options, *(f"preftune.{room}" for room in LIGHT), "preftune.methods", "preftune.runs.prepare"]
    script = f"import sys, json\nfor name in {names}: __import__(name)\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert HEAVY & set(json.loads(done.stdout)) == set()


def test_the_package_names_what_the_readme_uses() -> None:
    assert set(preftune.__all__) <= set(dir(preftune))
    for name in preftune.__all__:
        assert getattr(preftune, name) is not None
