"""Collects what every endpoint served after its fault, and shows it at the end of the run."""

from collections.abc import Callable

import pytest

Row = tuple[str, str, str, str, str]
HEADINGS: Row = ("fault", "reported", "the victim serves", "the other serves", "both after the next sync")
ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    return request.config.stash.setdefault(ROWS, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("faults during a sync from weights 1 to weights 2")
    widths = [max(len(row[column]) for row in [HEADINGS, *rows]) for column in range(len(HEADINGS))]
    for row in [HEADINGS, *rows]:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
