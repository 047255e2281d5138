"""Learning rate and weight decay by parameter: which spans of a flat shard are stepped with which coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor

from estimator.errors import InputError, invalid
from runtime.kernels.optimizer import State
from runtime.optimizer import OptimizerConfig, Shard
from runtime.storage import GroupStorage


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters that are stepped with coefficients of their own.

    Of several groups that a parameter matches the first takes it; one that matches none has the optimizer's coefficients.
    """

    names: tuple[str, ...]
    """Patterns of names in the model, as a shell's: ``("*.bias", "*norm.weight")``."""
    lr_scale: float = 1.0
    """Multiplies the learning rate, whatever a schedule makes of it."""
    weight_decay: float | None = None
    """``None``: the optimizer's."""

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not self.names or not all(isinstance(name, str) for name in self.names):
            raise invalid("param_groups.names", self.names, "a tuple of patterns of parameter names")
        for field in ("lr_scale", "weight_decay"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < float("inf"):
                raise invalid(f"param_groups.{field}", value, "a number >= 0")


class Coefficients(NamedTuple):
    """What may differ within one shard."""

    lr_scale: float
    weight_decay: float


class Piece(NamedTuple):
    """Spans of a rank's shard, in elements from its start, that are stepped with the same coefficients."""

    coefficients: Coefficients
    spans: tuple[slice, ...]

    def within(self, start: int, stop: int) -> list[slice]:
        """What of the spans lies in ``start`` to ``stop``, in elements from ``start``."""
        cut = [slice(max(s.start, start) - start, min(s.stop, stop) - start) for s in self.spans]
        return [s for s in cut if s.start < s.stop]


def assign(
    storages: Sequence[GroupStorage],
    names: Sequence[Sequence[str]],
    groups: Sequence[ParamGroup],
    config: OptimizerConfig,
) -> list[list[Piece]]:
    """For every storage the pieces of this rank's shard; ``names``: of every storage's slots.

    Raises ``InputError`` for a pattern that matches no trained parameter.
    """
    trained = [name for storage, own in zip(storages, names, strict=True) if storage.group.kind.trained for name in own]
    for pattern in (pattern for group in groups for pattern in group.names):
        if not any(fnmatchcase(name, pattern) for name in trained):
            raise InputError(
                f"param_groups has the pattern {pattern!r}, which no trained parameter matches; allowed: patterns of names such as "
                f"{trained[0]!r}"
            )
    return [_pieces(storage, own, groups, config) for storage, own in zip(storages, names, strict=True)]


def _coefficients(name: str, groups: Sequence[ParamGroup], config: OptimizerConfig) -> Coefficients:
    for group in groups:
        if any(fnmatchcase(name, pattern) for pattern in group.names):
            decay = config.weight_decay if group.weight_decay is None else group.weight_decay
            return Coefficients(group.lr_scale, decay)
    return Coefficients(1.0, config.weight_decay)


def _pieces(
    storage: GroupStorage, names: Sequence[str], groups: Sequence[ParamGroup], config: OptimizerConfig
) -> list[Piece]:
    """Padding goes with the parameter before it, so that neighbours with equal coefficients are one span."""
    layout = storage.group
    start = storage.rank * layout.shard_numel if layout.shard_numel < layout.padded_numel else 0
    ends = [*(slot.offset for slot in storage.slots[1:]), layout.padded_numel]
    spans: dict[Coefficients, list[slice]] = {}
    before: Coefficients | None = None
    for slot, name, end in zip(storage.slots, names, ends, strict=True):
        own = _coefficients(name, groups, config)
        low, high = max(slot.offset - start, 0), min(end - start, layout.shard_numel)
        if low >= high:
            continue
        if own == before:
            spans[own][-1] = slice(spans[own][-1].start, high)
        else:
            spans.setdefault(own, []).append(slice(low, high))
        before = own
    return [Piece(coefficients, tuple(of)) for coefficients, of in spans.items()]


def _cut(state: State, span: slice) -> State:
    """Blocks of 8-bit states are not cut: parameter groups do not go with them."""
    if isinstance(state, Tensor):
        return state[span]
    assert span == slice(0, state.codes.numel()), f"{span} of 8-bit states"
    return state


def cut_shard(shard: Shard, span: slice) -> Shard:
    """``span`` of ``shard``."""
    return replace(
        shard,
        master=shard.master[span],
        grads=shard.grads[span],
        states=[_cut(state, span) for state in shard.states],
        target=None if shard.target is None else shard.target[span],
    )
