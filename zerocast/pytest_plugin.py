"""pytest plugin: the fixture ``zerocast_gate`` holds functions of the user's own against a baseline file (``docs/check.md``).

Loaded with every pytest that has Zerocast installed, so it imports nothing heavy before a test asks for the fixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from zerocast.function_gate import FunctionGate

RUNS = 5
_WRITTEN: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zerocast", "performance gate")
    group.addoption(
        "--zerocast-update",
        action="store_true",
        help="Measure what tests with zerocast_gate measure, and write it into their baselines.",
    )
    group.addoption("--zerocast-strict", action="store_true", help="Fail, not skip, when zerocast_gate cannot decide.")
    group.addoption("--zerocast-runs", type=int, default=RUNS, metavar="N", help=f"Runs (processes) of each function; default {RUNS}.")  # fmt: skip


@pytest.fixture
def zerocast_gate(request: pytest.FixtureRequest) -> FunctionGate:
    """``zerocast_gate("name", step, baseline="perf.json")`` fails when ``step()`` became slower or needs more memory."""
    from zerocast.function_gate import FunctionGate

    return FunctionGate(request, request.config.stash.setdefault(_WRITTEN, []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_WRITTEN, []):
        terminalreporter.write_line(line)
