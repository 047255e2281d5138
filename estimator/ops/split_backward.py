"""A backward pass in two: first the gradients of inputs, later those of weights (Qi et al. 2023, section 2).

Linear layers, experts among them, leave what they have saved and the gradients of their outputs for the second pass, as in
``runtime.parallel.late``; everything else is done in the first, and so are the vocabulary's logits, which are too large to wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from estimator.ops.cost import SplitBackward
from estimator.ops.liveness import KEPT_GRADS, WRITTEN, Held, Meter, backward_pass, kept_of
from estimator.ops.operator import Op
from estimator.ops.tape import Tape


def split_backward(graph: Tape, recompute: str) -> SplitBackward:
    """The backward pass of a unit that does ``recompute``, in two."""
    regions, kept = kept_of(graph, recompute)
    held: list[Held] = []
    meter = Meter()
    backward_pass(graph, kept, recompute, regions, meter, held)
    inputs: list[Op] = []
    for node in reversed(graph.nodes):
        inputs += node.backward if node.late is None else node.late.inputs
    weights = tuple(op for one in held for op in one.late.weights)
    later = Meter()
    play_weights(graph, held, later)
    return SplitBackward(tuple(inputs), weights, meter.memory(), later.memory())


def play_weights(graph: Tape, held: list[Held], meter: Meter) -> None:
    """The second pass: products one after another, each of which lets go of what nobody else needs."""
    holders: Counter[Hashable] = Counter(name for one in held for name, _, _ in one.things)
    for one in held:
        meter.look(one.late.weights_temp_bytes)
        if graph.param_grads == "kept":
            meter.add(KEPT_GRADS, one.late.grad_bytes, WRITTEN)
        for name, category, n_bytes in one.things:
            holders[name] -= 1
            if not holders[name]:
                meter.add(category, -n_bytes, name)
