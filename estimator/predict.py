"""``predict``: a ``Job`` in, a ``StepReport`` out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from estimator.job.experts import expert_notes
from estimator.job.files import job_to_dict
from estimator.job.job import Job
from estimator.job.kernels import kernels_in_use
from estimator.job.mesh import Mesh
from estimator.job.model import ModelSpec
from estimator.job.strategy import Strategy
from estimator.memory.reader import StepMemory, read_memory
from estimator.memory.verdict import judge
from estimator.ops.biased_attention import distance_table_bytes
from estimator.ops.context import Context
from estimator.ops.cost import UnitCost
from estimator.ops.exchange import ExpertRanks
from estimator.ops.kernels.chip import H200, chip_of
from estimator.ops.layers import Shape, unit_costs
from estimator.report import StepReport
from estimator.schedule.activations import sized
from estimator.schedule.buffers import takes_fused_step
from estimator.schedule.events import AddRows, Buffer, Collective, Compute, Copy, Send, StepProgram
from estimator.schedule.program import build_program
from estimator.schedule.reduction import warm_up
from estimator.schedule.stages import PipelinePlace
from estimator.sharding.layout import Layout, make_layout
from estimator.sharding.sparse import TOKEN_TABLE, with_rows
from estimator.sharding.stages import stage_units, untied
from estimator.sharding.tensor import parts
from estimator.sharding.units import model_units
from estimator.time.files import counts_checksums
from estimator.time.interval import note_of
from estimator.time.pipeline import time_of_pipeline
from estimator.time.player import StepTime, time_of
from estimator.time.profile import HardwareProfile, profile_for
from estimator.units import DTYPE_BYTES, MIB

_NOT_FORECAST = "memory leaves out what the allocator rounds and fragments and what NCCL allocates"


def predict(job: Job, profile: HardwareProfile | None = None, *, rank: int | None = None) -> StepReport:
    """Memory and time of one step of ``job`` in steady state.

    ``profile`` is a calibrated one for the job's GPU; without it the shipped curves of the GPU, or of the nearest
    architecture, are used and the report's notes say so. In a pipeline memory is that of the stage that needs most, or of the
    stage of ``rank``. Raises ``InputError`` when the profile cannot time the job.
    """
    blueprints = lay_out_stages(job)
    memories = [memory_of(blueprint) for blueprint in blueprints]
    curves, notes = profile_for(job.cluster.gpu, profile)
    if job.strategy.pp == 1:
        time = time_of(blueprints[0].program, blueprints[0].costs, job, curves)
    else:
        time = time_of_pipeline([(b.program, b.costs) for b in blueprints], job, curves)
    worst = max(range(len(memories)), key=lambda stage: memories[stage].peak_bytes)
    if rank is not None:
        worst = job.mesh.place("pp", rank)
    costs = [cost for blueprint in blueprints for cost in blueprint.costs]
    return _report(job, blueprints[worst], memories[worst], time, notes, curves, costs)


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What every reader of a job needs: layout, program and unit costs, derived once."""

    layout: Layout
    program: StepProgram
    costs: list[UnitCost]
    tables: tuple[Buffer, ...]
    """Device buffers that live all the time beside the groups' (rotary tables; what a pipeline's rank has of the batch)."""
    stage: int = 0
    """Of which pipeline rank this is."""


def lay_out(job: Job, stage: int = 0, *, is_server: bool = True) -> Blueprint:
    """Derive layout, ``StepProgram`` and operator costs of ``job``, of its pipeline rank ``stage``; with parameter servers of one of
    these, which hold most, or where not ``is_server`` of another rank."""
    return _lay_out(job, range(stage, stage + 1), is_server)[0]


def lay_out_stages(job: Job) -> list[Blueprint]:
    """``lay_out`` of every pipeline rank."""
    return _lay_out(job, range(job.strategy.pp))


