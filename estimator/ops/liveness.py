"""Live bytes of a unit's passes under eager autograd, from its ``Tape``.

The rules are PyTorch's: a tensor lives while Python or a saved variable refers to it; a backward node produces all its
gradients, then drops what it saved and the gradient it consumed; two gradients of one tensor are summed into a third;
checkpointing (non-reentrant, early stop) replays the forward up to its last saved tensor. Proven byte for byte against
runs on meta tensors (``validator``'s ``fake`` backend).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace
from typing import NamedTuple

from estimator.job.recompute import parts_of
from estimator.ops.cost import PassMemory, Source, UnitCost
from estimator.ops.operator import Op
from estimator.ops.regions import Regions, again_name
from estimator.ops.tape import TEMPORARIES, Late, Node, Ref, Tape

KEPT_GRADS = "reduce_buckets"
"""Category of parameters' gradients as autograd leaves them, where these wait for their unit's."""


def unit_cost(graph: Tape, recompute: str) -> UnitCost:
    """Operators and live bytes of one unit. ``recompute`` is what this unit does (only blocks recompute)."""
    regions, kept = kept_of(graph, recompute)
    forward_memory = _Forward(graph, kept, from_cache=False).run(stop=len(graph.nodes))
    meter = Meter()
    again = backward_pass(graph, kept, recompute, regions, meter)[0]
    backward_memory = meter.memory()
    forward = tuple(op for node in graph.nodes for op in node.forward)
    backward = tuple(op for node in reversed(graph.nodes) for op in node.backward)
    input_bytes = graph.tensors[graph.input].n_bytes if graph.input >= 0 else 0
    return UnitCost(
        forward, backward, again, forward_memory, backward_memory, input_bytes, source=Source(graph, recompute)
    )


def play_unit(source: Source, forward: Meter, backward: Meter, held: list[Held] | None = None) -> dict[Ref, int]:
    """Both passes of the unit once more, told to ``forward`` and ``backward``; which gradients (by number) of which tensors are
    left at the end. ``held``: see ``backward_pass``."""
    graph, recompute = source
    regions, kept = kept_of(graph, recompute)
    _Forward(graph, kept, from_cache=False, meter=forward).run(stop=len(graph.nodes))
    return backward_pass(graph, kept, recompute, regions, backward, held)[1]


def kept_of(graph: Tape, recompute: str) -> tuple[Regions | None, set[Ref]]:
    """The parts of the unit that run again, where only parts do, and what its forward pass leaves behind."""
    parts = parts_of(recompute)
    regions = Regions(graph, parts) if parts else None
    return regions, regions.kept() if regions is not None else _kept_by_forward(graph, recompute)


def _kept_by_forward(graph: Tape, recompute: str) -> set[Ref]:
    """Storages that the forward pass leaves behind for the backward pass."""
    if recompute == "none":
        return {ref for node in graph.nodes for ref in (*node.saves, *node.aux)}
    kept = {graph.input, *(shared.ref for shared in graph.shared)}
    if recompute == "selective":
        kept |= {ref for node in graph.nodes for ref in _cached(node)}
    return kept


def _cached(node: Node) -> tuple[Ref, ...]:
    """What selective recomputation keeps of the node's results."""
    return (*node.outputs, *node.aux) if node.cached else node.cached_outputs


def run_again(node: Node) -> tuple[Op, ...]:
    """What selective recomputation does again of the node, to have what it does not keep."""
    if node.cached:
        return ()
    return node.uncached if node.cached_outputs else node.forward


def _replay_stop(graph: Tape, span: range) -> int:
    """Before which node of ``span`` the replay of a checkpoint ends: it stops once the last tensor to save is packed.

    torch's own operators pack before their kernel runs, Python autograd functions after it.
    """
    if not graph.style.early_stop:
        return span.stop
    last = max(i for i in span if graph.nodes[i].saves or graph.nodes[i].saves_weight)
    return last + 1 if graph.nodes[last].saves_after else last


PENDING = "pending"
"""What a parameter's gradient is called that waits for another unit's."""
WRITTEN = "written"
"""What parameters' gradients are called that wait for their unit's."""


