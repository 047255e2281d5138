"""``zerocast runs``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from estimator.errors import InputError
from zerocast.job_flags import json_flag, store_flag


@click.group(
    "runs", short_help="List, show, export, import or delete recorded runs.", epilog="Example: zerocast runs list"
)
def command() -> None:
    """The record store: what was measured on this machine, or imported from another."""


@command.command("list", epilog="Example: zerocast runs list --model gpt-30m --origin cpu")
@click.option("--model", metavar="NAME", help="Only records of this model.")
@click.option("--origin", metavar="NAME", help="Only records of this origin: fake, cpu, cuda, predicted.")
@store_flag
@json_flag
def list_(model: str | None, origin: str | None, store_path: Path | None, as_json: bool) -> None:
    """List the recorded runs, oldest first."""
    from dashboard.data import strategy_row
    from validator.store.database import Store
    from zerocast.show import bytes_cell, rate_cell, say, seconds_cell, table, write_json

    store = Store(store_path)
    records = store.records(model=model, origin=origin)
    if as_json:
        write_json([{"id": r.id, "added_utc": r.added_utc, "report": r.report.to_dict()} for r in records])
        return
    if not records:
        say(f"no such records in {store.path}; 'zerocast measure' adds one")
        return
    rows = []
    for record in records:
        row, job = strategy_row(record.report), record.report.job
        rows.append(
            (
                str(record.id), record.added_utc[:10], record.report.origin, _name(job), _gpus(job),
                str(row["zero_stage"]), str(row["offload"]), str(row["recompute"]), str(row["micro_batch_size"]),
                bytes_cell(row["peak_bytes"]), seconds_cell(row["step_s"]), rate_cell(row["tokens_per_s"]),
            )
        )  # fmt: skip
    columns = [
        ("id", "right"), ("added", "left"), ("origin", "left"), ("model", "left"), ("GPUs", "left"), ("ZeRO", "right"),
        ("offload", "left"), ("recompute", "left"), ("micro", "right"), ("peak", "right"), ("step", "right"), ("tokens/s", "right"),
    ]  # fmt: skip
    table(str(store.path), columns, rows)


@command.command("show", epilog="Example: zerocast runs show 3")
@click.argument("record_id", metavar="ID", type=int)
@store_flag
@json_flag
def show(record_id: int, store_path: Path | None, as_json: bool) -> None:
    """Show one recorded run."""
    from validator.store.database import Store
    from zerocast.show import say, show_report, write_json

    record = {r.id: r for r in Store(store_path).records()}.get(record_id)
    if record is None:
        raise _no_record(record_id, Store(store_path))
    if as_json:
        write_json({"id": record.id, "added_utc": record.added_utc, "report": record.report.to_dict()})
        return
    show_report(
        record.report,
        f"record {record.id}: {_name(record.report.job)} on {_gpus(record.report.job)} ({record.report.origin})",
    )
    for key in ("date_utc", "host", "cpu", "gpu", "python", "torch", "git"):
        if record.report.provenance.get(key):
            say(f"{key}: {record.report.provenance[key]}")


@command.command("export", epilog="Example: zerocast runs export runs.jsonl")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", metavar="NAME", help="Only records of this model.")
@click.option("--origin", metavar="NAME", help="Only records of this origin.")
@store_flag
@json_flag
def export(file: Path, model: str | None, origin: str | None, store_path: Path | None, as_json: bool) -> None:
    """Write records to FILE: .jsonl, .csv or .parquet by its ending."""
    from validator.store.database import Store
    from validator.store.records import export_reports

    reports = Store(store_path).reports(model=model, origin=origin)
    export_reports(reports, file)
    _done(as_json, f"{len(reports)} records written to {file}", exported=len(reports), file=str(file))


@command.command("import", epilog="Example: zerocast runs import runs.jsonl")
@click.argument("file", type=click.Path(path_type=Path))
@store_flag
@json_flag
def import_(file: Path, store_path: Path | None, as_json: bool) -> None:
    """Add the records in FILE (all of them, or none when one is bad); known ones are left alone."""
    from validator.store.database import Store
    from validator.store.records import import_reports

    reports = import_reports(file)
    n_new = Store(store_path).add_many(reports)
    _done(as_json, f"{n_new} of {len(reports)} records were new", read=len(reports), added=n_new)


@command.command("delete", epilog="Example: zerocast runs delete 3 4")
@click.argument("ids", metavar="ID...", type=int, nargs=-1, required=True)
@store_flag
@json_flag
def delete(ids: tuple[int, ...], store_path: Path | None, as_json: bool) -> None:
    """Delete records by id (all of the given ones, or none when one is unknown)."""
    from validator.store.database import Store

    store = Store(store_path)
    known = {r.id for r in store.records()}
    for record_id in ids:
        if record_id not in known:
            raise _no_record(record_id, store)
    n_deleted = store.delete(set(ids))
    _done(as_json, f"{n_deleted} records deleted", deleted=n_deleted)


def _no_record(record_id: int, store: Any) -> InputError:
    known = [r.id for r in store.records()]
    allowed = ", ".join(map(str, known[-20:])) if known else "none, the store is empty"
    return InputError(f"record id is {record_id}; allowed in {store.path}: {allowed}")


def _done(as_json: bool, text: str, **data: Any) -> None:
    from zerocast.show import say, write_json

    if as_json:
        write_json(data)
    else:
        say(text)


def _name(job: dict[str, Any]) -> str:
    model = job.get("model")
    return str(model.get("name", "?")) if isinstance(model, dict) else str(model or "?")


def _gpus(job: dict[str, Any]) -> str:
    cluster = job.get("cluster", {})
    gpu = cluster.get("gpu")
    name = gpu.get("name") if isinstance(gpu, dict) else gpu
    return f"{cluster.get('n_gpus', '?')} x {name or '?'}"
