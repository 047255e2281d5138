"""What is read beside a session: the allocator, the driver and the host, in the process that runs the steps."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from validator.measure.device_memory import MEANINGS, DeviceMeter

_BYTES = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes", "inactive_split_bytes")
_COUNTS = ("num_alloc_retries", "num_ooms", "num_device_alloc", "num_device_free", "num_sync_all_streams")


class GpuInstruments:
    """Memory of one GPU around a session. Made when the context is there and nothing is allocated yet."""

    def __init__(self, cuda: Any, meter: DeviceMeter) -> None:
        """``cuda``: ``torch.cuda``, its device set. ``meter`` was made before CUDA was touched."""
        self._cuda, self._meter = cuda, meter
        cuda.synchronize()  # makes the context
        meter.attach(str(cuda.get_device_properties(cuda.current_device()).uuid), cuda.mem_get_info)
        self._context_bytes = self._outside_allocator()
        self._comm_bytes: int | None = None
        self._peak_used_bytes = 0
        self._facts: dict[str, Any] = {}

    def network_is_up(self) -> None:
        """The process group has done its first collective: what grew since belongs to it."""
        self._cuda.synchronize()
        self._comm_bytes = max(0, self._outside_allocator() - self._context_bytes)

    def warmed_up(self) -> None:
        """First steps also hold what libraries need once: peaks count from here on."""
        self._cuda.reset_peak_memory_stats()
        if hasattr(self._cuda, "reset_peak_host_memory_stats"):
            self._cuda.reset_peak_host_memory_stats()
        self._peak_used_bytes = 0

    def after_step(self) -> None:
        """The allocator returns nothing to the driver between steps, so what a step took at most is still held at its end."""
        self._peak_used_bytes = max(self._peak_used_bytes, self._meter.used_bytes())

    def finished(self) -> None:
        """The timed steps are over: take down what they took, before metering, under which autograd adds out of place."""
        stats = self._cuda.memory_stats()
        pinned = pinned_peaks(self._cuda.host_memory_stats()) if hasattr(self._cuda, "host_memory_stats") else {}
        native = self._meter.source != "driver"
        outside = self._outside_allocator()
        _, total = self._cuda.mem_get_info()
        self._facts = {
            "allocator_peak_bytes": self._cuda.max_memory_allocated(),
            "reserved_bytes": self._cuda.max_memory_reserved(),
            "device_used_bytes": self._peak_used_bytes,
            "capacity_bytes": total,
            # without NVML other processes' memory is in it
            "cuda_context_bytes": self._context_bytes if native else None,
            "comm_buffers_bytes": self._comm_bytes,
            "facts": {
                "allocator": {"backend": self._cuda.get_allocator_backend(), **allocator_facts(stats)},
                "device_memory": {
                    "source": self._meter.source,
                    "meaning": MEANINGS[self._meter.source],
                    "nvml_not_used": self._meter.reason,
                    "others_bytes": self._meter.others_bytes(),
                    "context_bytes": self._context_bytes if native else None,
                    "comm_buffers_bytes": self._comm_bytes,
                    # kernels loaded, library handles, further communicators: grown since, not in the allocator
                    "libraries_bytes": outside - self._context_bytes - (self._comm_bytes or 0),
                },
                "pinned": pinned,
            },
        }

    def facts(self) -> dict[str, Any]:
        """Fields of ``validator.measure.report.RankResult``."""
        return self._facts

    def _outside_allocator(self) -> int:
        return self._meter.used_bytes() - self._cuda.memory_reserved()


def allocator_facts(stats: Mapping[str, Any]) -> dict[str, int]:
    """From ``torch.cuda.memory_stats``: peaks in bytes, segments held at most, and what tells of trouble."""
    facts = {f"peak_{name}": stats[f"{name}.all.peak"] for name in _BYTES if f"{name}.all.peak" in stats}
    if "segment.all.peak" in stats:
        facts["peak_segments"] = stats["segment.all.peak"]
    return {**facts, **{name: stats[name] for name in _COUNTS if name in stats}}


def pinned_peaks(stats: Mapping[str, Any]) -> dict[str, int]:
    """From ``torch.cuda.host_memory_stats``: pinned bytes in use and held, both in the allocator's own sizes (powers of two).

    Older versions of torch call them ``allocated_bytes`` and ``reserved_bytes``, newer ones ``active_bytes`` and
    ``allocated_bytes``.
    """
    newer = "active_bytes.peak" in stats
    names = {
        "peak_active_bytes": "active_bytes.peak" if newer else "allocated_bytes.peak",
        "peak_held_bytes": "allocated_bytes.peak" if newer else "reserved_bytes.peak",
    }
    return {ours: stats[theirs] for ours, theirs in names.items() if theirs in stats}


def peak_rss_bytes() -> int | None:
    """Most host memory that this process has held; ``None`` where the system does not tell."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
