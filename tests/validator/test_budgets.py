"""Budgets: how they are spelled, what they hold for, and which broken promise is told first."""

from __future__ import annotations

import pytest

from estimator.errors import InputError
from estimator.report import StepReport
from validator.compare import Budget, compare, judge, parse_budgets


@pytest.fixture
def comparison(make_job, make_report):
    """Eleven cases whose steps are 0, 10, 20 ... 100 % too high and whose peaks are all 2 % too low."""
    measured = [make_report(make_job(micro_batch=n), step_s=1.0) for n in range(1, 12)]
    predicted = [
        StepReport(**{**vars(m), "origin": "predicted", "step_s": 1 + 0.1 * i, "peak_allocated_bytes": 980})
        for i, m in enumerate(measured)
    ]
    return compare(predicted, measured)


def sentences(comparison, *texts, gated=("peak_allocated_bytes", "step_s")):
    return [overrun.sentence for overrun in judge(comparison, parse_budgets(texts), gated)]


def test_spellings():
    assert parse_budgets(["5", "step_s=15", "step_s:median=10.5%", "category_peak_bytes.params:p90=0"]) == (
        Budget(term=None, statistic="worst", limit=0.05),
        Budget(term="step_s", statistic="worst", limit=0.15),
        Budget(term="step_s", statistic="median", limit=0.105),
        Budget(term="category_peak_bytes.params", statistic="p90", limit=0.0),
    )


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["-1"], ["'-1'", "0 or more"]),
        (["nan"], ["'nan'", "0 or more"]),
        (["inf"], ["'inf'"]),
        (["five"], ["'five'", "TERM=PERCENT"]),
        ([""], ["''"]),
        (["=5"], ["'=5'"]),
        (["step_s="], ["'step_s='"]),
        (["step_s=1=2"], ["'step_s=1=2'"]),
        (["step_s:median"], ["TERM:STATISTIC=PERCENT"]),
        (["step_s:mean=3"], ["'mean'", "did you mean 'median'?", "p90", "worst"]),
        (["step_s=3", "step_s:worst=4"], ["step_s:worst=4", "second"]),
        (["3", "4"], ["second"]),
    ],
)
def test_a_bad_spelling_is_one_sentence(texts, words):
    with pytest.raises(InputError) as error:
        parse_budgets(texts)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_worst_is_told_row_by_row_largest_first(comparison):
    said = sentences(comparison, "75")
    assert len(said) == 3  # 80, 90 and 100 %
    assert "mb11" in said[0] and "+100.0% is over 75 %" in said[0] and "+80.0%" in said[2]
    assert sentences(comparison, "100.1") == []


def test_each_term_has_its_own_budget(comparison):
    assert sentences(comparison, "peak_allocated_bytes=2.1", "step_s=101") == []
    said = sentences(comparison, "peak_allocated_bytes=1.9", "step_s=101")
    assert len(said) == 11 and all("peak_allocated_bytes" in s and "-2.0%" in s for s in said)
    assert sentences(comparison, "2.1", "step_s=101") == []  # the one without a term holds for the other alone
    assert len(sentences(comparison, "1.9", gated=("peak_allocated_bytes",))) == 11


@pytest.mark.parametrize(("statistic", "size"), [("median", 50), ("p90", 90), ("worst", 100)])
def test_statistics_by_hand(comparison, statistic, size):
    assert sentences(comparison, f"step_s:{statistic}={size + 0.1}") == []
    (said, *_) = sentences(comparison, f"step_s:{statistic}={size - 0.1}")
    assert f"{size}.0%" in said and f"over {size - 0.1:g} %" in said


def test_a_broken_median_names_the_term_and_the_runs(comparison):
    assert sentences(comparison, "step_s:median=10") == ["step_s: median error over 11 runs is 50.0%, over 10 %"]


def test_an_undefined_error_is_over_every_budget(make_job, make_report):
    measured = [make_report(make_job(micro_batch=n), host_bytes=0) for n in (1, 2, 3)]
    predicted = [StepReport(**{**vars(m), "origin": "predicted", "host_bytes": n}) for n, m in enumerate(measured)]
    result = compare(predicted, measured)  # 0 against 0, then 1 and 2 against 0
    assert len(sentences(result, "host_bytes=1000000")) == 2
    assert sentences(result, "host_bytes:median=100") == [
        "host_bytes: median error over 3 runs is undefined, over 100 %"
    ]


def test_bytes_on_the_wire_come_first_whatever_the_budget(comparison, make_report):
    measured = make_report(step_s=1.0)
    wrong = {"collective_bytes": {"all_gather": 129}, "step_s": 9.0}
    result = compare([StepReport(**{**vars(measured), "origin": "predicted", **wrong})], [measured])
    said = sentences(result, "100")
    assert len(said) == 2
    assert "collective_bytes.all_gather must be equal, predicted 129, measured 128" in said[0] and "step_s" in said[1]


def test_a_budget_for_nothing_fails_and_an_unknown_term_is_a_mistake(comparison):
    assert sentences(comparison, "host_bytes=5") == [
        "nothing to gate: no run has both a forecast and a measurement of host_bytes"
    ]
    with pytest.raises(InputError, match="did you mean 'step_s'"):
        sentences(comparison, "step_ms=5")
