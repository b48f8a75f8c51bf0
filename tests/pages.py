"""Find the pages of the site and run them, each in a process of its own.

PyTorch, BackPACK and Matplotlib are imported once, here. A page then runs in a
*forked* process: it starts in milliseconds, and nothing that it does can reach the
next one. One thread a process, since a pool of threads does not survive a fork.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

# A forked process can't use CUDA. The pages that run as plain scripts can.
ENVIRONMENT = {**os.environ, "MPLBACKEND": "agg"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""
matplotlib.use("agg")

import backpack.hessianfree.ggnvp  # noqa: E402, F401
import einops  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("examples/**/[0-9]*.py"))

# The one warning that a page may give without the build turning it into an error.
HARMLESS = "Full backward hook is firing"

torch.set_num_threads(1)
# The first use of these imports hundreds of modules: do it before any fork.
torch.testing.assert_close(torch.ones(1), torch.ones(1))
torch.func.vmap(torch.func.grad(torch.sin))(torch.ones(1))
einops.einsum(torch.ones(1), "n -> ")


def name_of(page: Path) -> str:
    """Return a page's short name: ``1_scale_module/2_individual_gradients``."""
    return str(page.relative_to(ROOT / "examples").with_suffix(""))


# Lines that are printed when all tests are done.
SUMMARY: list[str] = []


def progress(text: str) -> None:
    """Show a line at once; conftest.py lets it reach the terminal."""
    print(text)


def execute(source: str, path: Path | str) -> dict[str, Any]:
    """Run a page's source as ``python path`` would and return its variables.

    Warnings are errors, as in the build, and figures are not shown.
    """
    plt.show = lambda *args, **kwargs: plt.close("all")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", HARMLESS, UserWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
    main = types.ModuleType("__main__")
    main.__file__ = str(path)
    sys.modules["__main__"] = main
    exec(compile(source, str(path), "exec"), main.__dict__)
    return main.__dict__


@dataclass
class Outcome:
    """How a forked process ended."""

    code: int  # exit code; negative: the signal that ended it
    output: str  # what it printed, the traceback included
    value: Any  # what the function returned, through JSON

    def __str__(self) -> str:
        """Show the end of the output: the error."""
        if self.code == -signal.SIGALRM:
            return "took too long"
        return f"exit code {self.code}:\n" + self.output[-2500:]


def run_forked(function: Callable[[], Any], limit: float = 120) -> Outcome:
    """Call ``function`` in a forked process that starts in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        output, value = Path(folder, "output"), Path(folder, "value")
        Path(folder, "empty").mkdir()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            finish(lambda: value.write_text(json.dumps(function())), output, limit)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text = output.read_text(errors="replace")
        result = json.loads(value.read_text()) if value.exists() else None
        return Outcome(code, text, result)


def finish(function: Callable[[], Any], output: Path, limit: float) -> None:
    """Call ``function`` in this forked process, print to a file, and end."""
    code = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)  # SIGALRM ends the process
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        os.chdir(output.parent / "empty")
        function()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
