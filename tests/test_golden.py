"""The curves of every method are what they were: losses of 20 steps against those of golden.json."""

from __future__ import annotations

import json

import golden
import pytest
import tolerances

from preftune import methods

KNOWN = json.loads(golden.FILE.read_text(encoding="utf-8")) if golden.FILE.is_file() else {}


def test_every_method_has_a_curve() -> None:
    assert list(KNOWN) == list(methods.NEEDS), "python tests/golden.py writes them"
    assert all(len(curve) == golden.STEPS for curve in KNOWN.values())


@pytest.mark.parametrize("name", KNOWN)
def test_a_curve_is_what_it_was(name: str) -> None:
    assert golden.losses(name) == pytest.approx(KNOWN[name], rel=tolerances.CURVE, abs=tolerances.CURVE / 10)
