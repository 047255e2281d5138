"""The gate's statistics against brute force, its rates on simulated noise, and the baseline file."""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from estimator.errors import InputError
from validator.gate import report as gate_report
from validator.gate.baseline import Baseline, environment_of, load_baseline, save_baseline, update
from validator.gate.decide import check, decide_shift
from validator.gate.ranks import critical_rank, runs_needed, shift_of
from validator.gate.remeasure import case_of, remeasure
from validator.store.records import report_to_json

TREE = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("bench_gate", TREE / "benchmarks" / "bench_gate.py")
assert spec is not None and spec.loader is not None
bench = importlib.util.module_from_spec(spec)
sys.modules["bench_gate"] = bench
spec.loader.exec_module(bench)

PLACE = {
    "torch": "2.13.0",
    "cuda": "13.0",
    "host": "node1",
    "cpu": "a cpu",
    "gpu": {"name": "A GPU", "driver_version": "580"},
}


@pytest.fixture
def runs(make_report, make_job):
    """Reports of one case: ``runs([0.1, 0.2])``; ``peak`` bytes, any field; each with steps and date of its own."""

    def make(steps, peak=1_000_000, start=0, place=PLACE, **changes):
        return [
            make_report(
                step_s=s, tokens_per_s=32 / s, peak_allocated_bytes=peak,
                provenance={**place, "steps": 8, "warmup": 3, "seed": 0, "date_utc": f"day {start + i}"}, **changes,
            )
            for i, s in enumerate(steps)
        ]  # fmt: skip

    return make


def medians(seed: int, factor: float = 1.0, n: int = 5) -> list[float]:
    rng = np.random.default_rng(seed)
    return [statistics.median(run) for run in bench.session(rng, bench.Noise(), 1, n, factor)[0]]


@pytest.mark.parametrize(("n", "m"), [(3, 4), (4, 4), (5, 5), (2, 14), (6, 3)])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_critical_rank_equals_brute_force(n: int, m: int, alpha: float) -> None:
    us = []
    for chosen in itertools.combinations(range(n + m), n):
        others = [i for i in range(n + m) if i not in chosen]
        us.append(sum(a > b for a in chosen for b in others))
    k = critical_rank(n, m, alpha)
    share = [sum(u <= i for u in us) / len(us) for i in range(n * m + 1)]
    assert (k == 0 and share[0] > alpha) or (share[k - 1] <= alpha < share[k])


def test_interval_covers_the_truth_as_often_as_promised() -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(2000):
        shift = shift_of(rng.standard_cauchy(6), rng.standard_cauchy(6) + 1.0, 0.05)
        missed += not shift.low <= 1.0 <= shift.high
    assert 0.04 < missed / 2000 < 0.11  # 2 x 5 % at most, less because ranks are whole numbers


def test_five_percent_slower_is_flagged_and_unchanged_code_is_not() -> None:
    noise = bench.NOISES["quiet"]
    slower = bench.gates(noise, 1.05, 100)
    assert sum("regressed" in gate for gate in slower) >= 98
    assert sum(gate.count("regressed") for gate in slower) >= 0.9 * 400
    assert not any("regressed" in gate for gate in bench.gates(noise, 1.0, 20))
    same = bench.gates(noise, 1.0, 200, seed=1)
    assert sum("regressed" in gate for gate in same) <= 2
    assert sum(gate.count("pass") for gate in same) >= 0.85 * 800


def test_a_yardstick_and_pairs_see_through_the_machine() -> None:
    plain, paced, pairs = (bench.paced_gates(0.05, 1.0, 60, yardstick=y, paired=p) for y, p in ((False, False), (True, False), (False, True)))  # fmt: skip
    assert plain.count("regressed") >= 6
    assert "regressed" not in paced and "regressed" not in pairs
    assert bench.paced_gates(0.05, 1.05, 60, yardstick=True).count("regressed") >= 48
    assert bench.paced_gates(0.05, 1.05, 60, yardstick=False, paired=True).count("regressed") >= 54


def test_steps_of_a_run_are_no_independent_samples() -> None:
    assert bench.pooled_false_alarms(bench.NOISES["quiet"], 100) > 0.15


