"""Live bytes of a unit's passes under eager autograd, from its ``Tape``.

The rules are PyTorch's: a tensor lives while Python or a saved variable refers to it; a backward node produces all its
gradients, then drops what it saved and the gradient it consumed; two gradients of one tensor are summed into a third;
checkpointing (non-reentrant, early stop) replays the forward up to its last saved tensor. Proven byte for byte against
runs on meta tensors (``validator``'s ``fake`` backend).
"""

from __future__ import annotations

from collections import Counter

from estimator.job.strategy import Recompute
from estimator.ops.cost import PassMemory, UnitCost
from estimator.ops.tape import TEMPORARIES, Node, Ref, Tape


def unit_cost(graph: Tape, recompute: Recompute) -> UnitCost:
    """Operators and live bytes of one unit. ``recompute`` is what this unit does (only blocks recompute)."""
    kept = _kept_by_forward(graph, recompute)
    forward_memory = _Forward(graph, kept, from_cache=False).run(stop=len(graph.nodes))
    backward_memory = _backward(graph, kept, recompute)
    forward = tuple(op for node in graph.nodes for op in node.forward)
    backward = tuple(op for node in reversed(graph.nodes) for op in node.backward)
    replayed = graph.nodes[: _replay_stop(graph)] if recompute != "none" else []
    cached = recompute == "selective"
    again = tuple(op for node in replayed if not (cached and node.cached) for op in node.forward)
    return UnitCost(forward, backward, again, forward_memory, backward_memory)


def _kept_by_forward(graph: Tape, recompute: Recompute) -> set[Ref]:
    """Storages that the forward pass leaves behind for the backward pass."""
    if recompute == "none":
        return {ref for node in graph.nodes for ref in (*node.saves, *node.aux)}
    kept = {graph.input}
    if recompute == "selective":
        kept |= {ref for node in graph.nodes if node.cached for ref in (*node.outputs, *node.aux)}
    return kept


def _replay_stop(graph: Tape) -> int:
    """How many nodes a checkpoint replays: it stops once the last tensor to save is packed.

    torch's own operators pack before their kernel runs, Python autograd functions after it.
    """
    last = max(i for i, node in enumerate(graph.nodes) if node.saves)
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

    def __init__(self, graph: Tape, kept: set[Ref], from_cache: bool) -> None:
        self.graph, self.from_cache = graph, from_cache
        self.meter = _Meter()
        self.known = {graph.input, graph.output, *kept}
        if from_cache:
            self.known |= {ref for node in graph.nodes if node.cached for ref in node.outputs}
        self.ends: dict[int, list[Ref]] = {}
        for ref, tensor in enumerate(graph.tensors):
            if ref not in kept and ref != graph.output:
                self.ends.setdefault(tensor.last_use, []).append(ref)

    def category(self, ref: Ref) -> str:
        """Tensors that die inside the pass are temporaries, except logits."""
        tensor = self.graph.tensors[ref]
        return tensor.category if ref in self.known or tensor.category == "logits_loss" else TEMPORARIES

    def run(self, stop: int) -> PassMemory:
        self.play(stop)
        return self.meter.memory()

    def play(self, stop: int) -> None:
        meter, tensors = self.meter, self.graph.tensors
        for index, node in enumerate(self.graph.nodes[:stop]):
            if not (self.from_cache and node.cached):
                for ref in (*node.outputs, *node.aux):
                    meter.add(self.category(ref), tensors[ref].n_bytes)
                meter.look(node.forward_temp_bytes, node.temp_category)
            for ref in self.ends.get(index, ()):
                meter.add(self.category(ref), -tensors[ref].n_bytes)


def _backward(graph: Tape, kept: set[Ref], recompute: Recompute) -> PassMemory:
    """Backward pass of a unit, recomputation first where there is any."""
    meter = _Meter()
    tensors, nodes = graph.tensors, graph.nodes
    saved = Counter(ref for node in nodes for ref in (*node.saves, *node.aux))
    if recompute != "none":
        stop = _replay_stop(graph)
        meter = _replay(graph, set(saved), recompute, stop)
        for ref in kept - set(saved) - {graph.input}:
            if tensors[ref].last_use >= stop or ref == graph.output:
                meter.add(tensors[ref].category, -tensors[ref].n_bytes)
    _play_backward(graph, saved, meter)
    return meter.memory()


def _replay(graph: Tape, saved: set[Ref], recompute: Recompute, stop: int) -> _Meter:
    """The checkpointed forward again, up to its last saved tensor; then only saved tensors remain.

    Cached outputs are handed out as they are reached and die like any other; one that is never reached stays in the
    cache until the replay is over.
    """
    forward = _Forward(graph, saved | {graph.input}, from_cache=recompute == "selective")
    forward.play(stop)
    meter = forward.meter
    for node in graph.nodes[:stop]:
        for ref in (*node.outputs, *node.aux):
            if ref not in saved and graph.tensors[ref].last_use >= stop and not (forward.from_cache and node.cached):
                meter.add(forward.category(ref), -graph.tensors[ref].n_bytes)
    return meter


def _play_backward(graph: Tape, saved: Counter[Ref], meter: _Meter) -> None:
    """Nodes in reverse. ``saved`` counts the nodes that hold a storage."""
    tensors = graph.tensors
    grad_of: dict[Ref, int] = {graph.output: 0}
    grad_bytes: list[tuple[int, str]] = [_grad(graph, graph.output)]
    grad_refs = [1]

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

    for node in reversed(graph.nodes):
        incoming = [grad_of.pop(ref) for ref in node.outputs]
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
            meter.add(node.pending_category, -2 * node.settled_grad_bytes)
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


def _grad(graph: Tape, ref: Ref) -> tuple[int, str]:
    """Bytes and category of a tensor's gradient."""
    tensor = graph.tensors[ref]
    return tensor.n_grad_bytes, "logits_loss" if tensor.category == "logits_loss" else TEMPORARIES
