"""The page through Streamlit's own test harness: figures equal ``predict``'s, mistakes are sentences, stores may be empty."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import dashboard
from estimator.job import Job
from estimator.job.options import JobOptions, build_job
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.predict import predict
from estimator.report import StepReport
from estimator.time.profile import HardwareProfile
from estimator.units import format_bytes, format_seconds
from estimator.views.memory import memory_over_step
from estimator.views.remedies import find_remedies
from estimator.views.step import view_step
from estimator.views.waterfall import waterfall
from estimator.views.words import memory_remedy_words, peak_words, time_words
from validator.store.database import Store

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

PAGE = str(Path(dashboard.__file__).with_name("app.py"))
DEFAULTS = JobOptions(
    model="llama-3-8b", gpu="h100-sxm", gpus=8, gpus_per_node=8, zero=3, seq_len=4096, micro_batch=1, global_batch=8
)


def forecast_of(job: Job, profile: HardwareProfile | None = None) -> StepReport:
    """As the page forecasts: with the allocator."""
    return predict(job, profile, allocator=AllocatorSettings())


def page(monkeypatch: pytest.MonkeyPatch, *args: str) -> AppTest:
    monkeypatch.setattr(sys, "argv", [PAGE, *args])
    return AppTest.from_file(PAGE, default_timeout=60).run()


def metrics(app: AppTest) -> dict[str, str]:
    return {m.label: m.value for m in app.metric}


def sentences(app: AppTest) -> list[str]:
    assert not app.exception, [e.value for e in app.exception]
    return [e.value for e in app.error]


def test_first_page_shows_what_predict_says(monkeypatch) -> None:
    app = page(monkeypatch)
    assert not sentences(app)
    report = forecast_of(build_job(DEFAULTS))
    shown = metrics(app)
    assert shown["Needs per GPU"] == format_bytes(report.device_used_bytes)
    assert shown["Step"] == format_seconds(report.step_s)
    assert shown["Tokens per second"] == f"{report.tokens_per_s:,.0f}"
    assert shown["MFU"] == f"{report.mfu:.1%}"
    assert shown["Fits"] == ("yes" if report.fits else "no")


def test_first_page_says_why(monkeypatch) -> None:
    app = page(monkeypatch)
    assert not sentences(app)
    view = view_step(build_job(DEFAULTS), allocator=AllocatorSettings())
    captions = [caption.value for caption in app.caption]
    for words in (peak_words(view, memory_over_step(view)), time_words(view, waterfall(view))):
        assert " ".join(words) in captions
    charts = [json.loads(chart.proto.spec) for chart in app.get("vega_lite_chart")]
    titles = {
        layer["encoding"].get(axis, {}).get("title") for c in charts for layer in c["layer"] for axis in ("x", "y")
    }
    assert {"ms into the step's program", "ms of one step", "GiB on one GPU"} <= titles


def test_remedies_come_when_they_are_asked_for(monkeypatch) -> None:
    app = page(monkeypatch)
    assert len(app.dataframe) == 2
    app.button(key="remedies").click().run()
    assert not sentences(app)
    found = find_remedies(build_job(DEFAULTS), allocator=AllocatorSettings())
    (table,) = [d.value for d in app.dataframe if "change" in d.value.columns]
    assert list(table["change"]) == [remedy.change.words for remedy in found.tried]
    shown = [m.value for m in app.markdown]
    assert f"- {memory_remedy_words(found.for_memory[0], found)}" in shown


def test_changing_the_strategy_changes_the_figures(monkeypatch) -> None:
    app = page(monkeypatch)
    before = metrics(app)
    app.selectbox(key="recompute").set_value("full")
    app.selectbox(key="offload").set_value("optimizer")
    app.run()
    assert not sentences(app)
    from dataclasses import replace

    report = forecast_of(build_job(replace(DEFAULTS, recompute="full", offload="optimizer")))
    assert metrics(app)["Needs per GPU"] == format_bytes(report.device_used_bytes) != before["Needs per GPU"]


def test_table_has_every_stage_and_offload(monkeypatch) -> None:
    table = page(monkeypatch).dataframe[1].value
    assert len(table) == 12
    assert set(table["ZeRO"]) == {0, 1, 2, 3}
    assert (table["needs (GiB)"] > 0).all()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("global_batch", 9, "global_batch is 9"), ("gpus", 12, "gpus is 12")],
)
def test_a_mistake_is_a_sentence(monkeypatch, key: str, value: int, words: str) -> None:
    app = page(monkeypatch)
    app.number_input(key=key).set_value(value).run()
    (error,) = sentences(app)
    assert words in error


def test_an_unknown_config_is_a_sentence(monkeypatch) -> None:
    app = page(monkeypatch)
    app.selectbox(key="model").set_value("a config.json of mine ...").run()
    app.text_input(key="model_path").set_value("/nowhere/config.json").run()
    (error,) = sentences(app)
    assert "/nowhere/config.json" in error


def test_an_empty_store_says_what_to_run(monkeypatch, home) -> None:
    app = page(monkeypatch)
    assert not sentences(app)
    assert any("zerocast measure" in code.value for code in app.code)
    assert not list(home.iterdir())


def test_a_corrupt_store_is_a_sentence(monkeypatch, tmp_path) -> None:
    store = tmp_path / "runs.db"
    store.write_bytes(b"no database " * 100)
    (error,) = sentences(page(monkeypatch, "--store", str(store)))
    assert "runs.db" in error


def test_a_missing_profile_is_a_sentence(monkeypatch) -> None:
    errors = sentences(page(monkeypatch, "--profile", "/nowhere/profile.json"))
    assert errors and all("/nowhere/profile.json" in e for e in errors)


def recorded(tmp_path: Path, **changes) -> Path:
    """A store with one run that is the forecast itself with ``changes``."""
    from dataclasses import replace

    forecast = forecast_of(build_job(DEFAULTS))
    path = tmp_path / "runs.db"
    counted = {"peak_allocated_bytes": forecast.allocator_bytes, **changes}  # what torch counts on a GPU
    Store(path).add(replace(forecast, origin="cuda", notes=(), **counted))
    return path


def test_recorded_runs_stand_beside_their_forecast(monkeypatch, tmp_path) -> None:
    forecast = predict(build_job(DEFAULTS))
    store = recorded(tmp_path, step_s=forecast.step_s * 2)
    app = page(monkeypatch, "--store", str(store))
    assert not sentences(app)
    shown = metrics(app)
    assert shown["Recorded runs"] == "1"
    assert shown["Peak memory, median error"] == "0.0%"
    assert shown["Step time, median error"] == "50.0%"
    assert shown["Bytes on the wire"] == "equal"
    tables = [d.value for d in app.dataframe]
    (blame,) = [t for t in tables if "run" in t.columns]
    assert blame["error"].iloc[0] == "-50.0%"
    (totals,) = [t for t in tables if "term" in t.columns and "step time" in set(t["term"])]
    row = totals[totals["term"] == "step time"].iloc[0]
    assert row["predicted"] == format_seconds(forecast.step_s)
    assert row["measured"] == format_seconds(forecast.step_s * 2)
    assert totals.iloc[0]["error"] in ("-50.0%", "+100.0%")


def test_errors_by_group_are_those_of_the_validator(monkeypatch, tmp_path) -> None:
    from dataclasses import replace

    store = recorded(tmp_path)
    for stage, factor in ((1, 2.0), (2, 1.25)):
        forecast = predict(build_job(replace(DEFAULTS, zero=stage)))
        Store(store).add(replace(forecast, origin="cuda", notes=(), step_s=forecast.step_s * factor))
    app = page(monkeypatch, "--store", str(store))
    app.selectbox(key="group_by").set_value("stage")
    app.selectbox(key="group_term").set_value("step_s")
    app.run()
    assert not sentences(app)
    (groups,) = [d.value for d in app.dataframe if "stage" in d.value.columns]
    assert dict(zip(groups["stage"], groups["bias"], strict=True)) == {"1": "-50.0%", "2": "-20.0%", "3": "+0.0%"}
    assert dict(zip(groups["stage"], groups["median error"], strict=True)) == {"1": "50.0%", "2": "20.0%", "3": "0%"}


def test_a_run_that_cannot_be_forecast_says_so(monkeypatch, tmp_path) -> None:
    path = tmp_path / "runs.db"
    Store(path).add(StepReport(origin="cpu", job_key="f" * 16, step_s=1.0))
    app = page(monkeypatch, "--store", str(path))
    assert not sentences(app)
    assert any("f" * 16 in w.value for w in app.warning)


def test_a_calibrated_machine_can_be_chosen(monkeypatch, home) -> None:
    from dataclasses import replace

    from estimator import catalog
    from estimator.time.profile import shipped_profiles
    from estimator.time.profile_file import save_profile

    mine = replace(catalog.gpu("h200"), name="my-h200")
    shipped = next(p for p in shipped_profiles() if p.arch == "hopper")
    profile = replace(shipped, name="mine", gpu=mine, host=catalog.host_of("h200"))
    save_profile(profile, home / "profiles" / "my-h200.json")
    app = page(monkeypatch)
    app.selectbox(key="gpu").set_value("my-h200").run()
    assert not sentences(app)
    job = build_job(replace(DEFAULTS, gpu="my-h200"), local_gpu=profile.gpu, local_host=profile.host)
    assert metrics(app)["Step"] == format_seconds(predict(job, profile).step_s)
