"""The forecast in sentences: what memory is made of at its peak, what the step is spent on, and what would change either."""

from __future__ import annotations

from collections.abc import Sequence

from estimator.schedule.events import Compute
from estimator.units import format_bytes, format_seconds
from estimator.views.labels import CATEGORY_LABELS
from estimator.views.memory import MemoryCurve
from estimator.views.remedies import Remedies, Remedy
from estimator.views.step import StepView
from estimator.views.waterfall import Term

NAMED = 3
"""Largest categories, terms and remedies that sentences name."""
ARITHMETIC = ("ideal", "uneven", "matmul", "attention")
"""Terms that are the GPU's arithmetic."""
VISIBLE = 1.02
"""Step over program from which a reader would wonder."""
_INEXACT = " (training is then not quite the same)"


def peak_words(view: StepView, curve: MemoryCurve) -> list[str]:
    """When memory of one GPU is largest, what it is made of then, and whether it fits."""
    report, peak = view.report, curve.peak
    total = peak.total_bytes
    played_s = view.record.ranks[curve.rank].end_s
    when = f"{format_seconds(peak.time_s)} into the step's program"
    if played_s > 0:
        when += f" ({peak.time_s / played_s:.0%} of the way)"
    largest = sorted(peak.live.items(), key=lambda item: -item[1])[:NAMED]
    made_of = ", ".join(f"{CATEGORY_LABELS[name]} {format_bytes(n)} ({_share(n, total)})" for name, n in largest)
    standing = curve.samples[0].total_bytes
    words = [
        f"Live tensors peak at {format_bytes(total)} in {report.peak_where}, {when}: {made_of}.",
        f"{format_bytes(standing)} of it ({_share(standing, total)}) stay from step to step; the step adds {format_bytes(total - standing)}.",
        *_kept_words(view, curve),
    ]
    if report.step_s and report.step_s > VISIBLE * played_s > 0:
        words.append(
            f"The program takes {format_seconds(played_s)} of the step's {format_seconds(report.step_s)}: what slows it has no place in it."
        )
    if report.device_used_bytes is not None and report.capacity_bytes:
        free = report.capacity_bytes - report.device_used_bytes
        needs = f"One GPU needs {format_bytes(report.device_used_bytes)} of its {format_bytes(report.capacity_bytes)}"
        fits = f"{needs}: {format_bytes(free)} are left."
        words.append(fits if report.fits else f"It does not fit: {report.explanation}.")
    return words


def _kept_words(view: StepView, curve: MemoryCurve) -> list[str]:
    """What a micro-batch leaves in each kind of unit for its backward pass."""
    blueprint = view.blueprints[curve.rank]
    kept: dict[int, list[str]] = {}
    units = {event.unit for s in blueprint.program.step for event in s.events if isinstance(event, Compute)}
    for unit in sorted(units):
        n_bytes = blueprint.costs[unit].forward_memory.after.get("activations", 0)
        kept.setdefault(n_bytes, []).append(blueprint.layout.units[unit].name)
    most = max(kept, key=lambda n_bytes: n_bytes * len(kept[n_bytes]), default=0)
    if most <= 0:
        return []
    names = kept[most]
    who = names[0] if len(names) == 1 else f"each of {len(names)} units ({names[0]} to {names[-1]})"
    return [
        f"A micro-batch leaves {format_bytes(most)} of activations in {who}, {format_bytes(most * len(names))} in all."
    ]