def test_throughput_and_time_agree_and_improvement_is_told() -> None:
    old, new = medians(0), medians(1, 1.08)
    slow = decide_shift("c", "step_s", old, new, 0.03)
    rate = decide_shift("c", "tokens_per_s", [32 / s for s in old], [32 / s for s in new], 0.03)
    assert slow.status == rate.status == "regressed"
    assert (1 + slow.change) * (1 + rate.change) == pytest.approx(1) and rate.low < rate.change < rate.high < 0
    assert decide_shift("c", "step_s", new, old, 0.03).status == "improved"
    assert decide_shift("c", "step_s", old, new, 0.20).status == "pass"


def test_one_wild_run_does_not_decide() -> None:
    old, new = medians(2), medians(3)
    assert decide_shift("c", "step_s", old, [*new[:4], 50 * new[4]], 0.03).status in ("pass", "inconclusive")
    assert decide_shift("c", "step_s", old, [*medians(4, 1.10)[:4], 50.0], 0.03).status == "regressed"


def test_too_few_runs_are_inconclusive_and_say_how_many_more() -> None:
    verdict = decide_shift("c", "step_s", medians(5), medians(6, 1.5, n=1), 0.03)
    assert (verdict.status, verdict.more_runs, verdict.more_baseline_runs) == ("inconclusive", 3, 0)
    assert "needs 3 more runs" in verdict.reason and verdict.low is None
    again = decide_shift("c", "step_s", medians(5), medians(6, 1.5, n=3), 0.03)
    assert again.status == "inconclusive" and again.more_runs == 1  # 1/56 is above the level
    assert decide_shift("c", "step_s", medians(5), medians(6, 1.5, n=4), 0.03).status == "regressed"
    assert decide_shift("c", "step_s", medians(5, n=1), medians(6, n=5), 0.03).more_baseline_runs == 4


def test_runs_asked_for_shrink_the_interval_enough() -> None:
    new, base = runs_needed(0.04, 0.03, 5, 5)
    assert (1 / (5 + new) + 1 / (5 + base)) ** 0.5 / (2 / 5) ** 0.5 * 0.04 < 0.03 and new < 20
    assert runs_needed(0.5, 0.0001, 5, 5) == (25, 25)
    wild = decide_shift("c", "step_s", [1, 2, 3, 4, 5], [1.1, 2.1, 3.1, 4.1, 5.1], 0.03)
    assert wild.status == "inconclusive" and "needs a quieter machine" in wild.reason
    same = decide_shift("c", "step_s", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 0.03)
    assert same.status == "inconclusive" and same.change == 0  # equal medians alone prove nothing


def test_memory_is_exact(runs) -> None:
    (place,) = update(Baseline(), runs([0.1] * 5), {}).environments

    def verdict(peak, **changes):
        found = check(place.cases, runs([0.1], peak, start=9, **changes), metrics=["peak_allocated_bytes"]).verdicts
        assert len(found) == 1
        return found[0]

    grown = verdict(1_010_000)  # 1 %
    assert grown.status == "regressed" and grown.change == pytest.approx(0.01) and "+10,000 bytes" in grown.reason
    assert verdict(1_000_001).status == "regressed"
    assert verdict(1_000_000).status == "pass"
    assert verdict(999_999).status == "improved"
    out = verdict(None, fits=False)
    assert out.status == "regressed" and "out of memory" in out.reason


def test_memory_that_varied_before_is_held_against_its_range(runs) -> None:
    (place,) = update(Baseline(), [*runs([0.1] * 2), *runs([0.1] * 2, 1_000_100, start=5)], {}).environments

    def status(*peaks: int) -> str:
        new = [r for i, peak in enumerate(peaks) for r in runs([0.1], peak, start=20 + i)]
        return check(place.cases, new, metrics=["peak_allocated_bytes"]).verdicts[0].status

    assert [status(999_999), status(1_000_000), status(1_000_050), status(1_000_100)] == [
        "improved",
        "pass",
        "pass",
        "pass",
    ]
    assert status(1_000_000, 1_000_101) == "regressed"


