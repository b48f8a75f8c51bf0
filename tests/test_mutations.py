"""Every method of every extension on every page, broken in many ways, fails its page.

Run with ``UPDATE=1`` to write the numbers into ``docs/how_checked.rst``.
"""

import os
import re
from collections import Counter

import mutants
import pages
import pytest
from pages import PAGES, ROOT, name_of

# Mutants that can't be noticed: page, method, mutant, and why.
SIGN = "prints or counts, and returns V as its parent does; there the sign is checked"
PAGE_4 = "1_scale_module/4_ggn_diagonal"
EXCLUDED: dict[tuple[str, str, str], str] = {
    (PAGE_4, "TellingDiagGGNExact.backpropagate", "negated"): SIGN,
    (PAGE_4, "TellingDiagGGNExact.backpropagate", "absolute value"): SIGN,
    (PAGE_4, "CountingDiagGGNExact.backpropagate", "negated"): SIGN,
}

HOW_CHECKED = ROOT / "docs" / "how_checked.rst"
NUMBERS: dict[str, Counter] = {}
COLUMNS = {
    "methods": "Methods",
    "made": "Mutants",
    "failed": "Failed the page",
    "by_check": "of these, in a comparison",
    "no_effect": "No effect",
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_mutant_fails_its_page(page):
    """Break each method in each way, one at a time: the page must fail."""
    survey = mutants.survey(page)
    assert survey.code == 0, f"the page itself fails: {survey}"
    methods = survey.value["methods"]
    uncalled = [key for key, method in methods.items() if not method["calls"]]
    plan = {
        key: [m for m in mutants.MUTANTS if m not in method["no effect"]]
        for key, method in methods.items()
        if method["calls"]
    }
    hunt = mutants.hunt(page, plan, survey.value["seconds"])
    assert hunt.code == 0, f"the page itself fails: {hunt}"
    made = sum(map(len, plan.values()))
    assert len(hunt.value) == made

    survivors, excluded = [f"{key}: never called" for key in uncalled], set()
    for result in hunt.value:
        method = result["method"].rsplit(":")[0]
        if result["outcome"] != "killed":
            if (name_of(page), method, result["mutant"]) in EXCLUDED:
                excluded.add((name_of(page), method, result["mutant"]))
            else:
                survivors.append("{method}: {mutant}: {outcome} {how}".format(**result))
    outcomes = Counter(result["outcome"] for result in hunt.value)
    NUMBERS[name_of(page)] = numbers = Counter(
        methods=len(methods),
        made=made - len(excluded),
        failed=outcomes["killed"],
        by_check=sum("AssertionError" in result["how"] for result in hunt.value),
        no_effect=sum(len(methods[key]["no effect"]) for key in plan) + len(excluded),
    )
    pages.progress(
        f"{name_of(page):40} {numbers['failed']:4} of {numbers['made']:4} mutants"
    )
    assert not survivors, "the page passes with these mutants:\n" + "\n".join(survivors)
    unused = {key for key in EXCLUDED if key[0] == name_of(page)} - excluded
    assert not unused, f"excluded without need: {unused}"


def test_numbers_on_the_site_are_up_to_date():
    """The table on "How this site is checked" shows what was found just now."""
    if len(NUMBERS) < len(PAGES):
        pytest.skip("needs the results of all pages")
    rows = [[page, *row(numbers)] for page, numbers in NUMBERS.items()]
    rows.append(["All pages", *row(sum(NUMBERS.values(), Counter()))])
    pages.SUMMARY.append(f"{'':42}" + "".join(f"{head:>11}" for head in COLUMNS))
    for name, *cells in rows:
        line = f"{name:42}" + "".join(f"{cell:>11}" for cell in cells)
        pages.SUMMARY.append(line)
    head = ["Page", *COLUMNS.values()]
    links = [[f":doc:`gallery/{name}`", *cells] for name, *cells in rows[:-1]]
    table = ".. list-table::\n   :header-rows: 1\n\n" + "".join(
        "   * - " + "\n     - ".join(cells) + "\n" for cells in [head, *links, rows[-1]]
    )
    text = HOW_CHECKED.read_text()
    new = re.sub(
        r"(?s)(\.\. numbers begin\n\n).*(\n\.\. numbers end)",
        lambda match: match[1] + table + match[2],
        text,
    )
    if os.environ.get("UPDATE"):
        HOW_CHECKED.write_text(new)
    elif text != new:
        pytest.fail(
            "docs/how_checked.rst is out of date: make test T=mutations UPDATE=1"
        )


def row(numbers: Counter) -> list[str]:
    """Format the numbers of a page."""
    return [str(numbers[column]) for column in COLUMNS]
