"""Seconds of every kind of event of one job, each worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from estimator.errors import InputError
from estimator.job.job import Job
from estimator.job.kernels import kernels_in_use
from estimator.ops.cost import UnitCost
from estimator.ops.kernels import grad_norm, optimizer
from estimator.ops.operator import Op
from estimator.ops.streaming import around_step, fused_step
from estimator.schedule.events import CollectiveOp, Keep, Pack, Span, Unpack
from estimator.schedule.nvme import IO_BLOCK_BYTES, IO_QUEUE
from estimator.time.compression import codec_op
from estimator.time.network import CollectiveTimer, timer_over
from estimator.time.operators import OperatorTimer, curve_seconds, seconds_curve
from estimator.time.profile import HardwareProfile
from estimator.units import DTYPE_BYTES

PassTime = tuple[str, float, float, float]
"""Part, device seconds, seconds from issue to end if the device never lags, seconds of issuing. With compute clock
``c`` and host clock ``h`` the pass ends at ``max(c + device, h + issue_to_end)``: a chain of kernels, each of which
starts when it is issued and its predecessor is done, is linear in that sense."""


class Durations:
    """Seconds of a job's events on a profile; ``workers`` ranks share a node."""

    def __init__(self, costs: Sequence[UnitCost], job: Job, profile: HardwareProfile) -> None:
        cluster, strategy = job.cluster, job.strategy
        self.job, self.profile, self.costs = job, profile, costs
        self.kernels = kernels_in_use(cluster.gpu.arch, strategy.kernels_off)
        self.workers = min(cluster.n_gpus, cluster.gpus_per_node)
        self.ops = OperatorTimer(cluster.gpu, profile, self.workers)
        self.is_cpu = self.ops.is_cpu
        self.overlap = profile.host_point(self.workers).overlap if self.is_cpu else 1.0
        self.issue_s = 0.0 if self.is_cpu else self.ops.host_op_s
        self._passes: dict[tuple[int, str], tuple[PassTime, ...]] = {}
        self._copies: dict[tuple[str, int], float] = {}
        self._networks: dict[tuple[Span | None, str], CollectiveTimer] = {}

    def passes(self, unit: int, phase: str) -> tuple[PassTime, ...]:
        """What ``Compute(unit, phase)`` runs: the loss counts as forward; recomputation precedes backward."""
        cost = self.costs[unit]
        key = (id(cost), phase)
        known = self._passes.get(key)
        if known is None:
            chains = (
                {"forward": cost.forward}
                if phase != "backward"
                else {"recompute": cost.recompute, "backward": cost.backward}
            )
            known = self._passes[key] = tuple(self._chain(part, ops) for part, ops in chains.items() if ops)
        return known

    def _chain(self, part: str, ops: Sequence[Op]) -> PassTime:
        device_s = issue_s = end_s = 0.0
        for op in ops:
            seconds = self.ops.seconds(op)
            issue_s += self.ops.host_seconds(op)
            end_s = max(end_s, issue_s) + seconds
            device_s += seconds
        return part, device_s, 0.0 if self.is_cpu else end_s, issue_s

    def collective(self, op: CollectiveOp, n_bytes: int, span: Span | None = None) -> float:
        dtype = self.job.strategy.dtype if op == "all_gather" else self.job.strategy.grads
        network = self._networks.get((span, dtype))
        if network is None:
            network = self._networks[span, dtype] = timer_over(span, self.job, self.profile, dtype)
        return network.seconds(op, n_bytes)

    def copy(self, direction: str, n_bytes: int) -> float:
        """A pinned copy: the host link, or this GPU's share of host memory if that is less; or one between host and files.

        Raises ``InputError`` where the profile has no rates of files.
        """
        if n_bytes <= 0:
            return 0.0
        known = self._copies.get((direction, n_bytes))
        if known is None:
            known = self._copies[direction, n_bytes] = self._copy(direction, n_bytes)
        return known

    def _file_copy(self, direction: str, n_bytes: int) -> float:
        """At the measured rate of the size and number of blocks that the runtime uses (the nearest measured); the ranks of a node
        share it."""
        points = [p for p in self.profile.files if f"nvme_{p.direction}" == direction]
        if not points:
            raise InputError(
                f"offload is {self.job.strategy.offload!r}, whose time needs rates of files; profile {self.profile.name!r} has none, "
                "allowed: one from `zerocast calibrate --nvme FOLDER`"
            )
        nearest = min(points, key=lambda p: (abs(log(p.queue / IO_QUEUE)), abs(log(p.block_bytes / IO_BLOCK_BYTES))))
        return n_bytes * self.workers / nearest.bytes_per_s

    def _copy(self, direction: str, n_bytes: int) -> float:
        if direction.startswith("nvme"):
            return self._file_copy(direction, n_bytes)
        profile, cluster = self.profile, self.job.cluster
        shared_s = 0.0 if self.is_cpu else n_bytes * self.workers / cluster.host.memory_bytes_per_s
        if profile.is_measured and profile.copies:
            points = [p for p in profile.copies if p.direction == direction and p.pinned] or list(profile.copies)
            workers = min({p.workers for p in points}, key=lambda w: (abs(w - self.workers), w))
            curve = seconds_curve((p.bytes, p.bytes / p.bytes_per_s) for p in points if p.workers == workers)
            return max(curve_seconds(curve, n_bytes), shared_s)
        chip = profile.chip
        assert chip is not None, f"profile {profile.name} has neither copies nor chip constants"
        return chip.copy_s + max(n_bytes / (chip.copy_efficiency * cluster.gpu.host_link_bytes_per_s), shared_s)

    # ---- compression ----------------------------------------------------------------------------------------------

    def compression(self, event: Pack | Unpack | Keep) -> float:
        """What the compute stream does before a compressed collective and after it."""
        s = self.job.strategy
        if isinstance(event, Keep):
            return self._stream(2 * event.n_bytes)
        return self.ops.seconds(codec_op(event, s.dtype if event.purpose == "params" else s.grads, self.kernels))

    # ---- gradients and optimizer ----------------------------------------------------------------------------------

    def accumulate(self, n_bytes: int) -> float:
        """Two reads and a write."""
        return self._stream(3 * n_bytes)

    def grad_norm(self, n_bytes: int, on_host: bool) -> float:
        """One read of the gradient shard."""
        if "grad_norm" in self.kernels and not on_host:
            dtype, width = self.job.strategy.dtype, DTYPE_BYTES[self.job.strategy.grads]
            return self.ops.seconds(grad_norm.cost(n_bytes // width, dtype, width))
        return self._host_stream(n_bytes, on_host)

    def update(self, numel: int, on_host: bool) -> float:
        """One optimizer step on ``numel`` elements: bound by memory on the device, by the measured rate on the host.

        The runtime's kernel does everything in one pass. Around torch's fused step the runtime makes passes of its own: it
        casts low-precision gradients to fp32, scales them, and casts the new parameters back.
        """
        if numel <= 0:
            return 0.0
        strategy = self.job.strategy
        if optimizer.RULES[strategy.optimizer].kernel in self.kernels and not on_host:
            width = DTYPE_BYTES[strategy.dtype]
            copy_width = 0 if strategy.dtype == "fp32" else width
            step = optimizer.cost(strategy.optimizer, numel, DTYPE_BYTES[strategy.grads], copy_width)
            return self.ops.seconds(step._replace(dtype=strategy.dtype))
        around_s = self._host_stream(numel * self._passes_bytes(), on_host)
        if on_host or self.is_cpu:
            return numel / self._host_rate() + around_s
        return self._stream(numel * self._update_bytes()) + around_s

    def _passes_bytes(self) -> int:
        """Bytes per element moved by the passes before and after the fused optimizer step."""
        return sum(op.n_bytes for op in around_step(self.job.strategy.dtype, 1, self.job.strategy.grads))

    def _host_stream(self, n_bytes: int, on_host: bool) -> float:
        if on_host and not self.is_cpu:
            return n_bytes * self.workers / self.job.cluster.host.memory_bytes_per_s
        return self._stream(n_bytes)

    def _update_bytes(self) -> int:
        """Bytes per element of the fused step: fp32 gradient read, states and parameters read and written."""
        return fused_step(self.job.strategy.optimizer, 1).n_bytes

    def _host_rate(self) -> float:
        """Elements per second of one rank: published rates are a whole node's, measured ones one process's of many.

        Other optimizers than Adam move fewer bytes (28 per element there), and no rank exceeds its share of memory.
        """
        point = self.profile.host_point(self.workers)
        n_bytes = self._update_bytes()
        if self.profile.is_measured:
            return point.adam_elements_per_s * 28 / n_bytes
        node = min(point.adam_elements_per_s * 28 / n_bytes, self.job.cluster.host.memory_bytes_per_s / n_bytes)
        return node / self.workers

    def _stream(self, n_bytes: int) -> float:
        return self.ops.traffic_seconds(n_bytes, dtype=self.job.strategy.dtype) if n_bytes > 0 else 0.0
