"""Units and costs of a traced module, from its plain records."""

from __future__ import annotations

from functools import lru_cache

from estimator.job.traced import Held, Traced, TracedCost, TracedOp, TracedPass
from estimator.ops.cost import PassMemory, UnitCost
from estimator.ops.operator import Op


@lru_cache(maxsize=16)
def traced_costs(traced: Traced) -> list[UnitCost]:
    """Cost of every unit; units that do the same share one object."""
    costs = [_cost(cost) for cost in traced.costs]
    return [costs[unit.cost] for unit in traced.units]


def _cost(cost: TracedCost) -> UnitCost:
    return UnitCost(
        _ops(cost.forward.ops),
        _ops(cost.backward.ops),
        _ops(cost.recompute),
        _memory(cost.forward),
        _memory(cost.backward),
    )


def _ops(ops: tuple[TracedOp, ...]) -> tuple[Op, ...]:
    return tuple(
        Op(op.name, op.kind, op.backward, op.dtype, op.flops, op.n_bytes, op.shape, op.launches)  # type: ignore[arg-type]
        for op in ops
    )


def _memory(one: TracedPass) -> PassMemory:
    def by_category(held: tuple[Held, ...]) -> dict[str, int]:
        return {of.category: of.n_bytes for of in held}

    return PassMemory(by_category(one.peak), by_category(one.after), by_category(one.category_peak))
