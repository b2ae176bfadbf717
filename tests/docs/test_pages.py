"""README and pages: their length, links, names, code blocks, markers and pictures are what they should be."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

import nipq

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDE = sorted((DOCS / "guide").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Of the headings, as MkDocs and GitHub make them."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), flags=re.DOTALL)


def resolve(path: str) -> object:
    """The object of a dotted path; the longest importable part of it is imported."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    wrong = []
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", prose):
        place = (page.parent / target) if target else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            wrong.append(f"{target}#{anchor}")
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_named_exists(page: Path) -> None:
    names = re.findall(r"`([\w./]+/[\w.]*\.(?:py|md|yaml)|[\w.]+\.md|\w+\.py)`", text_of(page))
    places = (ROOT, ROOT / "src" / "nipq", DOCS, ROOT / "tests")
    assert not [name for name in names if not any((place / name).exists() for place in places)]


@pytest.mark.parametrize("folder", ["src", "experiments", "benchmarks", "configs", "examples", "tests"])
def test_pages_that_the_code_names_exist(folder: str) -> None:
    files = [path for end in ("py", "yaml", "md") for path in (ROOT / folder).rglob(f"*.{end}")]
    named = {name for path in files for name in re.findall(r"docs/[\w/-]+\.md", text_of(path))}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "reference"], ids=name_of)
def test_every_name_of_the_library_exists(page: Path) -> None:
    """In running text and in tables: ``nipq.NAME`` and deeper."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    wrong = []
    for path in sorted(set(re.findall(r"`(nipq(?:\.[A-Za-z_]\w*)+)[`(]", prose)) - {"nipq.json"}):
        try:
            resolve(path)
        except (AttributeError, ImportError):
            wrong.append(path)
    assert not wrong


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDE], ids=name_of)
def test_python_blocks_compile(page: Path) -> None:
    for block in python_blocks(page):
        compile(block, name_of(page), "exec")


def test_there_are_python_blocks() -> None:
    assert sum(len(python_blocks(page)) for page in (ROOT / "README.md", *GUIDE)) >= 20


def test_the_site_has_every_page() -> None:
    def pages(tree: object) -> list[str]:
        if isinstance(tree, str):
            return [tree]
        return [page for part in (tree.values() if isinstance(tree, dict) else tree) for page in pages(part)]

    listed = pages(SITE["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_page_says_its_point_first() -> None:
    """A paragraph of prose follows the title, not a list, a table or another heading."""
    pages = [page for page in DOCS.rglob("*.md") if page.parent.name != "reference"]
    firsts = {name_of(page): text_of(page).split("\n\n")[1] for page in pages}
    assert not [
        name for name, first in firsts.items() if len(first) < 80 or first.startswith(("#", "-", "|", "!", "<"))
    ]


# ------------------------------------------------------------------------------------------------------ results


def test_markers_of_results_come_in_pairs_and_once() -> None:
    found: list[str] = []
    for page in PAGES:
        marks = re.findall(r"<!-- results:([\w.-]+):(begin|end) -->", text_of(page))
        assert [kind for _, kind in marks] == ["begin", "end"] * (len(marks) // 2), name_of(page)
        begins = [name for name, kind in marks if kind == "begin"]
        assert begins == [name for name, kind in marks if kind == "end"], name_of(page)
        found += begins
    assert found
    assert len(found) == len(set(found))


def test_every_picture_is_shown_and_described() -> None:
    shown = set()
    for page in PAGES:
        for description, target in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text_of(page)):
            assert description, f"{name_of(page)}: {target} has no description"
            shown.add((page.parent / target).resolve())
    assert shown == {picture.resolve() for picture in (DOCS / "results" / "pictures").iterdir()}


# ---------------------------------------------------------------------------------------------------- reference


def entries(page: Path) -> list[str]:
    return re.findall(r"^::: ([\w.]+)$", text_of(page), flags=re.MULTILINE)


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=name_of)
def test_what_the_reference_shows_exists(page: Path) -> None:
    for path in entries(page):
        resolve(path)


def test_the_reference_has_every_public_name() -> None:
    shown = {path.rpartition(".")[2] for path in entries(DOCS / "reference" / "nipq.md")}
    assert shown == set(nipq.__all__) - {"__version__"}


# ------------------------------------------------------------------------------------------------------ messages


def messages() -> str:
    """All texts of the source, a placeholder in them as three dots."""
    found = []
    for path in (ROOT / "src" / "nipq").rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_in_the_source() -> None:
    """In the first column; three dots and quoted names stand for what differs from case to case."""
    first_cells = re.findall(r"^\| (`[^|]*) \|", text_of(DOCS / "guide" / "troubleshooting.md"), flags=re.MULTILINE)
    quoted = [text for cell in first_cells for text in re.findall(r"`([^`]+)`", cell) if " " in text]
    source = messages()
    parts = [part.strip() for text in quoted for part in re.split(r"\.\.\.|'[^']*'", text) if len(part.strip()) > 12]
    assert len(parts) > 50
    assert not [part for part in parts if part not in source]


# --------------------------------------------------------------------------------------------------------- grids


def test_the_page_on_comparing_shows_the_example_grid() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", text_of(DOCS / "guide" / "comparing.md"), flags=re.DOTALL)
    grid = ROOT / "configs" / "grids" / "digits.yaml"
    assert yaml.safe_load(shown) == yaml.safe_load(text_of(grid))
