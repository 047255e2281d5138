"""``zerocast plot``."""

from __future__ import annotations

from pathlib import Path

import click

from zerocast.job_flags import JobCommand, JobFlags, job_and_profile, job_flags, json_flag, module_flag, profile_flag


@click.command(
    "plot",
    cls=JobCommand,
    short_help="Draw a forecast: memory over the step, where the time goes, the roofline.",
    epilog="Example: zerocast plot --model llama-3-8b --gpu h100-sxm --gpus 8 --zero 3 --write plots",
)
@job_flags
@module_flag
@profile_flag
@click.option(
    "--write", "folder", type=click.Path(path_type=Path), metavar="FOLDER", required=True, help="Folder of the files."
)
@json_flag
def command(flags: JobFlags, profile_path: Path | None, folder: Path, as_json: bool) -> None:
    """Write memory.png, waterfall.png and roofline.png, and beside each the numbers in it as CSV (seconds, bytes, FLOPs).

    In a pipeline, memory is that of the stage that needs most, time that of the stage that ends last.
    """
    from dashboard.step_plots import write_step_plots
    from estimator.views.step import view_step
    from zerocast.show import job_title, say, write_json

    job, profile = job_and_profile(flags, profile_path)
    written = write_step_plots(view_step(job, profile), folder, job_title(job))
    if as_json:
        write_json({"files": [str(path) for path in written]})
        return
    for path in written:
        say(str(path))
