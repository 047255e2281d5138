"""Altair charts from the rows of ``dashboard.data``."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from dashboard.colours import CATEGORY_COLOURS, PART_COLOURS, term_colour
from dashboard.data import Row
from dashboard.step_data import NEAR
from estimator.units import GIB, format_seconds


def memory_bar(rows: Sequence[Row], capacity_bytes: int | None) -> alt.LayerChart:
    """One stacked bar of the bytes at the peak by category, and a line at the GPU's capacity (GiB)."""
    values = [
        {"category": r["label"], "GiB": r["at_peak_bytes"] / GIB, "order": i}
        for i, r in enumerate(rows)
        if r["at_peak_bytes"]
    ]
    total = sum(v["GiB"] for v in values)
    capacity = (capacity_bytes or 0) / GIB
    scale = alt.Scale(domain=[0, max(total, capacity) * 1.08 or 1.0], nice=False)
    shown = [r for r in rows if r["at_peak_bytes"]]
    colours = alt.Scale(domain=[r["label"] for r in shown], range=[CATEGORY_COLOURS[r["category"]] for r in shown])
    bar = (
        alt.Chart(alt.Data(values=values))
        .mark_bar(height=60)
        .encode(
            x=alt.X("GiB:Q", stack="zero", scale=scale, title="GiB on one GPU at the peak"),
            color=alt.Color(
                "category:N", scale=colours, legend=alt.Legend(title=None, orient="bottom", columns=5, labelLimit=220)
            ),
            order=alt.Order("order:Q"),
            tooltip=[alt.Tooltip("category:N"), alt.Tooltip("GiB:Q", format=".3f")],
        )
    )
    layers: list[alt.Chart] = [bar]
    if capacity:
        line = alt.Chart(alt.Data(values=[{"GiB": capacity, "text": f"capacity {capacity:.1f} GiB"}])).encode(
            x=alt.X("GiB:Q", scale=scale)
        )
        layers.append(line.mark_rule(color="#c9534f", strokeWidth=2, strokeDash=[6, 4]))
        layers.append(
            line.mark_text(color="#c9534f", align="right", dx=-6, dy=-37, fontWeight="bold").encode(text="text:N")
        )
    return alt.LayerChart(layer=layers).properties(height=230)


def time_bars(rows: Sequence[Row]) -> alt.LayerChart:
    """A horizontal bar for each part of the step (ms), longest share labelled."""
    values = [
        {
            "part": r["label"],
            "ms": r["seconds"] * 1e3,
            "share": r["share"],
            "text": f"{r['seconds'] * 1e3:,.3g} ms ({r['share']:.0%})",
        }
        for r in rows
    ]
    longest = max((v["ms"] for v in values), default=1.0)
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("part:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
        x=alt.X("ms:Q", title="ms of one step", scale=alt.Scale(domain=[0, longest * 1.45], nice=False)),
    )
    colours = alt.Scale(domain=[r["label"] for r in rows], range=[PART_COLOURS[r["part"]] for r in rows])
    bars = base.mark_bar().encode(
        color=alt.Color("part:N", scale=colours, legend=None),
        tooltip=[alt.Tooltip("part:N"), alt.Tooltip("ms:Q", format=",.3f"), alt.Tooltip("share:Q", format=".1%")],
    )
    labels = base.mark_text(align="left", dx=5).encode(text="text:N")
    return alt.LayerChart(layer=[bars, labels]).properties(height=alt.Step(26))


def error_bars(rows: Sequence[Row]) -> alt.Chart:
    """Signed error of each compared term in percent, as given (worst first); the axis shows one percent at least."""
    values = [{"term": r["label"], "percent": 100 * r["error"]} for r in rows if r["error"] is not None]
    ends = alt.Scale(domain=[min([-1.0, *(v["percent"] for v in values)]), max([1.0, *(v["percent"] for v in values)])])
    return (
        alt.Chart(alt.Data(values=values))
        .mark_bar()
        .encode(
            y=alt.Y("term:N", sort=None, title=None, axis=alt.Axis(labelLimit=260)),
            x=alt.X("percent:Q", title="error, %", scale=ends),
            color=alt.condition("datum.percent > 0", alt.value("#d9822b"), alt.value("#1f4e8c")),
            tooltip=[alt.Tooltip("term:N"), alt.Tooltip("percent:Q", format="+.2f")],
        )
        .properties(height=alt.Step(22))
    )


