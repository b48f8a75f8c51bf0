"""The built site in a real browser: every page, wide and narrow, light and dark.

Chromium must be installed; its path may be given in the variable ``CHROMIUM``.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import pytest
from axe_playwright_python.base import AXE_FILE_PATH
from pages import PAGES, name_of, progress
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

READING_ORDER = [f"gallery/{name_of(page)}.html" for page in PAGES]


def find_chromium() -> str:
    """Return the path of Chromium; install it as root on Debian if there is none."""
    names = ["chromium", "chromium-browser", "google-chrome", "chrome"]
    found = filter(None, [os.environ.get("CHROMIUM"), *map(shutil.which, names)])
    if path := next(found, None):
        return path
    if os.getuid() == 0 and shutil.which("apt-get"):
        progress("No Chromium found: installing it with apt-get.")
        subprocess.run(["apt-get", "update", "-q"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-q", "chromium"], check=True)
        return shutil.which("chromium")
    progress("No Chromium found: installing it with Playwright.")
    subprocess.run(["playwright", "install", "--with-deps", "chromium"], check=True)
    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Start the browser once."""
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Serve the built site on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Page]:
    """Open a tab that starts at the home page."""
    context = chromium.new_context(base_url=address, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto("index.html")
    yield page
    context.close()


def listen(context: BrowserContext, home: str) -> tuple[Page, list[str]]:
    """Open a tab and note each error, warning and request to another host."""
    problems: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on(
        "console",
        lambda message: (
            message.type in ["error", "warning"]
            and problems.append(f"console: {message.text}")
        ),
    )
    page.on(
        "request",
        lambda request: (
            request.url.startswith((home, "data:"))
            or problems.append(f"request to another host: {request.url}")
        ),
    )
    page.on(
        "response",
        lambda answer: (
            answer.status < 400 or problems.append(f"{answer.status}: {answer.url}")
        ),
    )
    return page, problems


def html_files(site: Path) -> list[str]:
    """Return the pages of the site, the theme's own templates left out."""
    paths = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    return [path for path in paths if not path.startswith("_static/")]


def wait_for_math(page: Page) -> None:
    """Wait until MathJax, if the page loads it, has rendered everything."""
    page.wait_for_load_state("load")
    page.evaluate("() => window.MathJax?.startup?.promise")


# Runs in the page. A formula is rendered if MathJax put its output into the element.
LOOK = r"""(width) => {
    const all = (selector) => [...document.querySelectorAll(selector)];
    const problems = [];
    for (const math of all("span.math, div.math"))
        if (!math.querySelector("mjx-container") || math.querySelector("mjx-merror"))
            problems.push("math not rendered: " + math.textContent.trim());
    for (const image of all("main img"))
        if (image.alt.trim().length < 8)
            problems.push(`no useful alt text: ${image.src}: "${image.alt}"`);
    if (document.documentElement.scrollWidth > width)
        problems.push(`scrolls sideways: ${document.documentElement.scrollWidth} px`);
    for (const block of all("main :is(p, li, img, h1, h2, h3):not(td *, th *)"))
        if (block.getBoundingClientRect().right > width)
            problems.push("wider than the screen: " + block.outerHTML.slice(0, 60));
    if (width >= 1280)
        for (const code of all("div.highlight-Python pre, div.highlight-default pre"))
            if (code.scrollWidth > code.clientWidth)
                problems.push("code cut off: " + code.textContent.slice(0, 60));
    return problems;
}"""
AXE = """async (rules) => {
    const options = {resultTypes: ["violations"], preload: false};
    const {violations} = await axe.run(rules ? {...options, runOnly: rules} : options);
    return violations.map(
        v => `${v.help}: ${v.nodes.map(n => n.html).join(" | ")}`);
}"""
COLORS = ["color-contrast", "link-in-text-block"]
# Code and formulas have thousands of elements that look the same on all pages.
WITHOUT_CODE_AND_MATH = """() => {
    for (const code of document.querySelectorAll("div.highlight pre"))
        code.textContent = code.textContent;
    for (const math of document.querySelectorAll("mjx-container"))
        math.replaceChildren();
}"""


def show(page: Page, width: int, scheme: str) -> None:
    """Give the page a width, and let it be light or dark."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(400)  # the theme reacts after 300 ms
    assert page.evaluate("document.documentElement.dataset.theme") == scheme


def examine(page: Page, strip: bool) -> list[str]:
    """Return what is wrong with a page in light and in dark, wide and narrow.

    Whether the keyboard can scroll wide code and formulas is examined with all of them.
    With ``strip``, all other rules see them without what they consist of. In the dark,
    the rules about colors are examined: no other rule depends on them.
    """
    found = []
    page.add_script_tag(path=AXE_FILE_PATH)
    for width in [1280, 390]:
        show(page, width, "light")
        problems = page.evaluate(LOOK, width)
        problems += page.evaluate(AXE, ["scrollable-region-focusable"])
        found += [f"{width} px: {problem}" for problem in problems]
    if strip:
        page.evaluate(WITHOUT_CODE_AND_MATH)
    for width, scheme in [
        (390, "light"),
        (390, "dark"),
        (1280, "dark"),
        (1280, "light"),
    ]:
        show(page, width, scheme)
        problems = page.evaluate(AXE, COLORS if scheme == "dark" else None)
        found += [f"{width} px, {scheme}: {problem}" for problem in problems]
    return found


def test_every_page_looks_right(chromium, address, site):
    """Math, console, hosts, alt texts, width and accessibility on all pages."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page, noted = listen(context, address)
    found = []
    for path in html_files(site):
        page.goto(address + path)
        wait_for_math(page)
        problems = examine(page, strip=path != READING_ORDER[1])
        found += [f"{path}: {problem}" for problem in noted + problems]
        noted.clear()
        progress(f"{path}: {len(found)} problems so far")
    context.close()
    assert not found, "\n".join(found)


def test_what_looks_wrong_is_noticed(page):
    """Gray on gray in one scheme, an image without a text, a line that is too wide."""
    page.goto(READING_ORDER[0])
    wait_for_math(page)
    page.add_style_tag(
        content="main p { min-width: 500px; }"
        "html[data-theme=dark] main p { color: #444; }"
        "html[data-theme=light] main h2 { color: #bbb; }"
    )
    page.eval_on_selector("main img", "image => image.alt = ''")
    found = "\n".join(examine(page, strip=True))
    for view, fault in [
        ("390 px", "wider than the screen: <p"),
        ("1280 px", "no useful alt text"),
        ("390 px, dark", "minimum color contrast .*<p"),
        ("1280 px, dark", "minimum color contrast .*<p"),
        ("390 px, light", "minimum color contrast .*<h2"),
        ("1280 px, light", "minimum color contrast .*<h2"),
    ]:
        assert re.search(f"{view}: .*{fault}", found), f"{view}: {fault}\n{found}"


def leave_out_math(page: Page) -> None:
    """Let a page load no MathJax: a test that visits many does not look at formulas."""
    page.route("**/mathjax/**", lambda route: route.abort())


def test_links(page, address, site):
    """Every page can be reached from home; every link and anchor leads somewhere."""
    leave_out_math(page)
    to_visit, anchors, links = ["index.html"], {}, {}
    while to_visit:
        name = to_visit.pop()
        page.goto(name)
        anchors[name] = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
        hrefs = page.eval_on_selector_all(
            "a[href]", "all => all.map(e => e.getAttribute('href'))"
        )
        links[name] = {urldefrag(urljoin(address + name, href)) for href in hrefs}
        for url, _ in links[name]:
            target = url.removeprefix(address)
            known = target in anchors or target in to_visit
            if url.startswith(address) and url.endswith(".html") and not known:
                if (site / target).exists():
                    to_visit.append(target)
    broken = []
    for name, targets in links.items():
        for url, anchor in targets:
            target = url.removeprefix(address) or "index.html"
            if not url.startswith(address):
                continue
            if not (site / target).exists():
                broken.append(f"{name}: no file {target}")
            elif anchor and target in anchors and anchor not in anchors[target]:
                broken.append(f"{name}: no anchor {target}#{anchor}")
    assert not broken, "\n".join(broken)
    assert set(html_files(site)) - {"search.html"} == set(anchors)


def test_next_walks_through_all_pages_in_reading_order(page, address):
    """Follow "Next" from home to the end, then "Previous" back to home."""
    leave_out_math(page)
    expected = [*READING_ORDER, *reversed(READING_ORDER)]
    walked = []
    for button in ["a.right-next", "a.left-prev"]:
        while page.locator(button).count():
            with page.expect_navigation():
                page.locator(button).click()
            walked.append(page.url.removeprefix(address))
    assert [name for name in walked if name in READING_ORDER] == expected
    assert walked[-1] == "index.html"


@pytest.mark.parametrize(
    ("words", "target"),
    [
        ("GGN", "1_scale_module/3_ggn_derivation.html"),
        ("subsampling", "1_scale_module/2_individual_gradients.html"),
        (
            "BackPACK extension expects a backpropagation quantity but it is None",
            "2_any_layer/5_contract_and_traps.html",
        ),
    ],
)
def test_search(page, words, target):
    """The search finds the page that a reader with these words wants."""
    page.goto(f"search.html?q={words}")
    page.wait_for_selector("ul.search li a")
    results = page.eval_on_selector_all("ul.search li a", "all => all.map(a => a.href)")
    assert any(target in result for result in results[:5]), results


def test_copy_button(page):
    """What lands in the clipboard is the code, and only the code."""
    page.goto(READING_ORDER[1])
    block = page.locator("div.highlight").nth(1)
    block.hover()
    block.locator("button.copybtn").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == block.locator("pre").inner_text().strip()
    compile(copied, "copied", "exec")


@pytest.mark.parametrize("ending", [".py", ".ipynb", ".zip"])
def test_downloads(page, tmp_path, ending):
    """The links on a page deliver its files."""
    page.goto(READING_ORDER[0])
    with page.expect_download() as download:
        page.locator(f"article a.reference.download[href$='{ending}']").first.click()
    assert download.value.suggested_filename == f"1_module{ending}"
    download.value.save_as(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size > 1000


def test_from_disk(chromium, site):
    """The folder works by double click, without a server."""
    context = chromium.new_context()
    page, problems = listen(context, site.as_uri())
    page.goto((site / READING_ORDER[2]).as_uri())
    wait_for_math(page)
    problems += page.evaluate(LOOK, 1280)
    assert not problems
    # The search works, too; only the summaries of what it finds need a server.
    page.goto((site / "search.html").as_uri() + "?q=GGN")
    page.wait_for_selector("ul.search li a")
    context.close()


def test_printed_page_is_complete(chromium, address, tmp_path):
    """The PDF of a page holds all code lines to their ends."""
    from pypdf import PdfReader

    page = chromium.new_page()
    page.goto(address + READING_ORDER[3])
    wait_for_math(page)
    code = page.eval_on_selector_all(
        "div.highlight-Python pre", "all => all.map(e => e.textContent)"
    )
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    page.close()
    sheets = [sheet.extract_text() for sheet in PdfReader(tmp_path / "page.pdf").pages]
    printed = re.sub(r"\s", "", "".join(sheets))
    lines = {line for block in code for line in block.splitlines() if len(line) > 40}
    missing = [line for line in lines if re.sub(r"\s", "", line) not in printed]
    assert not missing
