"""Puts real output into the README: the block after ``<!-- $ COMMAND -->`` becomes what COMMAND prints.

``python docs/refresh.py`` rewrites forecasts; with ``--measured`` also the blocks marked ``<!-- measured $ ... -->``, which
train on this machine. ``tests/test_readme.py`` fails when a forecast in the README is no longer what the command prints.
``docs/accuracy.md`` is written anew from the committed records and published runs; ``tests/test_accuracy.py`` fails when it is stale.
So is ``docs/estimators.md``, from published runs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
README = TREE / "README.md"
ACCURACY = "zerocast accuracy --write docs/accuracy.md"
BLOCK = re.compile(r"<!-- (?P<kind>measured )?\$ (?P<command>[^\n]+?) -->\n\n```\n(?P<output>.*?)```\n", re.DOTALL)


def output_of(command: str) -> str:
    """What ``command`` (a ``zerocast`` command line) prints, without trailing blanks and doubled blank lines."""
    arguments = shlex.split(command)
    assert arguments[0] == "zerocast", command
    env = {**os.environ, "PYTHONPATH": str(TREE)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=TREE,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    lines = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def blocks(text: str) -> list[re.Match[str]]:
    """The marked blocks in order."""
    return list(BLOCK.finditer(text))


def refreshed(text: str, measured: bool) -> str:
    """``text`` with new output; measured blocks only when ``measured``."""

    def renew(match: re.Match[str]) -> str:
        if match["kind"] and not measured:
            return match[0]
        command = match["command"]
        return f"<!-- {match['kind'] or ''}$ {command} -->\n\n```\n$ {command}\n{output_of(command)}```\n"

    return BLOCK.sub(renew, text)


if __name__ == "__main__":
    output_of(ACCURACY)
    beside = [sys.executable, "benchmarks/bench_estimators.py", "--write", "docs/estimators.md"]
    subprocess.run(beside, cwd=TREE, env={**os.environ, "PYTHONPATH": str(TREE)}, check=True)
    README.write_text(refreshed(README.read_text(encoding="utf-8"), "--measured" in sys.argv), encoding="utf-8")
