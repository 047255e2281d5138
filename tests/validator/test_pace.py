"""A machine that is slower today is told apart from code that is slower; hand-computed figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from validator.gate.baseline import Baseline, Run, run_of, update
from validator.gate.decide import check, check_runs
from validator.gate.pace import TRACKING, at_one_pace
from validator.measure.yardstick import step_in_yardsticks, yardstick_median

NAME = "steplike-1, 1 x 1 threads"


def run(step_s: float, yardstick_s: float | None, name: str | None = NAME, **changes) -> Run:
    length = None if yardstick_s is None else step_s / yardstick_s
    fields = {"yardstick": name if yardstick_s else None, "yardstick_s": yardstick_s, "step_yardsticks": length}
    return Run(record=f"{step_s}{yardstick_s}{changes}", step_s=step_s, **{**fields, **changes})


@pytest.fixture
def reports(make_report):
    """Runs of a step of ``step_s`` on a machine that takes ``pace`` times as long, with noise that both share."""

    def make(
        seed: int,
        step_s: float = 0.1,
        pace: float = 1.0,
        own: float = 0.003,
        shared: float = 0.1,
        yard: float = 0.003,
        n: int = 5,
    ):
        rng = np.random.default_rng(seed)
        found = []
        for i in range(n):
            common = pace * np.exp(rng.normal(0, shared))
            steps = [float(step_s * common * np.exp(rng.normal(0, own))) for _ in range(8)]
            yards = [float(0.003 * common * np.exp(rng.normal(0, yard))) for _ in range(8)]
            found.append(make_report(
                step_s=sorted(steps)[4], tokens_per_s=16 / sorted(steps)[4],
                provenance={"torch": "2.13", "steps": 8, "date_utc": f"{seed}-{i}", "step_seconds": steps, "yardstick": NAME, "yardstick_seconds": yards},
            ))  # fmt: skip
        return found

    return make


def status(old, new, metric: str = "step_s"):
    (place,) = update(Baseline(), old, {}).environments
    return check(place.cases, new, metrics=[metric]).verdicts[0]


def test_hand_computed_pace() -> None:
    old = [run(1.0, 0.1), run(1.2, 0.12), run(0.9, 0.1)]
    new = [run(2.0, 0.2, tokens_per_s=100.0), run(2.2, 0.2)]
    before, after, pace = at_one_pace(old, new)
    assert pace is not None and pace.change == pytest.approx(1.0) and pace.doubt == pytest.approx(TRACKING * np.log(2))
    assert [r.step_s for r in before] == pytest.approx([1.0, 1.0, 0.9])
    assert [r.step_s for r in after] == pytest.approx([1.0, 1.1])
    assert after[0].tokens_per_s == pytest.approx(200.0)
    assert "100.0 % slower, which is taken out" in pace.text


@pytest.mark.parametrize(
    "odd", [run(1.0, None), run(1.0, 0.1, "another piece of work"), run(1.0, 0.1, step_yardsticks=None)]
)
def test_runs_that_cannot_be_compared_stay_as_they_are(odd: Run) -> None:
    old = [run(1.0, 0.1), run(1.1, 0.1)]
    for runs in ((old, [odd]), ([*old, odd], old)):
        assert at_one_pace(*runs) == (*runs, None)


def test_records_without_steps_have_no_figures() -> None:
    assert step_in_yardsticks({"step_seconds": [2.0, 6.0, 3.0], "yardstick_seconds": [1.0, 2.0, 2.0]}) == 2.0
    assert yardstick_median({"yardstick_seconds": [1.0, 4.0, 2.0]}) == 2.0
    for bad in (
        {},
        {"step_seconds": [1.0], "yardstick_seconds": [1.0, 2.0]},
        {"step_seconds": [1.0], "yardstick_seconds": [0]},
        {"yardstick_seconds": "x"},
    ):
        assert step_in_yardsticks(bad) is None


def test_a_slower_machine_is_no_regression_and_slower_code_is_one(reports) -> None:
    old = reports(0)
    same = status(old, reports(1, pace=1.08))
    assert same.status == "pass" and same.taken_out and same.machine == pytest.approx(0.08, abs=0.15)
    assert "the machine itself was" in same.reason
    assert status(old, reports(2, step_s=0.11, pace=1.08)).status == "regressed"
    assert status(old, reports(2, step_s=0.09, pace=1.08)).status == "improved"
    assert status(old, reports(2, step_s=0.11, pace=1.08), "tokens_per_s").status == "regressed"
    for seed in range(3, 23):
        assert status(old, reports(seed, pace=1 + seed / 10)).status != "regressed"


def test_a_far_slower_machine_leaves_it_open(reports) -> None:
    verdict = status(reports(0), reports(1, step_s=0.103, pace=4.0))
    assert verdict.status == "inconclusive" and "needs the machine at the baseline's speed" in verdict.reason


def test_without_a_yardstick_the_same_runs_alarm_or_stay_open(reports) -> None:
    bare = [replace(r, provenance={k: v for k, v in r.provenance.items() if "yardstick" not in k}) for r in (*reports(0, shared=0.01), *reports(1, pace=1.2, shared=0.01))]  # fmt: skip
    verdict = status(bare[:5], bare[5:])
    assert verdict.status == "regressed" and verdict.machine is None


def test_a_wild_yardstick_is_left_out_of_the_figures(reports) -> None:
    quiet = {"shared": 0.001, "yard": 1.0}
    verdict = status(reports(0, **quiet), reports(2, step_s=0.2, **quiet))
    assert not verdict.taken_out and verdict.machine is not None and verdict.change == pytest.approx(1.0, abs=0.02)
    assert "allowed for" in verdict.reason


def test_pairs_see_through_drift(reports) -> None:
    drift = [1.0, 1.4, 2.0, 0.7, 1.1, 3.0, 1.6, 0.9]
    bare = {"yardstick": None, "yardstick_s": None, "step_yardsticks": None}
    old = [replace(run_of(reports(i, pace=p, shared=0.0, n=1)[0]), **bare) for i, p in enumerate(drift)]
    new = [
        replace(run_of(reports(50 + i, step_s=0.105, pace=p, shared=0.0, n=1)[0]), **bare) for i, p in enumerate(drift)
    ]
    (place,) = update(Baseline(), reports(0, n=1), {}).environments
    verdicts = {v.metric: v for v in check_runs(replace(place.cases[0], runs=tuple(old)), new, paired=True)}
    assert verdicts["step_s"].status == "regressed" and verdicts["step_s"].change == pytest.approx(0.05, abs=0.01)
    assert verdicts["peak_allocated_bytes"].status == "pass" and "step_prediction_error" not in verdicts
    assert {
        v.status for v in check_runs(replace(place.cases[0], runs=tuple(old)), old, metrics=["step_s"], paired=True)
    } == {"pass"}
    few = check_runs(replace(place.cases[0], runs=tuple(old[:3])), new[:3], metrics=["step_s"], paired=True)[0]
    assert few.status == "inconclusive" and "needs 5 more pairs of runs" in few.reason
