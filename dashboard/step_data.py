"""A step's views as tidy rows: the waterfall, memory over the step, operators under the roofs, remedies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dashboard.data import Row
from estimator.units import format_bytes, format_seconds
from estimator.views.labels import CATEGORY_LABELS
from estimator.views.memory import category_order

if TYPE_CHECKING:
    from estimator.views.memory import MemoryCurve, MemorySample
    from estimator.views.remedies import Remedy
    from estimator.views.roofline import RoofPoint
    from estimator.views.waterfall import Term

NEAR = 2.0
"""A GPU's capacity is drawn where it is less than so many times the peak."""
MOST_SAMPLES = 1500
"""Of a chart in the browser."""


def waterfall_rows(terms: Sequence[Term]) -> list[Row]:
    """Terms with where each begins and ends, and the whole step as the last row."""
    total_s = sum(term.seconds for term in terms)
    rows: list[Row] = []
    at = 0.0
    for term in terms:
        rows.append(_bar(term.name, term.label, at, at + term.seconds, term.seconds / total_s if total_s else 0.0))
        at += term.seconds
    return [*rows, _bar("step", "step", 0.0, total_s, 1.0)]


def _bar(name: str, label: str, start_s: float, end_s: float, share: float) -> Row:
    return {
        "term": name,
        "label": label,
        "start_s": start_s,
        "end_s": end_s,
        "seconds": end_s - start_s,
        "share": share,
    }


def memory_over_step_rows(curve: MemoryCurve) -> list[Row]:
    """A row for each sample and category, those that hold nothing then too, with the bytes of the categories before it."""
    categories = category_order(curve.samples)
    rows: list[Row] = []
    for sample in thinned(curve.samples):
        below = 0
        for name in categories:
            n_bytes = sample.live.get(name, 0)
            rows.append(
                {
                    "time_s": sample.time_s, "category": name, "label": CATEGORY_LABELS[name], "bytes": n_bytes, "below_bytes": below,
                    "event": sample.event,
                }
            )  # fmt: skip
            below += n_bytes
    return rows


def thinned(samples: Sequence[MemorySample], most: int = MOST_SAMPLES) -> list[MemorySample]:
    """At most ``most`` samples, and the last: the largest of every few in a row, so that the peak stays."""
    width = -(-len(samples) // most)
    largest = [max(samples[i : i + width], key=lambda s: s.total_bytes) for i in range(0, len(samples), width)]
    return largest if largest[-1] is samples[-1] else [*largest, samples[-1]]


def pass_rows(curve: MemoryCurve) -> list[Row]:
    """For a table: the passes at their own peaks, the ends of the step, and the peak."""
    categories = category_order(curve.samples)
    ends = (curve.samples[0], curve.samples[-1])
    chosen = [s for s in curve.samples if s.within or s in ends or s is curve.peak]
    return [
        {
            "time": format_seconds(s.time_s), "event": s.event + (" (peak)" if s is curve.peak else ""),
            "together": format_bytes(s.total_bytes),
            **{CATEGORY_LABELS[name]: format_bytes(s.live[name]) if s.live.get(name) else "" for name in categories},
        }
        for s in chosen
    ]  # fmt: skip


def remedy_rows(remedies: Sequence[Remedy]) -> list[Row]:
    """What was tried, for a table."""
    return [
        {
            "change": remedy.change.words,
            "memory": f"{'-' if remedy.saved_bytes > 0 else '+'}{format_bytes(abs(remedy.saved_bytes))}",
            "step": f"{'-' if remedy.gained_s > 0 else '+'}{format_seconds(abs(remedy.gained_s))}",
            "fits": {True: "yes", False: "no", None: "unknown"}[remedy.report.fits],
            "changes most": CATEGORY_LABELS[remedy.most_saved if remedy.saved_bytes > 0 else remedy.most_grown],
        }
        for remedy in remedies
    ]


def roofline_rows(points: Sequence[RoofPoint], step_s: float) -> list[Row]:
    """Operators for a table, by seconds."""
    return [
        {
            "operator": f"{p.name} {'x'.join(map(str, p.shape))}".strip(),
            "part": p.part,
            "runs": f"{p.runs:,}",
            "FLOPs/byte": f"{p.flops_per_byte:.3g}",
            "TFLOP/s": f"{p.flops_per_s / 1e12:.3g}",
            "GB/s": f"{p.runs * p.n_bytes / p.seconds / 1e9:,.0f}",
            "bound": p.roof,
            "of the roof": f"{p.of_roof:.0%}",
            "time": format_seconds(p.seconds),
            "share": f"{p.seconds / step_s:.1%}" if step_s else "-",
        }
        for p in points
    ]
