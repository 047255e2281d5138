"""A unit's cost taken apart at its layers, for a framework that fetches parameters layer by layer (DeepSpeed's stage 3).

A *piece* is a run of the unit's nodes: those of one layer whose parameters come and go, or what lies between two such layers.
Pieces are units of their own then (``estimator.sharding.grain``), and their costs add up to the unit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from estimator.ops.cost import PassMemory, Replayed, Source, UnitCost
from estimator.ops.liveness import Meter, play_unit, run_again
from estimator.ops.tape import Node, Tape
from estimator.sharding.grain import Piece, layers_of
from estimator.sharding.units import Param, Unit

WHOLE = ("none", "full", "selective")
"""What a unit may recompute that is taken apart: nothing, or its forward pass at once."""


class Cut(NamedTuple):
    """A piece, and the nodes that are its own."""

    piece: Piece
    nodes: range


def cuts_of(unit: Unit, cost: UnitCost, small_numel: int) -> tuple[Cut, ...]:
    """The pieces of ``unit``: a layer is one by itself where a parameter of it has more than ``small_numel`` elements. One piece,
    where it is not known which nodes read which parameters."""
    source = cost.source
    whole = Piece(tuple(range(len(unit.params))), borrows=bool(unit.borrows))
    if source is None or source.recompute not in WHOLE or cost.split is not None:
        return (Cut(whole, range(0)),)
    graph = source.tape
    reading = [index for index, node in enumerate(graph.nodes) if _weight_bytes(node)]
    layers = layers_of(unit)
    if len(reading) != len(layers) or not all(
        _reads(graph, graph.nodes[index], [unit.params[i] for i in layer])
        for index, layer in zip(reading, layers, strict=True)
    ):
        return (Cut(whole, range(0)),)
    cuts: list[Cut] = []
    start = 0
    held: tuple[int, ...] = ()
    for index, layer in zip(reading, layers, strict=True):
        node = graph.nodes[index]
        large = node.pending_grad_bytes > 0 or any(unit.params[i].numel > small_numel for i in layer)
        if not large:
            held += layer
            continue
        if index > start or held:
            cuts.append(Cut(Piece(held), range(start, index)))
        cuts.append(
            Cut(Piece(layer, borrows=node.pending_grad_bytes > 0 and bool(unit.borrows)), range(index, index + 1))
        )
        start, held = index + 1, ()
    if start < len(graph.nodes) or held:
        cuts.append(Cut(Piece(held), range(start, len(graph.nodes))))
    return tuple(cuts)


def piece_costs(cost: UnitCost, cuts: Sequence[Cut]) -> list[UnitCost]:
    """Of every piece, in forward order."""
    source = cost.source
    if len(cuts) == 1 or source is None:
        return [cost]
    place = [number for number, cut in enumerate(cuts) for _ in cut.nodes]
    forward, backward = _Cutter(place), _Cutter(place, replays=source.recompute != "none")
    play_unit(source, forward, backward)
    forward.close()
    backward.close()
    return [
        _cost(cost, source, number, cut.nodes, forward.memories, backward.memories) for number, cut in enumerate(cuts)
    ]


_NOTHING = PassMemory({}, {}, {})
_Memories = dict[tuple[bool, int], PassMemory]


def _cost(
    whole: UnitCost, source: Source, number: int, span: range, forward: _Memories, backward: _Memories
) -> UnitCost:
    nodes = source.tape.nodes[span.start : span.stop]
    replayed = None
    if source.recompute != "none":
        ops = [op for node in nodes for op in (run_again(node) if source.recompute == "selective" else node.forward)]
        replayed = Replayed(tuple(ops), backward.get((True, number), _NOTHING))
    return UnitCost(
        forward=tuple(op for node in nodes for op in node.forward),
        backward=tuple(op for node in reversed(nodes) for op in node.backward),
        recompute=(),
        forward_memory=forward.get((True, number), _NOTHING),
        backward_memory=backward.get((False, number), _NOTHING),
        input_bytes=whole.input_bytes if number == 0 else 0,
        replayed=replayed,
    )


def _weight_bytes(node: Node) -> int:
    return node.param_grad_bytes + node.pending_grad_bytes + node.settled_grad_bytes


def _reads(graph: Tape, node: Node, params: Sequence[Param]) -> bool:
    """Whether ``node`` makes gradients of the size of ``params``; of a table that others read too it is not asked."""
    if node.pending_grad_bytes or node.settled_grad_bytes:
        return True
    return node.param_grad_bytes == sum(param.numel for param in params) * graph.width


class _Cutter(Meter):
    """A meter that begins anew with every piece."""

    def __init__(self, place: Sequence[int], replays: bool = False) -> None:
        super().__init__()
        self.memories: _Memories = {}
        """By direction of the pass (forward or not) and number of the piece."""
        self._place, self._waits = place, replays
        self._key: tuple[bool, int] | None = None

    def begin(self, index: int, forward: bool) -> None:
        key = (forward, self._place[index])
        if self._waits:  # backward nodes that need nothing go before what runs again: they count with its first piece
            self._waits = not forward
            key = key if forward else (True, self._place[0])
        if key != self._key:
            self.close()
            self._key = key

    def close(self) -> None:
        """The newest piece is over."""
        if self._key is None:
            return
        assert self._key not in self.memories, f"piece {self._key} twice"
        self.memories[self._key] = self.memory()
        self.live.clear()
        self.total = self.peak_total = 0
        self.peak, self.category_peak = {}, {}
