"""Every page on its own: as a script, as a notebook, with other seeds, in float32."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pages
import pytest
from pages import ENVIRONMENT, PAGES, ROOT, WARNINGS, name_of
from repository import title_of

SEED = "torch.manual_seed(0)"
SEEDS = range(1, 1 + int(os.environ.get("SEEDS", 3)))  # twenty every week
# float64 becomes float32, and checks get this tolerance.
FLOAT32 = {"rtol": 1e-3, "atol": 1e-5}
# From here on a diagnosis must fit within 1e-8, which single precision can't reach.
NEEDS_FLOAT64 = {"2_any_layer/6_check_your_layer": "# A gallery of wrong extensions"}

# Lines with measured times, which differ from run to run.
MEASURED = {
    "2_any_layer/1_rms_norm": r"^N = .* to ",
    "3_in_use/1_temperature_scaling": r"^(trained|frozen)",
    "3_in_use/3_cost": r"quartiles|\d \s+\d+\.\d \s+\d+\.\d$",
}

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# ---------------------------------------------------------------------------
# Conventions
# ---------------------------------------------------------------------------
def faults(source: str) -> list[str]:
    """Return which conventions a page's source does not keep to."""
    tree = ast.parse(source)
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    found = []
    if "plt.show" not in calls:
        found.append("no figure")
    if "torch.testing.assert_close" not in calls:
        found.append("no check with torch.testing.assert_close")
    if SEED not in source and "rand" in source:
        found.append(f"random numbers without {SEED}")
    for node in ast.walk(tree):
        is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef)
        if is_definition and not ast.get_docstring(node):
            found.append(f"{node.name}, line {node.lineno}: no docstring")
    return found


@each_page
def test_conventions(page):
    """Each page has a figure, a check, a fixed seed, and docstrings."""
    assert not faults(page.read_text())


def test_conventions_notice_faults():
    """A page without a figure, a check, a seed or a docstring is found out."""
    assert faults("torch.rand(2)\ndef scale(x): return x") == [
        "no figure",
        "no check with torch.testing.assert_close",
        f"random numbers without {SEED}",
        "scale, line 2: no docstring",
    ]


def test_titles_are_unique():
    """No two pages have the same title."""
    titles = Counter(title_of(page.read_text()) for page in PAGES)
    twice = [title for title, count in titles.items() if count > 1]
    assert not twice, f"more than one page has the title {twice}"


def test_bibliography():
    """Each paper that a page links stands on "How to cite", with all of its pages."""
    text = (ROOT / "docs" / "bibliography.rst").read_text()
    listed = {
        (paper, page)
        for paper, places in re.findall(r"(?s)(arxiv\.org/abs/[\d.]+)(.*?)\n\n", text)
        for page in re.findall(r":doc:`gallery/(.*?)`", places)
        or ("All pages" in places) * [name_of(page) for page in PAGES]
    }
    linked = {
        (paper, name_of(page))
        for page in PAGES
        for paper in re.findall(r"arxiv\.org/abs/[\d.]+", page.read_text())
    }
    assert listed == linked


# ---------------------------------------------------------------------------
# As a plain script, and within the build
# ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scripts():
    """Run every page as a plain script from an empty folder, two at a time."""

    def run(page: Path) -> subprocess.CompletedProcess:
        options = [f"-W{option}" for option in (*WARNINGS, SHOWING)]
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.run(
                [sys.executable, *options, str(page)],
                cwd=folder,
                env=ENVIRONMENT,
                capture_output=True,
                text=True,
            )
            process.seconds = time.monotonic() - start
            process.left_behind = [path.name for path in Path(folder).iterdir()]
        pages.progress(f"script    {name_of(page)}")
        return process

    return dict(zip(PAGES, pages.two_at_a_time(run, PAGES), strict=True))


SHOWING = "ignore:FigureCanvasAgg is non-interactive:UserWarning"


@each_page
def test_script(page, scripts):
    """Each page runs from an empty folder, and leaves it empty."""
    assert scripts[page].returncode == 0, scripts[page].stderr
    assert not scripts[page].left_behind


def test_build_is_not_slower_than_its_pages(scripts, built):
    """Report the time of a clean build; the scripts ran two at a time."""
    ratio = built.seconds / sum(process.seconds for process in scripts.values())
    pages.SUMMARY.append(
        f"clean build: {ratio:.2f} of the time of all scripts added up"
    )


def lines(text: str, page: Path) -> list[str]:
    """Return what was printed, without measured times, indentation and empty lines."""
    measured = MEASURED.get(name_of(page))
    return [
        line.strip()
        for line in text.splitlines()
        if line.strip() and not (measured and re.search(measured, line.strip()))
    ]


@each_page
def test_prints_the_same_within_the_build(page, scripts, built):
    """What the site shows as output is what the page prints alone."""
    rst = built["docs/gallery"] / f"{name_of(page)}.rst"
    blocks = re.findall(
        r"(?m)^\.\. rst-class:: sphx-glr-script-out\n\n \.\. code-block:: none\n\n"
        r"((?:    .*\n|\n)*)",
        rst.read_text(),
    )
    assert lines("".join(blocks), page) == lines(scripts[page].stdout, page)


# ---------------------------------------------------------------------------
# As a notebook
# ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def notebooks(built):
    """Execute every notebook of the built site from an empty folder, two at a time."""
    paths = {path.stem: path for path in built.html.glob("_downloads/*/*.ipynb")}

    def run(page: Path) -> SimpleNamespace:
        path = paths[page.stem]
        with tempfile.TemporaryDirectory() as folder:
            command = (
                "nbconvert --to notebook --execute --output-dir . --log-level ERROR"
            )
            process = subprocess.run(
                [sys.executable, "-m", *command.split(), str(path)],
                cwd=folder,
                env=ENVIRONMENT,
                capture_output=True,
                text=True,
            )
        pages.progress(f"notebook  {name_of(page)}")
        return SimpleNamespace(path=path, process=process)

    return dict(zip(PAGES, pages.two_at_a_time(run, PAGES), strict=True))


