"""The output layer and the loss as Megatron-LM runs them with Transformer Engine's cross-entropy.

Logits exist once, in the activations' dtype: the loss's kernel writes their gradient over them
(``transformer_engine/common/triton/cross_entropy.py``). The output layer's product adds to the buffer of gradients itself
(``megatron/core/tensor_parallel/layers.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from estimator.ops.operator import Op
from estimator.ops.tape import Node, Ref

if TYPE_CHECKING:
    from estimator.ops.graph import Graph

_LOSS = "logits_loss"
_ROW_STATISTICS = 3
"""fp32 numbers of a row that tensor-parallel ranks exchange: maximum, sum and the label's logit."""


def in_place_loss(
    g: Graph, h: Ref, width: int, vocab_size: int, between: Callable[[Ref], Ref] = lambda logits: logits
) -> Ref:
    """Projection of ``h`` to this rank's part of the vocabulary, and mean cross-entropy of what ``between`` makes of it."""
    m, w, held = g.rows, g.width, g.share(vocab_size)
    full_bytes = m * width * w
    flops, n_bytes = 2.0 * m * width * held, (m * width + width * held + m * held) * w
    n_logits = m * held
    with g.call(h):
        logits = g.record(
            Node(
                (h,),
                (g.tensor(n_logits * w, _LOSS),),
                forward=(
                    *g.gathered(full_bytes),
                    Op("head", "matmul", False, g.dtype, flops, n_bytes, (1, m, held, width)),
                ),
                backward=(
                    *g.gathered(full_bytes, backward=True, beside=1),
                    Op("head_grad_input", "matmul", True, g.dtype, flops, n_bytes, (1, m, width, held)),
                    *g.summed(full_bytes, backward=True, beside=1),
                    Op("head_grad_weight", "matmul", True, g.dtype, flops, n_bytes, (1, held, width, m)),
                ),
                saves=(h,),
                backward_temp_bytes=full_bytes if g.splits_tokens else 0,
                saves_after=True,
            )
        )
        logits = between(logits)
        exchanged = g.statistics(_ROW_STATISTICS * 4 * m)
        return g.record(
            Node(
                (logits,),
                (g.tensor(4, _LOSS),),
                forward=(g.elementwise("cross_entropy", 3 * n_logits * w, 8 * n_logits, kind="loss"), *exchanged),
                backward=(g.elementwise("cross_entropy_backward", 2 * n_logits * w, n_logits, True, kind="loss"),),
                saves=(logits,),
                aux=(g.tensor(4 * m, _LOSS, grad=False),),
                forward_temp_bytes=_ROW_STATISTICS * 4 * m * (1 + g.n_tensor),
                temp_category=_LOSS,
                kept_grads=_LOSS,
                saves_after=True,
            )
        )
