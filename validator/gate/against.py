"""Measures two versions of this source tree in turn on one machine: what a shared machine's speed cannot fake.

The older version is unpacked into a temporary folder; every run is a process of its own that imports only its own tree. Pairs
go A B, B A, A B, ...: a machine that drifts hits both alike.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.report import StepReport
from validator.gate.baseline import BaselineCase
from validator.measure.runner import MeasureError
from validator.provenance import TREE, git_state
from validator.store.records import report_from_dict


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of the source tree."""

    tree: Path
    name: str
    """How the user calls it."""
    commit: str | None
    dirty: bool = False


@contextlib.contextmanager
def unpacked(revision: str, tree: Path = TREE) -> Iterator[Version]:
    """``revision`` of the git repository around ``tree`` in a folder that is gone afterwards; the checkout stays untouched.

    Raises ``InputError`` when ``tree`` is no git checkout, or does not know ``revision``.
    """
    commit = (
        _git(tree, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip().decode()
    )
    if not commit:
        raise InputError(
            f"--against is {revision!r}; allowed: a commit, branch or tag of the git checkout that Zerocast runs from ({tree})"
        )
    with tempfile.TemporaryDirectory(prefix="zerocast-against-", ignore_cleanup_errors=True) as folder:
        with zipfile.ZipFile(io.BytesIO(_git(tree, "archive", "--format=zip", commit))) as archive:
            archive.extractall(folder)
        if not Path(folder, "validator", "__main__.py").exists():
            raise InputError(
                f"--against is {revision!r}, which has no validator/__main__.py; allowed: a version of Zerocast"
            )
        yield Version(tree=Path(folder), name=revision, commit=commit)


def working_tree(tree: Path = TREE) -> Version:
    """The source tree as it is now, changes that are not committed included."""
    state = git_state(tree) or {}
    return Version(tree=tree, name="the working tree", commit=state.get("commit"), dirty=bool(state.get("dirty")))


def _git(tree: Path, *arguments: str) -> bytes:
    """Standard output of git; empty when it fails or is not there."""
    try:
        return subprocess.run(
            ["git", "-C", str(tree), *arguments], capture_output=True, stdin=subprocess.DEVNULL
        ).stdout
    except OSError:
        return b""


def measure_with(version: Version, case: BaselineCase) -> StepReport:
    """Runs ``case`` once with the code of ``version``, through its command line: what stays the same while modules move.

    Raises ``MeasureError`` when it gives no result there.
    """
    settings: dict[str, Any] = {"job": case.job, "backend": case.origin, "seed": case.seed, "steps": case.steps}
    settings |= {"warmup": case.warmup, "rank": case.rank or 0}
    with tempfile.TemporaryDirectory(prefix="zerocast-run-") as folder:
        file = Path(folder, "case.json")
        file.write_text(json.dumps(settings), encoding="utf-8")
        out, err = _run(
            version, ["-m", "validator", "measure", "--case", str(file), "--store", str(file.with_name("store.db"))]
        )
    try:
        (outcome,) = json.loads(out)
        if outcome["report"] is None:
            raise MeasureError(_no_result(case, version, outcome["error"]))
        report = report_from_dict(outcome["report"])
    except InputError as error:  # a version whose records are no longer read
        raise MeasureError(_no_result(case, version, str(error))) from None
    except (ValueError, KeyError, TypeError):  # it did not come as far as printing its outcome
        raise MeasureError(_no_result(case, version, err)) from None
    commit = {"commit": version.commit, "dirty": version.dirty} if version.commit else None
    return replace(report, provenance={**report.provenance, "git": commit})


def _run(version: Version, arguments: list[str]) -> tuple[str, str]:
    """Output and complaints of Python with the tree of ``version`` instead of this one."""
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != TREE]
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=version.tree, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(version.tree), *others])},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        return process.communicate()
    finally:  # its own processes end as soon as it does
        if process.poll() is None:
            process.terminate()
            process.wait()


def _no_result(case: BaselineCase, version: Version, reason: str) -> str:
    last = (reason.strip().splitlines() or ["it says nothing"])[-1]
    return f"case {case.name!r} gives no result with the code of {version.name}: {last}"


def measure_pairs(
    case: BaselineCase,
    old: Version,
    new: Version,
    n_pairs: int,
    measure_one: Callable[[Version, BaselineCase], StepReport] = measure_with,
) -> Iterator[tuple[StepReport, StepReport]]:
    """Yields ``n_pairs`` pairs (of ``old``, of ``new``); the first of each pair is old, new, old, ... in turn.

    ``fake`` is measured once: it has no noise.
    """
    for number in range(1 if case.origin == "fake" else n_pairs):
        first, second = (old, new) if number % 2 == 0 else (new, old)
        one, other = measure_one(first, case), measure_one(second, case)
        yield (one, other) if number % 2 == 0 else (other, one)
