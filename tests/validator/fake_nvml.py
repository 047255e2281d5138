"""A ``pynvml`` with devices as told."""

from __future__ import annotations

from types import SimpleNamespace


class FakeNvml:
    """Devices by UUID with the bytes that are taken, and their processes."""

    class NVMLError(Exception):
        pass

    def __init__(self, used: dict[str, int], processes: dict[str, dict[int, int | None]] | None = None) -> None:
        self.used, self.processes = used, processes or {}
        self.error: str | None = None

    def nvmlInit(self) -> None:
        if self.error:
            raise self.NVMLError(self.error)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.used)[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=self.used[handle])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        found = self.processes.get(handle, {})
        return [SimpleNamespace(pid=pid, usedGpuMemory=n_bytes) for pid, n_bytes in found.items()]
