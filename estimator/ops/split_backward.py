"""A backward pass in two: first the gradients of inputs, later those of weights (Qi et al. 2023, section 2).

Of a linear layer the first pass leaves the input and the gradient of the output for the second; everything else is done in the
first. No runtime of this project does so: the bytes are derived, not checked against a meter.
"""

from __future__ import annotations

from estimator.ops.cost import PassMemory, SplitBackward, UnitCost
from estimator.ops.operator import Op
from estimator.ops.tape import TEMPORARIES, Tape

_OF_WEIGHTS = frozenset(("linear_wgrad", "accumulate_grad", "bias_grad"))


def split_backward(graph: Tape, cost: UnitCost) -> SplitBackward:
    """``cost``'s backward pass, which was derived from ``graph``, in two."""
    linears = [node for node in graph.nodes if any(op.name == "linear_wgrad" for op in node.backward)]
    kept: dict[str, int] = {}
    for ref in {ref for node in linears for ref in node.saves}:
        kept[graph.tensors[ref].category] = kept.get(graph.tensors[ref].category, 0) + graph.tensors[ref].n_bytes
    grad_bytes = sum(graph.tensors[ref].n_grad_bytes for node in linears for ref in node.outputs)
    if grad_bytes:
        kept[TEMPORARIES] = kept.get(TEMPORARIES, 0) + grad_bytes
    whole = cost.backward_memory
    after = _sum(whole.after, kept)
    peak = max(_sum(whole.peak, {TEMPORARIES: grad_bytes}), after, key=lambda held: sum(held.values()))
    largest = max((node.param_grad_bytes for node in linears), default=0)
    inputs = PassMemory(peak, after, _sum(whole.category_peak, {TEMPORARIES: grad_bytes}))
    weights = PassMemory({TEMPORARIES: largest}, {name: -n for name, n in kept.items()}, {TEMPORARIES: largest})
    return SplitBackward(_without(cost.backward, True), _without(cost.backward, False), inputs, weights)


def _without(ops: tuple[Op, ...], of_weights: bool) -> tuple[Op, ...]:
    return tuple(op for op in ops if (op.name in _OF_WEIGHTS) != of_weights)


def _sum(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in (*a, *(set(b) - set(a)))}
