"""``predict``: a ``Job`` in, a ``StepReport`` out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from estimator.job.files import job_to_dict
from estimator.job.job import Job
from estimator.job.kernels import kernels_in_use
from estimator.job.model import ModelSpec
from estimator.job.strategy import Strategy
from estimator.memory.reader import StepMemory, read_memory
from estimator.memory.verdict import judge
from estimator.ops.cost import UnitCost
from estimator.ops.kernels.chip import H200, chip_of
from estimator.ops.kernels.optimizer import RULES
from estimator.ops.layers import Shape, unit_costs
from estimator.report import StepReport
from estimator.schedule.events import Buffer, Collective, Copy, StepProgram
from estimator.schedule.program import build_program
from estimator.sharding.layout import Layout, make_layout
from estimator.sharding.units import model_units
from estimator.time.interval import note_of
from estimator.time.player import StepTime, time_of
from estimator.time.profile import HardwareProfile, profile_for
from estimator.units import DTYPE_BYTES

_NOT_FORECAST = "memory leaves out what the allocator rounds and fragments and what NCCL allocates"


def predict(job: Job, profile: HardwareProfile | None = None) -> StepReport:
    """Memory and time of one step of ``job`` in steady state.

    ``profile`` is a calibrated one for the job's GPU; without it the shipped curves of the GPU, or of the nearest
    architecture, are used and the report's notes say so. Raises ``InputError`` when the profile cannot time the job.
    """
    blueprint = lay_out(job)
    memory = memory_of(blueprint)
    curves, notes = profile_for(job.cluster.gpu, profile)
    time = time_of(blueprint.program, blueprint.costs, job, curves)
    return _report(job, blueprint, memory, time, notes, curves)


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What every reader of a job needs: layout, program and unit costs, derived once."""

    layout: Layout
    program: StepProgram
    costs: list[UnitCost]
    tables: tuple[Buffer, ...]
    """Device buffers that live all the time beside the groups' (rotary tables)."""


