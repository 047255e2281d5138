"""``zerocast calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from estimator.errors import InputError
from zerocast.job_flags import json_flag, store_flag

if TYPE_CHECKING:
    from estimator.job import Gpu
    from estimator.time.profile import HardwareProfile


@click.command(
    "calibrate",
    short_help="Measure this machine into a hardware profile.",
    epilog="Example: zerocast calibrate --budget 60",
)
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="What to measure.")
@click.option(
    "--gpu",
    "gpu_name",
    metavar="NAME",
    help="With cuda or --import-only: the GPU's catalogue name, where it cannot be told.",
)
@click.option("--budget", type=float, metavar="SECONDS", help="About how long it takes [default: 60; with cuda 240].")
@click.option("--effort", default="full", show_default=True, metavar="quick|full", help="How many sizes to measure.")
@click.option("--workers", metavar="N,N", help="Processes at once, one round each [default: 1,2,4; on a GPU 1].")
@click.option("--nvme", type=click.Path(path_type=Path), metavar="DIR", help="Read and write files in this folder too.")
@click.option(
    "--nccl-tests", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
    help="Put in what all_reduce_perf and its sisters printed; may be given again.",
)  # fmt: skip
@click.option(
    "--import-only",
    is_flag=True,
    help="Measure nothing: put --nccl-tests into the profile that is there, or make one of shipped curves with a network fitted to them.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Profile to write; default: beside the store."
)
@store_flag
@json_flag
def command(
    device: str, gpu_name: str | None, budget: float | None, effort: str, workers: str | None, nvme: Path | None,
    nccl_tests: tuple[Path, ...], import_only: bool, out: Path | None, store_path: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure matrix products, attention, memory, copies, collectives, the host and (with --nvme) files, and write a
    profile: docs/calibration.md.

    Forecasts for this machine use the profile beside the store by themselves (--gpu cpu, or the GPU's name), others take
    it with --profile. An interrupted calibration goes on where it stopped.
    """
    from dashboard.profiles import profiles_folder
    from zerocast.show import say, write_json

    gpu = local_gpu(gpu_name) if device == "cuda" else None
    named = gpu.name if gpu else gpu_name if import_only and gpu_name else "cpu"
    path = out or profiles_folder(store_path) / f"{named}.json"
    if import_only:
        from validator.calibrate import import_nccl_tests

        if not nccl_tests:
            raise InputError("--import-only is given without --nccl-tests FILE")
        profile = import_nccl_tests(path, nccl_tests, gpu_name)
    else:
        profile = run_calibration(
            path, device=device, budget_s=budget, effort=effort, workers=_counts(workers), gpu=gpu, nvme=nvme,
            nccl_tests=nccl_tests,
        )  # fmt: skip
    if as_json:
        from estimator.time.profile_file import profile_to_dict

        write_json({"path": str(path), "profile": profile_to_dict(profile)})
        return
    show_profile(profile)
    say(f"profile written to {path}")


def run_calibration(path: Path, **options: Any) -> HardwareProfile:
    """``validator.calibrate`` into ``path`` with a progress bar."""
    from validator.calibrate import calibrate
    from zerocast.show import progress

    with progress() as bar:
        task = bar.add_task("calibrating: starting", total=None)
        return calibrate(
            out=path,
            on_progress=lambda what, done, planned: bar.update(
                task, description=f"calibrating: {what}", completed=done, total=planned
            ),
            **options,
        )


def show_profile(profile: HardwareProfile) -> None:
    """What the machine reaches at best, in a few lines."""
    from validator.calibrate import describe
    from zerocast.show import say

    for line in describe(profile):
        say(line)


def local_gpu(name: str | None) -> Gpu:
    """The catalogue's description of this machine's GPU."""
    import torch

    from estimator import catalog
    from validator.devices import catalogue_name

    if name is None and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        name = catalogue_name(device)
        if name is None:
            raise InputError(
                f"--gpu is not given and {device!r} is not in the catalogue; allowed: {', '.join(catalog.gpu_names())}"
            )
    if name is None:
        raise InputError("--device is 'cuda', but torch sees no GPU on this machine; allowed: cpu")
    return catalog.gpu(name)


def _counts(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--workers is {text!r}; allowed: whole numbers with commas, e.g. 1,2") from None
