"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


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