@each_page
def test_notebook(page, notebooks):
    """Each notebook of the site runs."""
    process = notebooks[page].process
    assert process.returncode == 0, process.stderr[-3000:]


RAW = {
    "role": r":[a-z]+(:[a-z]+)?:`",
    "directive": r"(?m)^\s*\.\. ",
    "link": r"`__?(\W|$)",
    "underline": r"(?m)^(={4,}|-{4,}|~{4,})$",
}


@each_page
def test_notebook_holds_no_raw_markup(page, notebooks):
    """No reStructuredText is left in the text of a notebook."""
    cells = json.loads(notebooks[page].path.read_text())["cells"]
    text = [c["source"] for c in cells if c["cell_type"] == "markdown"]
    assert raw_markup(["".join(source) for source in text]) == []


def raw_markup(cells: list[str]) -> list[str]:
    """Return what looks like reStructuredText in cells of Markdown."""
    found = []
    for cell in cells:
        cell = re.sub(r"(?s)```.*?```|``.*?``", "", cell)  # code
        for kind, pattern in RAW.items():
            if match := re.search(pattern, cell):
                around = cell[max(0, match.start() - 30) : match.end() + 30]
                found.append(f"{kind}: {around!r}")
    return found


def test_raw_markup_is_noticed():
    """Each kind of raw markup is found, and proper Markdown is not."""
    good = "# Title\n\n`code`, $x^2$, [link](2_x.ipynb).\n\n- a list\n\n```\n.. x\n```"
    assert raw_markup([good]) == []
    for bad in (":math:`x`", ":py:class:`X`", ".. note::", "`a <b>`__", "`a <b>`_\n"):
        assert raw_markup(["text " + bad if bad[0] != "." else bad]), bad


# ---------------------------------------------------------------------------
# Other seeds, float32, and other pages around it
# ---------------------------------------------------------------------------
@each_page
def test_other_seeds(page):
    """No check passes by luck: other seeds."""
    source = page.read_text()
    if SEED not in source:
        pytest.skip("no random numbers")

    def run(seed: int) -> None:
        pages.execute(source.replace(SEED, f"torch.manual_seed({seed})"), page)

    runs = [lambda seed=seed: run(seed) for seed in SEEDS]
    outcomes = pages.run_all_forked(runs, limit=300)
    pages.progress(f"seeds     {name_of(page)}")
    failed = {s: str(o) for s, o in zip(SEEDS, outcomes, strict=True) if o.code}
    assert not failed, f"fails with seeds {list(failed)}, " + next(
        iter(failed.values())
    )


@each_page
def test_float32(page):
    """The extensions are right in single precision, within ``FLOAT32``."""
    source, *_ = page.read_text().split(NEEDS_FLOAT64.get(name_of(page), "\0"))
    source = source.replace("float64", "float32").replace(".double()", ".float()")

    def run() -> None:
        torch = pages.torch
        compare = torch.testing.assert_close

        def assert_close(actual, expected, **settings):
            if getattr(actual, "dtype", torch.float32) == torch.float32:
                for name, least in FLOAT32.items():
                    settings[name] = max(settings.get(name) or 0, least)
            compare(actual, expected, **settings)

        torch.testing.assert_close = assert_close
        pages.execute(source, page)

    outcome = pages.run_forked(run)
    assert outcome.code == 0, outcome


def global_state() -> dict:
    """Return the settings that no page may change."""
    torch = pages.torch
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "print options": repr(vars(torch._tensor_str.PRINT_OPTS)),
        "rcParams": repr(dict(pages.matplotlib.rcParams)),
        "warning filters": repr(pages.warnings.filters),
    }


def changed_state(source: str, path: Path | str) -> list[str]:
    """Return which settings a page changes."""
    pages.prepare()
    before = global_state()
    pages.execute(source, path)
    after = global_state()
    return [name for name in before if before[name] != after[name]]


@pytest.fixture(scope="module")
def reversed_order():
    """Run all pages in one process, the last one first."""

    def run() -> dict:
        results = {}
        for page in reversed(PAGES):
            with tempfile.TemporaryFile("w+") as file:
                with pages.contextlib.redirect_stdout(file):
                    changed = changed_state(page.read_text(), page)
                file.seek(0)
                results[str(page)] = (changed, file.read())
        return results

    outcome = pages.run_forked(run, limit=600)
    assert outcome.code == 0, outcome
    return outcome.value


@each_page
def test_prints_the_same_after_other_pages(page, reversed_order, scripts):
    """Each page prints the same alone and with all pages in reverse order."""
    printed = reversed_order[str(page)][1]
    assert lines(printed, page) == lines(scripts[page].stdout, page)


@each_page
def test_global_state(page, reversed_order):
    """No page changes a global setting."""
    assert reversed_order[str(page)][0] == []


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        ("torch.set_default_dtype(torch.float64)", "default dtype"),
        ("torch.set_num_threads(2)", "threads"),
        ("plt.rcParams['font.size'] = 20", "rcParams"),
        ("warnings.simplefilter('ignore')", "warning filters"),
    ],
)
def test_changed_global_state_is_noticed(source, setting):
    """A page that changes a setting is found out."""
    source = f"import torch, warnings, matplotlib.pyplot as plt\n{source}"
    assert pages.run_forked(lambda: changed_state(source, "page.py")).value == [setting]
