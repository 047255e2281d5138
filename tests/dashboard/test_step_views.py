"""Rows, charts and pictures of a step's views."""

from __future__ import annotations

import pytest

from dashboard.step_data import (
    memory_over_step_rows,
    pass_rows,
    remedy_rows,
    roofline_rows,
    thinned,
    waterfall_rows,
)
from estimator.job.options import JobOptions, build_job
from estimator.units import GIB
from estimator.views.memory import MemoryCurve, MemorySample, memory_over_step
from estimator.views.remedies import find_remedies
from estimator.views.roofline import roof_of, roofline
from estimator.views.step import StepView, view_step
from estimator.views.waterfall import Term, waterfall

TERMS = (Term("ideal", "ideal", 0.004), Term("matmul", "products", 0.003), Term("attention", "attention", -0.001))
SAMPLES = (
    MemorySample(0.0, "start", {"params": 1 << 30}, 0),
    MemorySample(0.002, "forward a", {"params": 1 << 30, "activations": 3 << 30}, 0, True),
    MemorySample(0.004, "end", {"params": 1 << 30}, 0),
)
CURVE = MemoryCurve(SAMPLES, SAMPLES[1], 0, ())


@pytest.fixture(scope="module")
def view() -> StepView:
    return view_step(build_job(JobOptions(model="gpt2", gpu="h100-sxm", gpus=8, seq_len=512, zero=2, global_batch=256)))


def test_terms_begin_where_the_one_before_ends_and_the_step_is_last() -> None:
    rows = waterfall_rows(TERMS)
    assert [(r["start_s"], r["end_s"]) for r in rows] == [
        (0.0, 0.004), (0.004, 0.007), (0.007, pytest.approx(0.006)), (0.0, pytest.approx(0.006)),
    ]  # fmt: skip
    assert [r["share"] for r in rows] == pytest.approx([2 / 3, 1 / 2, -1 / 6, 1.0])
    assert rows[-1]["term"] == "step"


def test_every_sample_has_a_row_for_each_category() -> None:
    rows = memory_over_step_rows(CURVE)
    assert [(r["time_s"], r["category"], r["bytes"] >> 30) for r in rows] == [
        (0.0, "params", 1), (0.0, "activations", 0), (0.002, "params", 1), (0.002, "activations", 3), (0.004, "params", 1),
        (0.004, "activations", 0),
    ]  # fmt: skip
    assert [r["below_bytes"] >> 30 for r in rows] == [0, 1] * 3


def test_thinning_keeps_the_peak(view: StepView) -> None:
    curve = memory_over_step(view)
    few = thinned(curve.samples, 20)
    assert len(few) <= 21 and few[-1] is curve.samples[-1] and len(curve.samples) > 100
    assert few[0].total_bytes >= curve.samples[0].total_bytes
    assert curve.peak.total_bytes == max(s.total_bytes for s in few)
    assert thinned(curve.samples, len(curve.samples)) == list(curve.samples)


def test_tables_have_the_peak_the_changes_and_the_operators(view: StepView) -> None:
    curve = memory_over_step(view)
    passes = pass_rows(curve)
    assert sum("(peak)" in row["event"] for row in passes) == 1
    assert passes[0]["event"] == "start of the step" and passes[-1]["event"] == "end of the step"
    found = find_remedies(view.job)
    rows = remedy_rows(found.tried)
    assert [r["change"] for r in rows] == [r.change.words for r in found.tried]
    assert all(
        row["memory"][0] == ("-" if r.saved_bytes > 0 else "+") for row, r in zip(rows, found.tried, strict=True)
    )
    operators = roofline_rows(roofline(view), view.report.step_s)
    assert len(operators) == len(roofline(view)) and all(row["operator"] for row in operators)


# ---- charts -----------------------------------------------------------------------------------------------------------


def test_bars_of_the_waterfall_float() -> None:
    pytest.importorskip("altair", reason="needs altair")
    from dashboard.charts import waterfall_bars

    chart = waterfall_bars(waterfall_rows(TERMS)).to_dict()
    bars, labels = chart["layer"]
    assert bars["encoding"]["x"]["field"] == "from" and bars["encoding"]["x2"]["field"] == "to"
    values = chart["data"]["values"] if "data" in chart else bars["data"]["values"]
    assert [(v["from"], v["to"]) for v in values] == [
        (0.0, 4.0), (4.0, 7.0), (7.0, pytest.approx(6.0)), (0.0, pytest.approx(6.0)),
    ]  # fmt: skip
    assert bars["encoding"]["x"]["scale"]["domain"][1] > 7.0
    assert len(bars["encoding"]["color"]["scale"]["range"]) == 4 and labels["encoding"]["text"]["field"] == "text"


@pytest.mark.parametrize(("capacity", "lines"), [(80, 0), (5, 1), (None, 0)])
def test_capacity_is_drawn_where_it_is_near(capacity: int | None, lines: int) -> None:
    pytest.importorskip("altair", reason="needs altair")
    from dashboard.charts import memory_area

    chart = memory_area(memory_over_step_rows(CURVE), capacity and capacity * GIB).to_dict()
    assert len(chart["layer"]) == 1 + lines
    area = chart["layer"][0]
    assert area["mark"]["interpolate"] == "step-after" and area["encoding"]["y"]["stack"] is None
    values = chart["data"]["values"] if "data" in chart else area["data"]["values"]
    assert [(v["low"], v["high"]) for v in values if v["ms"] == 2.0] == [(0.0, 1.0), (1.0, 4.0)]
    assert area["encoding"]["y"]["scale"]["domain"] == [0, pytest.approx(1.05 * (5 if lines else 4))]


# ---- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_show_the_rows(view: StepView) -> None:
    pytest.importorskip("matplotlib")
    from dashboard.step_plots import memory_figure, roofline_figure, waterfall_figure

    terms = waterfall(view)
    (axes,) = waterfall_figure(terms, "title").axes
    widths = [bar.get_width() for bar in axes.patches]
    size = 1e-3 if "ms" in axes.get_xlabel() else 1.0
    assert widths == pytest.approx([abs(t.seconds) / size for t in terms] + [view.report.step_s / size])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [*(t.label for t in terms), "step"]

    curve = memory_over_step(view)
    figure = memory_figure(curve, None, "title")
    (axes,) = figure.axes
    assert axes.get_ylim()[1] > curve.peak.total_bytes / GIB
    (gap,) = curve.gaps
    assert any(f"{gap.repeats} more alike" in text.get_text() for text in axes.texts)
    shown = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"activations", "optimizer state"} <= shown

    points = roofline(view)
    (axes,) = roofline_figure(points, roof_of(view), "title").axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == sum(p.flops > 0 for p in points)
