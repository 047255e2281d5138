"""``zerocast explain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zerocast.job_flags import JobCommand, JobFlags, job_and_profile, job_flags, json_flag, module_flag, profile_flag

if TYPE_CHECKING:
    from estimator.views.memory import MemoryCurve
    from estimator.views.remedies import Remedies, Remedy
    from estimator.views.step import StepView
    from estimator.views.waterfall import Term

BEST = 3
"""Remedies that are put into words."""


@click.command(
    "explain",
    cls=JobCommand,
    short_help="Say why a forecast is what it is, and what would change it.",
    epilog="Example: zerocast explain --model llama-3-8b --gpu h100-sxm --gpus 8 --zero 3 --micro-batch 4",
)
@job_flags
@module_flag
@profile_flag
@click.option("--over-time", is_flag=True, help="Show memory over the step, pass by pass.")
@click.option("--operators", type=click.IntRange(min=1), metavar="N", help="Show the N operators that take most time.")
@click.option("--all", "show_all", is_flag=True, help="Show every change that was tried, not the best alone.")
@click.option(
    "--allocator/--no-allocator", default=True, help="Simulate PyTorch's allocator in every forecast (the default)."
)
@json_flag
def command(
    flags: JobFlags, profile_path: Path | None, over_time: bool, operators: int | None, show_all: bool, allocator: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Say in words what memory is made of at its peak and where the step's time goes, term by term from the model's FLOPs at
    the GPU's peak; then what would save memory or time.

    Remedies are forecasts of the same job with one thing changed (ZeRO stage, recomputation, micro-batch, offload, parallel sizes,
    prefetching, buckets, kernels) and the same global batch.
    """
    from estimator.memory.allocator_settings import AllocatorSettings
    from estimator.views.memory import memory_over_step
    from estimator.views.remedies import find_remedies
    from estimator.views.step import view_step
    from estimator.views.waterfall import waterfall
    from zerocast.show import progress

    job, profile = job_and_profile(flags, profile_path)
    settings = AllocatorSettings() if allocator else None
    view = view_step(job, profile, allocator=settings)
    curve, terms = memory_over_step(view), waterfall(view)
    with progress() as bar:
        task = bar.add_task("forecasting changes", total=None)
        remedies = find_remedies(
            job, profile, allocator=settings, on_progress=lambda done, n: bar.update(task, completed=done, total=n)
        )
    if as_json:
        from zerocast.show import write_json

        write_json(_as_data(view, curve, terms, remedies))
        return
    from dashboard.step_data import pass_rows, roofline_rows, waterfall_rows
    from estimator.views.roofline import roofline
    from estimator.views.words import memory_remedy_words, peak_words, surprises, time_remedy_words, time_words
    from zerocast.show import job_title, percent_cell, say, seconds_cell, show_rows, table

    say(f"{job_title(job)}\n")
    for sentence in [*peak_words(view, curve), *surprises(remedies, job.zero_stage)]:
        say(sentence)
    _say_best("Less memory:", remedies.for_memory, lambda r: memory_remedy_words(r, remedies))
    say("")
    if over_time:
        show_rows("Memory over the step", pass_rows(curve), ("event",))
    for sentence in time_words(view, terms):
        say(sentence)
    _say_best("Less time, of what fits:", remedies.for_time, lambda r: time_remedy_words(r, remedies))
    if remedies.hardware:
        _say_best("A better machine:", remedies.hardware, lambda r: time_remedy_words(r, remedies))
    say("")
    cells = [(r["label"], seconds_cell(r["seconds"]), percent_cell(r["share"])) for r in waterfall_rows(terms)]
    table("Where the time goes", [("term", "left"), ("time", "right"), ("share", "right")], cells)
    if operators:
        rows = roofline_rows(roofline(view)[:operators], view.report.step_s or 0.0)
        show_rows("Operators", rows, ("operator", "part", "bound"))
    _say_tried(remedies, show_all)
    for note in view.report.notes:
        say(f"note: {note}")


def _say_best(heading: str, remedies: tuple[Remedy, ...], words: Any) -> None:
    from zerocast.show import say

    say(heading if remedies else f"{heading} nothing that was tried")
    for number, remedy in enumerate(remedies[:BEST], start=1):
        say(f"  {number}. {words(remedy)}")


def _say_tried(remedies: Remedies, show_all: bool) -> None:
    from dashboard.step_data import remedy_rows
    from zerocast.show import say, show_rows

    if show_all:
        show_rows("Everything that was tried", remedy_rows(remedies.tried), ("change", "changes most"))
        for words, reason in remedies.refused:
            say(f"not possible: {words}: {reason}")
        return
    names = "; ".join(remedy.change.words for remedy in remedies.tried)
    say(f"tried: {names}")
    if remedies.refused:
        say(f"not possible: {'; '.join(words for words, _ in remedies.refused)} (--all says why)")


def _as_data(view: StepView, curve: MemoryCurve, terms: tuple[Term, ...], remedies: Remedies) -> dict[str, Any]:
    from estimator.views.words import peak_words, surprises, time_words

    report = view.report
    return {
        "job_key": view.job.key,
        "step_s": report.step_s,
        "peak_allocated_bytes": report.peak_allocated_bytes,
        "device_used_bytes": report.device_used_bytes,
        "fits": report.fits,
        "memory": {
            "words": [*peak_words(view, curve), *surprises(remedies, view.job.zero_stage)],
            "peak": {"time_s": curve.peak.time_s, "event": curve.peak.event, "live_bytes": curve.peak.live},
            "over_step": [
                {
                    "time_s": s.time_s,
                    "event": s.event,
                    "within_pass": s.within,
                    "live_bytes": s.live,
                    "host_bytes": s.host_bytes,
                }
                for s in curve.samples
            ],
            "remedies": [_remedy_data(remedy) for remedy in remedies.for_memory],
        },
        "time": {
            "words": time_words(view, terms),
            "bound": view.record.time.bound,
            "waterfall": [term._asdict() for term in terms],
            "remedies": [_remedy_data(remedy) for remedy in remedies.for_time],
            "hardware": [_remedy_data(remedy) for remedy in remedies.hardware],
        },
        "tried": [_remedy_data(remedy) for remedy in remedies.tried],
        "refused": [{"change": words, "reason": reason} for words, reason in remedies.refused],
        "notes": list(report.notes),
    }


def _remedy_data(remedy: Remedy) -> dict[str, Any]:
    return {
        "change": remedy.change.words,
        "strategy": remedy.change.strategy,
        "micro_batch": remedy.change.micro_batch_size,
        "same_training": not remedy.change.inexact,
        "saved_bytes": remedy.saved_bytes,
        "gained_s": remedy.gained_s,
        "device_used_bytes": remedy.report.device_used_bytes,
        "step_s": remedy.report.step_s,
        "fits": remedy.report.fits,
    }
