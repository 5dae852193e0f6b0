"""Counts, over all tests and workers, the token differences that a tiny margin excused."""

from collections.abc import Callable, Iterator

import pytest
from models import Excuses


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
