"""Plots: the right files, nothing drawn from nothing, and what is on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dashboard.plots import write_plots
from estimator.errors import InputError
from estimator.job.options import JobOptions, build_job
from estimator.predict import predict
from estimator.report import StepReport
from estimator.units import GIB
from validator.compare import Comparison, compare

pytest.importorskip("matplotlib")
PEAK, STEP = "peak_allocated_bytes", "step_s"


def compared(**changes: dict[int, dict]) -> Comparison:
    """gpt2 at three micro-batches, measured on two backends, each step 10 % longer than the one before says."""
    predicted, measured = [], []
    for i, micro in enumerate((1, 2, 4)):
        job = build_job(JobOptions(model="gpt2", gpu="h100-sxm", gpus=8, zero=i + 1, seq_len=128, micro_batch=micro))
        forecast = predict(job)
        predicted.append(forecast)
        fields = {**vars(forecast), "origin": "cuda" if i else "cpu", "step_s": forecast.step_s * (1 + 0.1 * i)}
        measured.append(StepReport(**{**fields, **changes.get(f"run{i}", {})}))
    return compare(predicted, measured)


@pytest.fixture
def figures(monkeypatch) -> dict[str, object]:
    """Catches every figure by the name of its file, on its way to the disk."""
    from matplotlib.figure import Figure

    caught: dict[str, object] = {}
    save = Figure.savefig

    def keep(self, path, **kwargs):
        caught[Path(path).stem] = self
        save(self, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return caught


def test_three_pngs_for_each_term(tmp_path) -> None:
    written, missing = write_plots(compared(), tmp_path / "new" / "plots", (PEAK, STEP))
    assert [path.name for path in written] == [
        f"{t}_{k}.png" for t in (PEAK, STEP) for k in ("scatter", "residuals", "groups")
    ]
    assert missing == [] and all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_points_are_the_rows_in_their_units(tmp_path, figures) -> None:
    comparison = compared()
    write_plots(comparison, tmp_path, (PEAK, STEP))
    for term, unit, size in ((PEAK, "GiB", GIB), (STEP, "ms", 1e-3)):
        rows = [row for row in comparison.rows if row.term == term]
        axes = figures[f"{term}_scatter"].axes[0]
        drawn = sorted(
            tuple(point) for dots in axes.collections for point in dots.get_offsets() if dots.get_label().endswith(")")
        )
        assert drawn == [pytest.approx(p) for p in sorted((r.measured / size, r.predicted / size) for r in rows)]
        assert axes.get_xlabel() == f"measured, {unit}" and axes.get_ylabel() == f"predicted, {unit}"
        assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_xlim() == axes.get_ylim()
        assert {text.get_text() for text in axes.get_legend().get_texts()} == {
            "within 10%", "predicted = measured", "cpu (1)", "cuda (2)",
        }  # fmt: skip
        errors = sorted(
            point[1] for dots in figures[f"{term}_residuals"].axes[0].collections for point in dots.get_offsets()
        )
        assert errors == pytest.approx(sorted(100 * row.error for row in rows))


def test_only_groupings_that_differ_have_a_panel(tmp_path, figures) -> None:
    write_plots(compared(), tmp_path, (STEP,))
    assert [axes.get_title() for axes in figures[f"{STEP}_groups"].axes] == ["by backend", "by stage"]


def test_colours_are_gpus_where_only_they_differ(tmp_path, figures) -> None:
    forecasts = [
        predict(build_job(JobOptions(model="gpt2", gpu=gpu, gpus=1, seq_len=128))) for gpu in ("h100-sxm", "a100-80")
    ]
    measured = [StepReport(**{**vars(f), "origin": "cuda"}) for f in forecasts]
    write_plots(compare(forecasts, measured), tmp_path, (STEP,))
    legend = figures[f"{STEP}_scatter"].axes[0].get_legend()
    assert legend.get_title().get_text() == "gpu"


def test_a_term_without_rows_is_told_and_not_drawn(tmp_path) -> None:
    nothing = {f"run{i}": {"step_s": None} for i in range(3)}
    written, missing = write_plots(compared(**nothing), tmp_path, (STEP,))
    assert written == [] and list(tmp_path.iterdir()) == []
    assert missing == ["no plot of step time: no run has both a forecast and a measurement above 0"]


def test_zeros_cannot_be_drawn_on_a_logarithm_and_are_told(tmp_path) -> None:
    written, missing = write_plots(compared(run0={"host_bytes": 0}, run1={"host_bytes": 7}), tmp_path, ("host_bytes",))
    assert written == [] and "host memory" in missing[0]  # nothing is offloaded: every forecast is 0
    written, missing = write_plots(compared(run0={"step_s": 0.0}), tmp_path, (STEP,))
    assert len(written) == 3 and missing == ["not in the plots of step time: 1 runs with a 0"]


def test_a_single_run_has_no_plot_by_group(tmp_path, figures) -> None:
    gone = {f"run{i}": {"step_s": None} for i in (1, 2)}
    written, missing = write_plots(compared(**gone), tmp_path, (STEP,))
    assert [path.stem for path in written] == [f"{STEP}_scatter", f"{STEP}_residuals"]
    assert missing == ["no plot of step time by group: all runs are of the same groups"]
    axes = figures[f"{STEP}_scatter"].axes[0]
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2, "an axis of a single point still has numbers"


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="plots folder"):
        write_plots(compared(), tmp_path / "file" / "plots", (STEP,))
