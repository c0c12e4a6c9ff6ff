"""docs/methods against the tables of the code: every method has a page, and a page says what the code does."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from test_docs import PAGES, ROOT, Row, blocks, rows, spans
from test_losses import AT_REFERENCE

from preftune import losses
from preftune.methods import ELSEWHERE, NEEDS, options_of
from preftune.methods.options import MethodOptions, readable
from preftune.methods.table import WORDS

FOLDER = ROOT / "docs/methods"
INDEX = FOLDER / "README.md"
KNOWN = set(NEEDS)


def listed(column: str) -> list[Row]:
    return [row for row in rows(INDEX) if column in row.cells]


def index() -> dict[str, Row]:
    return {spans(row.cells["method"])[0]: row for row in listed("first loss")}


def page(name: str) -> Path:
    target = re.search(r"\]\((\w+\.md)\)", index()[name].cells["method"])
    assert target, f"{name}: its row in the table of all methods has no link"
    return FOLDER / target[1]


def of_section(name: str, heading: str) -> bool:
    """Whether a heading of the page speaks of this method: of all of the page's, where it names none."""
    return name in spans(heading) or not spans(heading)


def keys(name: str) -> dict[str, str]:
    """The page's table of keys and defaults, as it stands."""
    found = [row.cells for row in rows(page(name)) if "default" in row.cells and of_section(name, row.section)]
    assert all(list(cells) == ["key", "default", "range"] for cells in found)
    return {spans(cells["key"])[0]: cells["default"] for cells in found}


def of_code(name: str) -> dict[str, float]:
    """Key and default of everything that a method reads."""
    row = NEEDS[name]
    first = {} if row.beta is None else {"beta": row.beta}
    return first | {"learning_rate": row.learning_rate} | {f"method.{key}": value for key, value in row.reads.items()}


def test_every_method_has_a_row_and_a_page_that_names_it() -> None:
    assert index().keys() == KNOWN
    assert {page(name).name for name in KNOWN} | {"README.md"} == {path.name for path in FOLDER.iterdir()} - {"constraints.md"}
    for name in KNOWN:
        title = page(name).read_text(encoding="utf-8").partition("\n")[0]
        assert title.startswith("# ") and name in re.findall(r"\w+", title.partition(":")[0]), title


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_pages_say_the_defaults_of_the_code(name: str) -> None:
    written = {
        key: default == "true" if default in ("true", "false") else float(default) for key, default in keys(name).items()
    }
    assert written == of_code(name)


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_pages_name_the_modifiers_that_a_method_reads(name: str) -> None:
    text = page(name).read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    said = [m for heading, body in sections if of_section(name, heading) for m in re.findall(r"^Modifiers: (.*)", body, re.M)]
    assert len(said) == 1, f"{page(name).name}: a line of modifiers under the keys of {name}"
    modifiers = {f"method.{key}" for key in readable(options_of(name)) if key not in NEEDS[name].reads}
    assert set(spans(said[0].partition(". ")[0])) == modifiers - {"method.divergence_alpha"}


def test_methods_named_are_methods() -> None:
    named = {name for path in PAGES for name in re.findall(r"\bmethod=(\w+)", path.read_text(encoding="utf-8"))}
    assert set(NEEDS) - {"mm_dpo"} <= named <= KNOWN


def test_pages_name_no_other_key_of_methods() -> None:
    known = {f"method.{key}" for key in MethodOptions.model_fields}
    for path in PAGES:
        named = set(re.findall(r"`(method\.\w+)", path.read_text(encoding="utf-8")))
        assert named <= known, path.name


def test_the_table_of_all_methods_is_that_of_the_code() -> None:
    for name, row in index().items():
        needs, cells = NEEDS[name], row.cells
        words = [WORDS[mark] for mark in needs.marks]
        assert cells["takes"] == " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words), name
        assert cells["reference"] == ("yes" if needs.reference else "no"), name
        assert cells["`beta`"] == ("–" if needs.beta is None else f"{needs.beta:g}"), name
        assert float(cells["`learning_rate`"]) == needs.learning_rate, name
        assert float(cells["with an adapter"]) == pytest.approx(10 * needs.learning_rate), name


def test_first_losses_are_those_of_the_losses() -> None:
    at_reference = AT_REFERENCE | {"kto": 0.5}
    for name, row in index().items():
        said = row.cells["first loss"]
        if name in at_reference:
            assert float(said) == pytest.approx(at_reference[name], abs=5e-4), name
        else:
            assert not re.match(r"[\d.]+$", said), f"{name}: the loss at the start depends on more than the method"
    alone = torch.zeros(1)
    half = losses.kto(alone, alone, torch.tensor([0]), torch.tensor([True]), baseline=0.0)
    assert float(half) == at_reference["kto"]


def test_other_tools_names_are_those_of_the_refusals() -> None:
    written = {name: spans(row.cells["here"]) for row in listed("elsewhere") for name in spans(row.cells["elsewhere"])}
    assert written == {name: re.findall(r"(?:^|method=)(\w+)", ours) for name, ours in ELSEWHERE.items()}


def test_every_choice_is_a_method_with_a_page() -> None:
    chosen = [row.cells["take"] for row in listed("take")]
    assert all(re.findall(r"\[\w+\]\(\w+\.md\)", cell) or "method." in cell for cell in chosen)
    for cell in chosen:
        for name, target in re.findall(r"\[(\w+)\]\((\w+\.md)\)", cell):
            assert page(name).name == target


def test_python_of_the_pages_runs() -> None:
    names: dict[str, object] = {}
    shown = blocks("python", sorted(FOLDER.glob("*.md")))
    assert {block.page for block in shown} == {"README.md", "mm_dpo.md", "plackett_luce.md"}
    for block in shown:
        exec(compile(block.text, block.page, "exec"), names)
    own = names["squared_hinge"]
    assert callable(own)
    policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -4.0])
    found = own(policy, reference, torch.tensor([0]), torch.tensor([1]), preference=torch.tensor([0.9]))
    assert float(found) == pytest.approx(0.9 * 0.3**2 + 0.1 * 1.7**2)
    (group,) = names["groups"]  # type: ignore[misc]
    assert group.marks[0].by.strength == 2
    (group,) = names["rankings"]  # type: ignore[misc]
    assert group.marks[0].tiers == ((1,), (0,), (2,))


@pytest.mark.parametrize(
    ("name", "said", "number"),
    [
        ("dpo", "2.197", math.log(0.9 / 0.1)),
        ("cdpo", "2.197", math.log(0.9 / 0.1)),
        ("exo", "6.907", math.log(0.999 / 0.001)),
        ("exo", "2.761", AT_REFERENCE["exo"]),
        ("nca", "6.93", math.log(2) / 0.1),
        ("nca", "1.386", AT_REFERENCE["nca"]),
        ("discopop", "0.847", AT_REFERENCE["discopop"]),
        ("plackett_luce", "1.792", math.log(6)),
        ("plackett_luce", "3.178", math.log(24)),
        ("mm_dpo", "0.1316", 0.1 * (1 + 0.5 * (1 - math.exp(-0.5 * 2)))),
    ],
)
def test_numbers_that_follow_from_a_formula(name: str, said: str, number: float) -> None:
    assert re.search(rf"(?<![\d.]){re.escape(said)}(?![\d])", page(name).read_text(encoding="utf-8"))
    assert float(said) == pytest.approx(number, abs=0.5 * 10 ** -len(said.partition(".")[2]))