def test_prediction_errors_are_gated(runs) -> None:
    old = runs([0.1, 0.101, 0.1, 0.099, 0.1])
    forecast = replace(old[0], origin="predicted", step_s=0.102)
    (place,) = update(Baseline(), old, {forecast.job_key: forecast}).environments
    new = runs([0.1, 0.1, 0.101, 0.099, 0.1], start=9)
    names = ["step_prediction_error", "peak_prediction_error"]
    same = check(place.cases, new, metrics=names, forecasts={forecast.job_key: forecast})
    assert [v.status for v in same.verdicts] == ["pass", "pass"]
    worse = check(place.cases, new, metrics=names, forecasts={forecast.job_key: replace(forecast, step_s=0.115)})
    assert [v.status for v in worse.verdicts] == ["regressed", "pass"]
    assert worse.verdicts[0].change == pytest.approx(0.13, abs=0.01)
    peaks = [
        check(
            place.cases,
            new[:1],
            metrics=names[1:],
            forecasts={forecast.job_key: replace(forecast, peak_allocated_bytes=n)},
        )
        for n in (1_000_000, 1_029_000, 1_031_000, 960_000)
    ]  # one run is enough: memory has no noise
    assert [gate.verdicts[0].status for gate in peaks] == ["pass", "pass", "regressed", "regressed"]
    assert not check(place.cases, new, metrics=names).verdicts  # no forecast: not known, never zero


def test_a_run_is_never_held_against_itself(runs) -> None:
    old = runs([0.1] * 5)
    (place,) = update(Baseline(), old, {}).environments
    gate = check(place.cases, [*old, *old], metrics=["step_s"])
    assert gate.verdicts[0].n_now == 0 and gate.verdicts[0].status == "inconclusive"
    new = runs([0.1, 0.2, 0.3], start=9)
    assert check(place.cases, [*old, *new, *new], metrics=["step_s"]).verdicts[0].n_now == 3
    assert check(place.cases, new, metrics=["step_s"], newest=1).verdicts[0].now == 0.3


def test_update_keeps_other_cases_and_sorts(runs, make_job, tmp_path: Path) -> None:
    other = runs([0.3] * 2, job=make_job(zero=2, n_gpus=2), job_key=None)
    other = [replace(r, job_key=make_job(zero=2, n_gpus=2).key) for r in other]
    first = update(Baseline(), [*other, *runs([0.1] * 3)], {})
    second = update(first, runs([0.2, 0.21], start=9), {}, newest=1)
    assert [len(c.runs) for c in second.environments[0].cases] == [1, 2]
    assert second.environments[0].cases[1] == first.environments[0].cases[1]
    save_baseline(second, tmp_path / "b.json")
    text = (tmp_path / "b.json").read_text(encoding="utf-8")
    assert load_baseline(tmp_path / "b.json") == second
    save_baseline(load_baseline(tmp_path / "b.json"), tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == text and [*tmp_path.iterdir()] == [tmp_path / "b.json"]
    assert sum('"record"' in line for line in text.splitlines()) == 3  # one line per run
    assert case_of(second.environments[0].cases[1]).job == make_job(zero=2, n_gpus=2)


def test_jobs_with_one_name_are_told_apart(runs, make_job) -> None:
    job = make_job()
    jobs = [job, replace(job, strategy=replace(job.strategy, bucket_bytes=1 << 20))]  # no part of the name
    reports = [r for job in jobs for r in runs([0.1], job=job) for r in [replace(r, job_key=job.key)]]
    (place,) = update(Baseline(), reports, {}).environments
    assert len({case.name for case in place.cases}) == 2


def test_another_environment_is_refused_by_name(runs) -> None:
    baseline = update(Baseline(), runs([0.1]), {})
    here = environment_of({**PLACE, "torch": "2.14.0", "gpu": {"name": "A GPU", "driver_version": "590"}})
    assert baseline.find(environment_of(PLACE)) is not None and baseline.find(here) is None
    text = str(baseline.refusal(here, "b.json"))
    assert text == (
        "baseline 'b.json' is from another environment: driver is '590' here and '580' there; torch is '2.14.0' here and '2.13.0' there"
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d.update(zerocast_baseline=3), "version 3, written by a newer Zerocast; allowed: at most 2"),
        (lambda d: d.update(zerocast_baseline="x"), "version 'x'"),
        (lambda d: d.update(enviroments=[]), "did you mean 'environments'"),
        (lambda d: d.pop("zerocast_baseline"), "is no baseline"),
        (lambda d: d["environments"][0]["cases"][0].update(nmae=1), "did you mean 'name'"),
        (lambda d: d["environments"][0]["cases"][0].pop("runs"), "no key 'runs'"),
        (lambda d: d["environments"][0]["cases"][0]["runs"][0].update(step_s=-1), "step_s is -1"),
        (lambda d: d["environments"][0]["cases"][0]["runs"][0].update(step_s="1"), "step_s is '1'"),
        (lambda d: d["environments"][0]["cases"][0]["runs"][0].update(peak_allocated_bytes=1.5), "allowed: int or null"),
        (lambda d: d["environments"][0]["environment"].pop("gpu"), "allowed: cpu, cuda, driver, gpu, host, torch"),
    ],
)  # fmt: skip
def test_a_bad_baseline_is_told_in_one_sentence(runs, tmp_path: Path, damage, says: str) -> None:
    file = tmp_path / "b.json"
    save_baseline(update(Baseline(), runs([0.1]), {}), file)
    data = json.loads(file.read_text(encoding="utf-8"))
    damage(data)
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError) as told:
        load_baseline(file)
    assert says in str(told.value) and str(file) in str(told.value) and "\n" not in str(told.value)


