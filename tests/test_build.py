"""The build as a whole: what it runs again, what makes it fail, and what comes after.

Every build here has no network and no home folder, see ``repository.ISOLATED``. Most
use stubs, pages with the right names and titles that take no time.
"""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import urljoin
from xml.etree import ElementTree

import pages
import pytest
from bs4 import BeautifulSoup
from pages import PAGES, ROOT, name_of
from repository import ISOLATED, Repository, title_of
from test_pages import lines


def count_of_pages_run(output: str) -> int:
    """Return how many pages a build ran, by its last words."""
    match = re.search(r"successfully executed (\d+) out of", output)
    return int(match[1]) if match else 0


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> Repository:
    """Build a copy in which all pages are stubs."""
    repository = Repository(tmp_path_factory.mktemp("stubs"))
    repository.replace_pages_by_stubs()
    good_build(repository, len(PAGES))
    return repository


def good_build(repository: Repository, pages_run: int | None = None) -> str:
    """Build, check that it works and how many pages it runs, and return its output."""
    build = repository.make("html")
    assert build.returncode == 0, build.stdout[-5000:]
    assert (repository.html / "index.html").exists()
    if pages_run is not None:
        assert count_of_pages_run(build.stdout) == pages_run, build.stdout[-3000:]
    return build.stdout


# ---------------------------------------------------------------------------
# Stubs: what is run again
# ---------------------------------------------------------------------------
def test_what_changes_is_run_again(stubs):
    """A page runs if it changed; all run if requirements.txt or conf.py changed."""
    page = stubs.page(PAGES[2])
    page.write_text(page.read_text().replace("A sentence", "Another sentence"))
    good_build(stubs, 1)
    for name in ["conf.py", "requirements.txt"]:
        with stubs[name].open("a") as file:
            file.write("# changed\n")
        good_build(stubs, len(PAGES))
    good_build(stubs, 0)


def test_renamed_page_leaves_nothing_behind(stubs):
    """After a page has a new name, its old name is gone from the site."""
    old = stubs.page(PAGES[-1])
    new = old.with_name("9_renamed.py")
    texts = {p: p.read_text() for p in stubs["docs"].glob("*.rst")}
    old.rename(new)
    for path, text in texts.items():
        path.write_text(text.replace(old.stem, new.stem))
    good_build(stubs)
    assert list(stubs.html.rglob("*9_renamed.html"))
    assert not list(stubs.html.rglob(f"*{old.stem}*"))
    new.rename(old)
    for path, text in texts.items():
        path.write_text(text)
    good_build(stubs)


# ---------------------------------------------------------------------------
# Stubs: one value, the repository, puts addresses and launch buttons into the site
# ---------------------------------------------------------------------------
HOME = "https://someone.github.io/layers/"


def test_wrong_repository_name(stubs):
    """A name that is not owner/name fails the build and is shown."""
    build = stubs.make("html", GITHUB_REPOSITORY="layers")
    assert build.returncode != 0
    assert "GITHUB_REPOSITORY is 'layers', but must be owner/name" in build.stdout


@pytest.fixture(scope="module", params=["someone/layers", ""], ids=["public", "local"])
def published(stubs, request) -> dict[str, BeautifulSoup]:
    """Build for a repository, or for none; return all documents by their address."""
    build = stubs.make("html", GITHUB_REPOSITORY=request.param)
    assert build.returncode == 0, build.stdout[-3000:]
    home = HOME if request.param else ""
    files = [path.relative_to(stubs.html) for path in stubs.html.rglob("*.html")]
    return {
        f"{home}{file}": BeautifulSoup((stubs.html / file).read_text(), "html.parser")
        for file in files
        if file.parts[0] != "_static" and file.name != "search.html"
    }


def test_sitemap(stubs, published):
    """The sitemap lists all documents."""
    sitemap = ElementTree.parse(stubs.html / "sitemap.xml").getroot()
    listed = [location.text for location in sitemap.findall(".//{*}loc")]
    assert sorted(listed) == sorted(published)


def test_link_previews(stubs, published):
    """Each document says its title, what it is about, and has a picture that exists."""
    for address, soup in published.items():
        about = {m.get("property"): m["content"] for m in soup.select("meta[content]")}
        assert about["og:title"] in soup.title.text
        assert len(about["og:description"]) > 40
        image = urljoin(address, about["og:image"])
        assert (stubs.html / image.removeprefix(HOME)).is_file(), image


