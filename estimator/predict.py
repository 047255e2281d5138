"""``predict``: a ``Job`` in, a ``StepReport`` out."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.job.job import Job
from estimator.memory.reader import StepMemory, read_memory
from estimator.ops.cost import UnitCost
from estimator.ops.layers import Shape, unit_costs
from estimator.schedule.events import Buffer, StepProgram
from estimator.schedule.program import build_program
from estimator.sharding.layout import Layout, make_layout
from estimator.sharding.units import model_units
from estimator.units import DTYPE_BYTES


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every reader of a job needs: layout, program and unit costs, derived once."""

    layout: Layout
    program: StepProgram
    costs: list[UnitCost]
    tables: tuple[Buffer, ...]
    """Device buffers that live all the time beside the groups' (rotary tables)."""


def lay_out(job: Job) -> Plan:
    """Derive layout, ``StepProgram`` and operator costs of ``job``."""
    units = model_units(job.model)
    layout = make_layout(units, job.strategy, job.zero_stage, job.dp)
    program = build_program(layout, job.strategy, job.zero_stage, job.dp, job.n_micro_batches)
    w, dtype = job.workload, job.strategy.dtype
    shape = Shape(w.micro_batch_size, w.seq_len, dtype, repeats_kv_heads=job.cluster.gpu.arch == "cpu")
    costs = unit_costs(job.model, units, shape, job.strategy.recompute)
    table_bytes = 2 * w.seq_len * (job.model.rotary_dim // 2) * DTYPE_BYTES[dtype]
    tables = (Buffer("tables", -1, "workspace", table_bytes),) if table_bytes else ()
    return Plan(layout=layout, program=program, costs=costs, tables=tables)


def memory_of(plan: Plan) -> StepMemory:
    """Live bytes of one rank over the step."""
    return read_memory(plan.program, plan.layout.units, plan.costs, plan.tables)