def _lay_out(job: Job, stages: range, is_server: bool = True) -> list[Blueprint]:
    gpu, is_pipeline = job.cluster.gpu, job.strategy.pp > 1
    model = untied(job.model) if is_pipeline else job.model
    units = model_units(model)
    kernels = kernels_in_use(gpu.arch, job.strategy.kernels_off)
    fused_step = takes_fused_step(job.strategy, kernels)
    w, dtype = job.workload, job.strategy.dtype
    seq_len = w.seq_len // job.strategy.cp
    shape = Shape(
        w.micro_batch_size, seq_len, dtype, repeats_kv_heads=dtype == "fp32" or gpu.arch == "cpu", kernels=kernels,
        chip=chip_of(gpu.arch, gpu.n_sms) if kernels else H200,
        factor_is_one=job.n_micro_batches == 1 and dtype != "fp16", grad_dtype=job.strategy.grads,
        stat_bytes=DTYPE_BYTES[dtype] if gpu.arch == "cpu" else 4, holds_batch=not is_pipeline,
        splits_backward=is_pipeline and job.strategy.pp_schedule == "zero_bubble",
        n_tensor=job.strategy.tp, splits_tokens=job.strategy.tp > 1 and job.strategy.sequence_parallel,
        is_cpu=gpu.arch == "cpu", context=Context(job.strategy.cp_kind, job.mesh.span("cp")),
        expert_ranks=ExpertRanks(job.mesh.data_groups(job.strategy.ep), job.strategy.expert_imbalance),
    )  # fmt: skip
    costs = unit_costs(model, units, shape, job.strategy.recompute, job.strategy.recompute_every)
    table_bytes = job.model.table_numel(seq_len) * DTYPE_BYTES[dtype]
    if job.model.encoder is not None:
        table_bytes += distance_table_bytes(job.model.encoder, w.seq_len)
    tables = (Buffer("tables", -1, "workspace", table_bytes),) if table_bytes else ()
    if not is_pipeline:
        rows = job.tokens_per_micro_batch if job.strategy.sparse_embeddings else 0
        layout, program = _program_of(
            job.model, job.strategy, job.zero_stage, job.mesh, job.n_micro_batches, fused_step, rows, is_server
        )
        if job.strategy.activation_offload:
            program = sized(program, costs)
        return [Blueprint(layout=layout, program=program, costs=costs, tables=tables)]
    boundary_bytes = shape.graph().stream_rows * model.d_model * DTYPE_BYTES[dtype]
    batch = Buffer("batch", -1, "activations", 8 * shape.rows * job.n_micro_batches)
    blueprints = []
    for stage in stages:
        layout, program = _stage_program(
            job.model, job.strategy, job.zero_stage, job.mesh, job.n_micro_batches, fused_step, stage, boundary_bytes
        )
        held = (*tables, batch) if stage in (0, job.strategy.pp - 1) else tables
        own = [costs[number] for number in stage_units(job.model, job.strategy, stage).numbers]
        blueprints.append(Blueprint(layout=layout, program=program, costs=own, tables=held, stage=stage))
    return blueprints


@lru_cache(maxsize=256)
def _stage_program(
    model: ModelSpec, strategy: Strategy, zero_stage: int, mesh: Mesh, n_micro_batches: int, fused_step: bool, stage: int,
    boundary_bytes: int,
) -> tuple[Layout, StepProgram]:  # fmt: skip
    """Of one pipeline rank; what passes from rank to rank depends on the micro-batch."""
    held = stage_units(model, strategy, stage)
    layout = make_layout(parts(held.units, mesh.tp, strategy.ep), strategy, zero_stage, mesh.n_data, held.chunks)
    place = PipelinePlace(stage, mesh.pp, held.chunks, boundary_bytes)
    return layout, build_program(
        layout, strategy, zero_stage, mesh, n_micro_batches, fused_step=fused_step, pipeline=place
    )


@lru_cache(maxsize=128)
def _program_of(
    model: ModelSpec, strategy: Strategy, zero_stage: int, mesh: Mesh, n_micro_batches: int, fused_step: bool,
    rows: int = 0, is_server: bool = True,
) -> tuple[Layout, StepProgram]:  # fmt: skip
    """Layout and program do not depend on sizes of the batch, unless ``rows`` are looked up that are exchanged alone: a search
    over micro-batches builds each once."""
    units = with_rows(parts(model_units(model), mesh.tp, strategy.ep), {TOKEN_TABLE: rows} if rows else {})
    layout = make_layout(units, strategy, zero_stage, mesh.n_data)
    return layout, build_program(
        layout, strategy, zero_stage, mesh, n_micro_batches, fused_step=fused_step, is_server=is_server
    )


def where_of(job: Job, stage: int, where: str) -> str:
    """``where`` memory is at its peak, for people: in a pipeline with the stage that it is of."""
    return where if job.strategy.pp == 1 else f"stage {stage} of {job.strategy.pp}: {where}"


def memory_of(blueprint: Blueprint) -> StepMemory:
    """Live bytes of one rank over the step."""
    return read_memory(blueprint.program, blueprint.layout.units, blueprint.costs, blueprint.tables)