def test_launch_buttons(stubs, published):
    """With a repository, each page opens its notebook, which installs what it needs."""
    requirements = (ROOT / "requirements.txt").read_text().splitlines()[1:5]
    place = "https://colab.research.google.com/github/someone/layers/blob/gh-pages/"
    for address, soup in published.items():
        buttons = [a["href"] for a in soup.select("a.launch")]
        is_page = re.search(r"gallery/.*/(?!index)", address)
        assert len(buttons) == bool(is_page and address.startswith("https"))
        for href in buttons:
            notebook = stubs.html / href.removeprefix(place)
            assert notebook.stem == Path(address).stem
            first, *_ = json.loads(notebook.read_text())["cells"]
            for line in requirements:
                assert line in "".join(first["source"])


# ---------------------------------------------------------------------------
# Stubs: what makes it fail
# ---------------------------------------------------------------------------
FAULTS = {
    "raises": ('raise ValueError("the page raised this")', "the page raised this"),
    "warns": ('import warnings; warnings.warn("a stray warning")', "a stray warning"),
    "has a syntax error": ("x = = 1", "invalid syntax"),
    "fails a check": ("torch.testing.assert_close(device, device + 1)", "Error"),
}


def test_faulty_pages_fail_the_build_and_the_next_one_works(stubs):
    """Pages with faults are all named in one build; mended, the next build works."""
    texts = {}
    for page, (line, _) in zip(PAGES, FAULTS.values(), strict=False):
        path = stubs.page(page)
        texts[path] = path.read_text()
        path.write_text(texts[path] + line + "\n")
    for _ in range(2):  # again: what failed must not pass because it was read before
        build = stubs.make("html")
        assert build.returncode != 0
        for path, (_, message) in zip(texts, FAULTS.values(), strict=True):
            assert path.name in build.stdout
            assert message in build.stdout, build.stdout[-5000:]
    for path, text in texts.items():
        path.write_text(text)
    good_build(stubs, len(texts))


def test_sphinx_warning_fails_the_build(stubs):
    """A reference that leads nowhere fails, and fails again."""
    index = stubs["docs/index.rst"]
    text = index.read_text()
    index.write_text(text + "\n:doc:`gallery/no_such_page`\n")
    for _ in range(2):
        build = stubs.make("html")
        assert build.returncode != 0
        assert "no_such_page" in build.stdout
    index.write_text(text)
    good_build(stubs, 0)


def test_missing_inventory_fails_the_build(stubs):
    """If the names of a library can't be read, the build fails and says so."""
    inventory = stubs["docs/inventories/torch.txt"]
    aside = inventory.rename(inventory.with_suffix(".aside"))
    build = stubs.make("html")
    assert build.returncode != 0
    assert "inventories/torch.txt" in build.stdout
    aside.rename(inventory)
    good_build(stubs)


def test_unconventional_pages_fail_the_tests(stubs):
    """A page without a figure, one without a check, one with the title of another."""
    edits = [("plt.show()", ""), ("torch.testing.assert_close", "torch.equal")]
    edits.append((title_of(PAGES[2].read_text()), title_of(PAGES[3].read_text())))
    texts = {stubs.page(page): stubs.page(page).read_text() for page in PAGES[:3]}
    for (path, text), (old, new) in zip(texts.items(), edits, strict=True):
        path.write_text(text.replace(old, new))
    result = stubs.make("test", "T=pages", PYTEST_ADDOPTS="-k 'conventions or titles'")
    assert result.returncode != 0
    for test, fault in [
        (name_of(PAGES[0]), "no figure"),
        (name_of(PAGES[1]), "no check with torch.testing.assert_close"),
        ("test_titles_are_unique", edits[2][1]),
    ]:
        assert re.search(rf"(?s)_ .*{test}.* _.*{re.escape(fault)}", result.stdout)
    for path, text in texts.items():
        path.write_text(text)


