"""``zerocast predict``."""

from __future__ import annotations

from pathlib import Path

import click

from zerocast.job_flags import JobFlags, job_and_profile, job_flags, json_flag, profile_flag


@click.command(
    "predict",
    short_help="Forecast memory and time of one training step.",
    epilog="Example: zerocast predict --model llama-3-8b --gpu h100-sxm --gpus 8 --zero 3 --recompute full",
)
@job_flags
@profile_flag
@json_flag
def command(flags: JobFlags, profile_path: Path | None, as_json: bool) -> None:
    """Forecast per-GPU memory and the time of one training step.

    With --json: the fields of a StepReport by name, in bytes, seconds and FLOPs.
    """
    from estimator.predict import predict

    job, profile = job_and_profile(flags, profile_path)
    report = predict(job, profile)
    if as_json:
        from zerocast.show import write_json

        write_json(report.to_dict())
        return
    from zerocast.show import job_title, show_report

    show_report(report, job_title(job))
