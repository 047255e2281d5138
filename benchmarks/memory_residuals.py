"""Forecast over published peak memory, and the spread of it: where ``spread.tensors`` of ``catalog/data/device_memory.json`` comes from.

    python benchmarks/memory_residuals.py RUNS.csv

The file has the columns of published runs (``peak_mem_gib``, ``peak_mem_kind``). A reserved figure in a run's notes ("real reserved
70.88 GiB") counts beside its allocated one. Left out are copies ("MEMORY NOT INDEPENDENT"), figures of GPUs that were full
("allocator-saturated"), which say only that it ran, and runs that cannot be expressed.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

from estimator.errors import InputError
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.predict import predict
from estimator.units import GIB
from validator.published import read_runs
from validator.published.expression import job_of
from validator.published.runs import PublishedRun

_LEFT_OUT = ("MEMORY NOT INDEPENDENT", "allocator-saturated")


def figures(run: PublishedRun) -> dict[str, float]:
    """Published GiB by kind."""
    notes, kind, gib = run.text("notes") or "", run.text("peak_mem_kind"), run.number("peak_mem_gib")
    found = {kind: gib} if kind in ("allocated", "reserved") and gib else {}
    if (reserved := re.search(r"real reserved ([\d.]+) GiB", notes)) is not None:
        found["reserved"] = float(reserved[1])
    return {} if any(words in notes for words in _LEFT_OUT) else found  # type: ignore[return-value]


def main(path: str) -> None:
    errors: dict[str, list[float]] = {}
    for run in read_runs(Path(path)):
        published = figures(run)
        if not published:
            continue
        try:
            job = job_of(run)
            report = predict(job, allocator=AllocatorSettings())
        except InputError as reason:
            print(f"left out {run.run_id}: {reason}")
            continue
        forecast = {"allocated": report.allocator_bytes, "reserved": report.peak_reserved_bytes}
        group = "compiled" if job.strategy.compile else "eager"
        for kind, gib in published.items():
            n_bytes = forecast[kind]
            assert n_bytes is not None
            error = n_bytes / (gib * GIB) - 1
            errors.setdefault(f"{group}, {kind}", []).append(error)
            print(f"{100 * error:+7.2f} %  {n_bytes / GIB:8.2f} of {gib:8.2f} GiB  {kind:9s}  {run.run_id}")
    print("root mean square, mean, n")
    for name, values in errors.items():
        square = math.sqrt(sum(value**2 for value in values) / len(values))
        print(f"{100 * square:7.2f} % {100 * sum(values) / len(values):+7.2f} % {len(values):4d}  {name}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/memory_residuals.py RUNS.csv")
    main(sys.argv[1])
