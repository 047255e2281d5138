"""What a GPU's memory is used for in all: the allocator's segments and what is outside of them; and how likely it is to be enough."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from estimator.catalog.hardware import load_data
from estimator.job.job import Job
from estimator.memory.allocator_settings import ROUND_LARGE_BYTES, AllocatorSettings
from estimator.memory.outside import Outside, outside_memory
from estimator.memory.reader import StepMemory
from estimator.memory.replay import Replay, Subject, can_replay, replay
from estimator.memory.requests import REQUESTS

_HALVINGS = 5
_FAR = 0.85
"""Nearer than this to a limit it is worth finding out how much is really needed."""


class DeviceMemory(NamedTuple):
    """Of one rank's GPU."""

    outside: Outside
    replay: Replay | None
    """What the allocator makes of the step where it was simulated; within the GPU's capacity if that is enough."""
    used_bytes: int
    """What ``nvidia-smi`` shows; without a replay of tensors as asked for, in place of reserved bytes."""
    needed_bytes: int
    """With less it runs out of memory: before it does, the allocator gives back what it only holds."""
    fits_probability: float
    """That ``needed_bytes`` are within the capacity, after the spread of forecasts in ``catalog/data/device_memory.json``."""

    def category_bytes_at_peak(self, memory: StepMemory) -> dict[str, int]:
        """``memory``'s, and with a replay what is no tensor's."""
        at_peak = dict(memory.category_bytes_at_peak)
        if self.replay is not None:
            at_peak["workspace"] = at_peak.get("workspace", 0) + self.outside.workspace_bytes
            at_peak["fragmentation"] = self.replay.fragmentation_bytes
            at_peak |= {"cuda_context": self.outside.context_bytes, "comm_buffers": self.outside.comm_bytes}
        return {category: n_bytes for category, n_bytes in at_peak.items() if n_bytes}


def device_memory(
    job: Job, subject: Subject, memory: StepMemory, settings: AllocatorSettings | None = None
) -> DeviceMemory:  # fmt: skip
    """Of the rank that runs ``subject``, whose live bytes are ``memory``. ``settings``: those of the allocator, which is then simulated,
    if the job's device has one and the order of requests is known."""
    outside = outside_memory(job, subject.program, subject.costs)
    capacity = job.cluster.gpu.memory_bytes
    if settings is None or job.cluster.gpu.arch == "cpu" or not can_replay(subject.costs):
        used = memory.peak_bytes + outside.workspace_bytes + outside.total_bytes
        return DeviceMemory(outside, None, used, used, _probability(used, outside, capacity))
    assert settings is not None
    subject = subject._replace(requests=REQUESTS[job.strategy.framework], workspace_bytes=outside.workspace_bytes)
    beyond = subject.beyond_bytes
    limit = capacity - outside.total_bytes - beyond
    result, needed = _within(subject, settings, limit)
    result = result._replace(
        reserved_bytes=result.reserved_bytes + beyond,
        allocated_bytes=result.allocated_bytes + beyond,
        requested_bytes=result.requested_bytes + beyond,
    )
    needed += outside.total_bytes + beyond
    used = needed if result.is_out_of_memory else result.reserved_bytes + outside.total_bytes
    return DeviceMemory(outside, result, used, needed, _probability(needed, outside, capacity))


def _within(subject: Subject, settings: AllocatorSettings, limit: int) -> tuple[Replay, int]:
    """The replay with ``limit`` bytes, or without a limit where these are not enough; and about how many would be, where they are
    near ``limit``."""
    free = replay(subject, replace(settings, garbage_collection_threshold=0))
    low, high = free.allocated_bytes, free.reserved_bytes
    if limit < _FAR * low:
        return free._replace(is_out_of_memory=True), low
    result = replay(subject, settings, limit) if settings.collects and limit >= low else free
    if _FAR * limit > high:
        return result, high
    if limit < low:
        result = free._replace(is_out_of_memory=True)
    elif limit < high:
        result = replay(subject, settings, limit)
        if result.is_out_of_memory:
            low, result = limit, free._replace(is_out_of_memory=True)
        else:
            high = limit
    for _ in range(_HALVINGS):
        middle = (low + high) // 2
        if middle - low < ROUND_LARGE_BYTES:
            break
        if replay(subject, settings, middle).is_out_of_memory:
            low = middle
        else:
            high = middle
    return result, high


def _probability(needed: int, outside: Outside, capacity: int) -> float:
    """Normal, with the spreads of what tensors and what others need."""
    spread = load_data("device_memory.json")["spread"]
    inside = needed - outside.total_bytes
    deviation = math.hypot(spread["tensors"] * inside, spread["outside"] * outside.total_bytes)
    if not deviation:
        return float(needed <= capacity)
    return 0.5 * (1 + math.erf((capacity - needed) / deviation / math.sqrt(2)))
