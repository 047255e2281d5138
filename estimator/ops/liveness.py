"""Live bytes of a unit's passes under eager autograd, from its ``Tape``.

The rules are PyTorch's: a tensor lives while Python or a saved variable refers to it; a backward node produces all its
gradients, then drops what it saved and the gradient it consumed; two gradients of one tensor are summed into a third;
checkpointing (non-reentrant, early stop) replays the forward up to its last saved tensor. Proven byte for byte against
runs on meta tensors (``validator``'s ``fake`` backend).
"""

from __future__ import annotations

from collections import Counter

from estimator.job.recompute import parts_of
from estimator.ops.cost import PassMemory, UnitCost
from estimator.ops.operator import Op
from estimator.ops.regions import Regions
from estimator.ops.tape import TEMPORARIES, Node, Ref, Tape


def unit_cost(graph: Tape, recompute: str) -> UnitCost:
    """Operators and live bytes of one unit. ``recompute`` is what this unit does (only blocks recompute)."""
    parts = parts_of(recompute)
    regions = Regions(graph, parts) if parts else None
    kept = regions.kept() if regions is not None else _kept_by_forward(graph, recompute)
    forward_memory = _Forward(graph, kept, from_cache=False).run(stop=len(graph.nodes))
    backward_memory, again = _backward(graph, kept, recompute, regions)
    forward = tuple(op for node in graph.nodes for op in node.forward)
    backward = tuple(op for node in reversed(graph.nodes) for op in node.backward)
    input_bytes = graph.tensors[graph.input].n_bytes if graph.input >= 0 else 0
    return UnitCost(forward, backward, again, forward_memory, backward_memory, input_bytes)


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


def _uncached(node: Node) -> tuple[Op, ...]:
    """What it does again to have the others."""
    if node.cached:
        return ()
    return node.uncached if node.cached_outputs else node.forward


def _replay_stop(graph: Tape, span: range) -> int:
    """Before which node of ``span`` the replay of a checkpoint ends: it stops once the last tensor to save is packed.

    torch's own operators pack before their kernel runs, Python autograd functions after it.
    """
    last = max(i for i in span if graph.nodes[i].saves)
    return last + 1 if graph.nodes[last].saves_after else last