def time_words(view: StepView, terms: Sequence[Term]) -> list[str]:
    """What the step is spent on beyond the ideal, largest first."""
    report = view.report
    step_s = report.step_s or 0.0
    by_name = {term.name: term for term in terms}
    ideal_s = by_name["ideal"].seconds
    rest = sorted((t for t in terms if t.name != "ideal" and t.seconds > 0), key=lambda t: -t.seconds)[:NAMED]
    low, high = report.step_low_s, report.step_high_s
    between = f" ({format_seconds(low)} to {format_seconds(high)})" if low is not None and high is not None else ""
    costs = ", ".join(f"{t.label} {format_seconds(t.seconds)} ({_share(t.seconds, step_s)})" for t in rest)
    return [
        f"The step takes {format_seconds(step_s)}{between}. At the dense peak the model's FLOPs alone would take "
        f"{format_seconds(ideal_s)} ({_share(ideal_s, step_s)}).",
        f"What adds most: {costs}.",
        f"Its bottleneck is {_bottleneck(terms, step_s)}.",
    ]


def _bottleneck(terms: Sequence[Term], step_s: float) -> str:
    """What of everything that a step waits for takes most: arithmetic, or one of the other terms."""
    arithmetic_s = sum(term.seconds for term in terms if term.name in ARITHMETIC)
    others = [(term.label, term.seconds) for term in terms if term.name not in ARITHMETIC]
    name, seconds = max([("arithmetic (products and attention)", arithmetic_s), *others], key=lambda item: item[1])
    return f"{name}: {format_seconds(seconds)} ({_share(seconds, step_s)})"


def memory_remedy_words(remedy: Remedy, remedies: Remedies) -> str:
    """E.g. ``"recompute selective: 9.25 GiB less (27%), the step takes 42.1 ms (8.8%) longer"``."""
    base = remedies.base
    needed = base.device_used_bytes or base.peak_allocated_bytes or 0
    saved = f"{format_bytes(remedy.saved_bytes)} less ({_share(remedy.saved_bytes, needed)})"
    words = f"{remedy.change.words}: {saved}, {_time_words(remedy, base.step_s or 0.0)}{_fit_words(remedy, base.fits)}"
    return words + _INEXACT * remedy.change.inexact


def time_remedy_words(remedy: Remedy, remedies: Remedies) -> str:
    """E.g. ``"micro-batch 2, half the accumulation: 710 ms (5.2%) shorter, with 17.08 GiB more"``."""
    step_s = remedies.base.step_s or 0.0
    more = -remedy.saved_bytes
    memory = f", with {format_bytes(abs(more))} {'more' if more > 0 else 'less'}" if more else ""
    words = (
        f"{remedy.change.words}: {format_seconds(remedy.gained_s)} ({_share(remedy.gained_s, step_s)}) shorter{memory}"
    )
    return words + _INEXACT * remedy.change.inexact


def surprises(remedies: Remedies, stage: int) -> list[str]:
    """Higher ZeRO stages that need more memory, with what grows."""
    words = []
    for remedy in remedies.tried:
        if remedy.change.strategy.get("zero_stage", -1) > stage and remedy.saved_bytes < 0:
            before = remedies.base.category_bytes_at_peak.get(remedy.most_grown, 0)
            after = remedy.report.category_bytes_at_peak.get(remedy.most_grown, 0)
            words.append(
                f"{remedy.change.words} would need {format_bytes(-remedy.saved_bytes)} more: at its peak, {remedy.report.peak_where}, "
                f"{CATEGORY_LABELS[remedy.most_grown]} take {format_bytes(after)} instead of {format_bytes(before)}."
            )
    return words


def _time_words(remedy: Remedy, step_s: float) -> str:
    if abs(remedy.gained_s) < 1e-4 * step_s:
        return "the step takes as long"
    longer = "longer" if remedy.gained_s < 0 else "less"
    return f"the step takes {format_seconds(abs(remedy.gained_s))} ({_share(abs(remedy.gained_s), step_s)}) {longer}"


def _fit_words(remedy: Remedy, fits: bool | None) -> str:
    if fits or remedy.report.fits is None:
        return ""
    return "; then it fits" if remedy.report.fits else "; that is not enough"


def _share(part: float, whole: float) -> str:
    return (
        f"{100 * part / whole:.2g} %"
        if whole and abs(part) < 0.1 * abs(whole)
        else f"{100 * part / whole:.0f} %"
        if whole
        else "-"
    )
