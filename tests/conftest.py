"""What all tests share: progress lines, the summary, and one build of the site."""

import threading
import time
from pathlib import Path

import pages
import pytest
from repository import Repository


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let ``pages.progress`` write to the terminal, past what pytest captures."""
    plugins = session.config.pluginmanager
    reporter = plugins.get_plugin("terminalreporter")
    capture = plugins.get_plugin("capturemanager")
    start, one_at_a_time = time.monotonic(), threading.Lock()

    def show(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        with one_at_a_time, capture.global_and_fixture_disabled():
            reporter.write_line(f"{minutes:4}:{seconds:02}  {text}")

    pages.TERMINAL.append(show)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests collected for the end."""
    if pages.SUMMARY:
        terminalreporter.section("summary")
    for line in pages.SUMMARY:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Build the whole site once, in a copy of the repository."""
    repository = Repository(tmp_path_factory.mktemp("built"))
    pages.progress("building the site")
    start = time.monotonic()
    repository.build = repository.make("html")
    repository.seconds = time.monotonic() - start
    assert repository.build.returncode == 0, repository.build.stdout
    return repository


@pytest.fixture(scope="session")
def site(built: Repository) -> Path:
    """Return the folder of the built site."""
    return built.html
