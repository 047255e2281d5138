"""Autograd nodes of the operators that a kernel of the runtime does: what each keeps and needs beside its result.

Bytes, FLOPs and launches come from ``estimator.ops.kernels``; operands count as aligned to 16 bytes, as the runtime's are.
"""

from __future__ import annotations

from estimator.ops.kernels import activation, cross_entropy, linear_cross_entropy, norm, rotary
from estimator.ops.tape import Node, Ref, Tape

_LOSS = "logits_loss"


def norm_node(t: Tape, x: Ref, residual: Ref | None, rows: int, width: int, *, rms: bool, bias: bool) -> Node:
    """``rms_norm``, ``layer_norm``; with ``residual`` the norm of ``residual + x`` and that sum, both results.

    Kept: what was normalised, and one (LayerNorm: two) fp32 per row. Backward has fp32 partial rows of the weights'
    gradients beside the one gradient that both inputs share.
    """
    w = t.width
    n_partial = norm.partial_rows(rows, width, w, t.chip)
    call = norm.NormCall(rows, width, t.dtype, w, rms, bias, residual is not None, n_partial=n_partial)
    forward, backward = norm.cost(call)
    y = t.tensor(rows * width * w)
    summed = () if residual is None else (t.tensor(rows * width * w),)
    n_params = 2 if bias else 1
    return Node(
        (x,) if residual is None else (x, residual),
        (y, *summed),
        forward=(forward,),
        backward=(backward,),
        saves=summed or (x,),
        aux=(t.tensor(rows * 4 * (1 if rms else 2), grad=False),),
        backward_temp_bytes=n_params * n_partial * width * 4,
        param_grad_bytes=n_params * width * w,
        one_grad=True,
        saves_after=True,
        remakes="norms",
        remake=norm.cost(call._replace(residual=False))[:1],
    )


def activation_node(t: Tape, inputs: tuple[Ref, ...], width: int, name: str, *, bias: bool = False) -> Node:
    """``activate`` (one input, perhaps with a bias) and ``gated_activate`` (gate, up): they keep their inputs and compute the
    activation again. Backward has fp32 partial rows of the bias's gradient."""
    n_partial = activation.partial_rows(t.rows, width, t.width, t.chip) if bias else 0
    forward, backward = activation.cost(
        name, t.rows * width, t.dtype, t.width, gated=len(inputs) == 2, bias=width if bias else 0, n_partial=n_partial
    )
    return Node(
        inputs,
        (t.activation(width),),
        forward=(forward,),
        backward=(backward,),
        saves=inputs,
        backward_temp_bytes=4 * width * n_partial,
        param_grad_bytes=width * t.width if bias else 0,
        saves_after=True,
        remakes="activation",
        makes_all_grads=True,
    )


def rotary_node(t: Tape, x: Ref, shape: tuple[int, int, int, int], rotary_dim: int) -> Node:
    """``rotate`` of ``shape`` ``[B, S, H, D]``: keeps nothing but the shared tables."""
    forward, backward = rotary.cost(shape, rotary_dim, t.dtype, t.width, in_place=False)
    return Node((x,), (t.activation(shape[2] * shape[3]),), forward=(forward,), backward=(backward,), saves_after=True)


def cross_entropy_node(t: Tape, logits: Ref, vocab_size: int) -> Node:
    """``cross_entropy``: keeps the logits and two fp32 per row, and writes the gradient over the logits."""
    forward, backward = cross_entropy.cost(t.rows, vocab_size, t.dtype, t.width)
    row_bytes = 4 * t.rows
    return Node(
        (logits,),
        (t.tensor(4, _LOSS),),
        forward=(forward,),
        backward=(backward,),
        saves=(logits,),
        aux=(t.tensor(2 * row_bytes, _LOSS, grad=False),),
        forward_temp_bytes=row_bytes,
        temp_category=_LOSS,
        kept_grads=_LOSS,
        saves_after=True,
    )


def linear_cross_entropy_node(
    t: Tape, h: Ref, width: int, vocab_size: int, *, bias: bool, pending: bool, factor_is_one: bool
) -> Node:
    """``linear_cross_entropy``: logits of some rows at a time, all gradients in the forward pass, kept for backward."""
    w, shape = t.width, (t.rows, width, vocab_size)
    if t.frozen:
        return _frozen_linear_cross_entropy(t, h, shape, factor_is_one=factor_is_one, bias=bias)
    forward, backward = linear_cross_entropy.cost(shape, t.dtype, w, bias=bias, factor_is_one=factor_is_one)
    stride = linear_cross_entropy.logits_stride(vocab_size, w)
    chunk_rows = min(t.rows, linear_cross_entropy.default_chunk_rows(*shape))
    weight_bytes, sums_bytes = vocab_size * width * w, 4 * vocab_size if bias else 0
    bias_bytes = vocab_size * w if bias else 0
    kept = t.tensor(t.rows * width * w + weight_bytes + sums_bytes, _LOSS, grad=False)
    return Node(
        (h,),
        (t.tensor(4, _LOSS),),
        forward=tuple(forward),
        backward=(*backward, t.accumulate_grad(weight_bytes // w)),
        aux=(kept,),
        forward_temp_bytes=chunk_rows * stride * w + 4 * t.rows,
        backward_temp_bytes=8 if t.dtype == "fp16" else 0,  # what is left of the gradients' factor
        temp_category=_LOSS,
        param_grad_bytes=bias_bytes if pending else weight_bytes + bias_bytes,
        pending_grad_bytes=weight_bytes if pending else 0,
        pending_category=_LOSS,
        kept_grads=_LOSS,
        saves_after=True,
    )


def _frozen_linear_cross_entropy(
    t: Tape, h: Ref, shape: tuple[int, int, int], *, bias: bool, factor_is_one: bool
) -> Node:
    """The same with weights that have no gradients: the hidden states' gradient alone is made and kept."""
    forward, backward = linear_cross_entropy.cost(
        shape, t.dtype, t.width, bias=bias, factor_is_one=factor_is_one, of_weights=False
    )
    n_rows, width, vocab_size = shape
    stride = linear_cross_entropy.logits_stride(vocab_size, t.width)
    chunk_rows = min(n_rows, linear_cross_entropy.default_chunk_rows(*shape))
    return Node(
        (h,),
        (t.tensor(4, _LOSS),),
        forward=tuple(forward),
        backward=tuple(backward),
        aux=(t.tensor(n_rows * width * t.width, _LOSS, grad=False),),
        forward_temp_bytes=chunk_rows * stride * t.width + 4 * n_rows,
        backward_temp_bytes=8 if t.dtype == "fp16" else 0,
        temp_category=_LOSS,
        kept_grads=_LOSS,
        saves_after=True,
    )
