"""Counts, over all tests and workers, the token differences that a tiny margin excused."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from models import Excuses


def pytest_configure() -> None:
    """Ctrl-C works in the background too, where shells make tests ignore it; kernels run without a GPU."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Read where triton is first imported, so it is set before any test module is: without a GPU the
    # tests of the kernels run in triton's interpreter.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


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
