"""Second tab: recorded runs, predicted beside measured, worst error first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from dashboard.charts import error_bars
from dashboard.data import blame_table, compared_rows, compared_table, group_table, refusals, term_label, worst_first
from dashboard.profiles import profiles_beside
from estimator.time.profile_file import load_profile
from validator.compare import GATED, GROUPINGS, Compared, compare, compare_records, group_errors, label_of
from validator.store.database import Record, Store

GROUPS = {
    "Totals": (
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "device_used_bytes",
        "host_bytes",
        "step_s",
        "tokens_per_s",
    ),
    "Memory by category": ("category_peak_bytes",),
    "Time by part": ("time_parts_s",),
    "Communication": ("collective_bytes", "copy_bytes"),
}
"""Heading -> fields of ``StepReport`` under it."""


def runs_tab(store_path: Path | None, profile_path: Path | None) -> None:
    """The whole tab. Raises ``InputError`` on a store or profile that cannot be read."""
    store = Store(store_path)
    records = [r for r in store.records() if r.report.origin != "predicted"]
    if not records:
        st.info(f"No runs are recorded in {store.path} yet. Calibrate this machine once and measure one:")
        st.code("zerocast calibrate\nzerocast measure --model gpt-30m --gpus 2 --zero 2", language="bash")
        return
    profiles = [load_profile(profile_path)] if profile_path else profiles_beside(store_path)
    result = compare_records([r.report for r in records], profiles)
    _summary(result, len(records))
    _by_group(result)
    _one_run(records, result)


def _summary(result: Compared, n_runs: int) -> None:
    comparison = result.comparison
    by_term = {s.term: s for s in comparison.summaries}
    columns = st.columns(4)
    columns[0].metric("Recorded runs", n_runs, border=True)
    for column, term, label in (
        (columns[1], "peak_allocated_bytes", "Peak memory"),
        (columns[2], "step_s", "Step time"),
    ):
        median = by_term[term].median if term in by_term else None
        column.metric(f"{label}, median error", "-" if median is None else f"{median:.1%}", border=True)
    compared_bytes = any(row.must_be_exact for row in comparison.rows)
    equal = "equal" if not comparison.inexact else f"{len(comparison.inexact)} differ"
    columns[3].metric("Bytes on the wire", equal if compared_bytes else "-", border=True)
    for reason, keys in refusals(result.refused).items():
        st.warning(f"No forecast for {f'{len(keys)} jobs' if len(keys) > 1 else f'job {keys[0]}'}: {reason}")
    if comparison.blames:
        st.subheader("Every run, worst first")
        st.dataframe(blame_table(comparison.blames), hide_index=True, width="stretch")


def _by_group(result: Compared) -> None:
    """Error distributions of one term within the groups of one setting."""
    comparison = result.comparison
    terms = [s.term for s in comparison.summaries]
    if not terms:
        return
    st.subheader("Errors by group")
    left, right = st.columns(2)
    by = left.selectbox("Group by", GROUPINGS, key="group_by")
    first = [term for term in GATED if term in terms]
    term = right.selectbox(
        "Of", [*first, *(t for t in terms if t not in first)], format_func=term_label, key="group_term"
    )
    groups = group_errors(comparison.rows, comparison.settings, by, [term])
    st.dataframe(group_table(groups), hide_index=True, width="stretch")


def _one_run(records: Sequence[Record], result: Compared) -> None:
    st.subheader("One run, term by term")
    by_label = {f"{r.id}: {label_of(r.report)} [{r.report.origin}]": r.report for r in reversed(records)}
    report = by_label[st.selectbox("Run", list(by_label), key="run")]
    if report.explanation:
        st.info(report.explanation)
    if report.job_key not in result.predicted:
        return
    rows = compared_rows(compare([result.predicted[report.job_key]], [report]).rows)
    left, right = st.columns([2, 3], gap="large")
    with left:
        st.markdown("**Error of each term, worst first**")
        st.altair_chart(error_bars(worst_first(rows)[:15]), width="stretch")
    with right:
        for heading, fields in GROUPS.items():
            chosen = worst_first(row for row in rows if row["term"].partition(".")[0] in fields)
            if chosen:
                st.markdown(f"**{heading}**")
                st.dataframe(compared_table(chosen), hide_index=True, width="stretch")