class Meter:
    """Live bytes by category, and a copy of them at their largest total.

    ``what`` names what comes or goes, for a subclass that has to know which: a ``Ref``, a gradient (``("grad", tensor, number)``),
    ``PENDING`` or ``WRITTEN``. ``None`` is a change of category.
    """

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak_total = 0
        self.peak: dict[str, int] = {}
        self.category_peak: dict[str, int] = {}

    def begin(self, index: int, forward: bool) -> None:
        """Node ``index`` is the next to run, forward or backward; for a subclass that has to know."""

    def add(self, category: str, n_bytes: int, what: Hashable | None = None) -> None:
        self.live[category] += n_bytes
        self.total += n_bytes
        if n_bytes > 0:
            self._raise(category, self.live[category])

    def _raise(self, category: str, n_bytes: int) -> None:
        if n_bytes > self.category_peak.get(category, 0):
            self.category_peak[category] = n_bytes

    def look(self, *temps: int, temp_category: str = TEMPORARIES) -> None:
        """Compare this instant, with ``temps`` (bytes) more, to the largest so far."""
        temp_bytes = sum(temps)
        self._raise(temp_category, self.live[temp_category] + temp_bytes)
        if self.total + temp_bytes > self.peak_total:
            self.peak_total = self.total + temp_bytes
            self.peak = dict(self.live)
            self.peak[temp_category] = self.peak.get(temp_category, 0) + temp_bytes

    def memory(self) -> PassMemory:
        return PassMemory(
            {k: v for k, v in self.peak.items() if v}, {k: v for k, v in self.live.items() if v}, self.category_peak
        )


class _Forward:
    """Plays a forward pass that keeps ``kept``. ``from_cache``: outputs of cached nodes already exist."""

    def __init__(self, graph: Tape, kept: set[Ref], from_cache: bool, meter: Meter | None = None) -> None:
        self.graph, self.from_cache = graph, from_cache
        self.meter = Meter() if meter is None else meter
        self.second: frozenset[Ref] = frozenset()
        outputs = {graph.output, *graph.further_outputs}
        self.known = {graph.input, *outputs, *kept}
        if from_cache:
            self.known |= {ref for node in graph.nodes for ref in _cached(node) if ref in node.outputs}
        self.ends: dict[int, list[Ref]] = {}
        for ref, tensor in enumerate(graph.tensors):
            if ref not in kept and ref not in outputs:
                self.ends.setdefault(tensor.last_use, []).append(ref)

    def category(self, ref: Ref) -> str:
        """Tensors that die inside the pass are temporaries, except logits."""
        tensor = self.graph.tensors[ref]
        return tensor.category if ref in self.known or tensor.category == "logits_loss" else TEMPORARIES

    def run(self, stop: int) -> PassMemory:
        self.play(0, stop)
        return self.meter.memory()

    def play(self, start: int, stop: int) -> None:
        meter, tensors = self.meter, self.graph.tensors
        for index, node in enumerate(self.graph.nodes[start:stop], start):
            meter.begin(index, True)
            if not (self.from_cache and node.cached):
                for ref in (*node.outputs, *node.aux):
                    if not (self.from_cache and ref in node.cached_outputs):
                        name = again_name(ref) if ref in self.second else ref
                        meter.add(self.category(ref), tensors[ref].n_bytes, name)
                meter.look(node.forward_temp_bytes, temp_category=node.temp_category)
            for ref in self.ends.get(index, ()):
                meter.add(self.category(ref), -tensors[ref].n_bytes, ref)


class Held(NamedTuple):
    """What a node whose weights' gradients come later holds until then."""

    late: Late
    things: list[tuple[Hashable, str, int]]
    """What it has saved and the gradients of its outputs: name, category, bytes."""


def backward_pass(
    graph: Tape, kept: set[Ref], recompute: str, regions: Regions | None, meter: Meter, held: list[Held] | None = None
) -> tuple[tuple[Op, ...], dict[Ref, int]]:
    """Plays the backward pass of a unit; the forward operators that run again in it, before it or as it comes to ``regions``, and
    which gradients of which tensors are left. With ``held`` nodes leave the gradients of weights for later, if they can, and are
    added to it in the order of that pass."""
    tensors, nodes = graph.tensors, graph.nodes
    if regions is not None:
        again = _Again(graph, regions, meter)
        left = _play_backward(graph, regions.saved(), meter, again, held)
        return tuple(again.ops), left
    saved: Counter[Hashable] = Counter(ref for node in nodes for ref in (*node.saves, *node.aux))
    ops: tuple[Op, ...] = ()

    def replay() -> None:
        nonlocal ops
        whole = range(len(nodes))
        stop, still = _replay_stop(graph, whole), {ref for node in nodes for ref in (*node.saves, *node.aux)}
        ops = _replay(graph, meter, still, whole[:stop], cached=recompute == "selective")
        for ref in kept - still - {graph.input}:
            if tensors[ref].last_use >= stop or ref == graph.output:
                meter.add(tensors[ref].category, -tensors[ref].n_bytes, ref)

    if recompute != "none":
        saved.update(shared.ref for shared in graph.shared)  # a checkpoint holds what went in until all is done
        if graph.input >= 0 and graph.input not in saved:
            saved[graph.input] = 1
    left = _play_backward(graph, saved, meter, held=held, replay=replay if recompute != "none" else None)
    late = {name for one in held or () for name, _, _ in one.things}
    for name, count in saved.items():
        if count and name not in late:
            assert isinstance(name, Ref)
            meter.add(tensors[name].category, -tensors[name].n_bytes, name)
    return ops, left


