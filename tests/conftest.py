"""What all tests share: progress lines, the summary, and one build of the site."""

import pages
import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let ``pages.progress`` write to the terminal, past what pytest captures."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    pages.progress = reporter.write_line


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests collected for the end."""
    if pages.SUMMARY:
        terminalreporter.section("summary")
    for line in pages.SUMMARY:
        terminalreporter.write_line(line)
