"""Fixtures that every test file shares. Models and tokenizers themselves are made in tiny.py."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# before torch is imported: on models this small, threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

# matplotlib keeps its list of fonts where it is: every test has a cache folder of its own, and would make it again
os.environ.setdefault("MPLCONFIGDIR", str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matplotlib"))

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For the fixtures that a whole file shares: they run before the folder below is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty: no test takes reference values from another, or leaves any behind."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _own_warnings_are_errors() -> None:
    """A warning raised by a line of preftune's own fails the test. pytest puts the filters back after each test."""
    warnings.filterwarnings("error", module=r"preftune(\.|$)")


@pytest.fixture
def shared() -> Any:
    """shared("data/x.jsonl") or shared("models/x"): the path beside the checkout, or a skip that says what is missing."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs ../shared/{name}, which is not here")
        return path

    return find


@pytest.fixture
def tokenizer() -> Any:
    """The tiny tokenizer with start and end token and without a chat template."""
    import tiny

    return tiny.tokenizer()


@pytest.fixture
def model() -> Any:
    """A tiny random Llama, in evaluation mode."""
    import tiny

    return tiny.model()


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples that a run writes before and after training are cut to three tokens."""
    monkeypatch.setattr("preftune.runs.answers.NEW_TOKENS", 3)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave everything but report.html and its pictures, which have tests of their own."""
    monkeypatch.setattr("preftune.report.write", lambda folder: None)
