"""The paper map goes through every statement, fault and question, and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Of a statement, a fault or a question in the paper map.
ID = r"\b[TBQ]\d{1,2}b?\b"
PAPER_MAP = (ROOT / "docs" / "internals" / "paper-map.md").read_text(encoding="utf-8")


def test_it_names_tests_that_exist() -> None:
    cited = set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAPER_MAP))
    assert len(cited) > 30
    missing = [
        f"{file}::{name}"
        for file, name in sorted(cited)
        if not (ROOT / "tests" / file).is_file() or f"def {name}(" not in (ROOT / "tests" / file).read_text("utf-8")
    ]
    assert not missing


@pytest.mark.parametrize(("letter", "count"), [("B", 10), ("Q", 25), ("T", 14)])
def test_it_goes_through_every_id(letter: str, count: int) -> None:
    rows = set(re.findall(rf"^\| ({letter}\d+) \|", PAPER_MAP, flags=re.MULTILINE))
    assert rows == {f"{letter}{number}" for number in range(1, count + 1)}


def test_every_id_in_the_source_is_on_the_page() -> None:
    used = {name for path in (ROOT / "src").rglob("*.py") for name in re.findall(ID, path.read_text("utf-8"))}
    assert used
    assert not used - set(re.findall(rf"^\| ({ID}) \|", PAPER_MAP, flags=re.MULTILINE))
