"""Fitting constants of frameworks: what was put in comes out, ranges hold, and groups that are left out take no part."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import lru_cache
from math import exp

import numpy as np
import pytest

from estimator.time.stack import PRIOR, RANGES, UNTOLD, Stack
from validator.published import broken_budgets, parse_published_budgets, read_runs
from validator.published.cases import TABLE, cases_of
from validator.published.evaluation import GroupError
from validator.published.fit import Case, fit, fit_chips, fit_lines
from validator.published.left_out import GROUPS, residuals

TRUTH = replace(PRIOR, matmul=0.85, attention=0.6, memory=0.9, step_s=0.02)


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    """Real runs of one framework, two of each of four models, whose seconds are what ``TRUTH`` makes of them."""
    runs = cases_of(read_runs(TABLE))
    models = ("MPT-125m", "MPT-350m", "MPT-760m", "MPT-1b")
    own = {name: [c for c in runs if (c.framework, c.gpu, c.model) == ("composer", "a100-80", name)] for name in models}
    found = [case for same in own.values() for case in (same[0], same[-1])]
    return tuple(replace(case, seconds=case.seconds * exp(case.error(TRUTH))) for case in found)


def test_what_was_put_in_comes_out() -> None:
    stack, lines = fit(cases(), PRIOR, looseness=30.0)
    assert np.abs(lines.errors).max() < 0.002
    for name in ("matmul", "memory"):  # forward and backward attention are in the same proportion in all of these runs
        assert getattr(stack, name) == pytest.approx(getattr(TRUTH, name), rel=0.03), name


def test_an_outlier_moves_little() -> None:
    odd = [*cases()[1:], replace(cases()[0], seconds=2 * cases()[0].seconds)]
    _, lines = fit(odd, PRIOR, looseness=10.0)  # eight runs cannot hold as many constants that are all but free
    assert np.median(np.abs(lines.errors)) < 0.02 and np.abs(lines.errors).max() > 0.5


def test_constants_stay_in_their_ranges() -> None:
    fast = [replace(case, seconds=case.seconds / 10) for case in cases()]
    stack, _ = fit(fast, PRIOR, looseness=30.0)
    for name, value in asdict(stack).items():
        assert RANGES[name].low <= value <= RANGES[name].high, name
    assert stack.matmul == RANGES["matmul"].high


def test_lines_forecast_what_whole_forecasts_say() -> None:
    stack, lines = fit(cases(), PRIOR)
    beside = Stack(**{name: value + 0.01 * (name not in UNTOLD) for name, value in asdict(stack).items()})
    step = np.array(list(asdict(beside).values())) - lines.at
    for case, error, slope in zip(cases(), lines.errors, lines.slopes, strict=True):
        assert case.error(beside) == pytest.approx(error + slope @ step, abs=0.003)


def test_nothing_to_learn_from_leaves_the_prior() -> None:
    stack, lines = fit(cases(), PRIOR)
    nothing = lines.of([])
    assert asdict(fit_lines(nothing, PRIOR)) == pytest.approx(asdict(PRIOR), abs=1e-5)
    assert stack != PRIOR


def test_what_is_left_out_takes_no_part() -> None:
    model = cases()[0].model
    spoiled = [replace(case, seconds=3 * case.seconds) if case.model == model else case for case in cases()]
    clean, bad = ({"composer": fit_chips(own)} for own in (list(cases()), spoiled))
    found = {r.case.run_id: r.log_error for r in residuals({"composer": spoiled}, bad, "model")}
    kept = {r.case.run_id: r.log_error for r in residuals({"composer": list(cases())}, clean, "model")}
    for case in cases():
        if case.model == model:  # forecast as before (but for where derivatives were taken), and three times as far off
            assert found[case.run_id] == pytest.approx(kept[case.run_id] - np.log(3), abs=0.08)
    assert set(GROUPS) == {"model", "gpus", "source", "gpu", "framework"}


def test_the_projects_runs_are_read_and_most_can_be_forecast() -> None:
    runs = read_runs(TABLE)
    assert len(cases_of(runs)) > 0.85 * sum(run.number("step_time_s") is not None for run in runs)


def group(median: float) -> GroupError:
    return GroupError("A paper", "h100", "step_time_s", 9, 1, median, 2 * median, -median, 90.0)


def test_budgets_of_published_runs() -> None:
    assert (
        broken_budgets([group(4.0)], parse_published_budgets(["step_time_s:median=5", "paper/step_time_s:coverage=85"]))
        == []
    )
    said = broken_budgets([group(6.0)], parse_published_budgets(["step_time_s:median=5", "step_time_s:bias=5%"]))
    assert said == [
        "A paper on h100: median of step_time_s over 9 runs is 6.0 %, over 5 %",
        "A paper on h100: bias of step_time_s over 9 runs is -6.0 %, over 5 %",
    ]
