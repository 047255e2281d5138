"""What stands behind the pytest fixture ``zerocast_gate``.

Calls of one process are no independent samples, so every run is a pytest of its own that executes just the test that asked,
up to the gate; there the function is timed, and the process ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from estimator.errors import InputError, require_int

if TYPE_CHECKING:
    from validator.gate.baseline import Baseline, EnvironmentBaseline
    from validator.gate.decide import Verdict
    from validator.gate.function_run import FunctionReport

_OUT, _NAME = "ZEROCAST_GATE_OUT", "ZEROCAST_GATE_NAME"
"""Environment of a measuring process: where it writes its report, and which function it measures."""
_PLUGIN = "zerocast.pytest_plugin"
LIMIT_S = 600.0
"""Longest that one run may take."""


class FunctionGate:
    """The gate of one test; call it once for every function."""

    def __init__(self, request: pytest.FixtureRequest, written: list[str]) -> None:
        self._node, self._config, self._written = request.node, request.config, written

    def __call__(
        self, name: str, step: Callable[[], object], *, baseline: str | Path = "perf.json", runs: int | None = None, steps: int = 8,
        warmup: int = 3, min_effect: float = 0.03,
    ) -> tuple[Verdict, ...]:  # fmt: skip
        """Holds ``step()`` against the case ``name`` of the file ``baseline`` (beside the test's file).

        Each of ``runs`` processes calls it ``warmup`` times and then takes ``steps`` samples. A regression fails the test; what
        cannot be decided skips it, or fails it with ``--zerocast-strict``. Returns the verdicts.
        """
        if os.environ.get(_OUT):
            return self._measure_here(name, step, steps, warmup)
        path = Path(self._node.path).parent / baseline
        try:
            n_runs = require_int("runs", runs if runs is not None else self._config.getoption("--zerocast-runs"))
            return self._decide(name, path, n_runs, min_effect)
        except InputError as error:
            pytest.fail(str(error), pytrace=False)

    def _measure_here(self, name: str, step: Callable[[], object], steps: int, warmup: int) -> tuple[Verdict, ...]:
        if os.environ[_NAME] != name:
            return ()
        from validator.gate.function_run import measure_function

        report = measure_function(name, step, steps=steps, warmup=warmup, tree=self._config.rootpath)
        Path(os.environ[_OUT]).write_text(json.dumps(report.to_dict()), encoding="utf-8")
        pytest.skip("measured")

    def _decide(self, name: str, path: Path, n_runs: int, min_effect: float) -> tuple[Verdict, ...]:
        from validator.gate.baseline import Baseline, environment_of, load_baseline, save_baseline, update
        from validator.gate.decide import check

        if self._config.getoption("--zerocast-update"):
            old = load_baseline(path) if path.exists() else Baseline()
            save_baseline(update(old, [self._run(name) for _ in range(n_runs)], {}), path)
            self._written.append(f"zerocast: {n_runs} run(s) of {name!r} written to {path}")
            return ()
        if not path.exists():
            raise InputError(f"there is no baseline {str(path)!r}; {self._advice('writes it')}")
        baseline = load_baseline(path)
        first = self._run(name)
        place = self._place(baseline, environment_of(first.provenance), path)
        cases = [case for case in place.cases if case.identity == (name, "function", None)]
        if not cases:
            raise InputError(f"baseline {str(path)!r} has no function {name!r}; {self._advice('adds it')}")
        gate = check(cases, [first, *(self._run(name) for _ in range(n_runs - 1))], min_effect=min_effect)
        if gate.regressed:
            pytest.fail("; ".join(_told(v) for v in gate.regressed), pytrace=False)
        if gate.inconclusive:
            end: Any = pytest.fail if self._config.getoption("--zerocast-strict") else pytest.skip
            end("; ".join(_told(v) for v in gate.inconclusive))
        return gate.verdicts

    def _place(self, baseline: Baseline, environment: dict[str, str | None], path: Path) -> EnvironmentBaseline:
        place = baseline.find(environment)
        if place is None:
            raise InputError(f"{baseline.refusal(environment, path)}; {self._advice('adds this one')}")
        return place

    def _advice(self, what: str) -> str:
        return f"'pytest --zerocast-update {self._node.nodeid}' {what}: review and commit it"

    def _run(self, name: str) -> FunctionReport:
        """One run in a process of its own. Raises ``InputError`` when it does not come as far as the gate."""
        from validator.gate.function_run import FunctionReport

        dropped = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_CURRENT_TEST")
        env = {key: value for key, value in os.environ.items() if key not in dropped}
        with tempfile.TemporaryDirectory(prefix="zerocast-gate-") as folder:
            out = Path(folder, "run.json")
            done = subprocess.run(
                self._command(), cwd=self._config.invocation_params.dir, env={**env, _OUT: str(out), _NAME: name},
                capture_output=True, text=True, timeout=LIMIT_S,
            )  # fmt: skip
            if not out.exists():
                last = (done.stdout.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                raise InputError(
                    f"a run of {self._node.nodeid} in a process of its own did not measure {name!r}: {last}"
                )
            return FunctionReport.from_dict(json.loads(out.read_text(encoding="utf-8")))

    def _command(self) -> Sequence[str]:
        """A pytest of this test alone: options come from the ini file and ``PYTEST_ADDOPTS``, not from this command line."""
        config, plugins = self._config, self._config.pluginmanager
        target = "::".join([str(self._node.path), *self._node.nodeid.split("::")[1:]])
        by_name = {module.__name__ for module, _ in plugins.list_plugin_distinfo() if hasattr(module, "__name__")}
        return [
            sys.executable, "-m", "pytest", target, "-q", "--rootdir", str(config.rootpath), "-p", "no:cacheprovider",
            *(["-c", str(config.inipath)] if config.inipath else []),
            *(["-p", _PLUGIN] if _PLUGIN not in by_name else []),
            *(["-n", "0"] if plugins.hasplugin("xdist") else []),
            *(["--no-cov"] if plugins.hasplugin("_cov") else []),
        ]  # fmt: skip


def _told(verdict: Verdict) -> str:
    return f"{verdict.case}: {verdict.metric} {verdict.status}, {verdict.reason}"
