"""``run_session``: train a job for a few steps and say what it took. What the validator calls in each process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from estimator.errors import InputError
from estimator.job.job import Job
from estimator.memory.reader import StepMemory
from runtime.context import input_memory, metered_by
from runtime.engine import Engine, initialize
from runtime.host_memory import keep_freed_memory
from runtime.ledger import Ledger
from runtime.models import Decoder
from runtime.optimizer import OptimizerConfig

Device = Literal["cpu", "cuda", "meta"]


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How long to run and what to watch."""

    steps: int = 8
    """Steps that are measured, after ``warmup``."""
    warmup: int = 3
    track_memory: bool = True
    """Meter live bytes in one further step; that step is not timed."""
    seed: int = 0
    lr: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one rank measured. Memory is ``None`` when it was not tracked; times are empty on ``meta``."""

    peak_allocated_bytes: int | None = None
    peak_phase: str | None = None
    peak_where: str | None = None
    category_bytes_at_peak: dict[str, int] = field(default_factory=dict)
    category_peak_bytes: dict[str, int] = field(default_factory=dict)
    phase_peak_bytes: dict[str, int] = field(default_factory=dict)
    phase_category_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    host_bytes: int | None = None
    pinned_bytes: int | None = None
    step_seconds: tuple[float, ...] = ()
    """Wall-clock seconds of every measured step."""
    part_seconds: dict[str, float] = field(default_factory=dict)
    """Median seconds by part of ``estimator.report.TIME_PARTS``."""
    collective_bytes: dict[str, int] = field(default_factory=dict)
    collective_calls: dict[str, int] = field(default_factory=dict)
    copy_bytes: dict[str, int] = field(default_factory=dict)
    losses: tuple[float, ...] = ()


def run_session(
    job: Job,
    device: Device,
    options: SessionOptions,
    *,
    rank: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Measurement:
    """Train ``job``'s model on random tokens as rank ``rank``; every rank of the job calls this.

    torch.distributed's default group (gloo, nccl or fake) must span ``job.dp`` ranks unless that is 1. ``on_step`` is
    told the number and seconds of every step, warm-up included. Raises ``InputError`` when the group does not match.
    """
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks != job.dp:
        raise InputError(f"the process group has {ranks} ranks; allowed: {job.dp}, the job's data-parallel size")
    if device == "cpu":
        keep_freed_memory()
    engine = _make_engine(job, device, options)
    batches = _Batches(job, device, options.seed + rank)
    seconds, parts, losses = _timed_steps(engine, batches, options, on_step) if device != "meta" else ([], [], [])
    report = _metered_step(engine, batches, steps=2 if device == "meta" else 1) if options.track_memory else None
    if report is None and device == "meta":
        _train_step(engine, batches)
    return Measurement(
        peak_allocated_bytes=report.peak_bytes if report else None,
        peak_phase=report.peak_phase if report else None,
        peak_where=report.peak_where if report else None,
        category_bytes_at_peak=report.category_bytes_at_peak if report else {},
        category_peak_bytes=report.category_peak_bytes if report else {},
        phase_peak_bytes=report.phase_peak_bytes if report else {},
        phase_category_bytes=report.phase_category_bytes if report else {},
        host_bytes=report.host_peak_bytes if report else None,
        pinned_bytes=(report.host_peak_bytes if device == "cuda" else 0) if report else None,
        step_seconds=tuple(seconds),
        part_seconds={
            name: statistics.median(p.get(name, 0.0) for p in parts) for name in sorted({n for p in parts for n in p})
        },
        collective_bytes=dict(engine.comm.bytes),
        collective_calls=dict(engine.comm.calls),
        copy_bytes=dict(engine.executor.copy_bytes),
        losses=tuple(losses),
    )


def _make_engine(job: Job, device: Device, options: SessionOptions) -> Engine:
    with torch.device(device):
        model = Decoder(job.model, seq_len=job.workload.seq_len)
    if device != "meta":
        model.reset_parameters(options.seed)
    return initialize(
        model=model,
        strategy=job.strategy,
        n_micro_batches=job.n_micro_batches,
        optimizer=OptimizerConfig(lr=options.lr),
    )


class _Batches:
    """Random token ids and the labels one place further on."""

    def __init__(self, job: Job, device: Device, seed: int) -> None:
        self.shape = (job.workload.micro_batch_size, job.workload.seq_len)
        self.vocab_size, self.device = job.model.vocab_size, device
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        def draw() -> torch.Tensor:
            return torch.randint(self.vocab_size, self.shape, device=self.device, generator=self.generator)

        with input_memory():
            return draw(), draw()


def _train_step(engine: Engine, batches: _Batches) -> torch.Tensor:
    for _ in range(engine.n_micro_batches):
        ids, labels = batches.next()
        loss = engine(ids, labels)
        engine.backward(loss)
        del ids, labels
        engine.step()
    return loss.detach()


def _timed_steps(
    engine: Engine, batches: _Batches, options: SessionOptions, on_step: Callable[[int, float], None] | None
) -> tuple[list[float], list[dict[str, float]], list[float]]:
    seconds, parts, losses = [], [], []
    for number in range(options.warmup + options.steps):
        if engine.comm.size > 1:
            torch.distributed.barrier()
        start = engine._clock()
        loss = _train_step(engine, batches)
        elapsed = engine._clock() - start
        if on_step is not None:
            on_step(number, elapsed)
        if number >= options.warmup:
            seconds.append(elapsed)
            parts.append(dict(engine.seconds))
            losses.append(loss.item())
    return seconds, parts, losses


def _metered_step(engine: Engine, batches: _Batches, steps: int) -> StepMemory:
    """Live bytes of a step in steady state."""
    ledger = Ledger()
    with metered_by(ledger):
        for storage in engine.storages:
            storage.meter_all()
        engine.meter_tables(ledger)
        for _ in range(steps):
            ledger.enter("forward", "start of the step")
            ledger.start_step()
            _train_step(engine, batches)
        report = ledger.report()
    return report
