"""Fixtures for all tests."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ALONE = {
    "runtime/test_generic.py": "starts processes; once failed beside other tests",
    "dashboard/test_browser.py": "a browser and a server",
    "estimator/test_catalog.py": "a bound in seconds",
    "runtime/test_faults.py": "groups of processes that must end in time",
    "runtime/test_parts.py": "times held against each other",
    "test_architecture.py": "start-up held against that of bare Python",
    "validator/test_calibrate.py": "a calibration",
    "validator/test_calibrate_rounds.py": "a budget in seconds",
    "validator/test_calibrate_tasks.py": "times held against each other",
    "validator/test_campaign.py": "a budget in seconds",
    "validator/test_gate_real.py": "times held against each other",
    "validator/test_nodes.py": "a port, and torchrun twice",
    "validator/test_ranking.py": "times held against a forecast",
    "validator/test_runner.py": "groups of processes with time limits",
    "validator/test_timing.py": "times held against each other",
    "validator/test_yardstick.py": "times held against each other",
    "zerocast/test_cli.py": "a server, and signals in time",
    "zerocast/test_pytest_plugin.py": "start-up in milliseconds",
}
"""Test files that other tests at the same time would disturb, and why: what they need is the machine to themselves."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """A shell has what it starts in the background ignore interrupts, and so would the commands that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of ``ALONE``: ``make test`` runs the others two at a time, and then these."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.path.relative_to(here).as_posix() in ALONE:
            item.add_marker("alone")


class Ran(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store and profiles of the test's own: no test reads or writes the user's."""
    folder = tmp_path_factory.mktemp("zerocast-home")
    monkeypatch.setenv("ZEROCAST_HOME", str(folder))
    return folder


@pytest.fixture
def zerocast(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command line in this process: ``zerocast("predict", "--json").out``."""
    from zerocast.cli import main
    from zerocast.show import console

    def run(*args: str) -> Ran:
        console.cache_clear()
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        code = ended.value.code
        return Ran(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return run