def test_killed_build(stubs):
    """A build that was killed while pages ran does no harm to the next one."""
    stubs.make("clean")
    build = subprocess.Popen(
        stubs.command("html"),
        cwd=stubs.folder,
        env=ISOLATED,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(list(stubs["docs/gallery"].glob("*/*.md5"))) < 3:
        assert build.poll() is None, "the build ended before it could be killed"
        time.sleep(0.02)
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    good_build(stubs)
    good_build(stubs, 0)


@pytest.mark.parametrize("name", ["", "4_ggn_diagnal"])
def test_page_with_a_typo(stubs, name):
    """``make page`` with an unknown page lists the pages there are."""
    result = stubs.make("page", f"PAGE={name}")
    assert result.returncode != 0
    assert "4_ggn_diagonal" in result.stdout


def test_page_alone(stubs):
    """``make page`` builds one page and leaves the site alone."""
    before = sorted(stubs.html.rglob("*"))
    result = stubs.make("page", "PAGE=4_ggn_diagonal")
    assert result.returncode == 0, result.stdout[-3000:]
    assert count_of_pages_run(result.stdout) == 1
    assert sorted(stubs.html.rglob("*")) == before


def test_unknown_part_of_the_tests(stubs):
    """``make test`` with an unknown part lists the parts there are."""
    result = stubs.make("test", "T=mutation")
    assert result.returncode != 0
    assert "mutations" in result.stdout


def test_old_python(stubs, tmp_path):
    """An old Python is refused with a word on what to do."""
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    (stubs[".venv"] / "requirements.txt").unlink()
    result = stubs.make("html", f"PYTHON={old}")
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stdout


# ---------------------------------------------------------------------------
# The real pages
# ---------------------------------------------------------------------------
def with_mutant(source: str) -> str | None:
    """Scale the result of the first method of an extension by 1.01, if there is one."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or "Module(" in ast.unparse(node)[:60]:
            continue
        bases = " ".join(map(ast.unparse, node.bases))
        if not re.search(r"Extension|Derivatives|DiagGGN", bases):
            continue
        for method in node.body:
            is_method = isinstance(method, ast.FunctionDef)
            if is_method and method.name != "__init__" and "bias" != method.name:
                last = method.body[-1]
                computes = isinstance(last, ast.Return) and not isinstance(
                    last.value, ast.Constant
                )
                if computes and "self" not in ast.unparse(last):
                    lines = source.splitlines(keepends=True)
                    start, end = last.lineno - 1, last.end_lineno
                    indent = " " * last.col_offset
                    wrong = f"{indent}return 1.01 * ({ast.unparse(last.value)})\n"
                    return "".join([*lines[:start], wrong, *lines[end:]])
    return None


@pytest.fixture(scope="module")
def copied(built, tmp_path_factory) -> Repository:
    """Copy the built site with its repository, to build it anew."""
    folder = tmp_path_factory.mktemp("copied") / "site"
    return Repository(shutil.copytree(built.folder, folder, symlinks=True))


def test_mutants_fail_the_build_and_are_named(copied, built):
    """A mutant on each page stops the build; without them the next build works.

    The second build runs the pages anew, so it must give the same site as the first.
    """
    mutated = {page: with_mutant(page.read_text()) for page in PAGES}
    mutated = {page: source for page, source in mutated.items() if source}
    assert len(mutated) >= len(PAGES) - 2  # two pages have no extension
    for page, source in mutated.items():
        copied.page(page).write_text(source)
    pages.progress(f"building with a mutant on each of {len(mutated)} pages")
    failed = copied.make("html")
    assert failed.returncode != 0
    assert not copied.html.exists(), "a broken site could be published"
    for page in mutated:
        assert f"{name_of(page)}.py" in failed.stdout, failed.stdout[-5000:]
    assert failed.stdout.count("AssertionError") >= len(mutated)
    assert "not close" in failed.stdout

    for page in mutated:
        copied.page(page).write_text(page.read_text())
    pages.progress("building without the mutants")
    good_build(copied, len(mutated))
    assert differences(built.html, copied.html) == []


def differences(before: Path, after: Path) -> list[str]:
    """Return the files of two sites that differ, measured times left out.

    Times are in the figures of one page, in the lines of output that ``MEASURED``
    names, in the run time at the end of each page, and as words in the search index.
    In ``.buildinfo`` is a hash of the configuration, to which the folder belongs.
    """

    def content(folder: Path) -> dict[str, bytes | list[str]]:
        files = {}
        for path in filter(Path.is_file, folder.rglob("*")):
            files[str(path.relative_to(folder))] = path.read_bytes()
        for page in PAGES:
            name = f"gallery/{name_of(page)}.html"
            text = re.sub(r"Total running time.*|<[^>]+>", "", files[name].decode())
            files[name] = lines(text, page)
        return files

    first, second = content(before), content(after)
    different = {
        n for n in first.keys() | second.keys() if first.get(n) != second.get(n)
    }
    may_differ = re.compile(r"\.buildinfo|searchindex\.js|_images/.*3_cost_.*png")
    return sorted(name for name in different if not may_differ.fullmatch(name))


def test_what_a_second_build_costs(copied, built):
    """Nothing changed: no page runs. One page edited: that page runs."""

    def ratio(pages_run: int) -> str:
        start = time.monotonic()
        good_build(copied, pages_run)
        return f"{(time.monotonic() - start) / built.seconds:.3f}"

    pages.SUMMARY.append(f"unchanged build: {ratio(0)} of the time of a clean one")
    page = copied.page(PAGES[0])
    page.write_text(page.read_text() + "\n# The end.\n")
    pages.SUMMARY.append(f"one page edited: {ratio(1)} of the time of a clean one")


def test_size(built):
    """The whole site is under 12 MB."""
    size = sum(p.stat().st_size for p in built.html.rglob("*") if p.is_file())
    pages.SUMMARY.append(f"size of the site: {size / 1e6:.1f} MB")
    assert size < 12e6