def _replay(
    graph: Tape, meter: Meter, saved: set[Ref], span: range, *, cached: bool = False,
    second: frozenset[Ref] = frozenset(),
) -> tuple[Op, ...]:  # fmt: skip
    """The checkpointed nodes of ``span`` again, of whose tensors only ``saved`` ones remain; their operators.

    ``second``: tensors of which the first ones are still there.
    ``cached``: outputs of cached nodes are handed out as they are reached and die like any other; one that is never reached
    stays in the cache until the replay is over.
    """
    nodes = graph.nodes[span.start : span.stop]
    made = [(node, ref) for node in nodes for ref in (*node.outputs, *node.aux)]
    elsewhere = set(range(len(graph.tensors))) - {ref for _, ref in made}
    forward = _Forward(graph, saved | elsewhere, cached, meter)
    forward.known -= {graph.output, *graph.further_outputs} - saved  # which nobody takes
    forward.second = second
    forward.play(span.start, span.stop)
    for node, ref in made:
        outlives = graph.tensors[ref].last_use >= span.stop or ref == graph.output
        if ref not in saved and outlives and not (cached and ref in _cached(node)):
            meter.add(forward.category(ref), -graph.tensors[ref].n_bytes, ref)
    ops = [op for node in nodes for op in (run_again(node) if cached else node.forward)]
    return tuple(ops[: len(ops) - nodes[-1].after] if nodes else ())


class _Again:
    """Makes parts of a block again as its backward pass comes to them."""

    def __init__(self, graph: Tape, regions: Regions, meter: Meter) -> None:
        self.graph, self.regions, self.meter = graph, regions, meter
        self.ops: list[Op] = []
        self._there: set[Ref] = set()
        self._replayed: set[range] = set()

    def bring_back(self, index: int) -> None:
        """Node ``index`` is about to read what it saved."""
        node = self.graph.nodes[index]
        span = self.regions.span_of.get(index)
        if span is None:
            for ref in node.saves:
                self._remake(ref)
        elif span not in self._replayed and node.packs:
            self._replayed.add(span)
            for ref in self.regions.inputs[span]:
                self._remake(ref)
            saved = {ref for i in span for ref in (*self.graph.nodes[i].saves, *self.graph.nodes[i].aux)}
            again = range(span.start, _replay_stop(self.graph, span))
            self.ops += _replay(self.graph, self.meter, saved, again, second=self.regions.twice[span])

    def _remake(self, ref: Ref) -> None:
        node = self.regions.remade.get(ref)
        if node is None or ref in self._there:
            return
        self._there.add(ref)
        meter, tensors = self.meter, self.graph.tensors
        meter.add(tensors[ref].category, tensors[ref].n_bytes, ref)
        for other in node.aux:  # made beside it, and dropped
            meter.add(TEMPORARIES, tensors[other].n_bytes, again_name(other))
        meter.look(node.forward_temp_bytes, temp_category=node.temp_category)
        for other in node.aux:
            meter.add(TEMPORARIES, -tensors[other].n_bytes, again_name(other))
        self.ops += node.remake or node.forward


