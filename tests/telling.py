"""What tests have to say at the end of a run: figures that are looked at, not asserted. Works across processes too."""

from collections.abc import Callable, Iterator

import pytest

Tell = Callable[[str, str], None]


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Return a function that takes a heading and a line to be shown below it."""

    def say(heading: str, line: str) -> None:
        request.node.user_properties.append(("told", (heading, line)))

    return say


class Told:
    """Collects what was told, in the process that reports."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            for heading, line in self._of(report):
                lines = self._lines.setdefault(heading, [])
                if line not in lines:
                    lines.append(line)

    @staticmethod
    def _of(report: pytest.TestReport) -> Iterator[tuple[str, str]]:
        for name, value in report.user_properties:
            if name == "told":
                heading, line = value  # type: ignore[misc]
                yield heading, line

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for heading, lines in self._lines.items():
            terminalreporter.section(heading)
            for line in lines:
                terminalreporter.write_line(line)
