"""An adapter beside a frozen projection, as ``runtime.models.lora`` computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.job.lora import Lora
from estimator.ops.operator import Op
from estimator.ops.products import products_of
from estimator.ops.tape import Node, Ref, Shared, Tape
from estimator.ops.written_out import dropout

if TYPE_CHECKING:
    from estimator.ops.graph import Graph


def adapt(g: Graph, lora: Lora, x: Ref, base: Ref, n_in: int, n_out: int) -> Ref:
    """``base + scale * B A dropout(x)``: the narrow product is scaled, and the wide one added to ``base`` by the product's kernel.

    Kept: what A multiplies (``x``, or its copy without what was dropped, and a byte per element that says what was), and the
    scaled narrow product.
    """
    with g.call(x, base):
        y = dropout(g, x, g.rows * n_in) if lora.dropout else x
        low = g.linear(y, n_in, lora.rank, bias=False, trained=True)
        if lora.scale != 1:
            low = _scaled(g, low, g.rows * lora.rank)
        return _product_added(g, base, low, lora.rank, n_out)


def _scaled(g: Graph, x: Ref, numel: int) -> Ref:
    n_bytes = 2 * numel * g.width
    return g.record(
        Node(
            (x,),
            (g.tensor(numel * g.width),),
            forward=(g.elementwise("lora_scale", n_bytes, numel),),
            backward=(g.elementwise("lora_scale_backward", n_bytes, numel, True),),
        )
    )


def _product_added(g: Graph, base: Ref, low: Ref, rank: int, n_out: int) -> Ref:
    p, g.n_matmuls = products_of(g, rank, n_out), g.n_matmuls + 1
    numel = rank * n_out
    read: Op = p.forward[0]._replace(name="lora_added", n_bytes=p.forward[0].n_bytes + g.rows * n_out * g.width)
    return g.record(
        Node(
            (base, low),
            (g.activation(n_out),),
            forward=(read,),
            backward=(*p.backward, *g.accumulated(numel)),
            saves=(low,),
            param_grad_bytes=numel * g.width,
            passes_grad=True,
            cached=g.n_matmuls % 2 == 1,
            trained=True,
        )
    )


def hold_batch(tape: Tape, rows: int) -> None:
    """The micro-batch (ids and labels, int64, of ``rows`` tokens), which the unit before has made, lives until the backward pass of
    ``tape``'s unit, the last of all, is over."""
    ids = tape.tensor(2 * 8 * rows, grad=False)
    tape.shared.append(Shared(ids, waits=False))
    first = next(node for node in tape.nodes if node.backward)
    first.inputs, first.saves = (*first.inputs, ids), (*first.saves, ids)
    tape.tensors[ids].last_use = len(tape.nodes) - 1
