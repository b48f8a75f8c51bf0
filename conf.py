"""Sphinx configuration; the Makefile says how it is called."""

import contextlib
import json
import os
import re
import sys
import warnings
from importlib import metadata, util
from pathlib import Path
from urllib.parse import urljoin
from zipfile import ZIP_DEFLATED, ZipFile

from docutils import nodes
from PIL import Image
from sphinx.addnodes import download_reference
from sphinx.errors import ConfigError
from sphinx.ext.intersphinx import InventoryAdapter

ROOT = Path(__file__).parent
GALLERY = ROOT / "docs" / "gallery"
# Sphinx-Gallery gets `prepare_page`, below, by its name "conf.prepare_page": with the
# function itself in the configuration, Sphinx could not cache what it has read.
sys.path.insert(0, str(ROOT))

project = "Custom layers in BackPACK"
author = "the authors of this tutorial"
language = "en"
smartquotes = False  # messages are quoted as they are raised
exclude_patterns = ["_build", "gallery/index.rst"]  # docs/index.rst includes it
extensions = [
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxext.opengraph",
]

# -- The pages, run by Sphinx-Gallery ---------------------------------------------

PINS = re.findall(
    r"^(?:torch|backpack|einops|matplotlib).*",
    (ROOT / "requirements.txt").read_text(),
    flags=re.MULTILINE,
)
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"[\\/]\d+_\w+\.py$",
    "within_subsection_order": "FileNameSortKey",
    "reset_modules": ("matplotlib", "conf.prepare_page"),
    "reset_modules_order": "both",
    "image_srcset": ["2x"],
    # Commented out: whoever runs a notebook decides what is installed where.
    "first_notebook_cell": "# If these are missing (on Colab, say), run this cell "
    f"without the first # of the next line.\n# %pip install {' '.join(PINS)}",
    "capture_repr": (),  # a page shows what it prints, as the script does
    "remove_config_comments": True,  # such as the choice of the thumbnail
    "inspect_global_variables": False,  # link what is imported, not every variable
    "write_computation_times": False,  # its page loads scripts from other hosts
    "show_signature": False,
}

# Sphinx-Gallery skips a page if its .md5 fits its text. That must not happen to a page
# that failed or was killed, even if its text is what it was before. So a page has no
# .md5 while it runs, and as Sphinx-Gallery writes that file a moment before the others,
# a page that is still named in `running` loses it again.
RUNNING = GALLERY / "running"
if RUNNING.exists():
    for md5 in GALLERY.glob(f"*/{RUNNING.read_text()}.md5"):
        md5.unlink()
page_filters = contextlib.ExitStack()