class _Meter:
    """Live bytes by category, and a copy of them at their largest total."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak_total = 0
        self.peak: dict[str, int] = {}
        self.category_peak: dict[str, int] = {}

    def add(self, category: str, n_bytes: int) -> None:
        self.live[category] += n_bytes
        self.total += n_bytes
        if n_bytes > 0:
            self._raise(category, self.live[category])

    def _raise(self, category: str, n_bytes: int) -> None:
        if n_bytes > self.category_peak.get(category, 0):
            self.category_peak[category] = n_bytes

    def look(self, temp_bytes: int = 0, temp_category: str = TEMPORARIES) -> None:
        """Compare this instant, with ``temp_bytes`` more, to the largest so far."""
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

    def __init__(self, graph: Tape, kept: set[Ref], from_cache: bool, meter: _Meter | None = None) -> None:
        self.graph, self.from_cache = graph, from_cache
        self.meter = meter or _Meter()
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
            if not (self.from_cache and node.cached):
                for ref in (*node.outputs, *node.aux):
                    if not (self.from_cache and ref in node.cached_outputs):
                        meter.add(self.category(ref), tensors[ref].n_bytes)
                meter.look(node.forward_temp_bytes, node.temp_category)
            for ref in self.ends.get(index, ()):
                meter.add(self.category(ref), -tensors[ref].n_bytes)


def _backward(
    graph: Tape, kept: set[Ref], recompute: str, regions: Regions | None
) -> tuple[PassMemory, tuple[Op, ...]]:
    """Backward pass of a unit, and the forward operators that run again in it: before it, or as it comes to ``regions``."""
    meter = _Meter()
    tensors, nodes = graph.tensors, graph.nodes
    saved = Counter(ref for node in nodes for ref in (*node.saves, *node.aux))
    if regions is not None:
        again = _Again(graph, regions, meter)
        _play_backward(graph, saved, meter, again)
        return meter.memory(), tuple(again.ops)
    ops: tuple[Op, ...] = ()
    if recompute != "none":
        whole, cached = range(len(nodes)), recompute == "selective"
        stop = _replay_stop(graph, whole)
        ops = _replay(graph, meter, set(saved), whole[:stop], cached)
        for ref in kept - set(saved) - {graph.input}:
            if tensors[ref].last_use >= stop or ref == graph.output:
                meter.add(tensors[ref].category, -tensors[ref].n_bytes)
        saved.update(shared.ref for shared in graph.shared)  # a checkpoint holds what went in until all is done
    _play_backward(graph, saved, meter)
    for ref in saved:
        if saved[ref]:
            meter.add(tensors[ref].category, -tensors[ref].n_bytes)
    return meter.memory(), ops


def _replay(graph: Tape, meter: _Meter, saved: set[Ref], span: range, cached: bool = False) -> tuple[Op, ...]:
    """The checkpointed nodes of ``span`` again, of whose tensors only ``saved`` ones remain; their operators.

    ``cached``: outputs of cached nodes are handed out as they are reached and die like any other; one that is never reached
    stays in the cache until the replay is over.
    """
    nodes = graph.nodes[span.start : span.stop]
    made = [(node, ref) for node in nodes for ref in (*node.outputs, *node.aux)]
    elsewhere = set(range(len(graph.tensors))) - {ref for _, ref in made}
    forward = _Forward(graph, saved | elsewhere, cached, meter)
    forward.play(span.start, span.stop)
    for node, ref in made:
        outlives = graph.tensors[ref].last_use >= span.stop or ref == graph.output
        if ref not in saved and outlives and not (cached and ref in _cached(node)):
            meter.add(forward.category(ref), -graph.tensors[ref].n_bytes)
    return tuple(op for node in nodes for op in (_uncached(node) if cached else node.forward))


class _Again:
    """Makes parts of a block again as its backward pass comes to them."""

    def __init__(self, graph: Tape, regions: Regions, meter: _Meter) -> None:
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
        elif span not in self._replayed and (node.saves or node.aux):
            self._replayed.add(span)
            for ref in self.regions.inputs[span]:
                self._remake(ref)
            saved = {ref for i in span for ref in (*self.graph.nodes[i].saves, *self.graph.nodes[i].aux)}
            again = range(span.start, _replay_stop(self.graph, span))
            self.ops += _replay(self.graph, self.meter, saved, again)

    def _remake(self, ref: Ref) -> None:
        node = self.regions.remade.get(ref)
        if node is None or ref in self._there:
            return
        self._there.add(ref)
        meter, tensors = self.meter, self.graph.tensors
        meter.add(tensors[ref].category, tensors[ref].n_bytes)
        for other in node.aux:  # made beside it, and dropped
            meter.add(TEMPORARIES, tensors[other].n_bytes)
        meter.look(node.forward_temp_bytes, node.temp_category)
        for other in node.aux:
            meter.add(TEMPORARIES, -tensors[other].n_bytes)
        self.ops += node.remake or node.forward


def _play_backward(graph: Tape, saved: Counter[Ref], meter: _Meter, again: _Again | None = None) -> None:
    """Nodes in reverse. ``saved`` counts the nodes that hold a storage; what is not there, ``again`` makes."""
    tensors = graph.tensors
    viewed = {ref for node in graph.nodes for ref in node.inputs}  # others read the view, whose gradient it is
    there = [graph.output, *(ref for ref in graph.further_outputs if ref not in viewed)]
    there += [shared.ref for shared in graph.shared if shared.waits]
    grad_of: dict[Ref, int] = {ref: i for i, ref in enumerate(there)}
    grad_bytes: list[tuple[int, str]] = [_grad(graph, ref) for ref in there]
    grad_refs = [1] * len(there)

    def new_grad(ref: Ref, category: str = "") -> int:
        n_bytes, usual = _grad(graph, ref)
        grad_bytes.append((n_bytes, category or usual))
        grad_refs.append(0)
        meter.add(grad_bytes[-1][1], grad_bytes[-1][0])
        return len(grad_bytes) - 1

    def drop_grad(grad: int) -> None:
        grad_refs[grad] -= 1
        if grad_refs[grad] == 0:
            meter.add(grad_bytes[grad][1], -grad_bytes[grad][0])

    def drop_saved(node: Node) -> None:
        for ref in (*node.saves, *node.aux):
            saved[ref] -= 1
            if saved[ref] == 0:
                meter.add(tensors[ref].category, -tensors[ref].n_bytes)

    for index in reversed(range(len(graph.nodes))):
        node = graph.nodes[index]
        if again is not None:
            again.bring_back(index)
        incoming = [grad_of.pop(ref) for ref in node.outputs if ref in grad_of]
        if node.kept_grads:
            drop_saved(node)
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
        meter.look(node.backward_temp_bytes + node.param_grad_bytes + node.pending_grad_bytes, category)
        meter.add(node.pending_category, node.pending_grad_bytes)
        if not node.kept_grads:
            drop_saved(node)
        for grad in incoming:
            drop_grad(grad)
        if node.settled_grad_bytes:  # the sum of both counts as what waited does
            meter.add(node.pending_category, node.settled_grad_bytes)
            meter.look(node.settled_grad_bytes)
            meter.add(node.pending_category, -(1 if node.stays_pending else 2) * node.settled_grad_bytes)
        for ref, grad in outgoing:
            if ref not in grad_of:
                grad_of[ref] = grad
                continue
            total = new_grad(ref)
            grad_refs[total] = 1
            meter.look(node.param_grad_bytes)
            drop_grad(grad_of[ref])
            drop_grad(grad)
            grad_of[ref] = total
    if graph.input in grad_of:
        n_bytes, category = grad_bytes[grad_of[graph.input]]
        meter.add(category, -n_bytes)  # the unit before knows it as a temporary
        meter.add(TEMPORARIES, n_bytes)


def _grad(graph: Tape, ref: Ref) -> tuple[int, str]:
    """Bytes and category of a tensor's gradient."""
    tensor = graph.tensors[ref]
    return tensor.n_grad_bytes, "logits_loss" if tensor.category == "logits_loss" else TEMPORARIES
