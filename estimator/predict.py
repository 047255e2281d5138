"""``predict``: a ``Job`` in, a ``StepReport`` out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from estimator.job.experts import expert_notes
from estimator.job.files import job_to_dict
from estimator.job.job import Job
from estimator.job.kernels import kernels_in_use
from estimator.job.lora import lora_notes
from estimator.job.mesh import Mesh
from estimator.job.model import ModelSpec
from estimator.job.strategy import Strategy
from estimator.job.tower import tower_notes
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.memory.device import DeviceMemory, device_memory
from estimator.memory.reader import PeakReader, StepMemory, read_memory
from estimator.memory.replay import Subject
from estimator.memory.verdict import judge
from estimator.ops.biased_attention import distance_table_bytes
from estimator.ops.context import Context
from estimator.ops.cost import UnitCost
from estimator.ops.exchange import ExpertRanks
from estimator.ops.kernels.chip import H200, chip_of
from estimator.ops.layers import Shape, unit_costs
from estimator.ops.pieces import cuts_of, piece_costs
from estimator.ops.products import weight_copies_bytes
from estimator.ops.style import param_grads_of, style_of
from estimator.report import StepReport
from estimator.schedule.activations import sized
from estimator.schedule.buffers import takes_fused_step
from estimator.schedule.events import AddRows, Buffer, Collective, Compute, Copy, Event, Send, StepProgram
from estimator.schedule.program import StagePrograms, build_program
from estimator.schedule.reduction import warm_up
from estimator.schedule.stages import PipelinePlace
from estimator.schedule.standing import standing_buffers
from estimator.sharding.grain import Grain, fetches_layers, take_apart
from estimator.sharding.layout import Layout, make_layout
from estimator.sharding.sparse import TOKEN_TABLE, with_rows
from estimator.sharding.stages import units_of_stages, untied
from estimator.sharding.tensor import parts
from estimator.sharding.units import count_params, model_units, trained_units
from estimator.sharding.vocabulary import with_padded_vocabulary
from estimator.time.files import counts_checksums
from estimator.time.interval import note_of
from estimator.time.pipeline import time_of_pipeline
from estimator.time.player import StepTime, time_of
from estimator.time.profile import HardwareProfile, profile_for
from estimator.time.stack import Stack
from estimator.units import DTYPE_BYTES, MIB

_NOT_REPLAYED = "memory leaves out what the allocator rounds and fragments"


def predict(
    job: Job, profile: HardwareProfile | None = None, *, rank: int | None = None, stack: Stack | None = None,
    allocator: AllocatorSettings | None = None,
) -> StepReport:  # fmt: skip
    """Memory and time of one step of ``job`` in steady state.

    ``profile`` is a calibrated one for the job's GPU; without it the shipped curves of the GPU, or of the nearest
    architecture, are used and the report's notes say so. In a pipeline memory is that of the stage that needs most, or of the
    stage of ``rank``. ``stack``: other constants of the job's framework than the shipped ones. ``allocator``: the settings of PyTorch's
    caching allocator, which is then simulated for that stage, so that the report has reserved bytes; it takes longer than all
    the rest. Raises ``InputError`` when the profile cannot time the job.
    """
    blueprints = lay_out_stages(job)
    worst = blueprints[_fullest(blueprints) if rank is None else job.mesh.place("pp", rank)]
    memory = memory_of(worst)
    curves, notes = profile_for(job.cluster.gpu, profile)
    if job.strategy.pp == 1:
        time = time_of(blueprints[0].program, blueprints[0].costs, job, curves, stack)
    else:
        time = time_of_pipeline([(b.program, b.costs) for b in blueprints], job, curves, stack)
    costs = [cost for blueprint in blueprints for cost in blueprint.costs]
    device = device_memory(job, subject_of(worst), memory, allocator)
    return _report(job, worst, memory, device, time, notes, curves, costs)


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
    whole: Blueprint | None = None
    """Where layers are units: the same with whole units, whose requests for memory are known."""


def lay_out(job: Job, stage: int = 0, *, is_server: bool = True) -> Blueprint:
    """Derive layout, ``StepProgram`` and operator costs of ``job``, of its pipeline rank ``stage``; with parameter servers of one of
    these, which hold most, or where not ``is_server`` of another rank."""
    return _lay_out(job, range(stage, stage + 1), is_server)[0]


def lay_out_stages(job: Job) -> list[Blueprint]:
    """``lay_out`` of every pipeline rank."""
    return _lay_out(job, range(job.strategy.pp))


def _lay_out(job: Job, stages: range, is_server: bool = True) -> list[Blueprint]:
    gpu, is_pipeline = job.cluster.gpu, job.strategy.pp > 1
    spec = with_padded_vocabulary(job.model, job.strategy)
    model = untied(spec) if is_pipeline else spec
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
        param_grads=param_grads_of(job.strategy), style=style_of(job.strategy, job.n_micro_batches),
    )  # fmt: skip
    costs = _unit_costs(model, shape, job.strategy.recompute, job.strategy.recompute_every)
    scheduled = _scheduled(job.strategy)
    if not is_pipeline:
        rows = job.tokens_per_micro_batch if job.strategy.sparse_embeddings else 0
        layout, program = _program_of(
            spec, scheduled, job.zero_stage, job.mesh, job.n_micro_batches, fused_step, rows, is_server
        )
        if job.strategy.activation_offload:
            program = sized(program, costs)
        tables = _tables(job, range(model.n_layers), layout)
        whole = Blueprint(layout=layout, program=program, costs=costs, tables=tables)
        if not fetches_layers(job.strategy, job.zero_stage):
            return [whole]
        grain, replaying, own = _taken_apart(
            model, shape, job.strategy.recompute, job.strategy.recompute_every,
            job.strategy.resident_numel if job.zero_stage == 3 else 0,
        )  # fmt: skip
        layout, program = _program_of(
            spec,
            job.strategy,
            job.zero_stage,
            job.mesh,
            job.n_micro_batches,
            fused_step,
            grain=grain,
            replaying=replaying,
        )
        return [Blueprint(layout=layout, program=program, costs=own, tables=tables, whole=whole)]
    boundary_bytes = shape.graph().stream_rows * model.d_model * DTYPE_BYTES[dtype]
    batch = Buffer("batch", -1, "activations", 8 * shape.rows * job.n_micro_batches)
    blueprints = []
    of_stages = units_of_stages(spec, scheduled)
    written = _stage_programs(
        spec, scheduled, job.zero_stage, job.mesh, job.n_micro_batches, fused_step, boundary_bytes
    )
    for stage in stages:
        layout, program = written[stage]
        numbers = of_stages[stage].numbers
        tables = _tables(job, [number - 1 for number in numbers if 0 < number <= model.n_layers], layout)
        held = (*tables, batch) if stage in (0, job.strategy.pp - 1) else tables
        own = [costs[number] for number in numbers]
        blueprints.append(Blueprint(layout=layout, program=program, costs=own, tables=held, stage=stage))
    return blueprints


def _tables(job: Job, layers: Iterable[int], layout: Layout) -> tuple[Buffer, ...]:
    """What lives beside the groups' buffers where a rank holds ``layers``."""
    n_bytes = job.model.table_numel(job.workload.seq_len // job.strategy.cp, layers) * DTYPE_BYTES[job.strategy.dtype]
    if job.model.encoder is not None:
        n_bytes += distance_table_bytes(job.model.encoder, job.workload.seq_len)
    if job.model.traced is not None:
        n_bytes += job.model.traced.buffer_bytes
    n_bytes += weight_copies_bytes(style_of(job.strategy), job.cluster.gpu.arch, layout.units)
    tables = (Buffer("tables", -1, "workspace", n_bytes),) if n_bytes else ()
    return (*tables, *standing_buffers(job, layout.units))


@lru_cache(maxsize=128)
def _scheduled(strategy: Strategy) -> Strategy:
    """What of ``strategy`` layout and program depend on: where inputs of blocks do not travel they are the same whatever is recomputed,
    and a search over that builds each once."""
    return strategy if strategy.activation_offload else replace(strategy, recompute="none", recompute_every=1)


@lru_cache(maxsize=128)
def _unit_costs(model: ModelSpec, shape: Shape, recompute: str, recompute_every: int) -> list[UnitCost]:
    """Costs do not depend on how states are sharded: a search over that derives them once."""
    return unit_costs(model, model_units(model), shape, recompute, recompute_every)


@lru_cache(maxsize=64)
def _taken_apart(
    model: ModelSpec, shape: Shape, recompute: str, recompute_every: int, small_numel: int
) -> tuple[Grain, frozenset[int], list[UnitCost]]:
    """Pieces of every kind of unit, which units run again before their backward pass, and the costs of all pieces."""
    units, costs = model_units(model), _unit_costs(model, shape, recompute, recompute_every)
    cuts = {unit.kind: cuts_of(unit, cost, small_numel) for unit, cost in zip(units, costs, strict=True)}
    of = {id(cost): piece_costs(cost, cuts[unit.kind]) for unit, cost in zip(units, costs, strict=True)}
    replaying = frozenset(index for index, cost in enumerate(costs) if of[id(cost)][0].replayed is not None)
    grain = tuple((kind, tuple(cut.piece for cut in made)) for kind, made in cuts.items())
    return grain, replaying, [piece for cost in costs for piece in of[id(cost)]]


@lru_cache(maxsize=64)
def _stage_programs(
    model: ModelSpec, strategy: Strategy, zero_stage: int, mesh: Mesh, n_micro_batches: int, fused_step: bool,
    boundary_bytes: int,
) -> tuple[tuple[Layout, StepProgram], ...]:  # fmt: skip
    """Of every pipeline rank; what passes from rank to rank depends on the micro-batch. Ranks that stand alike and whose units differ in
    their names alone, as parameter lists that are equal are one object, have one layout and one set of passes."""
    alike: dict[tuple[object, ...], tuple[Layout, StagePrograms]] = {}
    result = []
    for rank, held in enumerate(units_of_stages(model, strategy)):
        units = parts(held.units, mesh.tp, strategy.ep)
        place = PipelinePlace(rank, mesh.pp, held.chunks, boundary_bytes).alike()
        key = place, tuple((unit.kind, id(unit.params)) for unit in units)
        if key not in alike:
            layout = make_layout(units, strategy, zero_stage, mesh.n_data, place.chunks)
            alike[key] = (
                layout,
                StagePrograms(layout, strategy, zero_stage, mesh, n_micro_batches, place, fused_step=fused_step),
            )
        layout, programs = alike[key]
        result.append((layout._replace(units=units), programs.of(rank)))
    return tuple(result)


@lru_cache(maxsize=128)
def _program_of(
    model: ModelSpec, strategy: Strategy, zero_stage: int, mesh: Mesh, n_micro_batches: int, fused_step: bool,
    rows: int = 0, is_server: bool = True, grain: Grain = (), replaying: frozenset[int] = frozenset(),
) -> tuple[Layout, StepProgram]:  # fmt: skip
    """Layout and program do not depend on sizes of the batch, unless ``rows`` are looked up that are exchanged alone: a search
    over micro-batches builds each once. With ``grain`` layers are units."""
    units = parts(model_units(model), mesh.tp, strategy.ep)
    if grain:
        units = take_apart(units, grain, replaying)
    if rows:
        units = with_rows(units, {TOKEN_TABLE: rows})
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


def _fullest(blueprints: Sequence[Blueprint]) -> int:
    """The first stage of those whose peak is highest."""
    if len(blueprints) == 1:
        return 0
    reader = PeakReader()
    peaks = [reader.read(blueprint.program, blueprint.costs, blueprint.tables) for blueprint in blueprints]
    return peaks.index(max(peaks))


def subject_of(blueprint: Blueprint) -> Subject:
    """What the simulated allocator replays: whole units, as the order of requests of a part of one is not known."""
    b = blueprint.whole
    if b is None:
        return Subject(blueprint.layout, blueprint.program, blueprint.costs, blueprint.tables)
    beyond = memory_of(blueprint).peak_bytes - memory_of(b).peak_bytes
    return Subject(b.layout, b.program, b.costs, b.tables, beyond_bytes=beyond)


def traffic_of(
    program: StepProgram, costs: Sequence[UnitCost] = ()
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Collective bytes and calls by operation (``send``: to another pipeline rank), and copied bytes by direction, of one step; ``costs`` of the units where ranks
    exchange something within them."""
    n_bytes: dict[str, int] = {}
    calls: dict[str, int] = {}
    copies: dict[str, int] = {}
    within: dict[tuple[int, str], dict[str, tuple[int, int]]] = {}
    for events, repeat in _repeats(program):
        for event in events:
            kind = type(event)
            if kind is Collective or kind is Send:
                op = event.op if kind is Collective else "send"  # type: ignore[union-attr]
                n_bytes[op] = n_bytes.get(op, 0) + event.n_bytes * repeat  # type: ignore[union-attr]
                calls[op] = calls.get(op, 0) + repeat
            elif kind is Compute and costs:
                key = id(costs[event.unit]), event.phase  # type: ignore[union-attr]
                if key not in within:
                    within[key] = _exchanged(costs[event.unit], event.phase)  # type: ignore[union-attr]
                for name, (total, number) in within[key].items():
                    n_bytes[name] = n_bytes.get(name, 0) + total * repeat
                    calls[name] = calls.get(name, 0) + number * repeat
            elif kind is Copy:
                copies[event.stream] = copies.get(event.stream, 0) + event.n_bytes * repeat  # type: ignore[union-attr]
    return n_bytes, calls, copies


def _repeats(program: StepProgram) -> Iterable[tuple[tuple[Event, ...], int]]:
    """Events of one step, a pipeline's equal passes once, and how often they run."""
    found: dict[int, tuple[tuple[Event, ...], int]] = {}
    for section in program.step:
        for events in section.passes or (section.events,):
            found[id(events)] = events, found.get(id(events), (events, 0))[1] + section.repeat
    return found.values()


def exchanged_in(cost: UnitCost, phase: str) -> Iterator[tuple[str, int, int]]:
    """Collectives within a unit's pass: operation, bytes, calls."""
    for op in cost.ops_of(phase):
        if op.kind == "collective":
            yield op.name, op.n_bytes, op.launches


def _exchanged(cost: UnitCost, phase: str) -> dict[str, tuple[int, int]]:
    """The same in all, by operation."""
    found: dict[str, tuple[int, int]] = {}
    for name, n_bytes, calls in exchanged_in(cost, phase):
        total, number = found.get(name, (0, 0))
        found[name] = total + n_bytes, number + calls
    return found


def model_flops_of(job: Job) -> tuple[float, float]:
    """Model FLOPs, and FLOPs that recomputation adds, of one step of the whole job."""
    n_passes = job.n_micro_batches * job.mesh.n_data * job.strategy.tp
    model, again = flops_of([cost for blueprint in lay_out_stages(job) for cost in blueprint.costs])
    return n_passes * model, n_passes * again


def flops_of(costs: list[UnitCost]) -> tuple[float, float]:
    """Model FLOPs and recomputed FLOPs of one rank's micro-batch.

    Model FLOPs are three times the forward's matrix products and attention (Narayanan et al. 2021, equation 3, with
    causal attention counted as executed, and of experts those that tokens go to); recomputed ones are those that run again. With
    adapters they are the products that there are: those of frozen weights once forward and once for their inputs' gradients.
    """
    by_cost: dict[int, tuple[float, float]] = {}
    model = again = 0.0
    for cost in costs:
        if id(cost) not in by_cost:
            by_cost[id(cost)] = (
                _frozen_flops(cost)
                if cost.source is not None and cost.source.tape.frozen
                else 3
                * sum(
                    op.flops * op.useful
                    for op in cost.forward
                    if op.kind in ("matmul", "attention") and not op.backward
                ),
                sum(op.flops for op in cost.again if op.kind in ("matmul", "attention")),
            )
        model += by_cost[id(cost)][0]
        again += by_cost[id(cost)][1]
    return model, again


def _frozen_flops(cost: UnitCost) -> float:
    """Of a unit with frozen weights: attention three times, or once where no gradient goes through it."""
    ops = (*cost.forward, *cost.backward)
    products = sum(op.flops * op.useful for op in ops if op.kind == "matmul")
    attention = sum(op.flops * op.useful for op in cost.forward if op.kind == "attention")
    return products + attention * (3 if any(op.kind == "attention" for op in cost.backward) else 1)


def _report(
    job: Job, blueprint: Blueprint, memory: StepMemory, device: DeviceMemory, time: StepTime, notes: tuple[str, ...],
    curves: HardwareProfile, costs: list[UnitCost],
) -> StepReport:  # fmt: skip
    """``blueprint``, ``memory`` and ``device`` are those of one pipeline rank, ``costs`` those of the whole model."""
    gpu, n_passes = job.cluster.gpu, job.n_micro_batches * job.mesh.n_data * job.strategy.tp
    collective_bytes, collective_calls, copy_bytes = traffic_of(blueprint.program, blueprint.costs)
    model_flops, again_flops = (n_passes * flops for flops in flops_of(costs))
    device_flops = time.step_s * job.cluster.n_gpus * gpu.peak_flops[job.strategy.dtype]
    memory = replace(memory, peak_where=where_of(job, blueprint.stage, memory.peak_where))
    verdict, replayed = judge(job, memory, device), device.replay
    return StepReport(
        origin="predicted",
        job_key=job.key,
        job=job_to_dict(job),
        rank=blueprint.stage * (job.cluster.n_gpus // job.strategy.pp),
        peak_allocated_bytes=memory.peak_bytes,
        peak_reserved_bytes=replayed.reserved_bytes if replayed else None,
        allocator_bytes=replayed.allocated_bytes if replayed else None,
        alloc_retries=replayed.n_retries if replayed else None,
        device_used_bytes=device.used_bytes,
        peak_phase=memory.peak_phase,
        peak_where=memory.peak_where,
        category_bytes_at_peak=device.category_bytes_at_peak(memory),
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
        fits_probability=verdict.fits_probability,
        explanation=verdict.sentence if not verdict.fits else f"fits; the step is bound by {time.bound}",
        notes=(
            *notes,
            *_memory_notes(job, device),
            *_notes(job, curves),
            *_warmup_note(job, blueprint),
            *(_rows_note(blueprint.program) if job.strategy.sparse_embeddings else ()),
        ),
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


def _memory_notes(job: Job, device: DeviceMemory) -> tuple[str, ...]:
    if job.cluster.gpu.arch == "cpu":
        return ()
    if device.replay is None:
        return (_NOT_REPLAYED,)
    n = device.replay.n_retries
    if not n:
        return ()
    return (
        f"the GPU is so full that the allocator gives back its cache {n} time{'s' if n > 1 else ''} per step, for which it waits for the "
        "device: the seconds leave that out",
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
    notes = [note for note in (note_of(job, curves),) if note is not None]
    if job.zero_stage != job.strategy.zero_stage:
        notes.append(f"one data-parallel GPU leaves nothing to shard: ZeRO {job.strategy.zero_stage} runs as 0")
    notes += expert_notes(job.model, job.strategy, job.mesh.n_data)
    notes += tower_notes(job.model)
    if job.model.lora is not None:
        units = model_units(job.model)
        notes += lora_notes(job.model.lora, count_params(trained_units(units)), count_params(units))
    notes += job.model.traced.notes if job.model.traced is not None else ()
    if job.strategy.offload_nvme and not counts_checksums(curves):
        notes.append(
            f"profile {curves.name} was measured before checksums of files and commits were: their seconds are left out"
        )
    if job.cluster.gpu.unsourced:
        notes.append(f"unsourced figures of {job.cluster.gpu.name}: {', '.join(job.cluster.gpu.unsourced)}")
    if job.cluster.unsourced:
        notes.append(f"unsourced figures of its server and network: {', '.join(job.cluster.unsourced)}")
    return tuple(notes)
