"""First tab: choose a job, see its memory, its time, and every other stage and offload beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import streamlit as st

from dashboard.charts import memory_area, memory_bar, time_bars, waterfall_bars
from dashboard.data import memory_rows, memory_table, needed_bytes, strategy_rows, strategy_table, time_rows
from dashboard.profiles import local_machine, profile_of, profiles_beside
from dashboard.step_data import memory_over_step_rows, remedy_rows, waterfall_rows
from estimator.catalog import gpu_names, model_names
from estimator.job.options import JobOptions, build_job
from estimator.job.strategy import Dtype, Offload, Recompute
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.plan import alternatives
from estimator.plan.question import STAGES
from estimator.time.profile_file import load_profile
from estimator.units import format_bytes, format_seconds
from estimator.views.memory import memory_over_step
from estimator.views.remedies import find_remedies
from estimator.views.step import view_step
from estimator.views.waterfall import waterfall
from estimator.views.words import NAMED, memory_remedy_words, peak_words, surprises, time_remedy_words, time_words

if TYPE_CHECKING:
    from estimator.job import Job
    from estimator.report import StepReport
    from estimator.time.profile import HardwareProfile
    from estimator.views.step import StepView

OWN_CONFIG = "a config.json of mine ..."
DEFAULT_MODEL, DEFAULT_GPU = "llama-3-8b", "h100-sxm"
ROW_PIXELS = 35


def forecast_tab(store_path: Path | None, profile_path: Path | None) -> None:
    """The whole tab. Raises ``InputError`` on a job that cannot exist or a profile that cannot be read."""
    profiles = [load_profile(profile_path)] if profile_path else profiles_beside(store_path)
    machine = local_machine(profiles)
    here: dict[str, Any] = {"local_gpu": machine.gpu, "local_host": machine.host} if machine else {}
    job = build_job(_controls([p.gpu.name for p in profiles if p.gpu is not None]), **here)
    profile = profiles[0] if profile_path else profile_of(job.cluster.gpu.name, profiles)
    view = view_step(job, profile, allocator=AllocatorSettings())
    report = view.report
    _key_figures(report)
    st.subheader("Memory of one GPU")
    st.altair_chart(memory_bar(memory_rows(report), report.capacity_bytes), width="stretch")
    st.caption(_memory_caption(report))
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Time of one step")
        st.altair_chart(time_bars(time_rows(report)), width="stretch")
        st.caption(_time_caption(report))
    with right:
        st.subheader("Memory by category")
        st.dataframe(memory_table(memory_rows(report)), hide_index=True, width="stretch")
    _why(view, profile)
    st.subheader("Every ZeRO stage and offload for this job")
    table = strategy_table(strategy_rows(alternatives(job, profile)))
    st.dataframe(table, hide_index=True, width="stretch", height=ROW_PIXELS * (len(table) + 1) + 2)
    if report.notes:
        with st.expander(f"Where the numbers come from ({len(report.notes)} notes)"):
            for note in report.notes:
                st.markdown(f"- {note}")


def _why(view: StepView, profile: HardwareProfile | None) -> None:
    """Memory over the step, and the waterfall of its time, each with its sentences."""
    curve, terms = memory_over_step(view), waterfall(view)
    st.subheader("Memory over the step")
    st.altair_chart(memory_area(memory_over_step_rows(curve), view.report.capacity_bytes), width="stretch")
    gaps = [f"{gap.repeats} micro-batches like those before are left out." for gap in curve.gaps]
    st.caption(" ".join([*peak_words(view, curve), *gaps]))
    st.subheader("Where the time goes")
    st.altair_chart(waterfall_bars(waterfall_rows(terms)), width="stretch")
    st.caption(" ".join(time_words(view, terms)))
    if st.button("What would change it?", key="remedies"):
        _remedies(view.job, profile)


def _remedies(job: Job, profile: HardwareProfile | None) -> None:
    """Forecasts of the job with one thing changed: the best in words, all in a table."""
    found = find_remedies(job, profile, allocator=AllocatorSettings())
    best = [memory_remedy_words(remedy, found) for remedy in found.for_memory[:NAMED]]
    best += [time_remedy_words(remedy, found) for remedy in found.for_time[:NAMED]]
    for words in [*best, *surprises(found, job.zero_stage)]:
        st.markdown(f"- {words}")
    st.dataframe(remedy_rows(found.tried), hide_index=True, width="stretch")


def _controls(measured_gpus: Sequence[str]) -> JobOptions:
    with st.sidebar:
        st.header("Job")
        models, gpus = [*model_names(), OWN_CONFIG], list(dict.fromkeys([*gpu_names(), *measured_gpus]))
        model = st.selectbox("Model", models, index=_index(models, DEFAULT_MODEL), key="model")
        if model == OWN_CONFIG:
            model = st.text_input("Path of config.json", key="model_path")
        gpu = st.selectbox("GPU", gpus, index=_index(gpus, DEFAULT_GPU), key="gpu")
        left, right = st.columns(2)
        n_gpus = left.number_input("GPUs", min_value=1, value=8, key="gpus")
        per_node = right.number_input("per node", min_value=1, value=8, key="gpus_per_node")
        st.header("Strategy")
        stage = st.radio("ZeRO stage", STAGES, index=3, key="zero", horizontal=True)
        offload = st.selectbox("Offload to host memory", get_args(Offload), key="offload")
        recompute = st.selectbox("Recompute activations", get_args(Recompute), key="recompute")
        dtype = st.selectbox("Dtype", get_args(Dtype), index=_index(get_args(Dtype), "bf16"), key="dtype")
        st.header("Batch")
        seq_len = st.number_input("Tokens per sequence", min_value=1, value=4096, key="seq_len")
        left, right = st.columns(2)
        micro = left.number_input("Micro-batch", min_value=1, value=1, key="micro_batch")
        total = right.number_input("Global batch", min_value=1, value=8, key="global_batch")
    return JobOptions(
        model=model, gpu=gpu, gpus=int(n_gpus), gpus_per_node=int(per_node), zero=stage, offload=offload,
        recompute=recompute, dtype=dtype, seq_len=int(seq_len), micro_batch=int(micro), global_batch=int(total),
    )  # fmt: skip


def _index(names: Any, wanted: str) -> int:
    return list(names).index(wanted) if wanted in names else 0


def _key_figures(report: StepReport) -> None:
    needed = needed_bytes(report)
    figures = {
        "Needs per GPU": format_bytes(needed) if needed is not None else "-",
        "Fits": {True: "yes", False: "no", None: "unknown"}[report.fits],
        "Step": format_seconds(report.step_s) if report.step_s is not None else "-",
        "Tokens per second": f"{report.tokens_per_s:,.0f}" if report.tokens_per_s is not None else "-",
        "MFU": f"{report.mfu:.1%}" if report.mfu is not None else "-",
    }
    for column, (label, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
        column.metric(label, value, border=True)
    if report.explanation:
        (st.info if report.fits else st.error)(report.explanation)


def _memory_caption(report: StepReport) -> str:
    where = f" in {report.peak_where or report.peak_phase}" if report.peak_where or report.peak_phase else ""
    host = f" This rank keeps {format_bytes(report.host_bytes)} in host memory." if report.host_bytes else ""
    return f"Live tensors peak at {format_bytes(report.peak_allocated_bytes or 0)}{where}.{host}"


def _time_caption(report: StepReport) -> str:
    if report.step_s is None or report.step_low_s is None or report.step_high_s is None:
        return ""
    return f"The step takes between {format_seconds(report.step_low_s)} and {format_seconds(report.step_high_s)}."