def lay_out(job: Job) -> Blueprint:
    """Derive layout, ``StepProgram`` and operator costs of ``job``."""
    units, gpu = model_units(job.model), job.cluster.gpu
    kernels = kernels_in_use(gpu.arch, job.strategy.kernels_off)
    fused_step = RULES[job.strategy.optimizer].kernel in kernels
    layout, program = _program_of(job.model, job.strategy, job.zero_stage, job.dp, job.n_micro_batches, fused_step)
    w, dtype = job.workload, job.strategy.dtype
    shape = Shape(
        w.micro_batch_size, w.seq_len, dtype, repeats_kv_heads=dtype == "fp32" or gpu.arch == "cpu", kernels=kernels,
        chip=chip_of(gpu.arch, gpu.n_sms) if kernels else H200,
        factor_is_one=job.n_micro_batches == 1 and dtype != "fp16", grad_dtype=job.strategy.grads,
        stat_bytes=DTYPE_BYTES[dtype] if gpu.arch == "cpu" else 4,
    )  # fmt: skip
    costs = unit_costs(job.model, units, shape, job.strategy.recompute)
    table_bytes = 2 * w.seq_len * (job.model.rotary_dim // 2) * DTYPE_BYTES[dtype]
    tables = (Buffer("tables", -1, "workspace", table_bytes),) if table_bytes else ()
    return Blueprint(layout=layout, program=program, costs=costs, tables=tables)


@lru_cache(maxsize=128)
def _program_of(
    model: ModelSpec, strategy: Strategy, zero_stage: int, dp: int, n_micro_batches: int, fused_step: bool
) -> tuple[Layout, StepProgram]:
    """Layout and program do not depend on sizes of the batch: a search over micro-batches builds each once."""
    layout = make_layout(model_units(model), strategy, zero_stage, dp)
    return layout, build_program(layout, strategy, zero_stage, dp, n_micro_batches, fused_step=fused_step)


def memory_of(blueprint: Blueprint) -> StepMemory:
    """Live bytes of one rank over the step."""
    return read_memory(blueprint.program, blueprint.layout.units, blueprint.costs, blueprint.tables)


def traffic_of(program: StepProgram) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Collective bytes and calls by operation, and copied bytes by direction, of one step."""
    n_bytes: dict[str, int] = {}
    calls: dict[str, int] = {}
    copies: dict[str, int] = {}
    for section in program.step:
        for event in section.events:
            if type(event) is Collective:
                n_bytes[event.op] = n_bytes.get(event.op, 0) + event.n_bytes * section.repeat
                calls[event.op] = calls.get(event.op, 0) + section.repeat
            elif type(event) is Copy:
                copies[event.stream] = copies.get(event.stream, 0) + event.n_bytes * section.repeat
    return n_bytes, calls, copies


def model_flops_of(job: Job) -> tuple[float, float]:
    """Model FLOPs, and FLOPs that recomputation adds, of one step of the whole job."""
    n_passes = job.n_micro_batches * job.dp
    model, again = flops_of(lay_out(job).costs)
    return n_passes * model, n_passes * again


def flops_of(costs: list[UnitCost]) -> tuple[float, float]:
    """Model FLOPs and recomputed FLOPs of one rank's micro-batch.

    Model FLOPs are three times the forward's matrix products and attention (Narayanan et al. 2021, equation 3, with
    causal attention counted as executed); recomputed ones are those that run again.
    """
    by_cost: dict[int, tuple[float, float]] = {}
    model = again = 0.0
    for cost in costs:
        if id(cost) not in by_cost:
            by_cost[id(cost)] = (
                3 * sum(op.flops for op in cost.forward if op.kind in ("matmul", "attention") and not op.backward),
                sum(op.flops for op in cost.recompute if op.kind in ("matmul", "attention")),
            )
        model += by_cost[id(cost)][0]
        again += by_cost[id(cost)][1]
    return model, again


def _report(
    job: Job, blueprint: Blueprint, memory: StepMemory, time: StepTime, notes: tuple[str, ...], curves: HardwareProfile
) -> StepReport:
    gpu, n_passes = job.cluster.gpu, job.n_micro_batches * job.dp
    collective_bytes, collective_calls, copy_bytes = traffic_of(blueprint.program)
    model_flops, again_flops = (n_passes * flops for flops in flops_of(blueprint.costs))
    device_flops = time.step_s * job.cluster.n_gpus * gpu.peak_flops[job.strategy.dtype]
    verdict = judge(job, memory)
    return StepReport(
        origin="predicted",
        job_key=job.key,
        job=job_to_dict(job),
        peak_allocated_bytes=memory.peak_bytes,
        device_used_bytes=verdict.device_used_bytes,
        peak_phase=memory.peak_phase,
        peak_where=memory.peak_where,
        category_bytes_at_peak=memory.category_bytes_at_peak,
        category_peak_bytes=memory.category_peak_bytes,
        phase_peak_bytes=memory.phase_peak_bytes,
        phase_category_bytes=memory.phase_category_bytes,
        host_bytes=memory.host_peak_bytes,
        pinned_bytes=memory.host_peak_bytes if gpu.arch != "cpu" else 0,
        step_s=time.step_s,
        step_low_s=time.low_s,
        step_high_s=time.high_s,
        time_parts_s=time.parts,
        tokens_per_s=job.workload.global_batch_size * job.workload.seq_len / time.step_s,
        model_flops=model_flops,
        mfu=model_flops / device_flops,
        hfu=(model_flops + again_flops) / device_flops,
        collective_bytes=collective_bytes,
        collective_calls=collective_calls,
        copy_bytes=copy_bytes,
        capacity_bytes=gpu.memory_bytes,
        fits=verdict.fits,
        explanation=verdict.sentence if not verdict.fits else f"fits; the step is bound by {time.bound}",
        notes=(*notes, *_notes(job, curves)),
        provenance={"profile": curves.name, "profile_origin": curves.origin},
    )


def _notes(job: Job, curves: HardwareProfile) -> tuple[str, ...]:
    notes = [note for note in (note_of(curves),) if note is not None]
    if job.cluster.gpu.arch != "cpu":
        notes.append(_NOT_FORECAST)
    if job.zero_stage != job.strategy.zero_stage:
        notes.append(f"one data-parallel GPU leaves nothing to shard: ZeRO {job.strategy.zero_stage} runs as 0")
    if job.cluster.gpu.unsourced:
        notes.append(f"unsourced figures of {job.cluster.gpu.name}: {', '.join(job.cluster.gpu.unsourced)}")
    if job.cluster.unsourced:
        notes.append(f"unsourced figures of its server and network: {', '.join(job.cluster.unsourced)}")
    return tuple(notes)