def _play_backward(
    graph: Tape, saved: Counter[Hashable], meter: Meter, again: _Again | None = None, held: list[Held] | None = None,
    replay: Callable[[], None] | None = None,
) -> dict[Ref, int]:  # fmt: skip
    """Nodes in reverse. ``saved`` counts the nodes that hold a storage; what is not there, ``again`` makes, or ``replay``, all at once,
    when a node first reads what was saved (a checkpoint unpacks late: what needs nothing goes before). Which gradients (by
    number) of which tensors are left. ``held``: see ``backward_pass``."""
    tensors = graph.tensors
    viewed = {ref for node in graph.nodes for ref in node.inputs}  # others read the view, whose gradient it is
    there = [graph.output, *(ref for ref in graph.further_outputs if ref not in viewed)]
    there += [shared.ref for shared in graph.shared if shared.waits]
    grad_of: dict[Ref, int] = {ref: i for i, ref in enumerate(there)}
    grad_bytes: list[tuple[int, str]] = [_grad(graph, ref) for ref in there]
    grad_refs = [1] * len(there)
    names: list[Hashable] = [("grad", ref, i) for i, ref in enumerate(there)]

    def new_grad(ref: Ref, category: str = "") -> int:
        n_bytes, usual = _grad(graph, ref)
        grad_bytes.append((n_bytes, category or usual))
        grad_refs.append(0)
        names.append(("grad", ref, len(names)))
        meter.add(grad_bytes[-1][1], grad_bytes[-1][0], names[-1])
        return len(grad_bytes) - 1

    def drop_grad(grad: int) -> None:
        grad_refs[grad] -= 1
        if grad_refs[grad] == 0:
            meter.add(grad_bytes[grad][1], -grad_bytes[grad][0], names[grad])

    def drop_saved(index: int, late: Collection[Ref] = ()) -> None:
        node = graph.nodes[index]
        refs = (*node.saves, *node.aux) if again is None else again.regions.dropped_by(index)
        for ref in refs[len(late) :]:
            name = ref if again is None else again.regions.name_of(index, ref)
            saved[name] -= 1
            if saved[name] == 0:
                meter.add(tensors[ref].category, -tensors[ref].n_bytes, name)

    for index in reversed(range(len(graph.nodes))):
        meter.begin(index, False)
        node = graph.nodes[index]
        late = node.late if held is not None else None
        if late is not None:
            made = node.param_grad_bytes - late.grad_bytes
            node = replace(node, param_grad_bytes=made, backward_temp_bytes=late.inputs_temp_bytes)
        if again is not None:
            again.bring_back(index)
        if replay is not None and node.packs:
            replay()
            replay = None
        incoming = [grad_of.pop(ref) for ref in node.outputs if ref in grad_of]
        if node.kept_grads:
            drop_saved(index)
        outgoing: list[tuple[Ref, int]] = []
        for ref in node.inputs:
            if not tensors[ref].n_grad_bytes:
                continue
            if node.passes_grad and tensors[ref].n_grad_bytes == grad_bytes[incoming[0]][0]:
                grad = incoming[0]
            else:
                grad = outgoing[0][1] if node.one_grad and outgoing else new_grad(ref, node.kept_grads)
            outgoing.append((ref, grad))
        for _, grad in outgoing:
            grad_refs[grad] += 1
        category = node.kept_grads or TEMPORARIES
        fresh = 0 if graph.param_grads == "kept" else node.param_grad_bytes
        temps = node.backward_temp_bytes, node.param_grad_bytes, node.pending_grad_bytes
        meter.look(*temps, temp_category=category)
        meter.add(node.pending_category, node.pending_grad_bytes, PENDING)
        if late is not None and held is not None:
            refs = (*node.saves, *node.aux)
            names_of = [ref if again is None else again.regions.name_of(index, ref) for ref in refs]
            things = [(n, tensors[r].category, tensors[r].n_bytes) for n, r in zip(names_of, refs, strict=True)]
            held.append(Held(late, things + [(names[g], grad_bytes[g][1], grad_bytes[g][0]) for g in incoming]))
            drop_saved(index, refs)
            incoming = []
        elif not node.kept_grads:
            drop_saved(index)
        for grad in incoming:
            drop_grad(grad)
        if node.settled_grad_bytes:  # the sum of both counts as what waited does
            meter.add(node.pending_category, node.settled_grad_bytes, "own")
            meter.look(node.settled_grad_bytes)
            meter.add(node.pending_category, -node.settled_grad_bytes, "own")
            if not node.stays_pending:
                meter.add(node.pending_category, -node.settled_grad_bytes, PENDING)
        if not fresh and not node.stays_pending:
            meter.add(KEPT_GRADS, node.param_grad_bytes, WRITTEN)
        for ref, grad in outgoing:
            if ref not in grad_of:
                grad_of[ref] = grad
                continue
            total = new_grad(ref)
            grad_refs[total] = 1
            meter.look(fresh)
            drop_grad(grad_of[ref])
            drop_grad(grad)
            grad_of[ref] = total
    if graph.input in grad_of:
        n_bytes, category = grad_bytes[grad_of[graph.input]]
        meter.add(category, -n_bytes)  # the unit before knows it as a temporary
        meter.add(TEMPORARIES, n_bytes)
    return grad_of


def _grad(graph: Tape, ref: Ref) -> tuple[int, str]:
    """Bytes and category of a tensor's gradient."""
    tensor = graph.tensors[ref]
    return tensor.n_grad_bytes, "logits_loss" if tensor.category == "logits_loss" else TEMPORARIES