def waterfall_bars(rows: Sequence[Row]) -> alt.LayerChart:
    """A floating bar for each term (rows of ``waterfall_rows``, ms) from where the one before ended, and the step below."""
    values = [
        {
            "term": r["label"],
            "from": r["start_s"] * 1e3,
            "to": r["end_s"] * 1e3,
            "right": max(r["start_s"], r["end_s"]) * 1e3,
            "ms": r["seconds"] * 1e3,
            "share": r["share"],
            "text": f"{format_seconds(r['seconds'])} ({r['share']:.1%})",
        }
        for r in rows
    ]
    longest = max((v["right"] for v in values), default=1.0)
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("term:N", sort=None, title=None, axis=alt.Axis(labelLimit=300)),
    )
    colours = alt.Scale(domain=[r["label"] for r in rows], range=[term_colour(r["term"]) for r in rows])
    scale = alt.Scale(domain=[0, longest * 1.25], nice=False)
    bars = base.mark_bar().encode(
        x=alt.X("from:Q", title="ms of one step", scale=scale),
        x2="to:Q",
        color=alt.Color("term:N", scale=colours, legend=None),
        tooltip=[alt.Tooltip("term:N"), alt.Tooltip("ms:Q", format=",.3f"), alt.Tooltip("share:Q", format=".1%")],
    )
    labels = base.mark_text(align="left", dx=5).encode(x=alt.X("right:Q", scale=scale), text="text:N")
    return alt.LayerChart(layer=[bars, labels]).properties(height=alt.Step(24))


def memory_area(rows: Sequence[Row], capacity_bytes: int | None) -> alt.LayerChart:
    """Live bytes by category over the step (rows of ``memory_over_step_rows``), and a line at the GPU's capacity if it is near."""
    names = list(dict.fromkeys((r["category"], r["label"]) for r in rows))
    values = [
        {
            "ms": r["time_s"] * 1e3,
            "low": r["below_bytes"] / GIB,
            "high": (r["below_bytes"] + r["bytes"]) / GIB,
            "GiB": r["bytes"] / GIB,
            "category": r["label"],
            "event": r["event"],
        }
        for r in rows
    ]
    highest = max((v["high"] for v in values), default=1.0)
    capacity = (capacity_bytes or 0) / GIB
    near = 0 < capacity < NEAR * highest
    scale = alt.Scale(domain=[0, max(highest, capacity if near else 0.0) * 1.05], nice=False)
    colours = alt.Scale(domain=[label for _, label in names], range=[CATEGORY_COLOURS[name] for name, _ in names])
    areas = (
        alt.Chart(alt.Data(values=values))
        .mark_area(interpolate="step-after")
        .encode(
            x=alt.X("ms:Q", title="ms into the step's program", scale=alt.Scale(nice=False)),
            y=alt.Y("high:Q", stack=None, scale=scale, title="GiB on one GPU"),
            y2="low:Q",
            color=alt.Color(
                "category:N", scale=colours, legend=alt.Legend(title=None, orient="bottom", columns=5, labelLimit=220)
            ),
            tooltip=[alt.Tooltip("category:N"), alt.Tooltip("GiB:Q", format=".3f"), alt.Tooltip("event:N")],
        )
    )
    layers: list[alt.Chart] = [areas]
    if near:
        line = alt.Chart(alt.Data(values=[{"GiB": capacity}])).encode(y=alt.Y("GiB:Q", scale=scale))
        layers.append(line.mark_rule(color="#c9534f", strokeWidth=2, strokeDash=[6, 4]))
    return alt.LayerChart(layer=layers).properties(height=420)
