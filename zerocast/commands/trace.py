"""``zerocast trace``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from zerocast.job_flags import JobCommand, JobFlags, job_and_profile, job_flags, json_flag, module_flag, profile_flag


@click.command(
    "trace",
    cls=JobCommand,
    short_help="Write the forecast step as a trace for ui.perfetto.dev.",
    epilog="Example: zerocast trace --model llama-3-8b --gpu h100-sxm --gpus 8 --zero 3 --write step.json",
)
@job_flags
@module_flag
@profile_flag
@click.option(
    "--write", "file", type=click.Path(path_type=Path), metavar="FILE.json", required=True, help="The trace's file."
)
@click.option(
    "--micro-batches", type=click.IntRange(min=1), default=4, show_default=True, metavar="N",
    help="First micro-batches that are in it, beside the last; in a pipeline, turns of what repeats there.",
)  # fmt: skip
@click.option(
    "--stage", "stages", type=int, multiple=True, metavar="N", help="Only this pipeline stage; repeat for several."
)
@json_flag
def command(
    flags: JobFlags, profile_path: Path | None, file: Path, micro_batches: int, stages: tuple[int, ...], as_json: bool
) -> None:
    """Write what the forecast's streams do in one step, and memory by category, as Chrome trace events.

    A process for each pipeline stage, a track for each of its streams. Open the file at ui.perfetto.dev.
    """
    from estimator.views.step import view_step
    from estimator.views.trace import chrome_trace
    from zerocast.show import job_title, say, write_json

    job, profile = job_and_profile(flags, profile_path)
    trace = chrome_trace(view_step(job, profile, kept_turns=micro_batches), stages)
    text = json.dumps(trace, allow_nan=False)
    file.write_text(text, encoding="utf-8")
    facts = {
        "file": str(file),
        "n_events": len(trace["traceEvents"]),
        "n_bytes": len(text.encode()),
        "repeats_left_out": trace["otherData"]["repeats_left_out"],
        "step_s": trace["otherData"]["forecast_step_s"],
    }
    if as_json:
        write_json(facts)
        return
    say(job_title(job))
    say(f"{facts['n_events']:,} events in {file}: open it at ui.perfetto.dev")
    for note in trace["otherData"]["notes"]:
        say(f"note: {note}")
