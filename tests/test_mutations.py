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

HOW_CHECKED = ROOT / "docs" / "how_checked.rst"
NUMBERS: dict[str, Counter] = {}
COLUMNS = {
    "methods": "Methods",
    "made": "Mutants",
    "failed": "Noticed",
    "by_check": "of these, by an assertion",
    "no_effect": "No effect",
}


# The last page takes long and keeps one core busy only: it starts before the others.
@pytest.mark.parametrize("page", PAGES[::-1], ids=name_of)
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

    survivors = [f"{key}: never called" for key in uncalled] + [
        "{method}: {mutant}: {outcome} {how}".format(**result)
        for result in hunt.value
        if result["outcome"] != "killed"
    ]
    outcomes = Counter(result["outcome"] for result in hunt.value)
    NUMBERS[name_of(page)] = numbers = Counter(
        methods=len(methods),
        made=made,
        failed=outcomes["killed"],
        by_check=sum("AssertionError" in result["how"] for result in hunt.value),
        no_effect=sum(len(methods[key]["no effect"]) for key in plan),
    )
    pages.progress(
        f"{name_of(page):40} {numbers['failed']:4} of {numbers['made']:4} mutants"
    )
    assert not survivors, "the page passes with these mutants:\n" + "\n".join(survivors)


WEAK_PAGE = """
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.extensions.firstorder.base import FirstOrderModuleExtension

class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return x * self.weight

class ScaleBatchGrad(FirstOrderModuleExtension):
    def __init__(self):
        super().__init__(params=["weight"])

    def weight(self, ext, module, g_inp, g_out, bp):
        return (g_out[0] * module.input0).sum(1, keepdim=True)

    def backpropagate(self, ext, module, g_inp, g_out, bp):
        return module.weight * bp

class WrongBatchGrad(ScaleBatchGrad):
    def weight(self, ext, module, g_inp, g_out, bp):
        return 0.0 * module.input0[:, :1]

scale, loss_function = extend(Scale()), extend(torch.nn.MSELoss())
extension = BatchGrad()
extension.set_module_extension(Scale, ScaleBatchGrad())
with backpack(extension):
    loss_function(scale(torch.arange(12.0).reshape(4, 3)), torch.ones(4, 3)).backward()
torch.testing.assert_close(scale.weight.grad_batch.sum(0), scale.weight.grad)
"""


def test_survivors_are_found(tmp_path):
    """On a page that checks the sum of the individual gradients only, some survive."""
    page = tmp_path / "1_weak.py"
    page.write_text(WEAK_PAGE)
    methods = mutants.survey(page).value["methods"]
    weight, backpropagate = methods  # and nothing of WrongBatchGrad
    assert methods[backpropagate]["calls"] == 0
    made = [m for m in mutants.MUTANTS if m not in methods[weight]["no effect"]]
    assert "features rolled" not in made  # there is one feature
    outcomes = mutants.hunt(page, {weight: made}, seconds=1).value
    survivors = {o["mutant"] for o in outcomes if o["outcome"] == "survived"}
    assert survivors == {"samples rolled", mutants.SUBSET_IGNORED}
    assert len(outcomes) == len(made)


def test_numbers_on_the_site_are_up_to_date():
    """The table on "How this site is checked" shows what was found just now."""
    if len(NUMBERS) < len(PAGES):
        pytest.skip("needs the results of all pages")
    rows = [[page, *row(NUMBERS[page])] for page in map(name_of, PAGES)]
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
    new, places = re.subn(
        r"(?s)(\.\. numbers begin\n).*(\.\. numbers end)",
        lambda match: f"{match[1]}\n{table}\n{match[2]}",
        text,
    )
    assert places == 1
    if os.environ.get("UPDATE"):
        HOW_CHECKED.write_text(new)
    elif text != new:
        pytest.fail(
            "docs/how_checked.rst is out of date: make test T=mutations UPDATE=1"
        )


def row(numbers: Counter) -> list[str]:
    """Format the numbers of a page."""
    return [str(numbers[column]) for column in COLUMNS]
