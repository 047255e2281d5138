"""Every memory-bound kernel beside its rivals on the device at hand. ``python benchmarks/bench_kernels.py [--mib 256] [--dtype bf16]``

One row per kernel and direction, for norms and losses also forward and backward together: bytes that any implementation
moves, our time, bandwidth and share of a large copy in the same process (medians, caches emptied before each call), and
how many times faster ours is than each rival. Then the losses' peak memory, and what was set out for. Without a GPU small
sizes of ``torch`` and ``fused`` alone, unless the flags say more: compiling takes minutes there, and there is nothing of ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import groupby

import torch

from estimator.errors import InputError, require_choice
from estimator.units import MIB
from validator.kernels.case import KernelCase
from validator.kernels.goals import NORMS, contests, goals, memory_lines, table_lines
from validator.kernels.implementation import IMPLEMENTATIONS, missing
from validator.kernels.measure import Bench
from validator.kernels.report import KernelReport
from validator.kernels.table import KERNELS, NAMES, Kernel, kernel

MIB_PER_CALL = {"cpu": 16, "cuda": 256}
TIMES = {"cross_entropy": 8, "linear_cross_entropy": 32}
"""Kernels that take more of it: of what plain torch moves for the loss a sixth is left in one pass, and the head is to have
more rows than a few hundred."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mib", type=float, help="moved by a call of plain torch; losses move more (default: 256, CPU: 16)"
    )
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--kernels", default=",".join(NAMES), help="names, separated by commas (default: all)")
    parser.add_argument("--implementations", help="likewise (default: all; on a CPU torch,fused)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = args.implementations or ("torch,fused" if device == "cpu" else ",".join(IMPLEMENTATIONS))
    try:
        names = [require_choice("kernel", name, NAMES) for name in args.kernels.split(",")]
        implementations = [require_choice("implementation", x, IMPLEMENTATIONS) for x in chosen.split(",")]
    except InputError as error:
        parser.error(str(error))
    bench = Bench(device)
    print(f"{device}: a copy moves {bench.copy_bytes_per_s() / 1e9:.4g} GB/s; {args.dtype}, torch {torch.__version__}")
    reports: list[KernelReport] = []
    failures: list[str] = []
    cases = _cases(names, implementations, args.dtype, args.mib or MIB_PER_CALL[device], device)
    for number, (_, rivals) in enumerate(groupby(cases, key=lambda c: (c.kernel, c.backward, c.both))):
        of_one = []
        for case in rivals:
            try:
                of_one.append(bench.measure(case))
            except Exception as error:  # a library that does not fit, memory that runs out: the others go on
                failures.append(f"{case.label} failed: {type(error).__name__}: {str(error)[:200]}")
        reports += of_one
        for line in list(table_lines(contests(of_one), implementations))[number > 0 :]:
            print(line, flush=True)
    for line in (*memory_lines(contests(reports)), *failures, *map(str, goals(reports))):
        print(line)


def _cases(names: list[str], implementations: list[str], dtype: str, mib: float, device: str) -> Iterator[KernelCase]:
    """All implementations of one kernel and direction, one after the other."""
    for entry in _entries(names):
        for implementation in implementations:
            if dtype not in entry.dtypes or missing(entry.name, implementation, device):
                continue
            n_bytes = mib * MIB * TIMES.get(entry.name, 1)
            yield KernelCase(
                kernel=entry.name, backward=entry.backward, both=entry.both, dtype=dtype, n_bytes=round(n_bytes),
                implementation=implementation, device=device,  # type: ignore[arg-type]
            )  # fmt: skip


def _entries(names: list[str]) -> Iterator[Kernel]:
    for entry in KERNELS:
        if entry.name in names:
            yield entry
            if entry.backward and entry.name in (*NORMS, "cross_entropy"):
                yield kernel(entry.name, both=True)


if __name__ == "__main__":
    main()
