"""``zerocast budget``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zerocast.job_flags import JobCommand, JobFlags, job_and_profile, job_flags, json_flag, profile_flag

if TYPE_CHECKING:
    from estimator.run import RunReport


@click.command(
    "budget",
    cls=JobCommand,
    short_help="What a whole training run costs: days, dollars, kWh, checkpoints, goodput.",
    epilog="Example: zerocast budget --model llama-3-8b --gpu aws-p5.48xlarge --gpus 512 --tokens 1T --recompute full",
)
@job_flags
@profile_flag
@click.option("--tokens", "tokens", metavar="N", help="Tokens to train on, e.g. 15T, 300B, 2e9.")
@click.option(
    "--price", type=float, metavar="USD", help="Of one GPU and hour; default: the machine type's, if it has one."
)
@click.option("--machine", metavar="NAME", help="Machine type whose price is taken, e.g. aws-p5.48xlarge.")
@click.option(
    "--mtbf",
    metavar="HOURS|NAME",
    help="GPU-hours between failures: a number, llama-3 (default), rsc-1, rsc-2, bloom, none.",
)
@click.option(
    "--restart-s", type=float, metavar="S", help="From a failure to the reading of the checkpoint [default: 600]."
)
@click.option(
    "--checkpoint-every", type=float, metavar="S", help="Seconds between checkpoints; default: what loses least."
)
@click.option("--async-checkpoint", is_flag=True, help="Write checkpoints beside training, from a copy in host memory.")
@click.option(
    "--storage", type=float, metavar="GB/S", help="That all nodes together write or read [default: 1 per node]."
)
@click.option(
    "--power-factor", type=float, metavar="X", help="A server's watts over its GPUs' rated watts [default: 1.5]."
)
@click.option("--pue", type=float, metavar="X", help="The building's watts over its servers' [default: 1.1].")
@click.option("--bytes-per-token", type=float, metavar="X", help="Of the stored data set [default: 4].")
@json_flag
def command(
    flags: JobFlags, profile_path: Path | None, tokens: str | None, price: float | None, machine: str | None, mtbf: str | None,
    restart_s: float | None, checkpoint_every: float | None, async_checkpoint: bool, storage: float | None,
    power_factor: float | None, pue: float | None, bytes_per_token: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Forecast one step of the job, and from it a whole run over --tokens: wall clock with failures, restarts and checkpoints
    (Young 1974, Daly 2006), GPU-hours, dollars, energy, MFU and HFU by both conventions, and what data loading needs.

    With --json: the fields of a RunReport by name, in bytes, seconds, watts and dollars.
    """
    from estimator.errors import InputError
    from estimator.predict import predict
    from estimator.run import RunQuestion, token_count, whole_run

    if tokens is None:
        raise InputError("--tokens is not given; allowed: a number such as 15T, 300B or 2e9")
    given = {
        "mtbf": mtbf, "restart_s": restart_s, "checkpoint_every_s": checkpoint_every, "node_power_factor": power_factor, "pue": pue,
        "data_bytes_per_token": bytes_per_token, "storage_bytes_per_s": None if storage is None else storage * 1e9,
    }  # fmt: skip
    job, profile = job_and_profile(flags, profile_path)
    usd, source = _price(price, machine, str(flags.given.get("gpu", "")), job.cluster.gpu.name)
    question = RunQuestion(
        tokens=token_count(tokens), usd_per_gpu_hour=usd, asynchronous=async_checkpoint,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )  # fmt: skip
    run = whole_run(job, predict(job, profile), question)
    notes = (*run.notes, *source)
    if as_json:
        from zerocast.show import write_json

        write_json({**run.to_dict(), "notes": list(notes)})
        return
    from zerocast.show import job_title, say

    _show(run, job_title(job))
    for note in notes:
        say(f"note: {note}")


def _price(price: float | None, machine: str | None, gpu: str, job_gpu: str) -> tuple[float | None, tuple[str, ...]]:
    """Dollars per GPU and hour, and a note on where they come from."""
    from estimator import catalog
    from estimator.catalog.hardware import normal
    from estimator.errors import InputError

    if price is not None:
        return price, ()
    name = machine or (gpu if normal(gpu) in catalog.machine_names() else None)
    if name is None:
        return None, ("dollars: no price was given; --price, or --machine with one of the catalogue",)
    found = catalog.machine_type(name)
    if found.gpu != job_gpu:
        raise InputError(
            f"machine {found.name!r} has {found.gpu}, the job is for {job_gpu}; allowed: {', '.join(catalog.machine_names(job_gpu))}"
        )
    if found.usd_per_gpu_hour is None:
        return None, (f"dollars: no price of {found.name} is known; --price gives one",)
    say = f"price: {found.usd_per_hour:g} USD/h for {found.n_gpus} GPUs, {found.name}, {found.price_region}, {found.price_date}"
    return found.usd_per_gpu_hour, (f"{say} ({found.price_source})",)


def _show(run: RunReport, title: str) -> None:
    from zerocast.show import bytes_cell, percent_cell, rate_cell, say, seconds_cell, table

    u, saved = run.utilisation, run.checkpoint
    span = "" if run.days_low is None or run.days_high is None else f" ({run.days_low:,.1f} to {run.days_high:,.1f})"
    rows = [
        ("wall clock", f"{run.days:,.1f} days{span}"),
        ("steps", f"{run.n_steps:,} of {seconds_cell(run.step_s)}, {rate_cell(run.tokens_per_s)} tokens/s"),
        ("MFU, HFU (causal attention)", f"{percent_cell(u.mfu_causal)}, {percent_cell(u.hfu_causal)}"),
        ("MFU, HFU (full attention)", f"{percent_cell(u.mfu_full)}, {percent_cell(u.hfu_full)}"),
        ("GPU-hours", f"{run.gpu_hours:,.0f}"),
        ("dollars", "-" if run.usd is None else f"{run.usd:,.0f} ({run.tokens_per_usd:,.0f} tokens each)"),
        ("energy", "-" if run.kwh is None else f"{run.kwh:,.0f} kWh ({run.tokens_per_kwh:,.0f} tokens each)"),
        ("mean power", "-" if run.mean_watts is None else f"{run.mean_watts / 1e3:,.1f} kW"),
        ("checkpoint", f"{bytes_cell(saved.total_bytes)}, {bytes_cell(saved.rank_bytes)} from each of {saved.n_writers:,} ranks"),
        ("saving", f"{seconds_cell(saved.write_s)}, training stands still for {seconds_cell(saved.blocked_s)}"),
        ("saved every", "-" if run.checkpoint_every_s is None else f"{run.checkpoint_every_s / 60:,.1f} min ({run.n_checkpoints:,} times)"),
        ("failures", "none" if run.mtbf_s is None else f"{run.n_failures:,.1f}, one every {run.mtbf_s / 3600:,.1f} h"),
        ("goodput", percent_cell(run.goodput)),
        ("data", f"{run.data_bytes_per_s / 1e6:,.2f} MB/s of {run.data_bytes / 1e12:,.2f} TB"),
    ]  # fmt: skip
    table(f"{title} | {run.tokens:,} tokens", [("", "left"), ("", "left")], rows)
    if run.optimum_s is not None and run.checkpoint_every_s != run.optimum_s:
        say(f"saving every {run.optimum_s / 60:,.1f} min would lose least (Daly 2006)")
