"""Counts, over all tests and workers, the token differences that a tiny margin excused."""

import signal
from collections.abc import Callable, Iterator

import pytest
from models import Excuses


def pytest_configure() -> None:
    """Ctrl-C works in the tests also where they run in the background, which makes shells ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def excuses(record_property: Callable[[str, object], None]) -> Iterator[Excuses]:
    """Compares tokens; the terminal summary says how many were compared and excused."""
    counts = Excuses()
    yield counts
    record_property("tokens", (counts.compared, counts.excused))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "tokens" and report.when == "teardown"
    ]
    if counts:
        compared, excused = (sum(column) for column in zip(*counts, strict=True))
        terminalreporter.write_line(
            f"tokens compared with plain AR: {compared}, "
            f"differences excused by a top-two margin under 1e-4: {excused}"
        )