def traffic_of(
    program: StepProgram, costs: Sequence[UnitCost] = ()
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Collective bytes and calls by operation (``send``: to another pipeline rank), and copied bytes by direction, of one step; ``costs`` of the units where ranks
    exchange something within them."""
    n_bytes: dict[str, int] = {}
    calls: dict[str, int] = {}
    copies: dict[str, int] = {}
    for section in program.step:
        for event in section.events:
            if type(event) is Collective or type(event) is Send:
                op = event.op if type(event) is Collective else "send"
                n_bytes[op] = n_bytes.get(op, 0) + event.n_bytes * section.repeat
                calls[op] = calls.get(op, 0) + section.repeat
            elif type(event) is Compute and costs:
                for name, total, number in exchanged_in(costs[event.unit], event.phase):
                    n_bytes[name] = n_bytes.get(name, 0) + total * section.repeat
                    calls[name] = calls.get(name, 0) + number * section.repeat
            elif type(event) is Copy:
                copies[event.stream] = copies.get(event.stream, 0) + event.n_bytes * section.repeat
    return n_bytes, calls, copies


def exchanged_in(cost: UnitCost, phase: str) -> Iterator[tuple[str, int, int]]:
    """Collectives within a unit's pass: operation, bytes, calls."""
    for op in (*cost.recompute, *cost.backward) if phase == "backward" else cost.forward:
        if op.kind == "collective":
            yield op.name, op.n_bytes, op.launches


def model_flops_of(job: Job) -> tuple[float, float]:
    """Model FLOPs, and FLOPs that recomputation adds, of one step of the whole job."""
    n_passes = job.n_micro_batches * job.mesh.n_data * job.strategy.tp
    model, again = flops_of([cost for blueprint in lay_out_stages(job) for cost in blueprint.costs])
    return n_passes * model, n_passes * again


def flops_of(costs: list[UnitCost]) -> tuple[float, float]:
    """Model FLOPs and recomputed FLOPs of one rank's micro-batch.

    Model FLOPs are three times the forward's matrix products and attention (Narayanan et al. 2021, equation 3, with
    causal attention counted as executed, and of experts those that tokens go to); recomputed ones are those that run again.
    """
    by_cost: dict[int, tuple[float, float]] = {}
    model = again = 0.0
    for cost in costs:
        if id(cost) not in by_cost:
            by_cost[id(cost)] = (
                3
                * sum(
                    op.flops * op.useful
                    for op in cost.forward
                    if op.kind in ("matmul", "attention") and not op.backward
                ),
                sum(op.flops for op in cost.recompute if op.kind in ("matmul", "attention")),
            )
        model += by_cost[id(cost)][0]
        again += by_cost[id(cost)][1]
    return model, again


def _report(
    job: Job, blueprint: Blueprint, memory: StepMemory, time: StepTime, notes: tuple[str, ...], curves: HardwareProfile,
    costs: list[UnitCost],
) -> StepReport:  # fmt: skip
    """``blueprint`` and ``memory`` are those of one pipeline rank, ``costs`` those of the whole model."""
    gpu, n_passes = job.cluster.gpu, job.n_micro_batches * job.mesh.n_data * job.strategy.tp
    collective_bytes, collective_calls, copy_bytes = traffic_of(blueprint.program, blueprint.costs)
    model_flops, again_flops = (n_passes * flops for flops in flops_of(costs))
    device_flops = time.step_s * job.cluster.n_gpus * gpu.peak_flops[job.strategy.dtype]
    memory = replace(memory, peak_where=where_of(job, blueprint.stage, memory.peak_where))
    verdict = judge(job, memory)
    return StepReport(
        origin="predicted",
        job_key=job.key,
        job=job_to_dict(job),
        rank=blueprint.stage * (job.cluster.n_gpus // job.strategy.pp),
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
        notes=(*notes, *_notes(job, curves), *_warmup_note(job, blueprint), *_rows_note(blueprint.program)),
        provenance={"profile": curves.name, "profile_origin": curves.origin},
    )


def _warmup_note(job: Job, blueprint: Blueprint) -> tuple[str, ...]:
    """What the steps before compression begins send."""
    exact = warm_up(job.strategy) if job.mesh.n_data > 1 else None
    if exact is None:
        return ()
    warm = build_program(blueprint.layout, exact, job.zero_stage, job.mesh, job.n_micro_batches)
    sent, later = (sum(traffic_of(program)[0].values()) for program in (warm, blueprint.program))
    return (
        f"the forecast is of a step after the warm-up: its {job.strategy.compression_warmup_steps} steps exchange exact gradients, "
        f"{sent / MIB:,.1f} MiB in collectives instead of {later / MIB:,.1f} MiB",
    )


def _rows_note(program: StepProgram) -> tuple[str, ...]:
    """Rows of a table that are more than an all-reduce of all of it would move."""
    added = (event for section in program.step for event in section.events if isinstance(event, AddRows))
    for event in added:
        row_bytes = event.table[1] * event.width
        received, whole = event.pieces * event.n_rows * (8 + row_bytes), 2 * event.table[0] * row_bytes
        if received > whole:
            return (
                f"sparse_embeddings receives {received / MIB:,.1f} MiB where a sum of the whole table moves {whole / MIB:,.1f} MiB",
            )
    return ()


def _notes(job: Job, curves: HardwareProfile) -> tuple[str, ...]:
    notes = [note for note in (note_of(curves),) if note is not None]
    if job.cluster.gpu.arch != "cpu":
        notes.append(_NOT_FORECAST)
    if job.zero_stage != job.strategy.zero_stage:
        notes.append(f"one data-parallel GPU leaves nothing to shard: ZeRO {job.strategy.zero_stage} runs as 0")
    notes += expert_notes(job.model, job.strategy, job.mesh.n_data)
    if job.strategy.offload_nvme and not counts_checksums(curves):
        notes.append(
            f"profile {curves.name} was measured before checksums of files and commits were: their seconds are left out"
        )
    if job.cluster.gpu.unsourced:
        notes.append(f"unsourced figures of {job.cluster.gpu.name}: {', '.join(job.cluster.gpu.unsourced)}")
    if job.cluster.unsourced:
        notes.append(f"unsourced figures of its server and network: {', '.join(job.cluster.unsourced)}")
    return tuple(notes)
