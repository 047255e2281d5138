"""Device memory as the driver counts it: CUDA's context, communication buffers and loaded kernels included.

NVML (``pynvml`` of the package nvidia-ml-py) tells each process's memory, but in a container it may not know this process
by its own number. Then it is the device's memory less what was taken before this process began, which takes everyone else's
growth for this process's. Without NVML it is all that the driver counts as taken (``cudaMemGetInfo``), other processes included.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["nvml-process", "nvml-device", "driver"]
MEANINGS: dict[Source, str] = {
    "nvml-process": "NVML's figure for this process",
    "nvml-device": "NVML's figure for the device, less what was taken before this process began",
    "driver": "all that the driver counts as taken, other processes included",
}


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """One device before this process made its context there."""

    handle: Any
    used_bytes: int
    pids: frozenset[int]


class DeviceMeter:
    """Memory that this process takes on one device. Make it before CUDA makes a context, then ``attach`` it."""

    def __init__(self, nvml: Any = None) -> None:
        """``nvml`` stands in for ``pynvml`` in tests."""
        self.reason: str | None = None
        """Why NVML is not used; ``None``: it is."""
        self.source: Source = "driver"
        self._mem_get_info: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._mine: _Taken | None = None
        self._before: dict[str, _Taken] = {}
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
        except ImportError:
            self._nvml, self.reason = None, "pynvml is not installed"
            return
        try:
            self._nvml.nvmlInit()
            for index in range(self._nvml.nvmlDeviceGetCount()):
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = self._nvml.nvmlDeviceGetUUID(handle)
                self._before[uuid.decode() if isinstance(uuid, bytes) else uuid] = _Taken(
                    handle=handle, used_bytes=self._used_bytes(handle), pids=frozenset(self._processes(handle))
                )
        except self._nvml.NVMLError as error:
            self.reason = f"NVML says: {error}"

    def attach(self, uuid: str, mem_get_info: Callable[[], tuple[int, int]]) -> None:
        """This process now has a context on the device with ``uuid``; ``mem_get_info`` gives its free and total bytes."""
        self._mem_get_info = mem_get_info
        if self.reason is not None:
            return
        self._mine = self._before.get(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        if self._mine is None:
            self.reason = f"NVML lists no device {uuid}"
            return
        pid = os.getpid()
        new = self._processes(self._mine.handle).get(pid) is not None and pid not in self._mine.pids
        self.source = "nvml-process" if new else "nvml-device"

    def used_bytes(self) -> int:
        """What this process takes now, in the meaning of ``source``."""
        if self._mine is None:
            free, total = self._mem_get_info()
            return total - free
        if self.source == "nvml-process":
            return self._processes(self._mine.handle)[os.getpid()] or 0
        return self._used_bytes(self._mine.handle) - self._mine.used_bytes

    def others_bytes(self) -> int | None:
        """What other processes take; with ``nvml-device`` what they took before this process began; ``None``: not known."""
        if self._mine is None:
            return None
        if self.source == "nvml-process":
            return self._used_bytes(self._mine.handle) - self.used_bytes()
        return self._mine.used_bytes

    def _used_bytes(self, handle: Any) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def _processes(self, handle: Any) -> dict[int, int | None]:
        """Bytes of each process with a context, by its number; ``None`` where the driver does not tell."""
        return {p.pid: p.usedGpuMemory for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
