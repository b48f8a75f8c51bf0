"""Copies of the repository in which the tests can build, break and repair the site."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pages import ENVIRONMENT, PAGES, ROOT

# A build that reaches for the network or for the home folder shall fail. If the machine
# allows it, the build runs where there is no network; in any case its requests go to a
# port where no one listens. Its home is not even a folder.
WITHOUT_NETWORK = ["unshare", "--map-root-user", "--net"]
if not shutil.which("unshare") or subprocess.call([*WITHOUT_NETWORK, "true"]):
    WITHOUT_NETWORK = []
NO_WHERE = "http://127.0.0.1:9"
ISOLATED = {
    **ENVIRONMENT,
    "HOME": os.devnull,
    "HTTP_PROXY": NO_WHERE,
    "HTTPS_PROXY": NO_WHERE,
    "http_proxy": NO_WHERE,
    "https_proxy": NO_WHERE,
    "PIP_NO_INDEX": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
for variable in ("MAKEFLAGS", "MFLAGS", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
    ISOLATED.pop(variable, None)
ISOLATED.pop("GITHUB_REPOSITORY", None)  # see conf.py

# Stands in for Python where the Makefile makes the environment: it is there already.
PYTHON = """#!/bin/sh
case "$*" in *venv*) exit 0;; esac
exec {python} "$@"
"""

STUB = '''"""
{title}
{line}

A stub with the name and the title of a page.
"""

import matplotlib.pyplot as plt
import torch

torch.testing.assert_close(torch.ones(2).sum(), torch.tensor(2.0))
print("the stub ran")

# %%
# A section
# ---------
# A sentence.

fig, ax = plt.subplots(figsize=(2, 1))
ax.plot([0, 1], color="C0")
ax.set_title("A line")
plt.show()
'''


class Repository:
    """A copy of the repository, with an environment that needs no installation."""

    def __init__(self, folder: Path):
        """Copy what git tracks or would track, unless the copy is there."""
        self.folder = folder
        if (folder / ".venv").exists():
            return
        command = ["git", "ls-files", "-z", "-c", "-o", "--exclude-standard"]
        files = subprocess.check_output(command, cwd=ROOT, text=True)
        for name in filter(None, files.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((ROOT / name).read_bytes())
        venv = folder / ".venv"
        venv.mkdir()
        for entry in Path(sys.prefix).iterdir():
            if entry.suffix != ".txt":
                (venv / entry.name).symlink_to(entry)
        (venv / "requirements.txt").write_bytes(self["requirements.txt"].read_bytes())
        (venv / "tests.txt").write_bytes(self["tests/requirements.txt"].read_bytes())
        self["python"].write_text(PYTHON.format(python=sys.executable))
        self["python"].chmod(0o755)

    def __getitem__(self, name: str) -> Path:
        """Return the path of a file or folder."""
        return self.folder / name

    @property
    def html(self) -> Path:
        """Return the folder of the built site."""
        return self["docs/_build/html"]

    def page(self, page: Path) -> Path:
        """Return the copy of a page."""
        return self.folder / page.relative_to(ROOT)

    def command(self, *arguments: str) -> list[str]:
        """Return the command for a target of the Makefile."""
        return [*WITHOUT_NETWORK, "make", f"PYTHON={self['python']}", *arguments]

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Run a target; output and errors come back together as ``stdout``."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env={**ISOLATED, **variables},
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def replace_pages_by_stubs(self) -> None:
        """Keep the names and titles of all pages, so that builds take seconds."""
        for page in PAGES:
            title = title_of(page.read_text())
            self.page(page).write_text(STUB.format(title=title, line="=" * len(title)))


def title_of(source: str) -> str:
    """Return the title of a page: the first line of its docstring."""
    return ast.get_docstring(ast.parse(source)).splitlines()[0]
