"""Find the pages of the site and run them, each in a process of its own.

PyTorch, BackPACK and Matplotlib are imported once, here. A page then runs in a
*forked* process: it starts in milliseconds, and nothing that it does can reach the
next one. One thread a process, since a pool of threads does not survive a fork.
"""

import builtins
import contextlib
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

# A forked process can't use CUDA. The pages that run as plain scripts can. One thread
# each: several run at the same time, and threads that wait for a core cost the most.
ENVIRONMENT = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""
matplotlib.use("agg")

import backpack.hessianfree.ggnvp  # noqa: E402, F401
import einops  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("examples/**/[0-9]*.py"))

# The build turns every warning into an error, apart from these; see conf.py. Here they
# are in the form of Python's option -W, the last one first in force.
WARNINGS = (
    "error",
    "ignore:Full backward hook is firing:UserWarning",
    "ignore::DeprecationWarning",
    "error::DeprecationWarning:__main__",
    "ignore::FutureWarning",
    "error::FutureWarning:__main__",
)

torch.set_num_threads(1)
# The first use of these imports hundreds of modules, as torch._dynamo does, which
# optimizers and torch.func import when they are used: do it before any fork.
torch.testing.assert_close(torch.ones(1), torch.ones(1))
torch.func.vmap(torch.func.grad(torch.sin))(torch.ones(1))
einops.einsum(torch.ones(1), "n -> ")
# All of this stays: the garbage collector of a forked process need not look at it. To
# look at it would copy the memory that it lies in.
gc.freeze()


def name_of(page: Path) -> str:
    """Return a page's short name: ``1_scale_module/2_individual_gradients``."""
    return str(page.relative_to(ROOT / "examples").with_suffix(""))


SUMMARY: list[str] = []  # lines to print when all tests are done
TERMINAL: list[Callable[[str], None]] = [print]  # conftest.py adds the real one
ONE_AT_A_TIME = threading.Lock()


def progress(text: str) -> None:
    """Show a line at once, past what pytest captures."""
    TERMINAL[-1](text)


def two_at_a_time(function: Callable[[Any], Any], items: list) -> list:
    """Return ``[function(item) for item in items]``, computed by two threads."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def execute(source: str, path: Path | str) -> dict[str, Any]:
    """Run a page's source as ``python path`` would and return its variables.

    Warnings are errors, as in the build, and figures are not shown.
    """
    prepare()
    main = types.ModuleType("__main__")
    main.__file__ = str(path)
    sys.modules["__main__"] = main
    exec(compile(source, str(path), "exec"), main.__dict__)
    return main.__dict__


def prepare() -> None:
    """Turn warnings into errors, and let ``plt.show()`` show nothing."""
    plt.show = lambda *args, **kwargs: plt.close("all")
    for option in WARNINGS:
        action, message, category, module = [*option.split(":"), "", "", ""][:4]
        kind = getattr(builtins, category or "Warning")
        warnings.filterwarnings(action, message, kind, module)


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


class Forked:
    """A function that runs in a forked process, which starts in an empty folder."""

    def __init__(self, function: Callable[[], Any], limit: float = 120):
        """Start; after ``limit`` seconds the process ends with SIGALRM."""
        self.folder = tempfile.TemporaryDirectory()
        self.output = Path(self.folder.name, "output")
        self.value = Path(self.folder.name, "value")
        Path(self.folder.name, "empty").mkdir()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            work = lambda: self.value.write_text(json.dumps(function()))  # noqa: E731
            finish(work, self.output, limit)

    def outcome(self, flags: int = 0) -> Outcome | None:
        """Wait for the end, or with ``os.WNOHANG`` return None before the end."""
        pid, status = os.waitpid(self.pid, flags)
        if pid == 0:
            return None
        with self.folder:
            text = self.output.read_text(errors="replace")
            value = json.loads(self.value.read_text()) if self.value.exists() else None
        return Outcome(os.waitstatus_to_exitcode(status), text, value)


def run_forked(function: Callable[[], Any], limit: float = 120) -> Outcome:
    """Call ``function`` in a forked process and wait for it."""
    return Forked(function, limit).outcome()


def run_all_forked(functions: list[Callable[[], Any]], limit: float) -> list[Outcome]:
    """Call each function in a forked process of its own, two at the same time."""
    outcomes: list[Outcome | None] = [None] * len(functions)
    todo, running = list(enumerate(functions)), {}
    while todo or running:
        while todo and len(running) < 2:
            number, function = todo.pop(0)
            running[number] = Forked(function, limit)
        for number, process in list(running.items()):
            if outcome := process.outcome(os.WNOHANG):
                outcomes[number] = outcome
                del running[number]
        time.sleep(0.005)
    return outcomes


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
        code = (
            error.code if isinstance(error.code, int) else int(error.code is not None)
        )
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
