"""``UnitCost``: the operators of one unit and what they keep and need, per pass."""

from __future__ import annotations

from typing import NamedTuple

from estimator.ops.operator import Op
from estimator.ops.tape import Tape


class PassMemory(NamedTuple):
    """Device bytes by category over one pass of one unit, relative to the moment before it."""

    peak: dict[str, int]
    """Change at the instant of the largest total inside the pass."""
    after: dict[str, int]
    """Change that remains when the pass is over (may be negative)."""
    category_peak: dict[str, int]
    """Each category's own largest change inside the pass."""


class SplitBackward(NamedTuple):
    """The backward pass of a unit in two: for the gradients of inputs, and later for those of weights."""

    inputs: tuple[Op, ...]
    weights: tuple[Op, ...]
    inputs_memory: PassMemory
    weights_memory: PassMemory


class Replayed(NamedTuple):
    """A pass of its own of what runs again."""

    ops: tuple[Op, ...]
    memory: PassMemory


class Source(NamedTuple):
    """From what a unit's cost was derived."""

    tape: Tape
    recompute: str


class UnitCost(NamedTuple):
    """What the compute of one kind of unit costs. Operators are listed in execution order."""

    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    """Without recomputation."""
    recompute: tuple[Op, ...]
    """Forward operators that run again at the start of the backward pass."""
    forward_memory: PassMemory
    backward_memory: PassMemory
    input_bytes: int = 0
    """Of the tensor that the unit before hands over."""
    split: SplitBackward | None = None
    """Where backward is two passes (zero-bubble pipelines)."""
    source: Source | None = None
    """``None`` where the operators were not recorded on a tape, or are a part of what was."""
    replayed: Replayed | None = None
    """Of a layer that is a unit of its own (``estimator.ops.pieces``): what of it runs again before the backward pass of the unit
    that it is of; ``recompute`` is then empty."""

    @property
    def again(self) -> tuple[Op, ...]:
        """Forward operators that run again, in whichever pass."""
        return self.recompute if self.replayed is None else self.replayed.ops

    def memory_of(self, phase: str) -> PassMemory:
        """Of the pass that ``Compute`` calls ``phase``."""
        if phase in ("input_grad", "weight_grad"):
            assert self.split is not None
            return self.split.inputs_memory if phase == "input_grad" else self.split.weights_memory
        if phase == "recompute":
            assert self.replayed is not None
            return self.replayed.memory
        return self.backward_memory if phase == "backward" else self.forward_memory

    def ops_of(self, phase: str) -> tuple[Op, ...]:
        """What that pass runs, recomputation included."""
        if phase == "recompute":
            return self.again
        if phase == "weight_grad":
            assert self.split is not None
            return self.split.weights
        if phase == "input_grad":
            assert self.split is not None
            return (*self.recompute, *self.split.inputs)
        return (*self.recompute, *self.backward) if phase == "backward" else self.forward
