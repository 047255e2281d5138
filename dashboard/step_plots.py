"""PNGs of a forecast step, and the numbers behind each as CSV: memory over the step, the waterfall, the roofline. Needs matplotlib,
imported when used."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dashboard.colours import CATEGORY_COLOURS, term_colour
from dashboard.step_data import NEAR, waterfall_rows
from estimator.errors import InputError
from estimator.units import GIB, format_seconds
from estimator.views.labels import CATEGORY_LABELS
from estimator.views.memory import MemoryCurve, category_order, memory_csv_rows, memory_over_step
from estimator.views.roofline import Roof, RoofPoint, roof_of, roofline
from estimator.views.step import StepView
from estimator.views.waterfall import Term, waterfall

KIND_COLOURS = {
    "matmul": "#1f4e8c", "attention": "#d9822b", "norm": "#6a4c9c", "elementwise": "#2a8c6a", "loss": "#c9534f", "embedding": "#7a7f87",
}  # fmt: skip
NAMED_POINTS = 6
_DPI = 120


def write_step_plots(view: StepView, folder: Path, title: str) -> list[Path]:
    """``memory``, ``waterfall`` and ``roofline`` as PNG and CSV in ``folder``. Raises ``InputError`` when it cannot be written."""
    curve, terms, points = memory_over_step(view), waterfall(view), roofline(view)
    tables: dict[str, Iterable[Sequence[Any]]] = {
        "memory": memory_csv_rows(curve),
        "waterfall": [("term", "label", "seconds"), *terms],
        "roofline": _roofline_table(points),
    }
    figures = {
        "memory": memory_figure(curve, view.report.capacity_bytes, title),
        "waterfall": waterfall_figure(terms, title),
        "roofline": roofline_figure(points, roof_of(view), title),
    }
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=_DPI)
            written.append(write_csv(folder / f"{name}.csv", tables[name]))
    except OSError as error:
        raise InputError(f"plots folder {str(folder)!r} cannot be written: {error.strerror or error}") from None
    return written


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> Path:
    """``rows``, the first of which are headings."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def memory_figure(curve: MemoryCurve, capacity_bytes: int | None, title: str) -> Any:
    """Live bytes by category, stacked; a line at the GPU's capacity where it is near; gaps of the record in grey."""
    figure, axes = _figure(10.0, 5.2)
    unit, size = _seconds_unit(curve.samples[-1].time_s)
    times = [sample.time_s / size for sample in curve.samples]
    names = category_order(curve.samples)
    series = [[sample.live.get(name, 0) / GIB for sample in curve.samples] for name in names]
    axes.stackplot(
        times, *series, labels=[CATEGORY_LABELS[name] for name in names], colors=[CATEGORY_COLOURS[name] for name in names], step="post",
        linewidth=0,
    )  # fmt: skip
    peak = curve.peak
    axes.plot([peak.time_s / size], [peak.total_bytes / GIB], "o", color="black", markersize=4, zorder=5)
    label = f"{peak.total_bytes / GIB:.2f} GiB, {peak.event}"
    at_right = peak.time_s > 0.6 * curve.samples[-1].time_s
    axes.annotate(
        label, (peak.time_s / size, peak.total_bytes / GIB), xytext=(-8 if at_right else 8, 6), textcoords="offset points",
        ha="right" if at_right else "left", zorder=5,
    )  # fmt: skip
    highest, capacity = peak.total_bytes / GIB, (capacity_bytes or 0) / GIB
    if 0 < capacity < NEAR * highest:
        axes.axhline(capacity, color="#c9534f", linestyle="--", label=f"capacity {capacity:.1f} GiB")
        highest = max(highest, capacity)
    for gap in curve.gaps:
        axes.axvspan(gap.start_s / size, gap.end_s / size, color="white", alpha=0.6, zorder=3)
        middle = (gap.start_s + gap.end_s) / 2 / size
        axes.text(middle, highest * 0.5, f"{gap.repeats} more alike", ha="center", rotation=90, zorder=4)
    axes.set(
        xlim=(0, max(times[-1], 1e-12)),
        ylim=(0, highest * 1.12),
        xlabel=f"{unit} into the step's program",
        ylabel="GiB on one GPU",
    )
    axes.set_title(f"Memory over the step\n{title}", fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    return figure


def waterfall_figure(terms: Sequence[Term], title: str) -> Any:
    """A floating bar for each term, the step as the last."""
    rows = waterfall_rows(terms)
    figure, axes = _figure(10.0, 1.2 + 0.36 * len(rows))
    unit, size = _seconds_unit(rows[-1]["seconds"])
    for place, row in enumerate(rows):
        left, right = sorted((row["start_s"] / size, row["end_s"] / size))
        axes.barh(place, right - left, left=left, color=term_colour(row["term"]))
        axes.text(right, place, f"  {format_seconds(row['seconds'])} ({row['share']:.1%})", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set(
        xlim=(0, max(row["end_s"] for row in rows) / size * 1.22),
        ylim=(len(rows) - 0.4, -0.6),
        xlabel=f"{unit} of one step",
    )
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(f"Where the time goes\n{title}", fontsize=11)
    return figure


def roofline_figure(points: Sequence[RoofPoint], roof: Roof, title: str) -> Any:
    """Operators that calculate, as points whose area is their share of the time, under the datasheet's roofs."""
    figure, axes = _figure(9.0, 6.0)
    drawn = [p for p in points if p.flops > 0 and p.n_bytes > 0]
    total_s = sum(p.seconds for p in points)
    intensities = [p.flops_per_byte for p in drawn] or [roof.ridge]
    low, high = min([*intensities, roof.ridge]) / 3, max([*intensities, roof.ridge]) * 3
    corners = sorted((low, min(max(roof.ridge, low), high), high))
    axes.plot(corners, [roof.reachable(x) / 1e12 for x in corners], color="black", linewidth=1.5)
    axes.text(high, roof.flops_per_s / 1e12 * 1.06, f"{roof.flops_per_s / 1e12:,.0f} TFLOP/s {roof.dtype} ", ha="right")
    axes.text(low * 1.1, roof.reachable(low) / 1e12 * 1.6, f"{roof.bytes_per_s / 1e12:,.2f} TB/s", rotation=30)
    for kind, colour in KIND_COLOURS.items():
        own = [p for p in drawn if p.kind == kind]
        share = sum(p.seconds for p in own) / total_s if total_s else 0.0
        axes.scatter(
            [p.flops_per_byte for p in own], [p.flops_per_s / 1e12 for p in own],
            s=[20 + 1200 * p.seconds / total_s for p in own], color=colour, alpha=0.65, linewidths=0, label=f"{kind} ({share:.0%} of the time)",
        ) if own else None  # fmt: skip
    largest = {p.name: p for p in reversed(drawn)}
    for number, p in enumerate(sorted(largest.values(), key=lambda p: -p.seconds)[:NAMED_POINTS]):
        is_left = p.flops_per_byte < roof.ridge
        axes.annotate(
            p.name, (p.flops_per_byte, p.flops_per_s / 1e12), xytext=(16, -4) if is_left else (-14, -20 - 13 * number), textcoords="offset points",
            fontsize=8, ha="left" if is_left else "right", arrowprops={"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.5},
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs per byte", ylabel="TFLOP/s")
    axes.grid(alpha=0.25)
    rest = sum(p.seconds for p in points if p.flops <= 0) / total_s if total_s else 0.0
    note = f"; {rest:.0%} of the time moves bytes without arithmetic and is not drawn" if rest >= 0.005 else ""
    axes.set_title(f"Operators under the roofs{note}\n{title}", fontsize=11)
    axes.legend(fontsize=9, loc="lower right")
    return figure


def _roofline_table(points: Sequence[RoofPoint]) -> Iterable[Sequence[Any]]:
    yield ("operator", "kind", "part", "shape", "count", "flops", "bytes", "seconds", "roof", "of_roof")
    for p in points:
        yield (p.name, p.kind, p.part, "x".join(map(str, p.shape)), *p[4:])


def _seconds_unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
