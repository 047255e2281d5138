"""``zerocast measure``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zerocast.failed import Failed
from zerocast.job_flags import JobCommand, JobFlags, job_and_profile, job_flags, json_flag, profile_flag, store_flag

if TYPE_CHECKING:
    from estimator.report import StepReport
    from validator.measure.case import Case

CPU_PROCESSES = 2
"""Processes on a CPU when --gpus is not given."""


@click.command(
    "measure",
    cls=JobCommand,
    short_help="Run a training step on this machine and hold it against its forecast.",
    epilog="Example: zerocast measure --model gpt-30m --gpus 2 --zero 2 --seq-len 128 --dtype fp32",
)
@job_flags
@click.option("--backend", metavar="fake|cpu|cuda|cuda-virtual", help="Default: cuda where torch sees a GPU, else cpu.")
@click.option("--steps", type=int, default=8, show_default=True, help="Measured steps.")
@click.option("--warmup", type=int, default=3, show_default=True, help="Steps before them that are thrown away.")
@click.option("--rank", type=int, default=0, show_default=True, help="Rank that fake and cuda-virtual play.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights and data.")
@click.option(
    "--time-limit",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="End the case after this long.",
)
@click.option(
    "--write-case",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure nothing; write the case for a job of several nodes and say what to run on each.",
)
@click.option(
    "--nvme",
    "nvme_folder",
    metavar="FOLDER",
    help="Where a job with --offload optimizer:nvme has its optimizer's files meanwhile.",
)
@store_flag
@profile_flag
@json_flag
def command(
    flags: JobFlags, backend: str | None, steps: int, warmup: int, rank: int, seed: int, time_limit: float,
    write_case: Path | None, nvme_folder: str | None, store_path: Path | None, profile_path: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Train a few steps of the job, record what was measured, and show the forecast beside it.

    Backends: fake plays one rank of a job of any size without arithmetic (memory and bytes on the wire); cpu trains on
    this machine's cores with --gpu cpu (needs 'zerocast calibrate' once); cuda trains on its GPUs,
    cuda-virtual plays one rank of many on one GPU, without the network.
    """
    from estimator.predict import predict
    from validator.compare import compare
    from validator.measure.case import Case

    backend = backend or _default_backend()
    job, profile = job_and_profile(flags, profile_path, store_path, **_defaults(backend, flags))
    case = Case(
        job=job, backend=backend, steps=steps, warmup=warmup, rank=rank, seed=seed, time_limit_s=time_limit,  # type: ignore[arg-type]
        nvme_folder=nvme_folder,
    )  # fmt: skip
    check_device(case)
    if write_case is not None:
        _hand_over(case, write_case, as_json)
        return
    predicted = predict(job, profile, rank=rank if case.plays_one_rank else None)
    measured = run_case(case, store_path)
    comparison = compare([predicted], [measured])
    if as_json:
        from zerocast.show import write_json

        write_json(
            {"measured": measured.to_dict(), "predicted": predicted.to_dict(), "comparison": comparison.to_dict()}
        )
    else:
        from dashboard.data import compared_rows
        from zerocast.show import job_title, say, show_comparison

        if measured.explanation:
            say(measured.explanation)
        show_comparison(f"{job_title(job)} [{backend}]", compared_rows(comparison.rows))


def _hand_over(case: Case, file: Path, as_json: bool) -> None:
    """Writes ``case`` and says how to run it without this command, under torchrun on every node."""
    from estimator.errors import InputError
    from validator.measure.case import write_case
    from validator.measure.runner import command_of_node
    from zerocast.show import say, write_json

    if case.plays_one_rank:
        raise InputError(
            f"--backend is {case.backend!r}; allowed with --write-case: 'cuda' or 'cpu', which run every rank"
        )
    try:
        write_case(case, file)
    except OSError as error:
        raise InputError(f"--write-case is {str(file)!r}, which cannot be written: {error.strerror}") from None
    out = file.with_name(f"{file.stem}.report.jsonl")
    run, keep = command_of_node(case, file, out), f"python -m validator import --records {out}"
    if as_json:
        write_json({"case": str(file), "on_every_node": run, "then_on_the_first": keep})
    else:
        say(f"on every node, with {file} there: {run}")
        say(f"then, on the first: {keep}")


def run_case(case: Case, store_path: Path | None) -> StepReport:
    """Measures ``case`` with a progress bar and records it. Raises ``Failed`` when it gives no result."""
    from validator.measure.runner import MeasureError, Progress, measure
    from validator.store.database import Store
    from zerocast.show import progress

    n_timed = 0 if case.backend == "fake" else case.steps + case.warmup
    with progress() as bar:
        task = bar.add_task(f"{case.label}: starting", total=n_timed or None)

        def tell(event: Progress) -> None:
            if event.stage == "time":
                bar.update(task, advance=1, description=f"{case.label}: timing")
            elif event.stage == "memory":
                bar.update(task, description=f"{case.label}: counting memory")

        try:
            report = measure(case, tell)
        except MeasureError as error:
            raise Failed(str(error)) from None
    Store(store_path).add(report)
    return report


def check_device(case: Case) -> None:
    """Raises ``InputError`` when the job's GPU is not the kind of device that the backend runs on."""
    from estimator.errors import InputError

    gpu = case.job.cluster.gpu
    if case.backend == "cpu" and gpu.arch != "cpu":
        raise InputError(f"--gpu is {gpu.name!r}; allowed with backend 'cpu': 'cpu' (or --backend fake for any GPU)")
    if case.on_cuda and gpu.arch == "cpu":
        raise InputError(
            f"--gpu is {gpu.name!r}; allowed with backend {case.backend!r}: the name of this machine's GPU"
        )


def _default_backend() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _defaults(backend: str, flags: JobFlags) -> dict[str, Any]:
    if flags.file is not None:
        return {}
    if backend == "cpu":
        return {"gpu": "cpu", "gpus": CPU_PROCESSES}
    return cuda_defaults() if backend in ("cuda", "cuda-virtual") else {}


def cuda_defaults() -> dict[str, Any]:
    """Flags for this machine's GPUs: their number, and their name where the catalogue knows it."""
    import torch

    from validator.devices import catalogue_name, device_here

    if not torch.cuda.is_available():
        return {}
    name = catalogue_name(device_here() or "")
    return {"gpus": torch.cuda.device_count(), **({"gpu": name} if name else {})}
