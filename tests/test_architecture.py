"""The house keeps its shape: floors, quick start-up, small files, and nobody prints below the face."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
FLOORS = ("estimator", "runtime", "validator", "dashboard", "zerocast")
MAX_LINES = 500


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((TREE / folder).rglob("*.py"))]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(TREE)}
    return subprocess.run(command, cwd=TREE, env=env, capture_output=True, text=True, timeout=120)


def test_import_rules() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_import_rules_catch_an_arrow_upwards(tmp_path: Path) -> None:
    for floor in FLOORS:
        (tmp_path / floor).mkdir()
        (tmp_path / floor / "__init__.py").write_text("")
    for room in ("plan", "run", "views", "predict", "memory", "time", "schedule", "ops", "sharding"):
        (tmp_path / "estimator" / f"{room}.py").write_text("")
    (tmp_path / "estimator" / "plan.py").write_text("import dashboard\nimport torch\n")
    (tmp_path / "pyproject.toml").write_text((TREE / "pyproject.toml").read_text(encoding="utf-8"))
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "estimator.plan -> dashboard" in done.stdout and "estimator.plan -> torch" in done.stdout


@pytest.mark.parametrize("module", ["estimator", "zerocast", "zerocast.cli", "estimator.job", "dashboard.data"])
def test_import_is_light(module: str) -> None:
    heavy = {"torch", "pandas", "matplotlib", "streamlit", "altair", "scipy"}
    done = run(sys.executable, "-c", f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_predict_is_light() -> None:
    code = (
        "import sys; from zerocast import predict; from estimator.job.options import JobOptions, build_job\n"
        "print(*sorted({'torch', 'pandas', 'matplotlib', 'rich', 'click'} & set(sys.modules)))"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_predict_command_is_light() -> None:
    """A forecast needs no numerics library, whose import would take longer than all the rest."""
    code = (
        "import sys; from zerocast.cli import cli\n"
        "cli(['predict', '--model', 'gpt2', '--gpu', 'h100', '--gpus', '8', '--json'], standalone_mode=False)\n"
        "print(*sorted({'torch', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0 and '"step_s"' in done.stdout, done.stderr
    assert done.stderr.strip() == ""


def test_help_answers_quickly() -> None:
    def best_of(n: int, *command: str) -> float:
        seconds = []
        for _ in range(n):
            start = time.perf_counter()
            assert run(*command).returncode == 0
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    bare_s = best_of(5, sys.executable, "-c", "pass")
    help_s = best_of(5, sys.executable, "-m", "zerocast", "--help")
    print(f"zerocast --help: {help_s * 1e3:.0f} ms (bare Python {bare_s * 1e3:.0f} ms)")
    assert help_s < 0.5 or help_s < 10 * bare_s, "start-up has become slow"
    assert help_s < 1.5


def test_files_are_small() -> None:
    long = {
        str(path.relative_to(TREE)): n
        for path in sources(*FLOORS, "tests", "benchmarks")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"past {MAX_LINES} lines: {long}"


def test_tests_that_run_alone_exist() -> None:
    from tests.conftest import ALONE

    assert [name for name in ALONE if not (TREE / "tests" / name).exists()] == []


def test_nobody_prints_below_the_face() -> None:
    found = []
    for path in sources("estimator", "runtime", "validator"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{path.relative_to(TREE)}:{node.lineno}")
    assert not found, found


def test_public_names_resolve() -> None:
    import zerocast

    for name in zerocast.__all__:
        assert callable(getattr(zerocast, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        zerocast.nothing  # noqa: B018
