"""Bandwidth of every memory-bound kernel on the device at hand. ``python benchmarks/bench_kernels.py [--mib 64] [--dtype fp32]``

One row per kernel: bytes that any implementation moves, median seconds with emptied caches, GB/s, the share of a large copy
within device memory in the same process, and the error of the forecast (``--profile``: what ``zerocast calibrate`` wrote).
"""

from __future__ import annotations

import argparse

import torch

from estimator.errors import InputError
from estimator.time.profile_file import load_profile
from estimator.units import MIB, format_bytes, format_seconds
from validator.kernels.case import KernelCase
from validator.kernels.implementation import missing
from validator.kernels.measure import Bench
from validator.kernels.summary import short_name, with_forecasts
from validator.kernels.table import KERNELS


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=float, default=64, help="about how much one call moves (default: 64)")
    parser.add_argument("--dtype", default="fp32", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--profile", help="hardware profile of this machine")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    profile = load_profile(args.profile) if args.profile else None
    bench = Bench(device)
    print(f"{device}: a copy moves {bench.copy_bytes_per_s() / 1e9:.4g} GB/s; {args.dtype}, torch {torch.__version__}")
    print(f"{'kernel':26} {'bytes':>11} {'seconds':>9} {'GB/s':>8} {'of copy':>8} {'forecast':>9}")
    for entry in KERNELS:
        for implementation in ("torch", "cuda"):
            if args.dtype not in entry.dtypes or missing(entry.name, implementation, device):
                continue
            case = KernelCase(
                kernel=entry.name, backward=entry.backward, dtype=args.dtype, n_bytes=round(args.mib * MIB),
                implementation=implementation, device=device,
            )  # fmt: skip
            try:
                (row,) = with_forecasts([bench.measure(case)], profile)
            except (InputError, RuntimeError) as error:
                print(f"{entry.name:26} failed: {str(error).splitlines()[0]}")
                continue
            r = row.report
            forecast = f"{row.error:+9.0%}" if row.error is not None else f"{'-':>9}"
            print(
                f"{short_name(r):26} {format_bytes(r.bytes):>11} {format_seconds(r.seconds):>9} {r.bytes_per_s / 1e9:8.4g} "
                f"{r.of_copy:8.0%} {forecast}"
            )


if __name__ == "__main__":
    main()
