"""What the estimator's time model says for a measured kernel."""

from __future__ import annotations

from estimator import catalog
from estimator.errors import InputError
from estimator.job.cluster import Gpu
from estimator.ops.operator import Op
from estimator.ops.streaming import fused_step
from estimator.time.operators import OperatorTimer
from estimator.time.profile import HardwareProfile, profile_for
from validator.devices import catalogue_name
from validator.kernels.report import KernelReport
from validator.kernels.table import kernel


class Forecaster:
    """``profile`` is used where it is the measured device's own; a GPU of the catalogue has a shipped one."""

    def __init__(self, profile: HardwareProfile | None = None) -> None:
        self.profile = profile
        self._timers: dict[str, OperatorTimer] = {}

    def seconds(self, report: KernelReport) -> float:
        """Forecast for the operators that the estimator has for ``report``'s kernel, one after the other: plain torch's, or
        the runtime's own kernel's.

        Raises ``InputError`` for what the runtime never runs, when there is no profile of the device, or when it knows
        nothing of the dtype.
        """
        if report.implementation not in ("torch", "cuda"):
            raise InputError(f"the runtime does not run implementation {report.implementation!r}; allowed: cuda, torch")
        gpu, own = self._gpu_of(report)
        if gpu.name not in self._timers:
            self._timers[gpu.name] = OperatorTimer(gpu, profile_for(gpu, own)[0])
        timer = self._timers[gpu.name]
        entry = kernel(report.kernel, report.backward, report.both)
        ops = entry.ops(report.shape, report.dtype, report.implementation)
        return sum(_seconds(timer, op) for op in ops)

    def _gpu_of(self, report: KernelReport) -> tuple[Gpu, HardwareProfile | None]:
        local = self.profile.gpu if self.profile is not None else None
        if report.device == "cpu":
            if local is None or local.arch != "cpu":
                raise InputError("a kernel on a CPU is forecast with this machine's profile only; calibrate writes one")
            return local, self.profile
        name = catalogue_name(report.device_name)
        if local is not None and local.arch != "cpu" and name in (None, local.name):
            return local, self.profile
        if name is None:
            raise InputError(f"the catalogue has no GPU {report.device_name!r}; allowed: a profile of it")
        return catalog.gpu(name), None


def _seconds(timer: OperatorTimer, op: Op) -> float:
    """As ``estimator.time.durations`` does it: on a CPU the fused step is timed by its measured rate."""
    if op.kind == "optimizer" and timer.is_cpu:
        rate = timer.profile.host_point(timer.workers).adam_elements_per_s
        return op.n_bytes / fused_step("adamw", 1).n_bytes / rate
    return timer.seconds(op)
