"""The documentation names files and pages that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "clients/python/README.md",
    ROOT / "examples/README.md",
]
RECIPES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
CODE = re.compile(r"```.*?```", re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(CODE.sub("", page.read_text())):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(path), f"{target} has no part {anchor}"


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipes_list_files_that_are_there(recipe: Path) -> None:
    listed = re.findall(r"^- `([^`]+)`", recipe.read_text().partition("\n## Files\n")[2], re.MULTILINE)
    assert len(listed) > 1
    assert [path for path in listed if not (ROOT / path).exists()] == []


def test_there_is_a_recipe_for_each_wall() -> None:
    subjects = {recipe.stem for recipe in RECIPES}
    assert subjects >= {
        f"add-{what}"
        for what in ("a-model", "a-transport", "an-endpoint", "a-sampling-parameter", "an-option")
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_pages_name_are_there(page: Path) -> None:
    """In `code`, such as `baton/core/scheduler.py`."""
    folders = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    named = re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|c|h|md|proto|sh|mjs))`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []
