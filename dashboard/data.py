"""Reports as tidy rows for tables and charts: selecting, naming and sorting, no physics and no drawing.

A row is a plain dict. Units are in its keys (``_bytes``, ``_s``); views convert them when they draw.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from estimator.report import CATEGORIES, PHASES, TIME_PARTS, StepReport
from estimator.units import GIB, format_bytes, format_seconds
from estimator.views.labels import CATEGORY_LABELS as CATEGORY_LABELS
from estimator.views.labels import PART_LABELS as PART_LABELS

if TYPE_CHECKING:
    from estimator.plan import Rejection
    from validator import compare as validator_compare

Row = dict[str, Any]

OUTSIDE = "outside"
"""Not a category of the report: the device's bytes that are no live tensor."""
TERM_LABELS = {
    "peak_allocated_bytes": "peak memory (live tensors)",
    "peak_reserved_bytes": "peak memory (allocator)",
    "device_used_bytes": "device memory used",
    "host_bytes": "host memory",
    "pinned_bytes": "pinned host memory",
    "step_s": "step time",
    "tokens_per_s": "tokens per second",
}
GROUP_LABELS = {
    "category_peak_bytes": "memory",
    "phase_peak_bytes": "peak in phase",
    "time_parts_s": "time",
    "collective_bytes": "bytes on the wire",
    "collective_calls": "collective calls",
    "copy_bytes": "bytes copied",
}
REST_LABELS = {
    "category_bytes_at_peak.rest": "bytes outside the metered categories",
    "time_parts_s.rest": "time outside the measured parts",
}


def memory_rows(report: StepReport) -> list[Row]:
    """Device bytes at the peak by category, in the order of ``CATEGORIES``; categories that hold nothing are left out.

    What the device holds beside live tensors (context, communication buffers, the allocator's slack) is one last row, so
    that the rows add up to ``needed_bytes``.
    """
    at_peak, own = report.category_bytes_at_peak, report.category_peak_bytes
    rows: list[Row] = [
        {
            "category": name,
            "label": CATEGORY_LABELS[name],
            "at_peak_bytes": at_peak.get(name, 0),
            "own_peak_bytes": own.get(name),
        }
        for name in CATEGORIES
        if at_peak.get(name) or own.get(name)
    ]
    outside = (needed_bytes(report) or 0) - sum(row["at_peak_bytes"] for row in rows)
    if rows and outside > 0:
        rows.append(
            {"category": OUTSIDE, "label": "outside live tensors", "at_peak_bytes": outside, "own_peak_bytes": None}
        )
    return rows


def time_rows(report: StepReport) -> list[Row]:
    """Seconds by part, in the order of ``TIME_PARTS``, with each part's share of the step; empty parts are left out."""
    total_s = report.step_s or sum(report.time_parts_s.values())
    return [
        {
            "part": name,
            "label": PART_LABELS[name],
            "seconds": report.time_parts_s[name],
            "share": report.time_parts_s[name] / total_s if total_s else 0.0,
        }
        for name in TIME_PARTS
        if report.time_parts_s.get(name)
    ]


def needed_bytes(report: StepReport) -> int | None:
    """What the device must hold: the most complete figure that the report has."""
    for figure in (report.device_used_bytes, report.peak_reserved_bytes, report.peak_allocated_bytes):
        if figure is not None:
            return figure
    return None


def strategy_row(report: StepReport) -> Row:
    """One line of a table of strategies."""
    strategy, workload = report.job.get("strategy", {}), report.job.get("workload", {})
    return {
        "zero_stage": strategy.get("zero_stage"),
        "offload": strategy.get("offload"),
        "recompute": strategy.get("recompute"),
        "micro_batch_size": workload.get("micro_batch_size"),
        "peak_bytes": report.peak_allocated_bytes,
        "needed_bytes": needed_bytes(report),
        "host_bytes": report.host_bytes,
        "fits": report.fits,
        "step_s": report.step_s,
        "tokens_per_s": report.tokens_per_s,
        "mfu": report.mfu,
        "explanation": report.explanation,
    }


def strategy_rows(reports: Iterable[StepReport]) -> list[Row]:
    """Lines of a table of strategies, by stage and then by how much is offloaded."""
    order = {"none": 0, "optimizer": 1, "optimizer,param": 2}
    rows = [strategy_row(report) for report in reports]
    return sorted(rows, key=lambda r: (r["zero_stage"], order.get(r["offload"], len(order)), r["micro_batch_size"]))


def rejection_rows(rejections: Iterable[Rejection]) -> list[Row]:
    """Rejections grouped by cause, largest group first, each with its closest miss as the example."""
    groups: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        groups.setdefault(rejection.cause, []).append(rejection)
    rows = []
    for cause, members in groups.items():
        closest = min(members, key=lambda r: r.excess_bytes)
        s = closest.strategy
        setting = (
            f"ZeRO-{s.zero_stage}, offload {s.offload}, recompute {s.recompute}, micro-batch {closest.micro_batch_size}"
        )
        rows.append(
            {
                "cause": cause,
                "count": len(members),
                "excess_bytes": closest.excess_bytes,
                "example": f"{setting}: {closest.reason}",
            }
        )
    return sorted(rows, key=lambda row: -row["count"])


def memory_table(rows: Iterable[Row]) -> list[Row]:
    """``memory_rows`` under headings with units, for a table widget."""
    return [
        {
            "category": row["label"],
            "at the peak": format_bytes(row["at_peak_bytes"]),
            "its own peak": quantity("bytes", row["own_peak_bytes"]),
        }
        for row in rows
    ]


def strategy_table(rows: Iterable[Row]) -> list[Row]:
    """``strategy_rows`` under headings with units, for a table widget."""
    return [
        {
            "ZeRO": row["zero_stage"],
            "offload": row["offload"],
            "fits": "yes" if row["fits"] else "no",
            "needs (GiB)": _in(row["needed_bytes"], GIB),
            "host (GiB)": _in(row["host_bytes"], GIB),
            "step (ms)": _in(row["step_s"], 1e-3),
            "tokens/s": _in(row["tokens_per_s"], 1, digits=0),
            "MFU (%)": _in(row["mfu"], 1e-2, digits=1),
            "what decides": row["explanation"],
        }
        for row in rows
    ]


def _in(value: float | None, unit: float, digits: int = 2) -> float | None:
    return None if value is None else round(value / unit, digits)


def term_label(term: str) -> str:
    """A compared term for people, e.g. ``"memory: gradients"`` for ``"category_peak_bytes.grads"``."""
    group, _, name = term.partition(".")
    if not name:
        return TERM_LABELS.get(group, group)
    return f"{GROUP_LABELS.get(group, group)}: {CATEGORY_LABELS.get(name) or PART_LABELS.get(name) or name}"


def compared_rows(rows: Iterable[validator_compare.Row]) -> list[Row]:
    """Terms of a comparison in the order of ``StepReport``'s fields; terms that are 0 on both sides are left out."""
    return [
        {
            "case": row.case,
            "job_key": row.job_key,
            "origin": row.origin,
            "term": row.term,
            "label": term_label(row.term),
            "predicted": row.predicted,
            "measured": row.measured,
            "error": row.error,
        }
        for row in sorted(rows, key=lambda row: term_place(row.term))
        if row.predicted or row.measured
    ]


def term_place(term: str) -> tuple[int, int]:
    """Where a term stands among others: by its field, then by the order of categories, parts or phases."""
    group, _, name = term.partition(".")
    fields = [*TERM_LABELS, *GROUP_LABELS]
    names = PHASES if group == "phase_peak_bytes" else (*CATEGORIES, *TIME_PARTS)
    return (
        fields.index(group) if group in fields else len(fields),
        names.index(name) if name in names else len(names),
    )


def worst_first(rows: Iterable[Row]) -> list[Row]:
    """``compared_rows`` by size of their error, an undefined one (0 was measured) before all."""
    return sorted(rows, key=lambda row: float("-inf") if row["error"] is None else -abs(row["error"]))


