"""Units taken apart at their layers: the grain at which DeepSpeed's stage 3 fetches parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from estimator.job.framework import FRAMEWORKS
from estimator.job.strategy import Strategy
from estimator.sharding.units import Param, Unit


class Piece(NamedTuple):
    """A part of a unit that is a unit of its own."""

    params: tuple[int, ...]
    """Which of the unit's parameters are read in it, by index."""
    borrows: bool = False
    """It reads what the unit borrows."""


Grain = tuple[tuple[str, tuple[Piece, ...]], ...]
"""By kind of unit, its pieces in forward order."""


def fetches_layers(s: Strategy, zero_stage: int) -> bool:
    """Whether parameters come and go layer by layer, as far as that is forecast: not in pipelines, nor where they come from the host,
    compressed or from nearby, nor where blocks are compiled, or send their inputs to the host."""
    plain = s.pp == 1 and not (s.offload_param or s.quantized_weights or s.secondary_shard)
    whole_units = s.compile or s.activation_offload or s.sparse_embeddings
    return FRAMEWORKS[s.framework].live_numel > 0 and zero_stage >= 1 and plain and not whole_units


def layers_of(unit: Unit) -> list[tuple[int, ...]]:
    """Parameters of ``unit`` by the module that they are in, and an empty one at the end for a table that it borrows and has no
    bias beside."""
    layers: dict[str, tuple[int, ...]] = {}
    for index, param in enumerate(unit.params):
        name = param.name.rpartition(".")[0]
        layers[name] = (*layers.get(name, ()), index)
    return [*layers.values(), *([()] if unit.borrows and "out" not in layers else [])]


def take_apart(units: Sequence[Unit], grain: Grain, replaying: frozenset[int]) -> tuple[Unit, ...]:
    """``units`` in the pieces that ``grain`` says, in forward order; ``replaying``: those that run again before their backward pass. What is
    borrowed is the first piece of the unit that lends (its table of tokens)."""
    pieces_of = dict(grain)
    starts: list[int] = []
    made: list[Unit] = []
    held: dict[tuple[int, int], tuple[Param, ...]] = {}  # equal parameters stay one object
    for index, unit in enumerate(units):
        starts.append(len(made))
        pieces = pieces_of[unit.kind]
        for number, piece in enumerate(pieces):
            params = held.setdefault((id(unit.params), number), tuple(unit.params[i] for i in piece.params))
            made.append(
                Unit(
                    name=unit.name if len(pieces) == 1 else f"{unit.name} {_words(unit, piece)}".strip(),
                    kind=unit.kind if len(pieces) == 1 else f"{unit.kind}:{number}",
                    params=params,
                    borrows=tuple(starts[lender] for lender in unit.borrows) if piece.borrows else (),
                    whole=unit.name,
                    replays=index in replaying and len(pieces) > 1,
                )
            )
    return tuple(made)


def _words(unit: Unit, piece: Piece) -> str:
    """The layer of a piece; nothing for what lies between layers."""
    if piece.borrows:
        return "out"
    return unit.params[piece.params[0]].name.rpartition(".")[0] if len(piece.params) in (1, 2) else ""
