"""``UnitCost``: the operators of one unit and what they keep and need, per pass."""

from __future__ import annotations

from typing import NamedTuple

from estimator.ops.operator import Op


class PassMemory(NamedTuple):
    """Device bytes by category over one pass of one unit, relative to the moment before it."""

    peak: dict[str, int]
    """Change at the instant of the largest total inside the pass."""
    after: dict[str, int]
    """Change that remains when the pass is over (may be negative)."""
    category_peak: dict[str, int]
    """Each category's own largest change inside the pass."""


class UnitCost(NamedTuple):
    """What the compute of one kind of unit costs. Operators are listed in execution order."""

    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    """Without recomputation."""
    recompute: tuple[Op, ...]
    """Forward operators that run again at the start of the backward pass."""
    forward_memory: PassMemory
    backward_memory: PassMemory
