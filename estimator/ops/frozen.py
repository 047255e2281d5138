"""What autograd makes of operators where only adapters are trained (``ModelSpec.lora``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from estimator.ops.tape import Node, Tape

_OF_WEIGHTS = frozenset(("linear_wgrad", "accumulate_grad", "bias_grad"))


def freeze(tape: Tape, node: Node) -> None:
    """``node``, of ``tape``, without gradients of its weights; where none of its inputs needs a gradient either, autograd knows nothing
    of it: it keeps nothing, and nothing that comes of it has a gradient."""
    if not node.trained:
        node.param_grad_bytes = node.pending_grad_bytes = node.settled_grad_bytes = 0
        node.late = None
        node.backward = tuple(op for op in node.backward if op.name not in _OF_WEIGHTS)
    missing = [ref for ref in node.inputs if not tape.tensors[ref].n_grad_bytes]
    if node.trained or len(missing) < len(node.inputs):
        if node.makes_all_grads:
            node.backward_temp_bytes += sum(tape.tensors[ref].n_bytes for ref in missing)
        elif len(missing) == 1 and len(node.inputs) == len(node.backward) == 2 and node.saves == node.inputs:
            # a product, each of whose operands is kept for the other's gradient
            node.saves = tuple(missing)
            node.backward = (node.backward[node.inputs.index(missing[0]) ^ 1],)
        return
    node.outputs = (*node.outputs, *node.aux)
    for ref in node.outputs:
        tape.tensors[ref].n_grad_bytes = 0
    node.saves, node.aux, node.backward, node.backward_temp_bytes = (), (), (), 0
    node.passes_grad, node.saves_weight, node.kept_grads, node.remakes = False, False, "", ""