def prepare_page(gallery_conf, fname, when):
    """Give every page the same start. Called before and after it runs."""
    import matplotlib.pyplot as plt

    if when == "after":
        for path in GALLERY.glob(f"*/images/*_{Path(fname).stem}_*.png"):
            image = Image.open(path).convert("RGB")  # half the size with 256 colors
            image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        page_filters.close()
        RUNNING.unlink()
        return
    RUNNING.write_text(fname)
    for md5 in GALLERY.glob(f"*/{fname}.md5"):
        md5.unlink()
    # A page that warns fails: a reader could not tell whether the warning matters. One
    # is harmless and let through: torch raises it when the input of the first layer
    # needs no gradient, and BackPACK does not need that gradient either.
    page_filters.enter_context(warnings.catch_warnings(action="error"))
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    # As Python does: a deprecation matters here only if the page's own code causes it.
    for kind in [DeprecationWarning, FutureWarning]:
        warnings.filterwarnings("ignore", category=kind)
        warnings.filterwarnings("error", category=kind, module="__main__")
    plt.style.use("petroff10")  # colors that color-blind readers can tell apart
    plt.rcParams.update(
        {
            "figure.dpi": 90,  # and twice that for sharp screens: see image_srcset
            "font.size": 11,
            "axes.titlesize": "medium",
            "figure.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


# -- Links to the documentation of torch, BackPACK, ... ---------------------------

# The names that the pages use, in Sphinx's plain-text format: name, kind, page. They
# lie here so that no build depends on another site; `make linkcheck` visits each.
intersphinx_mapping = {
    "backpack": ("https://docs.backpack.pt/en/master", "inventories/backpack.txt"),
    "python": ("https://docs.python.org/3", "inventories/python.txt"),
    "matplotlib": ("https://matplotlib.org/stable", "inventories/matplotlib.txt"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.txt"),
}
linkcheck_ignore = [r"(?!https?://)"]  # between pages: the tests follow those
linkcheck_retries = 3


def visit_inventories(app):
    """Let the link check visit every address that the inventories hold."""
    if app.builder.name == "linkcheck":
        kinds = InventoryAdapter(app.env).main_inventory.values()
        links = [f"`<{item.uri}>`__" for kind in kinds for item in kind.values()]
        app.config.rst_epilog = "\n\n".join(["", *links]).replace("_>", r"\_>")


# -- HTML -------------------------------------------------------------------------

# MathJax from a package, so that the site serves it itself; only what pages load.
MATHJAX = Path(util.find_spec("sphinx-mathjax-offline").origin).parent / "static"
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}
exclude_patterns += [
    "mathjax/[!to]*",
    "mathjax/tex-[!c]*",
    "mathjax/tex-chtml-*",
    "mathjax/output/*.js",
    "mathjax/output/svg",
]

# The one value that says where this is published: "owner/name" of a repository whose
# branch gh-pages holds the site. GitHub's workflows set it. Without it, there are no
# buttons that open Colab, and the addresses in previews and sitemap are relative.
REPOSITORY = os.environ.get("GITHUB_REPOSITORY", "")
if REPOSITORY and not re.fullmatch(r"[\w.-]+/[\w.-]+", REPOSITORY):
    raise ConfigError(f"GITHUB_REPOSITORY is {REPOSITORY!r}, but must be owner/name.")
html_baseurl = REPOSITORY and "https://{}.github.io/{}/".format(*REPOSITORY.split("/"))
ogp_site_url = html_baseurl
ogp_custom_meta_tags = ['<meta name="twitter:card" content="summary_large_image" />']

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["docs/_static", str(MATHJAX)]
html_css_files = ["custom.css"]
html_js_files = ["wide-math.js"]
html_favicon = "docs/_static/favicon.svg"
templates_path = ["docs/_templates"]
html_copy_source = False
html_use_index = False
html_sidebars = {"**": ["reading-order"]}
html_theme_options = {
    "navbar_center": [],  # the sidebar shows all parts
    "navbar_persistent": ["search-button"],
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc", "sg_download_links"],
    "article_header_end": ["where"],
    "article_footer_items": ["run-with"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "back_to_top_button": False,
}
if REPOSITORY:
    html_theme_options["github_url"] = f"https://github.com/{REPOSITORY}"
html_context = {
    "default_mode": "auto",  # as the reader's system: light or dark
    "repository": REPOSITORY,
    "run_with": f"torch {metadata.version('torch')} and BackPACK "
    + metadata.version("backpack-for-pytorch"),
    "reading_order": [
        f"gallery/{page.parent.name}/{page.stem}"
        for page in sorted(ROOT.glob("examples/*/[0-9]*.py"))
    ],
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


FIGURE_OF = "A figure of the page: "


def describe_page(app, pagename, templatename, context, doctree):
    """Tell templates where the notebook is, and link previews which figure to show."""
    if not doctree:
        return
    figure, of = "3_ggn_derivation", "The GGN and its diagonal, derived"
    if pagename in html_context["reading_order"]:
        figure, of = pagename.split("/")[-1], context["title"]
        downloads = [n["filename"] for n in doctree.findall(download_reference)]
        [notebook] = [path for path in downloads if path.endswith(".ipynb")]
        context["notebook"] = f"_downloads/{notebook}"
    image = f"_images/sphx_glr_{figure}_001_2_00x.png"
    context["meta"] = {
        **(context["meta"] or {}),
        "og:image": html_baseurl + image
        if html_baseurl
        else context["pathto"](image, 1),
        "og:image:alt": FIGURE_OF + of,
    }


def link_notebook(text, stem):
    """Let the links of a notebook lead to the site or, if it has none, to notebooks."""
    [page] = [p for p in html_context["reading_order"] if p.endswith(f"/{stem}")]
    here = f"{html_baseurl}{page}.html"

    def lead(match):
        words, target = match.groups()
        if html_baseurl:
            return f"[{words}]({urljoin(here, target)})"
        if target.startswith("#"):  # Jupyter's programs don't agree on names of anchors
            return words
        return f"[{words}]({target.split('.html')[0]}.ipynb)"

    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            link = r"\[([^]]*)\]\(((?!\w+:)[\w./]+\.html(?:#[\w-]+)?|#[\w-]+)\)"
            cell["source"] = re.sub(link, lead, source).splitlines(keepends=True)
    return json.dumps(notebook, indent=2)


def finish_site(app, exception):
    """Link the notebooks, give all zips one date, drop what no page loads."""
    if exception or app.builder.name != "html":
        return
    for path in Path(app.outdir).glob("_downloads/*/*"):
        if path.suffix == ".ipynb":
            path.write_text(link_notebook(path.read_text(), path.stem))
        if path.suffix == ".zip":
            with ZipFile(path) as old:
                files = {info: old.read(info).decode() for info in old.infolist()}
            with ZipFile(path, "w") as new:
                for info in sorted(files, key=lambda info: info.filename):
                    info.date_time = (1980, 1, 1, 0, 0, 0)
                    info.compress_type = ZIP_DEFLATED
                    text, name = files[info], Path(info.filename)
                    is_notebook = name.suffix == ".ipynb"
                    new.writestr(
                        info, link_notebook(text, name.stem) if is_notebook else text
                    )
    for path in Path(app.outdir).glob("_static/*/*.map"):  # only debuggers ask for it
        path.unlink()
    urls = "".join(
        f"<url><loc>{html_baseurl}{app.builder.get_target_uri(name)}</loc></url>\n"
        for name in sorted(app.env.found_docs)
    )
    Path(app.outdir, "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns='
        f'"http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}</urlset>\n'
    )


def describe_thumbnails(app, doctree, docname):
    """Give each thumbnail the alt text that Sphinx-Gallery leaves empty."""
    for image in doctree.findall(nodes.image):
        if "/images/thumb/" in image["uri"]:
            title = image.next_node(nodes.reference, ascend=True).astext()
            image["alt"] = FIGURE_OF + title


def setup(app):
    app.connect("builder-inited", visit_inventories, priority=900)
    app.connect("html-page-context", describe_page, priority=400)
    app.connect("doctree-resolved", describe_thumbnails)
    app.connect("build-finished", finish_site)
