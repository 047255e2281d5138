"""Rows for tables and charts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dashboard.charts import CATEGORY_COLOURS, PART_COLOURS, memory_bar, time_bars
from dashboard.data import (
    CATEGORY_LABELS,
    OUTSIDE,
    PART_LABELS,
    blame_sentence,
    memory_rows,
    needed_bytes,
    percent,
    strategy_row,
    strategy_rows,
    strategy_table,
    time_rows,
)
from estimator.report import CATEGORIES, TIME_PARTS, StepReport
from estimator.units import GIB
from validator.compare import Blame

REPORT = StepReport(
    origin="predicted",
    job_key="0" * 16,
    job={"strategy": {"zero_stage": 3, "offload": "none", "recompute": "full"}, "workload": {"micro_batch_size": 2}},
    peak_allocated_bytes=30 * GIB,
    device_used_bytes=33 * GIB,
    category_bytes_at_peak={"activations": 20 * GIB, "params": 10 * GIB, "grads": 0},
    category_peak_bytes={"activations": 21 * GIB, "params": 10 * GIB, "grads": 2 * GIB, "workspace": 0},
    time_parts_s={"backward": 0.6, "forward": 0.3, "optimizer": 0.1, "data": 0.0},
    step_s=1.0,
    tokens_per_s=1000.4,
    mfu=0.4567,
    capacity_bytes=80 * GIB,
    fits=True,
)


def test_every_category_and_part_has_a_label_and_a_colour() -> None:
    assert tuple(CATEGORY_LABELS) == CATEGORIES and set(CATEGORY_COLOURS) == {*CATEGORIES, OUTSIDE}
    assert tuple(PART_LABELS) == TIME_PARTS and set(PART_COLOURS) == set(TIME_PARTS)
    for table in (CATEGORY_LABELS, CATEGORY_COLOURS, PART_LABELS, PART_COLOURS):
        assert len(set(table.values())) == len(table)


def test_memory_rows_keep_the_order_and_leave_out_what_is_empty() -> None:
    rows = memory_rows(REPORT)
    assert [r["category"] for r in rows] == ["params", "grads", "activations", OUTSIDE]
    assert [r["at_peak_bytes"] for r in rows] == [10 * GIB, 0, 20 * GIB, 3 * GIB]
    assert [r["own_peak_bytes"] for r in rows] == [10 * GIB, 2 * GIB, 21 * GIB, None]


def test_memory_rows_add_up_to_what_is_needed() -> None:
    assert sum(r["at_peak_bytes"] for r in memory_rows(REPORT)) == needed_bytes(REPORT)
    live_only = replace(REPORT, device_used_bytes=None)
    assert sum(r["at_peak_bytes"] for r in memory_rows(live_only)) == REPORT.peak_allocated_bytes


def test_time_rows_share_the_step() -> None:
    rows = time_rows(REPORT)
    assert [r["part"] for r in rows] == ["forward", "backward", "optimizer"]
    assert sum(r["share"] for r in rows) == pytest.approx(1.0)


def test_unknown_stays_unknown() -> None:
    empty = StepReport(origin="fake", job_key="0" * 16)
    assert memory_rows(empty) == time_rows(empty) == []
    assert needed_bytes(empty) is None
    assert set(strategy_row(empty).values()) == {None}


def test_needed_bytes_prefers_the_most_complete_figure() -> None:
    assert needed_bytes(REPORT) == 33 * GIB
    assert needed_bytes(replace(REPORT, device_used_bytes=None)) == 30 * GIB
    assert needed_bytes(replace(REPORT, device_used_bytes=None, peak_reserved_bytes=31 * GIB)) == 31 * GIB


def test_strategies_are_ordered_by_stage_and_offload() -> None:
    def variant(stage: int, offload: str) -> StepReport:
        strategy = {"zero_stage": stage, "offload": offload, "recompute": "none"}
        return replace(REPORT, job={**REPORT.job, "strategy": strategy})

    reports = [variant(3, "none"), variant(0, "optimizer,param"), variant(0, "none"), variant(0, "optimizer")]
    order = [(r["zero_stage"], r["offload"]) for r in strategy_rows(reports)]
    assert order == [(0, "none"), (0, "optimizer"), (0, "optimizer,param"), (3, "none")]


def test_table_has_units() -> None:
    (row,) = strategy_table([strategy_row(REPORT)])
    assert (
        row["needs (GiB)"] == 33.0 and row["step (ms)"] == 1000.0 and row["tokens/s"] == 1000 and row["MFU (%)"] == 45.7
    )
    assert row["host (GiB)"] is None and row["fits"] == "yes"


def test_memory_bar_stacks_to_the_peak_and_marks_the_capacity() -> None:
    spec = memory_bar(memory_rows(REPORT), REPORT.capacity_bytes).to_dict()
    bar, rule, text = spec["layer"]
    assert sum(v["GiB"] for v in bar["data"]["values"]) == pytest.approx(33.0)
    assert rule["data"]["values"][0]["GiB"] == pytest.approx(80.0)
    assert "80.0 GiB" in text["data"]["values"][0]["text"]
    low, high = bar["encoding"]["x"]["scale"]["domain"]
    assert low == 0 and high > 80


def test_time_bars_are_milliseconds() -> None:
    spec = time_bars(time_rows(REPORT)).to_dict()
    assert [v["ms"] for v in spec["data"]["values"]] == pytest.approx([300, 600, 100])


def blame(total: str = "peak_allocated_bytes", **changes) -> Blame:
    fields = {"error": -0.032, "term": "category_bytes_at_peak.activations", "difference": -410 << 20, **changes}
    return Blame(case="case", job_key="0" * 16, origin="cuda", total=total, **fields)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (blame(), "peak 3.2% low: activations 410.00 MiB short"),
        (blame(error=0.032, difference=410 << 20), "peak 3.2% high: activations 410.00 MiB over"),
        (blame(error=0.0, difference=0), "peak exact"),
        (blame(error=-1e-6, difference=-8), "peak <0.01% low: activations 8 B short"),
        (
            blame(measured_where="backward of head", predicted_where="optimizer"),
            "peak 3.2% low: activations 410.00 MiB short, in backward of head (forecast: in optimizer)",
        ),
        (
            blame(measured_where="backward of head", predicted_where="backward of head"),
            "peak 3.2% low: activations 410.00 MiB short, in backward of head",
        ),
        (
            blame(term="category_bytes_at_peak.rest"),
            "peak 3.2% low: bytes outside the metered categories 410.00 MiB short",
        ),
        (
            blame("step_s", error=0.5, term="time_parts_s.exposed_gather", difference=0.25),
            "step 50.0% high: waiting for parameters 250 ms over",
        ),
        (blame("step_s", error=0.5, term=None, difference=None), "step 50.0% high"),
        (
            blame("collective_bytes", error=0.0, term="collective_bytes.all_gather", difference=4),
            "bytes on the wire equal in sum: all_gather 4 B over",
        ),
        (
            blame("collective_bytes", error=None, term="collective_bytes.all_reduce", difference=4),
            "bytes on the wire forecast, none measured: all_reduce 4 B over",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_blame_is_a_sentence(given: Blame, sentence: str) -> None:
    assert blame_sentence(given) == sentence


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "-"), (0.0, "0%"), (1e-9, "<0.01%"), (0.00123, "0.12%"), (0.0123, "1.2%"), (12.0, "1200.0%")],
)
def test_percent_tells_exact_from_small(size: float | None, text: str) -> None:
    assert percent(size) == text
