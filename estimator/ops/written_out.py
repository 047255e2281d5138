"""Operators that other frameworks write out in several kernels, or do in place: what each keeps, needs and moves.

Statement by statement as in the code that ``estimator.job.framework`` names for each profile.
"""

from __future__ import annotations

from estimator.job.mesh import Span
from estimator.ops.operator import Op
from estimator.ops.tape import Node, Ref, Tape

_LOSS = "logits_loss"


def rms_norm(t: Tape, x: Ref, rows: int, width: int) -> Ref:
    """``LlamaRMSNorm``: ``weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(dtype)``, ``x32`` being ``x`` in fp32."""
    n, w, low = rows * width, t.width, t.dtype != "fp32"
    wide = _cast(t, "norm_to_fp32", x, n, w, 4) if low else x
    with t.call(wide):
        root = t.record(
            Node(
                (wide,),
                (t.tensor(4 * rows),),
                forward=(_norm(t, "mean_square", 12 * n, 2 * n, launches=3),),
                backward=(_norm(t, "mean_square_backward", 24 * n, 3 * n, backward=True, launches=4),),
                saves=(wide,),
                forward_temp_bytes=4 * n,  # squares
                backward_temp_bytes=12 * n,  # the mean's gradient for every element, ``x``, twice ``x``
                saves_after=True,
            )
        )
        t.nodes[-1].saves = (wide, root)
        scaled = t.record(
            Node(
                (wide, root),
                (t.tensor(4 * n),),
                forward=(_norm(t, "normalise", 8 * n, n),),
                backward=(_norm(t, "normalise_backward", 24 * n, 3 * n, backward=True, launches=3),),
                saves=(wide, root),
                backward_temp_bytes=4 * n,  # what is summed over rows
            )
        )
    with t.call(scaled):
        normal = _cast(t, "norm_from_fp32", scaled, n, 4, w) if low else scaled
        return t.record(
            Node(
                (normal,),
                (t.tensor(n * w),),
                forward=(_norm(t, "norm_weight", 2 * n * w, n),),
                backward=(_norm(t, "norm_weight_backward", 6 * n * w, 3 * n, backward=True, launches=3),),
                saves=(normal,),
                backward_temp_bytes=n * w,  # what is summed to the weight's gradient
                param_grad_bytes=width * w,
            )
        )


def _norm(t: Tape, name: str, n_bytes: int, flops: int, *, backward: bool = False, launches: int = 1) -> Op:
    return t.elementwise(name, n_bytes, flops, backward, kind="norm")._replace(launches=launches)


def _cast(t: Tape, name: str, x: Ref, numel: int, source: int, target: int) -> Ref:
    n_bytes = numel * (source + target)
    return t.record(
        Node(
            (x,),
            (t.tensor(numel * target),),
            forward=(t.elementwise(name, n_bytes),),
            backward=(t.elementwise(f"{name}_backward", n_bytes, 0, True),),
        )
    )


def rotary(t: Tape, x: Ref, width: int) -> Ref:
    """``x * cos + rotate_half(x) * sin``: four passes, and a copy with halves exchanged. Only the tables are kept."""
    n_bytes = t.rows * width * t.width
    temps = 2 * n_bytes
    return t.record(
        Node(
            (x,),
            (t.activation(width),),
            forward=(t.elementwise("rotary", 10 * n_bytes, 3 * t.rows * width)._replace(launches=5),),
            backward=(t.elementwise("rotary_backward", 10 * n_bytes, 3 * t.rows * width, True)._replace(launches=5),),
            forward_temp_bytes=temps,
            backward_temp_bytes=temps,
        )
    )


def gated_activation(t: Tape, gate: Ref, up: Ref, width: int, name: str) -> Ref:
    """``activation(gate) * up``: the product keeps both its operands."""
    numel = t.rows * width
    n_bytes = numel * t.width
    acted = t.record(
        Node(
            (gate,),
            (t.activation(width),),
            forward=(t.elementwise("activation", 2 * n_bytes, 8 * numel),),
            backward=(t.elementwise("activation_backward", 3 * n_bytes, 12 * numel, True),),
            saves=(gate,),
        )
    )
    if name == "relu":
        t.nodes[-1].saves = (acted,)
    with t.call(acted):
        return t.record(
            Node(
                (acted, up),
                (t.activation(width),),
                forward=(t.elementwise("gate", 3 * n_bytes, numel),),
                backward=(t.elementwise("gate_backward", 6 * n_bytes, 2 * numel, True)._replace(launches=2),),
                saves=(acted, up),
            )
        )


def dropout(t: Tape, x: Ref, numel: int, *, in_addition: bool = False) -> Ref:
    """Keeps a byte for every element, which says whether it stays. ``in_addition``: one kernel with the addition that follows
    (``bias_dropout_add``), so that the result has no bytes of its own."""
    w = t.width
    y, mask = t.tensor(numel * w), t.tensor(numel, grad=False)
    forward = t.elementwise("dropout", numel if in_addition else (2 * w + 1) * numel, 4 * numel)
    if in_addition:
        t.tensors[y].n_bytes = 0
        forward = forward._replace(launches=0)
    backward = t.elementwise("dropout_backward", (2 * w + 1) * numel, 2 * numel, True)
    return t.record(Node((x,), (y,), forward=(forward,), backward=(backward,), aux=(mask,), saves_after=True))


def cross_entropy_in_place(t: Tape, logits: Ref, held: int) -> Ref:
    """Megatron's: logits of this rank's ``held`` rows of the vocabulary as fp32, of which everything is made in place: minus the
    maximum, exponential, softmax (kept), gradient. Ranks that share the vocabulary exchange every row's maximum, label's logit and sum."""
    n, rows = t.rows * held, t.rows
    if t.dtype != "fp32":
        logits = _cast(t, "logits_to_fp32", logits, n, t.width, 4)
        t.tensors[logits].category = _LOSS
    exchanged = tuple(
        Op("all_reduce", "collective", False, "fp32", 0, 4 * rows, (0,), span=Span(t.n_tensor))
        for _ in range(3 if t.n_tensor > 1 else 0)
    )
    return t.record(
        Node(
            (logits,),
            (t.tensor(4 * rows, _LOSS),),
            forward=(
                t.elementwise("row_maximum", 4 * n, n, kind="loss"),
                *exchanged[:1],
                t.elementwise("softmax_in_place", 28 * n, 6 * n, kind="loss")._replace(launches=10),
                *exchanged[1:],
            ),
            backward=(t.elementwise("cross_entropy_backward", 8 * n, 2 * n, True, kind="loss")._replace(launches=3),),
            saves=(logits,),
            # which labels this rank has (1), and their place in its part (8)
            aux=(t.tensor(9 * rows, _LOSS, grad=False),),
            temp_category=_LOSS,
            forward_temp_bytes=24 * rows,
            kept_grads=_LOSS,
            saves_after=True,
        )
    )
