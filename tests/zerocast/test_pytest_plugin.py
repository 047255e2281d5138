"""The fixture ``zerocast_gate`` in tests of the user's own."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
TREE = Path(__file__).resolve().parents[2]
INSTALLED = any(e.name == "zerocast" for e in importlib.metadata.entry_points(group="pytest11"))
PLAIN = """
def test_step(zerocast_gate):
    zerocast_gate("first", lambda: sum(range(1000)))
    zerocast_gate("second", lambda: sum(range(2000)), baseline="perf.json")
"""
CANNED = """
import itertools, json, pytest, zerocast.function_gate as gate
from validator.gate.function_run import FunctionReport
count = itertools.count()

def run(self, name):
    factor, peak = json.load(open("canned.json"))
    n = next(count)
    return FunctionReport(name=name, step_s=factor * (1 + 0.001 * (n % 5)), peak_allocated_bytes=peak,
                          provenance={"torch": "2.13", "host": "a", "n": n, "factor": factor})

gate.FunctionGate._run = run
"""


@pytest.fixture
def user(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs pytest in a folder of a user's own."""
    monkeypatch.setenv("PYTHONPATH", str(TREE))
    pytester.makeini("[pytest]\naddopts = -p no:randomly\n")

    def run(*flags: str) -> pytest.RunResult:
        plugin = () if INSTALLED else ("-p", "zerocast.pytest_plugin")
        return pytester.runpytest_inprocess(*plugin, "-rs", *flags)

    return run


@pytest.fixture
def canned(user, pytester: pytest.Pytester):
    """The same with runs that are not measured: ``canned(1.05, 1000)``."""
    pytester.makeconftest(CANNED)
    pytester.makepyfile('def test_step(zerocast_gate):\n    assert zerocast_gate("my step", lambda: None)')

    def run(factor: float, peak: int, *flags: str) -> pytest.RunResult:
        Path("canned.json").write_text(json.dumps([factor, peak]), encoding="utf-8")
        return user(*flags)

    return run


def test_without_a_baseline_it_says_how_to_write_one(canned) -> None:
    done = canned(1.0, 1000)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        "there is no baseline '*perf.json'; 'pytest --zerocast-update *::test_step' writes it: review and commit it"
    )


def test_regressions_fail_with_the_sentence_of_the_gate(canned, pytester: pytest.Pytester) -> None:
    pytester.makepyfile('def test_step(zerocast_gate):\n    zerocast_gate("my step", lambda: None)')
    done = canned(1.0, 1000, "--zerocast-update")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines("zerocast: 5 run(s) of 'my step' written to *perf.json")
    text = Path("perf.json").read_text(encoding="utf-8")
    canned(1.001, 1000).assert_outcomes(passed=1)
    slow = canned(1.05, 1000)
    slow.assert_outcomes(failed=1)
    slow.stdout.fnmatch_lines("my step: step_s regressed, worse: 1 s to 1.05 s, +5.0 % *")
    fat = canned(1.0, 1010)
    fat.assert_outcomes(failed=1)
    fat.stdout.fnmatch_lines("my step: peak_allocated_bytes regressed, peak memory grew by *+1.00%*")
    canned(0.9, 1000).assert_outcomes(passed=1)
    few = canned(1.05, 1000, "--zerocast-runs", "2")
    few.assert_outcomes(skipped=1)
    few.stdout.fnmatch_lines("SKIPPED*my step: step_s inconclusive, cannot tell, needs * more run*")
    canned(1.05, 1000, "--zerocast-runs", "2", "--zerocast-strict").assert_outcomes(failed=1)
    assert Path("perf.json").read_text(encoding="utf-8") == text  # only --zerocast-update writes


def test_mistakes_are_one_sentence(canned, pytester: pytest.Pytester) -> None:
    canned(1.0, 1000, "--zerocast-update").assert_outcomes(failed=1)  # the test asserts on verdicts, and there are none
    for text, says in (
        (Path("perf.json").read_text(encoding="utf-8").replace('"my step"', '"other"'), "has no function 'my step'; 'pytest --zerocast-update"),
        (Path("perf.json").read_text(encoding="utf-8").replace('"host": "a"', '"host": "b"'), "host is 'a' here and 'b' there; 'pytest --zerocast-update"),
        ("{", "damaged or truncated"),
    ):  # fmt: skip
        Path("perf.json").write_text(text, encoding="utf-8")
        done = canned(1.0, 1000)
        done.assert_outcomes(failed=1)
        done.stdout.fnmatch_lines(f"*{says}*")
    done = canned(1.0, 1000, "--zerocast-runs", "0")
    done.stdout.fnmatch_lines("runs is 0; allowed: *")


def test_runs_are_processes_of_their_own_and_every_call_is_measured(user, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PLAIN)
    user("--zerocast-update", "--zerocast-runs", "1").assert_outcomes(passed=1)
    data = json.loads(Path("perf.json").read_text(encoding="utf-8"))
    cases = data["environments"][0]["cases"]
    assert [(c["name"], c["kind"], len(c["runs"])) for c in cases] == [
        ("first", "function", 1),
        ("second", "function", 1),
    ]
    assert all(c["runs"][0]["step_s"] > 0 and "peak_allocated_bytes" not in c["runs"][0] for c in cases)  # no torch
    pytester.makepyfile('def test_step(zerocast_gate):\n    raise RuntimeError("broken before the gate")')
    user().assert_outcomes(failed=1)


def test_a_test_that_fails_alone_is_told(user, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import os
        def test_step(zerocast_gate):
            assert "ZEROCAST_GATE_OUT" not in os.environ
            zerocast_gate("step", lambda: None)
    """)
    done = user("--zerocast-update", "--zerocast-runs", "1")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines("a run of *::test_step in a process of its own did not measure 'step': 1 failed in *")


def test_live_bytes_are_exact_and_the_yardstick_goes_along() -> None:
    torch = pytest.importorskip("torch")
    from validator.gate.function_run import measure_function

    weight = torch.ones(1000)

    def step(n: int) -> object:
        return lambda: weight.add_(torch.ones(n)[:1].sum())

    small, large = (measure_function("f", step(n), steps=2, warmup=1) for n in (10_000, 20_000))  # type: ignore[arg-type]
    assert small.peak_allocated_bytes is not None and large.peak_allocated_bytes == small.peak_allocated_bytes + 40_000
    assert small.peak_allocated_bytes >= 4 * 11_000
    assert len(small.provenance["yardstick_seconds"]) == 2 and small.step_s > 0


def test_pytest_starts_without_anything_heavy() -> None:
    code = """
import sys, time, pytest
before, start = set(sys.modules), time.perf_counter()
import zerocast.pytest_plugin
print(1e3 * (time.perf_counter() - start), *sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=True)
    milliseconds, *modules = done.stdout.split()
    assert modules == ["zerocast", "zerocast.pytest_plugin"]
    print(f"importing the plugin: {float(milliseconds):.1f} ms")
