"""``zerocast predict``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from zerocast.job_flags import JobCommand, JobFlags, job_and_profile, job_flags, json_flag, profile_flag


@click.command(
    "predict",
    cls=JobCommand,
    short_help="Forecast memory and time of one training step.",
    epilog="Example: zerocast predict --model llama-3-8b --gpu h100-sxm --gpus 8 --zero 3 --recompute full",
)
@job_flags
@click.option(
    "--module",
    metavar="FILE.py:NAME",
    help="In place of --model: a function that gives (module, example_batch), which is traced.",
)
@click.option(
    "--alloc-conf",
    metavar="TEXT",
    default="",
    help="Options of PyTorch's allocator, as in PYTORCH_ALLOC_CONF, e.g. expandable_segments:True.",
)
@profile_flag
@json_flag
def command(flags: JobFlags, module: str | None, alloc_conf: str, profile_path: Path | None, as_json: bool) -> None:
    """Forecast per-GPU memory and the time of one training step.

    Of a catalogue's model, or of any torch.nn.Module: --module names a function in a Python file that gives the module and
    an example micro-batch, or (module, (inputs, targets), loss) where the module does not compute its loss itself.

    On a GPU PyTorch's caching allocator is simulated: reserved bytes, fragmentation, and how likely the job is to fit.

    With --json: the fields of a StepReport by name, in bytes, seconds and FLOPs.
    """
    from estimator.memory.allocator_settings import AllocatorSettings
    from estimator.predict import predict

    allocator = AllocatorSettings.parse(alloc_conf)
    job, profile = job_and_profile(replace(flags, module=module), profile_path)
    report = predict(job, profile, allocator=allocator)
    if as_json:
        from zerocast.show import write_json

        write_json(report.to_dict())
        return
    from zerocast.show import job_title, show_report

    show_report(report, job_title(job))
