"""The run folder: claimed before compute is spent, every file written aside and renamed."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from preftune.aside import written_aside
from preftune.errors import Refusal, RunFailed
from preftune.models.inspect import MODEL_FILES

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# of a model's folder: what it computes with, how it reads and writes text, and where it stops
_OF_TEXT = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja")
_OF_MODELS = (*MODEL_FILES, "*.index.json", "generation_config.json", *_OF_TEXT)


def choose_out(out: str | None, name: str, *, overwrite: bool) -> Path:
    """Where the run goes. Refuses a folder that holds something; creates nothing yet."""
    if out is None:
        today = datetime.date.today().isoformat()
        number = 1
        while Path(f"runs/{name}-{today}-{number}").exists():
            number += 1
        return Path(f"runs/{name}-{today}-{number}")
    folder = Path(out)
    if folder.is_file():
        raise Refusal(f"{out} is a file; name a folder", code="out_is_file", key="out")
    check_parent(folder)
    if not overwrite:
        _check_empty(folder)
    return folder


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Refuses an output folder that is, or holds, what the run reads: overwriting would move it away."""
    for path in inputs:
        if path.exists() and (out.absolute() == path.absolute() or out.absolute() in path.absolute().parents):
            raise Refusal(f"{out} holds {path}, which this run reads: choose another folder", code="out_holds_input", key="out")


def make(folder: Path, *, overwrite: bool = False) -> Path:
    """Creates the folder; what was there stands beside it as .old-1, .old-2 ... Asks again: since it was chosen, another
    run may have begun there."""
    if not overwrite:
        _check_empty(folder)
    elif _holds_something(folder):
        with held(folder):
            os.replace(folder, _old(folder))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def held(folder: Path, key: str = "out") -> Generator[None]:
    """Inside, no other process trains in this folder; one that is killed holds it no longer.

    Raises:
        Refusal: another one does.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                line = f"another process trains in {folder} just now: stop it, or wait for its end"
                raise Refusal(line, code="run_in_use", key=key) from None
            except OSError:  # a disk that knows no locks
                pass
        yield
    finally:
        os.close(handle)


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _check_empty(folder: Path) -> None:
    if _holds_something(folder):
        what = "holds a run" if (folder / "config.yaml").exists() else "is not empty"
        raise Refusal(
            f"{folder} {what}; choose another folder, or overwrite=true moves it to {_old(folder).name}",
            code="out_holds_run",
            key="out",
        )


def _old(folder: Path) -> Path:
    number = 1
    while (beside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return beside


def choose_file(out: str, *, overwrite: bool) -> Path:
    """A file to write; one that is there is refused."""
    path = Path(out)
    if path.is_dir():
        raise Refusal(f"{out} is a folder; name a .jsonl file", code="out_is_folder", key="out")
    if path.exists() and not overwrite:
        raise Refusal(f"{out} is there already; overwrite=true replaces it", code="out_exists", key="out")
    check_parent(path)
    return path


def check_file_apart(out: Path, inputs: Iterable[str | Path]) -> None:
    """Refuses to write over a file that is read: one of these, or one in a folder of these. A new file may stand there, and a
    page, which nothing reads."""
    there = [path for path in (Path(given).expanduser() for given in inputs) if path.exists()]
    within = out.resolve().parents if out.suffix != ".html" else ()
    if out.is_file() and any(out.samefile(path) or path.resolve() in within for path in there):
        line = f"{out} is read, and would be written over: name another file"
        raise Refusal(line, code="out_is_input", key="out")


def check_parent(path: Path) -> None:
    """Refuses a place that cannot be written, before compute is spent on what should stand there."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise Refusal(f"{path} cannot be made: {parent} is a file", code="out_under_file", key="out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise Refusal(f"{path} cannot be made: you may not write in {parent}", code="not_writable", key="out")


def write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value, indent=2, file=str(path)) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where the file is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a checksum of all of it."""
    return {**value, "sha256": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}


def is_sealed(value: Any) -> bool:
    """Whether it is what `seal` gave."""
    return isinstance(value, dict) and seal({k: v for k, v in value.items() if k != "sha256"}) == value


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    write_text(path, "".join(to_json(line, file=str(path)) + "\n" for line in lines))


def to_json(value: Any, *, indent: int | None = None, file: str | None = None) -> str:
    """JSON as others read it: a figure that is not finite has no form there, and is an error instead of a broken file."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError as error:
        raise RunFailed(f"cannot be written as JSON: {error}", code="not_finite", file=file) from error


def environment(files: Iterable[Path], **more: Any) -> dict[str, Any]:
    """Versions, machine, commit and hashes: what a figure needs beside it to be worth something."""
    packages = ("preftune", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "machine": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "commit": _commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sha256": {str(path): sha256(path) for path in files},
        **more,
    }


def inputs(*read: str) -> list[Path]:
    """Every file that a run's numbers follow from, absolute: data files, and what is read of models in local folders, of an
    adapter's base too."""
    found: dict[Path, None] = {}
    for path in map(Path, read):
        if path.is_file():
            found[path.absolute()] = None
        elif path.is_dir():
            found |= dict.fromkeys(sorted(one.absolute() for pattern in _OF_MODELS for one in path.glob(pattern)))
            base = (read_json(path / "adapter_config.json") or {}).get("base_model_name_or_path")
            found |= dict.fromkeys(inputs(base) if base else ())
    return list(found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    """The commit of preftune itself, where it runs from a checkout of its own; not that of a repository around it."""
    here = Path(__file__).resolve().parents[1]
    ask = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    top, commit = found.stdout.splitlines()
    return commit if here == Path(top).resolve() / "src" / "preftune" else None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
