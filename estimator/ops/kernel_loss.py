"""Cross-entropy as flash-attn's kernel computes it, and what a trainer computes of the logits beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.ops.tape import Node, Ref

if TYPE_CHECKING:
    from estimator.ops.graph import Graph

_LOSS = "logits_loss"


def kernel_loss(g: Graph, logits: Ref, vocab_size: int) -> Ref:
    """``flash_attn/losses/cross_entropy.py``, ``inplace_backward=False``: logits are read once, kept with a row's logarithm of sums,
    and read again for a gradient of their own dtype.

    A metric (``Style.logit_metrics``) is ``F.cross_entropy`` of all logits under autocast, without gradients, once the backward pass
    is over: an fp32 copy and its log-probabilities. Its memory is not counted: activations are gone by then.
    """
    n = g.rows * vocab_size
    metric = (
        g.elementwise("metric_to_fp32", (g.width + 4) * n, 0, True, kind="loss"),
        g.elementwise("metric_log_softmax", 8 * n, 5 * n, True, kind="loss"),
    )
    with g.call(logits):
        return g.record(
            Node(
                (logits,),
                (g.tensor(4, _LOSS),),
                forward=(g.elementwise("cross_entropy", g.width * n, 5 * n, kind="loss"),),
                backward=(
                    g.elementwise("cross_entropy_backward", 2 * g.width * n, 3 * n, True, kind="loss"),
                    *metric * g.style.logit_metrics,
                ),
                saves=(logits,),
                aux=(g.tensor(4 * g.rows, _LOSS, grad=False),),
                temp_category=_LOSS,
            )
        )
