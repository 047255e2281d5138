"""``zerocast doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from zerocast.job_flags import json_flag, store_flag


@click.command(
    "doctor", short_help="Report what this machine has, and what is missing.", epilog="Example: zerocast doctor"
)
@store_flag
@json_flag
def command(store_path: Path | None, as_json: bool) -> None:
    """Look at Python, torch, CUDA, CuPy, GPUs, memory, disk and the store, and say what to do about what is missing.

    Changes nothing. Exit code 0 whatever is found: forecasts need none of it.
    """
    from dataclasses import asdict

    from validator.doctor import diagnose
    from zerocast.show import table, write_json

    findings = diagnose(store_path)
    if as_json:
        write_json([asdict(f) for f in findings])
        return
    columns = [("what", "left"), ("status", "left"), ("found", "left"), ("what to do", "left")]
    table("This machine", columns, [(f.what, f.status, f.detail, f.remedy) for f in findings])
