"""Two versions of a source tree, each measured with its own code, in turn."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from estimator.errors import InputError
from validator.gate.against import Version, measure_pairs, measure_with, unpacked, working_tree
from validator.gate.baseline import Baseline, BaselineCase, update
from validator.measure.runner import MeasureError
from validator.store.records import report_to_json

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")

MAIN = """
import json, pathlib, sys
case = json.loads(pathlib.Path(sys.argv[sys.argv.index("--case") + 1]).read_text())
if case["seed"] == 98:
    sys.exit("seed is 98; allowed: others")
here = json.loads(pathlib.Path(__file__).with_name("report.json").read_text())
report = {**here, "step_s": STEP_S, "provenance": {**here["provenance"], "case": case}}
if case["seed"] == 97:
    report["smell"] = 1
crashed = case["seed"] == 99
print(json.dumps([{"error": "it crashed" if crashed else None, "report": None if crashed else report}], indent=1))
sys.exit(crashed)
"""
"""What ``python -m validator measure`` does, without measuring."""


def git(tree: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(tree), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def tree(tmp_path: Path, make_report) -> Path:
    """A checkout with the command line that measures; tag ``old`` measures 1 s, the working tree 2 s."""
    tree = tmp_path / "tree"
    files = {
        "validator/__init__.py": "", "validator/__main__.py": f"STEP_S = 1.0\n{MAIN}",
        "validator/report.json": report_to_json(make_report()), ".gitignore": "__pycache__/\n",
    }  # fmt: skip
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "one")
    git(tree, "tag", "old")
    (tree / "validator/__main__.py").write_text(f"STEP_S = 2.0\n{MAIN}")
    return tree


@pytest.fixture
def case(make_report) -> BaselineCase:
    return update(Baseline(), [make_report()], {}).environments[0].cases[0]


def test_each_version_measures_with_its_own_code(tree: Path, case: BaselineCase) -> None:
    before = git(tree, "status", "--porcelain"), git(tree, "worktree", "list")
    with unpacked("old", tree) as old:
        folder, new = old.tree, working_tree(tree)
        ((a, b),) = measure_pairs(case, old, new, 1)
    assert (a.step_s, b.step_s) == (1.0, 2.0)
    head = git(tree, "rev-parse", "HEAD").strip()
    assert a.provenance["git"] == {"commit": head, "dirty": False} and b.provenance["git"] == {
        "commit": head,
        "dirty": True,
    }
    assert a.provenance["case"] == {"job": case.job, "backend": "cpu", "rank": 0, "seed": 0, "steps": 1, "warmup": 0}
    assert not folder.exists() and (git(tree, "status", "--porcelain"), git(tree, "worktree", "list")) == before


def test_pairs_turn_their_order(case: BaselineCase, make_report) -> None:
    order: list[str] = []

    def measure(version: Version, _: BaselineCase):
        order.append(version.name)
        return make_report(step_s=1.0 if version.name == "a" else 2.0)

    a, b = (Version(tree=Path(), name=name, commit=None) for name in "ab")
    pairs = list(measure_pairs(case, a, b, 3, measure))
    assert "".join(order) == "abbaab" and {(x.step_s, y.step_s) for x, y in pairs} == {(1.0, 2.0)}


def test_what_cannot_be_measured_is_told(tree: Path, case: BaselineCase, tmp_path: Path) -> None:
    for bad in ("nothing", "--help", "old:validator"):
        with pytest.raises(InputError, match=r"--against is .*; allowed: a commit, branch or tag"), unpacked(bad, tree):
            pass
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match="allowed: a commit"), unpacked("HEAD", tmp_path / "elsewhere"):
        pass
    git(tree, "rm", "--quiet", "--force", "validator/__main__.py")
    git(tree, "commit", "--quiet", "-m", "two")
    with pytest.raises(InputError, match="allowed: a version of Zerocast"), unpacked("HEAD", tree):
        pass
    said = {99: "it crashed", 98: "seed is 98", 97: "'smell'"}
    for seed, reason in said.items():
        with unpacked("old", tree) as old, pytest.raises(MeasureError, match=f"with the code of old: .*{reason}"):
            measure_with(old, replace(case, seed=seed))
