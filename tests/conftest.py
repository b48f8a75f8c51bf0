"""What all tests share: progress lines, the summary, and one build of the site.

``make test`` runs them in two processes, the *workers* of pytest-xdist. A third one
starts the workers and reports.
"""

import os
import time
from pathlib import Path

import pages
import pytest
from filelock import FileLock
from repository import Repository

START = time.monotonic()


def pytest_configure(config: pytest.Config) -> None:
    """Let ``pages.progress`` write to the terminal, past what pytest captures."""
    capture = config.pluginmanager.get_plugin("capturemanager")

    def show(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - START), 60)
        with pages.ONE_AT_A_TIME, capture.global_and_fixture_disabled():
            os.write(2, f"\n{minutes:4}:{seconds:02}  {text}".encode())

    pages.TERMINAL.append(show)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send what the tests of a worker collected for the end."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["summary"] = pages.SUMMARY


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Take it."""
    pages.SUMMARY.extend(getattr(node, "workeroutput", {}).get("summary", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests collected for the end."""
    if pages.SUMMARY:
        terminalreporter.section("summary")
    for line in pages.SUMMARY:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Build the whole site once, in a copy of the repository.

    The workers share it: no test changes it.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    seconds = folder / "seconds"  # written when all is done
    with FileLock(folder / "lock"):
        repository = Repository(folder / "built")
        if not seconds.exists():
            pages.progress("building the site")
            start = time.monotonic()
            build = repository.make("html")
            assert build.returncode == 0, build.stdout
            seconds.write_text(str(time.monotonic() - start))
    repository.seconds = float(seconds.read_text())
    return repository


@pytest.fixture(scope="session")
def site(built: Repository) -> Path:
    """Return the folder of the built site."""
    return built.html
