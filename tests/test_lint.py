"""Format, style, spelling, inventories, workflows: what ``make lint`` checks."""

import re

from pages import PAGES, ROOT
from repository import Repository


def test_lint(tmp_path):
    """``make lint`` finds nothing."""
    result = Repository(tmp_path).make("lint")
    assert result.returncode == 0, result.stdout


def test_lint_notices(tmp_path):
    """``make lint`` fails on a misspelled word."""
    repository = Repository(tmp_path)
    misspelled = "mi" + "spelled"  # in two parts, or it would be found here, too
    with repository["README.md"].open("a") as file:
        file.write(f"\nA {misspelled} word.\n")
    result = repository.make("lint")
    assert result.returncode != 0
    assert misspelled in result.stdout


def test_inventories_hold_only_what_pages_use():
    """Every name in the inventories is imported or used by a page."""
    code = "\n".join(page.read_text() for page in PAGES)
    for inventory in (ROOT / "docs/inventories").glob("*.txt"):
        for line in inventory.read_text().splitlines()[3:]:
            if name := line.split(" ")[0]:
                last = name.split(".")[-1]
                assert re.search(rf"\b{last}\b", code), f"{inventory.name}: {name}"
