"""Seconds of an optimizer's records on their way between host memory and files."""

from __future__ import annotations

from math import log

from estimator.errors import InputError
from estimator.job.job import Job
from estimator.schedule.nvme import IO_BLOCK_BYTES, IO_QUEUE
from estimator.time.profile import FilePoint, HardwareProfile


def file_seconds(direction: str, n_bytes: int, job: Job, profile: HardwareProfile) -> float:
    """``n_bytes`` through ``nvme_read`` or ``nvme_write`` by one rank, while the others of its node do the same.

    Each of ``IO_QUEUE`` threads moves a block and then takes its checksum (before writing it). So the rate is at most what the
    drive does at that depth, what the threads do that are given turns of a block alone and its checksum, and what the checksums
    do on the cores there are (asymptotic bounds of a closed queueing network: Denning & Buzen 1978, section 5). Rates are those
    measured at the size and number of blocks that the runtime uses (the nearest). Raises ``InputError`` where there are none.
    """
    kind = direction.removeprefix("nvme_")
    points = [p for p in profile.files if p.direction == kind]
    if not points:
        raise InputError(
            f"offload is {job.strategy.offload!r}, whose time needs rates of files; profile {profile.name!r} has none, "
            "allowed: one from `zerocast calibrate --nvme FOLDER`"
        )
    workers = min(job.cluster.n_gpus, job.cluster.gpus_per_node)
    seconds = n_bytes * workers / _nearest(points, IO_QUEUE).bytes_per_s
    sums = [p for p in profile.files if p.direction == "checksum"]
    if not sums:
        return seconds
    one, all_at_once = _nearest(sums, 1), _nearest(sums, IO_QUEUE)
    cores = max(1.0, job.cluster.host.n_cores / workers)
    sums_rate = min(all_at_once.bytes_per_s, one.bytes_per_s / one.queue * cores)
    alone = _nearest(points, 1)
    turns = 1 / (alone.bytes_per_s / alone.queue) + 1 / (one.bytes_per_s / one.queue)
    return max(seconds, n_bytes / sums_rate, n_bytes * turns / IO_QUEUE)


def counts_checksums(profile: HardwareProfile) -> bool:
    """Whether ``file_seconds`` knows what checksums take."""
    return any(p.direction == "checksum" for p in profile.files)


def _nearest(points: list[FilePoint], queue: int) -> FilePoint:
    return min(points, key=lambda p: (abs(log(p.queue / queue)), abs(log(p.block_bytes / IO_BLOCK_BYTES))))