def compared_table(rows: Iterable[Row]) -> list[Row]:
    """``compared_rows`` under headings, each number in the unit of its term."""
    return [
        {
            "term": row["label"],
            "predicted": quantity(row["term"], row["predicted"]),
            "measured": quantity(row["term"], row["measured"]),
            "error": error_text(row["error"]),
        }
        for row in rows
    ]


def blame_table(blames: Iterable[validator_compare.Blame]) -> list[Row]:
    """Runs with the error of their total and the part that causes most of it."""
    return [
        {"run": blame.case, "backend": blame.origin, "error": error_text(blame.error), "what": blame_sentence(blame)}
        for blame in blames
    ]


def blame_sentence(blame: validator_compare.Blame) -> str:
    """E.g. ``"peak 3.2% low: activations 410.00 MiB short, in backward of head (forecast: in optimizer)"``."""
    name = {"peak_allocated_bytes": "peak", "step_s": "step"}.get(blame.total, "bytes on the wire")
    if blame.error is None:
        text = f"{name} forecast, none measured"
    elif blame.error:
        text = f"{name} {percent(abs(blame.error))} {'high' if blame.error > 0 else 'low'}"
    else:
        text = f"{name} {'equal in sum' if blame.is_bug else 'exact'}"
    if blame.term is not None and blame.difference:
        part = blame.term.partition(".")[2]
        label = PART_LABELS.get(part) or CATEGORY_LABELS.get(part) or REST_LABELS.get(blame.term) or part
        amount = quantity(blame.total, abs(blame.difference))
        text += f": {label} {amount} {'over' if blame.difference > 0 else 'short'}"
    if blame.measured_where:
        text += f", in {blame.measured_where}"
    if blame.measured_where and blame.predicted_where not in (None, blame.measured_where):
        text += f" (forecast: in {blame.predicted_where})"
    return text


def refusals(refused: dict[str, str]) -> dict[str, list[str]]:
    """Job keys by the reason why they have no forecast."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in refused.items():
        by_reason.setdefault(reason, []).append(key)
    return by_reason


def group_table(groups: Iterable[validator_compare.GroupSummary]) -> list[Row]:
    """Error distributions of groups under headings, for a table widget."""
    return [{g.by: g.group, **_summary_cells(g.summary)} for g in groups]


def summary_table(summaries: Iterable[validator_compare.TermSummary]) -> list[Row]:
    """Error distributions of terms under headings, in the order of ``StepReport``'s fields."""
    return [_summary_cells(s) for s in sorted(summaries, key=lambda s: term_place(s.term))]


def _summary_cells(summary: validator_compare.TermSummary) -> Row:
    undefined = f" + {summary.n_undefined} undefined" if summary.n_undefined else ""
    return {
        "term": term_label(summary.term),
        "n": f"{summary.n}{undefined}",
        "median error": percent(summary.median),
        "P90": percent(summary.p90),
        "worst": percent(summary.worst),
        "bias": "-" if summary.bias is None else error_text(summary.bias),
        "off by at most": quantity(summary.term, summary.largest),
    }


def percent(size: float | None) -> str:
    """A size of an error, with as many digits as tell something: ``"0%"`` is exact. A dash for what is not known."""
    if size is None:
        return "-"
    if 0 < size < 1e-4:
        return "<0.01%"
    return f"{size:.2%}" if 0 < size < 1e-2 else f"{size:.1%}" if size else "0%"


def quantity(term: str, value: float | None) -> str:
    """``value`` in the unit that the name of ``term`` ends with: bytes, seconds, tokens per second or a plain number."""
    if value is None:
        return "-"
    field = term.partition(".")[0]
    if field == "tokens_per_s":
        return f"{value:,.0f}"
    if "bytes" in field:
        return format_bytes(value)
    return format_seconds(value) if field.endswith("_s") else f"{value:g}"


def error_text(error: float | None) -> str:
    """A signed error in percent; undefined where 0 was measured."""
    return "undefined" if error is None else f"{round(error, 3) + 0.0:+.1%}"
