"""``run_session``: train a job for a few steps and say what it took. What the validator calls in each process."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from estimator.errors import InputError
from estimator.job.cluster import Gpu
from estimator.job.grouping import rounding_fields
from estimator.job.job import Job
from estimator.job.kernels import KERNELS, kernels_in_use
from estimator.job.strategy import Strategy
from estimator.memory.reader import StepMemory
from estimator.ops.kernels.chip import chip_of
from estimator.sharding.sparse import TOKEN_TABLE
from runtime.comm import Communicator
from runtime.context import has_data, input_memory, metered_by
from runtime.engine import Engine, initialize
from runtime.history import AllocatorHistory
from runtime.hollow import hollow
from runtime.host_memory import keep_freed_memory
from runtime.kernels import loader, registry
from runtime.ledger import Ledger
from runtime.models import build
from runtime.models.batches import random_batch
from runtime.models.decoder import initial_values
from runtime.models.stage import stage_of, stage_values
from runtime.offload.states import NvmePlace
from runtime.optimizer import OptimizerConfig
from runtime.parallel.context import WholeContext, made_for
from runtime.parallel.experts import experts_for
from runtime.parallel.layers import WholeLayers
from runtime.parallel.tensor import TensorParallel
from runtime.reference import PARITY_OPTIMIZER, relative_difference, train_plain
from runtime.storage import TORCH_DTYPES

Device = Literal["cpu", "cuda", "meta", "fake-cpu"]
"""``meta`` and ``fake-cpu`` are tensors without data: such as a GPU's kernels make, and such as a CPU's do."""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How long to run and what to watch."""

    steps: int = 8
    """Steps that are measured, after ``warmup``."""
    warmup: int = 3
    """Compression's own warm-up ends with these at the latest: what is measured is what most steps are."""
    track_memory: bool = True
    """Meter live bytes in one further step; that step is not timed."""
    seed: int = 0
    lr: float = 1e-4
    reference: bool = False
    """Train the same model again in plain PyTorch and compare (``runtime.reference``, with its ``PARITY_OPTIMIZER``
    instead of ``lr``). Rank 0 does so, alone and for all ranks, when everything else is measured."""

    nvme_folder: str | None = None
    """Where a job with offload ``optimizer:nvme`` has its files meanwhile; nothing is left there."""

    @property
    def optimizer(self) -> OptimizerConfig:
        return PARITY_OPTIMIZER if self.reference else OptimizerConfig(lr=self.lr)


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
    """Wall-clock seconds of every measured step, from the first call until the device has finished."""
    device_step_seconds: tuple[float, ...] = ()
    """The same on the compute stream's own clock; empty without CUDA."""
    part_seconds: dict[str, float] = field(default_factory=dict)
    """Median seconds by part of ``estimator.report.TIME_PARTS``."""
    collective_bytes: dict[str, int] = field(default_factory=dict)
    collective_calls: dict[str, int] = field(default_factory=dict)
    copy_bytes: dict[str, int] = field(default_factory=dict)
    copy_seconds: dict[str, float] = field(default_factory=dict)
    """Median seconds per step for which copies occupied their streams, by direction."""
    file_access: str = ""
    """How an optimizer's files were accessed, and the kind of file system; empty without files."""
    losses: tuple[float, ...] = ()
    skipped_steps: int = 0
    """Steps that changed nothing because a gradient was not finite; warm-up and the metered step count too."""
    attribution: dict[str, Any] = field(default_factory=dict)
    """``runtime.snapshot.attribute`` of the metered step; empty without CUDA's caching allocator."""
    parity: dict[str, float] = field(default_factory=dict)
    """Largest relative difference from plain PyTorch: ``loss`` and ``params``; empty unless asked for, or on ranks > 0."""

    @property
    def copy_bytes_per_s(self) -> dict[str, float]:
        """What copies reached while they went on, by direction: ``h2d``, ``d2h``, ``nvme_read``, ``nvme_write``."""
        return {way: self.copy_bytes[way] / seconds for way, seconds in self.copy_seconds.items() if seconds > 0}


