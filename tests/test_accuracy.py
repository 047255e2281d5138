"""``docs/accuracy.md`` is what today's forecasts, the committed records and published runs say."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from estimator.time.stack import shipped_stacks
from validator.compare import Compared, compare_sources, judge, parse_budgets
from validator.published import Evaluation, broken_budgets, evaluate, parse_published_budgets, read_runs
from validator.published.cases import TABLE
from validator.store.files import read_record_files
from zerocast.accuracy import accuracy_page, stable_part
from zerocast.published_page import published_page

TREE = Path(__file__).resolve().parent.parent
PAGE, RECORDS = TREE / "docs" / "accuracy.md", TREE / "validator" / "records"
COMMAND = "zerocast accuracy --write docs/accuracy.md"


FILES, _ = read_record_files(RECORDS)
PUBLISHED = read_runs(TABLE)
BUDGETS = (
    "llm-foundry/step_time_s:median=2.5", "llm-foundry/step_time_s:p90=7", "llm-foundry/fits:coverage=100",
    "SimuMax/peak_mem_bytes:median=1", "SimuMax/peak_mem_bytes:p90=3", "torchtitan benchmarks/peak_mem_bytes:median=4",
    "SimuMax/step_time_s:median=5", "performance.md/step_time_s:median=5", "Korthikanti/step_time_s:median=6",
)  # fmt: skip
"""What is promised of published runs, in percent. Step times: of constants that were fitted on them, so these are alarms, not claims."""


@lru_cache(maxsize=1)
def published() -> Evaluation:
    return evaluate(PUBLISHED)


def compared(*origins: str) -> Compared:
    """The committed records (of ``origins``, when given) beside today's forecasts."""
    return compare_sources(
        [
            ([r for r in file.reports if not origins or r.origin in origins], [file.profile] if file.profile else [])
            for file in FILES
        ]
    )


def test_the_page_is_current() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert stable_part(written) == stable_part(
        accuracy_page(FILES, compared(), COMMAND, published_page(PUBLISHED, published()))
    ), f"run: python docs/refresh.py, or {COMMAND}"


def test_live_bytes_and_bytes_on_the_wire_keep_their_budget() -> None:
    result = compared("fake", "cpu")
    assert result.refused == {} and len(result.comparison.verdicts) > 0
    assert judge(result.comparison, parse_budgets(["peak_allocated_bytes=0.1", "host_bytes=0"])) == ()


def test_published_runs_keep_their_budgets() -> None:
    assert broken_budgets(published().groups, parse_published_budgets(BUDGETS)) == []


def test_constants_were_fitted_by_todays_forecasts() -> None:
    """The errors of left-out runs are shipped beside the constants: they must be those of runs that are still forecast."""
    known = {run_id for own in shipped_stacks().errors.values() for run_id in own}
    forecast = {row.run_id for row in published().rows if row.step_time_s is not None}
    timed = {run.run_id for run in PUBLISHED if run.number("step_time_s")}
    assert known == forecast & timed


def test_only_the_line_of_dates_and_versions_is_not_held() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    loose = set(lines) - set(stable_part("\n".join(lines)).splitlines())
    assert len(loose) == 1 and "Zerocast" in loose.pop()


def test_records_have_the_names_that_the_readme_asks_for() -> None:
    names = [path.name for path in RECORDS.iterdir() if path.name != "README.md"]
    pattern = re.compile(r"[a-z0-9][a-z0-9.-]*_torch\d+\.\d+\.\d+(_\d+)?(\.kernels)?\.(jsonl|profile\.json)")
    assert names and all(pattern.fullmatch(name) for name in names), names


def test_records_name_no_host_and_no_folder() -> None:
    for file in FILES:
        for report in file.reports:
            assert re.fullmatch(r"host-[0-9a-f]{8}", report.provenance["host"]), file.path
            assert not any("/" in word for word in report.provenance["command"]), file.path
