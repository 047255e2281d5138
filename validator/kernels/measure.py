"""Times kernels on one device, beside a large copy in the same process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from estimator.errors import InputError
from estimator.units import MIB
from validator import provenance
from validator.kernels.calls import Prepared
from validator.kernels.case import KernelCase
from validator.kernels.implementation import check, using
from validator.kernels.report import KernelReport
from validator.kernels.table import kernel
from validator.timing import held_until_issued, time_call, wait

COPY_BYTES = {"cpu": 128 * MIB, "cuda": 1024 * MIB}
"""Moved by the copy that bandwidths are held against. It is timed again beside every kernel: machines drift."""
SLICE_S = {"cpu": 0.4, "cuda": 0.1}
"""About how long one call is repeated."""
_COPY_SLICE_S = 0.2
_WARM_UP_S = 0.5
_FLUSH_BYTES = {"cpu": 64 * MIB, "cuda": 256 * MIB}
_MIN_REPEATS = 7


@dataclass
class Bench:
    """One device, ready to time kernels on. Raises ``InputError`` when torch has no such device.

    Before every repeat a buffer is written that is twice as large as a GPU's cache (64 MiB on a CPU, whose cache may be
    larger). A GPU's seconds are those between two events around the call, on a stream that was held until the host had
    issued it: no gaps in which the device waits for the host, unless the call itself waits for the device.
    """

    device: str
    origin: dict[str, Any] = field(init=False)
    _copy: Prepared = field(init=False)
    _flush: Callable[[], Any] = field(init=False)
    _flushed_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device is 'cuda', but torch sees no GPU on this machine; allowed: cpu")
        n_bytes = _FLUSH_BYTES[self.device]
        if self.device == "cuda":
            n_bytes = max(n_bytes, 2 * torch.cuda.get_device_properties(0).L2_cache_size)
        self._flushed_bytes = n_bytes
        buffer = torch.zeros(n_bytes // 4, device=self.device)
        self._flush = lambda: buffer.fill_(0.0)
        self.origin = provenance.collect(with_torch=True)
        self._copy = kernel("copy").prepare(COPY_BYTES[self.device], "fp32", self.device)
        self._warm_up(self._copy.call)

    def copy_bytes_per_s(self) -> float:
        """What a large copy within the device's memory reaches now, bytes read plus written."""
        return self._copy.least_bytes / statistics.median(self._seconds(self._copy, _COPY_SLICE_S))

    def _warm_up(self, call: Callable[[], Any]) -> None:
        """An idle device first has to raise its clocks."""
        end = time.perf_counter() + _WARM_UP_S
        while time.perf_counter() < end:
            call()
            wait(self.device == "cuda")

    def measure(self, case: KernelCase) -> KernelReport:
        """Times ``case``. Raises what torch raises, out of memory included, and ``InputError`` when a call takes too long."""
        with using(case.kernel, case.implementation):
            prepared = case.entry.prepare(case.shape, case.dtype, self.device, case.implementation)
            if prepared.before is not None:
                prepared.before()
            check(case.kernel, case.implementation, prepared.call)
            copy_bytes_per_s = self.copy_bytes_per_s()
            seconds = self._seconds(prepared, SLICE_S[self.device])
            peak_bytes = self._peak_bytes(prepared)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return case.report(
            bytes=prepared.least_bytes, counted_bytes=prepared.n_bytes, flops=prepared.flops, seconds=median,
            low_s=min(seconds), high_s=max(seconds), spread_s=high - low, repeats=len(seconds), peak_bytes=peak_bytes,
            copy_bytes_per_s=copy_bytes_per_s,
            provenance={
                **self.origin, **library(case.implementation), "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
                "flushed_bytes": self._flushed_bytes,
            },
        )  # fmt: skip

    def _seconds(self, prepared: Prepared, slice_s: float) -> list[float]:
        def before() -> None:
            if prepared.before is not None:
                prepared.before()
            self._flush()

        call = prepared.call
        ready = held_until_issued(call, before) if self.device == "cuda" else before
        seconds = time_call(call, self.device, slice_s, before=ready, min_repeats=_MIN_REPEATS)
        if not seconds:
            raise InputError("one call takes too long to be repeated; allowed: a smaller size")
        return seconds

    def _peak_bytes(self, prepared: Prepared) -> int | None:
        """See ``KernelReport``. Operands are alive before the call; what it leaves behind is gone after it."""
        if self.device == "cpu":
            return None
        if prepared.before is not None:
            prepared.before()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
        prepared.call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before_bytes + prepared.operand_bytes


def library(implementation: str) -> dict[str, str | None]:
    """Version of the library that ``implementation`` is from, where that is not torch or this project."""
    names = {"liger": "liger-kernel", "apex": "apex", "compile": "triton"}
    name = names.get(implementation)
    return {name: provenance.package_version(name)} if name else {}