def run_session(
    job: Job,
    device: Device,
    options: SessionOptions,
    *,
    rank: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Measurement:
    """Train ``job``'s model on random tokens as rank ``rank``; every rank of the job calls this.

    torch.distributed's default group (gloo, nccl or fake) must span the job's GPUs unless there is one. ``on_step`` is
    told the number and seconds of every step, warm-up included. Raises ``InputError`` when the group does not match.
    """
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks != job.cluster.n_gpus:
        raise InputError(f"the process group has {ranks} ranks; allowed: {job.cluster.n_gpus}, the job's GPUs")
    if options.reference and job.dp > 1 and (rounds := rounding_fields(job.strategy)):
        raise InputError(
            f"parity with plain PyTorch is asked for with {' and '.join(rounds)}, which rounds what ranks exchange; allowed: "
            "strategies without"
        )
    if device == "fake-cpu":
        with FakeTensorMode():
            return _run(job, "cpu", options, rank, on_step, is_real=False)
    if device == "cpu":
        keep_freed_memory()
        return _run(job, device, options, rank, on_step, is_real=True)
    with kernels_for(job.cluster.gpu, job.strategy):
        return _run(job, device, options, rank, on_step, is_real=device != "meta")


@contextmanager
def kernels_for(gpu: Gpu | None, strategy: Strategy) -> Iterator[None]:
    """Inside, the kernels that work are those that a forecast for ``gpu`` counts on (none without one), and ``meta`` stands for it.

    Raises ``InputError`` where the environment switches off others.
    """
    wanted = kernels_in_use(gpu.arch, strategy.kernels_off) if gpu is not None else frozenset()
    missing = sorted(name for name in wanted if not registry.enabled(name))
    if missing:
        raise InputError(
            f"{registry.ENVIRONMENT} switches off {', '.join(missing)}, which the job's forecast counts on; "
            "allowed: the names in the job's strategy.kernels_off"
        )
    chip = loader.standing_for(chip_of(gpu.arch, gpu.n_sms)) if gpu is not None and wanted else nullcontext()
    with chip, registry.switched_off(*(KERNELS.keys() - wanted)):
        yield


def _run(
    job: Job, device: str, options: SessionOptions, rank: int, on_step: Callable[[int, float], None] | None,
    *, is_real: bool,
) -> Measurement:  # fmt: skip
    with _nvme_place(job, options, is_real) as nvme:
        return _measured(job, device, options, rank, on_step, _make_engine(job, device, options, is_real, nvme))


@contextmanager
def _nvme_place(job: Job, options: SessionOptions, is_real: bool) -> Iterator[NvmePlace | None]:
    """A folder for this rank's files that is gone afterwards."""
    if not (is_real and job.strategy.offload_nvme):
        yield None
        return
    if options.nvme_folder is None:
        raise InputError("nvme_folder is not given; offload 'optimizer:nvme' needs a folder for the optimizer's files")
    try:
        folder = tempfile.TemporaryDirectory(prefix="zerocast-", dir=options.nvme_folder)
    except OSError as error:
        where = repr(options.nvme_folder)
        raise InputError(f"nvme_folder is {where}, where no folder can be made: {error.strerror}") from None
    with folder as name:
        yield NvmePlace(folder=Path(name))


def _measured(
    job: Job, device: str, options: SessionOptions, rank: int, on_step: Callable[[int, float], None] | None, engine: Engine,
) -> Measurement:  # fmt: skip
    is_real = has_data(next(engine.model.parameters()))
    batches = _Batches(job, device, options.seed + engine.comm.mesh.place("dp", rank), engine.layers.context)
    timed = _timed_steps(engine, batches, options, on_step) if is_real else _Timed()
    engine.end_warmup()
    attribution: dict[str, Any] = {}
    report = None
    if options.track_memory:
        report, attribution = _metered_step(engine, batches, steps=1 if is_real else 2)
    elif not is_real:
        _train_step(engine, batches)
    measured = Measurement(
        peak_allocated_bytes=report.peak_bytes if report else None,
        peak_phase=report.peak_phase if report else None,
        peak_where=report.peak_where if report else None,
        category_bytes_at_peak=report.category_bytes_at_peak if report else {},
        category_peak_bytes=report.category_peak_bytes if report else {},
        phase_peak_bytes=report.phase_peak_bytes if report else {},
        phase_category_bytes=report.phase_category_bytes if report else {},
        host_bytes=report.host_peak_bytes if report else None,
        pinned_bytes=(report.host_peak_bytes if device == "cuda" else 0) if report else None,
        step_seconds=tuple(timed.seconds),
        device_step_seconds=tuple(timed.device_seconds),
        part_seconds=_medians(timed.parts),
        collective_bytes=dict(engine.comm.bytes),
        collective_calls=dict(engine.comm.calls),
        copy_bytes=dict(engine.executor.copy_bytes),
        copy_seconds=_medians(timed.copies),
        file_access=engine.nvme.access if engine.nvme is not None else "",
        losses=tuple(timed.losses),
        skipped_steps=engine.skipped_steps if is_real else 0,
        attribution=attribution,
    )
    if not options.reference:
        engine.close()
        return measured
    trained = {name: param.cpu() for name, param in engine.full_parameters().items()}
    engine.close()
    del engine
    gc.collect()  # it holds itself through its hooks
    return replace(measured, parity=_parity(job, device, options, measured.losses, trained)) if rank == 0 else measured


def _medians(of_steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median over the steps by name; a step without a name counts as 0."""
    names = sorted({name for step in of_steps for name in step})
    return {name: statistics.median(step.get(name, 0.0) for step in of_steps) for name in names}


def _make_engine(job: Job, device: str, options: SessionOptions, is_real: bool, nvme: NvmePlace | None) -> Engine:
    """On a device with data the fp32 model is never there as a whole: its parameters are drawn into their groups."""
    comm = Communicator(job.mesh)
    context = made_for(job.strategy.cp_kind, comm)
    if job.strategy.tp > 1:
        layers: WholeLayers = TensorParallel(
            comm, sequence=job.strategy.sequence_parallel, context=context, experts=experts_for(job.strategy, comm)
        )
    else:
        layers = WholeLayers(context, experts_for(job.strategy, comm))
    if job.strategy.pp > 1:
        stage = stage_of(job, job.mesh.place("pp", comm.rank), device, layers, is_real=is_real)
        return initialize(
            model=stage, strategy=job.strategy, n_micro_batches=job.n_micro_batches, optimizer=options.optimizer,
            fill=stage_values(job.model, torch.device(device), options.seed) if is_real else None, comm=comm,
        )  # fmt: skip
    with torch.device("meta" if is_real else device):
        model = build(job.model, job.workload.seq_len, layers)
    fill = None
    if is_real:
        hollow(model, torch.device(device))
        model.fill_tables()
        fill = initial_values(torch.device(device), options.seed, lora=job.model.lora)
    return initialize(
        model=model,
        strategy=job.strategy,
        n_micro_batches=job.n_micro_batches,
        optimizer=options.optimizer,
        fill=fill,
        nvme=nvme,
        comm=comm,
        sparse_rows={TOKEN_TABLE: job.tokens_per_micro_batch} if job.strategy.sparse_embeddings else None,
    )


def _parity(
    job: Job, device: str, options: SessionOptions, losses: Sequence[float], trained: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Largest relative differences of rank 0's ``losses`` and of the ``trained`` parameters from plain training."""
    with torch.device(device):
        model = build(job.model, job.workload.seq_len)
    model.reset_parameters(options.seed)
    batches = [_Batches(job, device, options.seed + rank) for rank in range(job.dp)]
    plain = train_plain(
        model, job.strategy, options.optimizer, lambda _step, rank, _micro: batches[rank].next(), n_ranks=job.dp,
        n_micro_batches=job.n_micro_batches, steps=options.warmup + options.steps + options.track_memory,
    )  # fmt: skip
    wanted = [step[0][-1] for step in plain.losses[options.warmup :]]
    return {
        "loss": max(abs(got - want) / abs(want) for got, want in zip(losses, wanted, strict=False)),
        "params": relative_difference(trained, {name: param.cpu() for name, param in plain.params.items()}),
    }


class _Batches:
    """Random token ids, or images, and the labels that they go with."""

    def __init__(self, job: Job, device: str, seed: int, context: WholeContext | None = None) -> None:
        """``context``: of which a rank gets its own tokens."""
        self.shape = (job.workload.micro_batch_size, job.workload.seq_len)
        self.model, self.device, self.context = job.model, device, context or WholeContext()
        self.dtype = TORCH_DTYPES[job.strategy.dtype]
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        def draw(shape: tuple[int, ...] = self.shape) -> torch.Tensor:
            return torch.randint(self.model.vocab_size, shape, device=self.device, generator=self.generator)

        with input_memory():
            if self.model.patches is not None:
                shape = (self.shape[0], self.model.patches.channels, *(self.model.patches.image_size,) * 2)
                images = torch.randn(shape, dtype=self.dtype, device=self.device, generator=self.generator)
                return images, draw(self.shape[:1])
            ids, labels = random_batch(self.model, draw)
            return self.context.own(ids), self.context.own(labels)

    def of_step(self, engine: Engine) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """All micro-batches of a step: of each what this rank of a pipeline reads."""
        stage = engine.stage
        assert stage is not None
        drawn = (self.next() for _ in range(engine.n_micro_batches))
        return [(ids if stage.rank == 0 else None, labels if stage.is_last else None) for ids, labels in drawn]


def _train_step(engine: Engine, batches: _Batches, drawn: Sequence[Any] = ()) -> torch.Tensor | None:
    """The last micro-batch's loss; a pipeline has one on its last ranks. ``drawn``: its batches, where they are there already."""
    if engine.stage is not None:
        losses = engine.train_step(drawn or batches.of_step(engine))
        return losses[-1] if losses else None
    for _ in range(engine.n_micro_batches):
        ids, labels = batches.next()
        loss = engine(ids, labels)
        engine.backward(loss)
        del ids, labels
        engine.step()
    return loss.detach()


@dataclass
class _Timed:
    """What the measured steps took, one entry per step."""

    seconds: list[float] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    copies: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def _timed_steps(
    engine: Engine, batches: _Batches, options: SessionOptions, on_step: Callable[[int, float], None] | None
) -> _Timed:
    """Host and device meet once per step, at its end: within a step neither waits for the other more than it must."""
    timed, clock = _Timed(), engine.executor.parts
    cuda = engine.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    for number in range(options.warmup + options.steps):
        if number == options.warmup:
            engine.end_warmup()
        if engine.comm.size > 1:
            torch.distributed.barrier()
        start_s, start = time.perf_counter(), clock.mark()
        loss = _train_step(engine, batches)
        end = clock.mark()
        if cuda and engine.strategy.staleness:  # pushes may stay under way
            torch.cuda.current_stream().synchronize()
        elif cuda:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start_s
        if on_step is not None:
            on_step(number, elapsed)
        if number >= options.warmup:
            timed.seconds.append(elapsed)
            timed.device_seconds += [clock.between(start, end)] if cuda else []
            timed.parts.append(engine.seconds)
            timed.copies.append(engine.executor.copy_seconds())
            loss = engine.loss_of_all(loss)
            timed.losses += [] if loss is None else [loss.item()]
    return timed


def _metered_step(engine: Engine, batches: _Batches, steps: int) -> tuple[StepMemory, dict[str, Any]]:
    """Live bytes of a step in steady state; on CUDA also those of the allocator, attributed to the same categories."""
    with_history = engine.device.type == "cuda" and torch.cuda.get_allocator_backend() == "native"
    history = AllocatorHistory() if with_history else None
    ledger = Ledger(history.note if history else None)
    with history or nullcontext(), metered_by(ledger):
        for storage in engine.storages:
            storage.meter_all()
        engine.meter_tables(ledger)
        for _ in range(steps):
            drawn = batches.of_step(engine) if engine.stage is not None else ()
            ledger.enter("forward", "start of the step")
            ledger.start_step()
            _train_step(engine, batches, drawn)
            del drawn
        report = ledger.report()
    return report, history.attribution() if history else {}