def test_truncated_and_missing_baselines(runs, tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    save_baseline(update(Baseline(), runs([0.1]), {}), file)
    text = file.read_text(encoding="utf-8")
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        file.write_text(text[:cut], encoding="utf-8")
        with pytest.raises(InputError, match="damaged or truncated"):
            load_baseline(file)
    with pytest.raises(InputError, match="does not exist"):
        load_baseline(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be written"):
        save_baseline(Baseline(), tmp_path / "no" / "b.json")


def test_measuring_again_goes_in_turn_and_back(runs, make_job) -> None:
    job = make_job(zero=2)
    other = [replace(r, job_key=job.key) for r in runs([0.3], job=job)]
    (place,) = update(Baseline(), [*runs([0.1]), *other], {}).environments
    seen = []
    found = list(remeasure(place.cases, 3, measure_one=lambda case, _: seen.append(case.job.key) or other[0]))
    a, b = (case.job_key for case in place.cases)
    assert seen == [a, b, b, a, a, b] and len(found) == 6
    with pytest.raises(InputError, match="job_key 'x'"):
        case_of(replace(place.cases[0], job_key="x"))


def test_junit_markdown_and_annotations(runs) -> None:
    (place,) = update(Baseline(), runs(medians(0)), {}).environments
    gate = check(place.cases, runs(medians(1, 1.2, n=4), 1_000_000, start=9))
    assert [v.status for v in gate.verdicts] == ["regressed", "regressed", "pass"]
    open_gate = check(place.cases, [])
    suite = ET.fromstring(gate_report.junit(gate, place.environment, strict=False))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "2", "0")
    assert len(suite.findall("testcase/failure")) == 2
    assert {p.get("name"): p.get("value") for p in suite.iter("property")}["gpu"] == "A GPU"
    skipped = ET.fromstring(gate_report.junit(open_gate, place.environment, strict=False))
    assert len(skipped.findall("testcase/skipped")) == 3 and skipped.get("failures") == "0"
    assert ET.fromstring(gate_report.junit(open_gate, place.environment, strict=True)).get("failures") == "3"
    text = gate_report.markdown(gate, place.environment)
    assert text.startswith("### zerocast check: 2 regressed, 1 pass") and text.count("❌ regressed") == 2
    lines = gate_report.github_lines(gate, strict=False)
    assert len(lines) == 2 and all(line.startswith("::error title=") for line in lines)
    assert "%25" in lines[0] and "%" not in lines[0].replace("%25", "").replace("%2C", "").replace("%3A", "")
    assert [x.split()[0] for x in gate_report.github_lines(open_gate, strict=False)] == ["::warning"] * 3


def test_equal_records_give_equal_answers(runs) -> None:
    old, new = runs(medians(0)), runs(medians(1), start=9)
    (place,) = update(Baseline(), old, {}).environments
    assert check(place.cases, new) == check(place.cases, list(reversed(new)))
    assert len({report_to_json(r) for r in [*old, *new]}) == 10
