"""A mixture of experts as operators: mirrors ``runtime.models.experts`` statement by statement.

Rows go to slots, expert by expert, whose number depends on tokens and choices only (``Experts.slots``). Matrix products are
counted with the experts' rows split evenly; where no expert is idle that is what they add up to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from estimator.job.experts import Experts
from estimator.job.model import ModelSpec
from estimator.ops.exchange import ExpertRanks, to_experts, to_tokens
from estimator.ops.graph import Graph
from estimator.ops.operator import Op
from estimator.ops.products import FP8_MULTIPLE, Numel, Products, with_casts
from estimator.ops.tape import Late, Node, Ref, part_of_block

INDEX_BYTES = 8
"""Of a slot's or an expert's number."""


@part_of_block("mlp")
def expert_mlp(
    g: Graph, spec: ModelSpec, experts: Experts, h: Ref, dense: Callable[[Graph, ModelSpec, Ref], Ref],
    ranks: ExpertRanks,
) -> Ref:  # fmt: skip
    """``ExpertMlp``, whose experts ``ranks`` share. ``dense`` records a shared MLP of ``spec.d_ff``."""
    d = spec.d_model
    with g.call(h):
        y = _routed(g, spec, experts, h, ranks)
        if not experts.shared_d_ff:
            return y
        shared = dense(g, replace(spec, d_ff=experts.shared_d_ff), h)
        if experts.shared_gate:
            gate = g.stream_linear(h, d, 1, bias=False)
            with g.of_rows(g.stream_rows):
                shared = _gated(g, shared, _sigmoid(g, gate), d)
        return g.add(y, shared, d)


def _routed(g: Graph, spec: ModelSpec, experts: Experts, h: Ref, ranks: ExpertRanks) -> Ref:
    """Tensor-parallel ranks choose for their own tokens; each computes a part of every expert's channels for all tokens."""
    d = spec.d_model
    logits = g.stream_linear(h, d, experts.n_experts, bias=experts.router_bias)
    weights, chosen = _route(g, g.enter(logits, experts.n_experts), experts)
    g.sum_input_gradient(experts.n_experts)
    rows, slot = _dispatch(g, g.enter(h, d), d, experts)
    g.sum_input_gradient(d)
    with g.call(weights, chosen, slot):
        if ranks.size > 1:
            rows = to_experts(g, rows, d, experts, ranks)
        out = _expert_mlps(g, spec, experts, rows, ranks)
        if ranks.size > 1:
            out = to_tokens(g, out, d, experts, ranks)
        return g.leave(_combine(g, out, weights, slot, d, experts), d)


def _expert_mlps(g: Graph, spec: ModelSpec, experts: Experts, rows: Ref, ranks: ExpertRanks) -> Ref:
    d, f = spec.d_model, g.share(experts.d_ff)
    some = _Some(experts, experts.n_experts // ranks.size, g.rows)
    with g.call(rows), g.of_rows(ranks.rows(experts, g.rows)):
        gate = _grouped_linear(g, rows, d, f, some)
        up = _grouped_linear(g, rows, d, f, some, input_is_cast=g.style.joined_columns)
        if experts.clamp and g.style.own:
            inner = _clamped(g, gate, up, f)
        else:
            inner = g.gated_activate(gate, up, f, spec.activation)
        return _grouped_linear(g, inner, f, d, some)


def _clamped(g: Graph, gate: Ref, up: Ref, width: int) -> Ref:
    """``runtime.clamped``: statement by statement in plain torch."""
    numel = g.rows * width
    n_bytes = numel * g.width
    return g.record(
        Node(
            (gate, up),
            (g.activation(width),),
            forward=(g.elementwise("clamped_activation", 16 * n_bytes, 7 * numel)._replace(launches=7),),
            backward=(
                g.elementwise("clamped_activation_backward", 46 * n_bytes, 18 * numel, True)._replace(launches=18),
            ),
            saves=(gate, up),
            forward_temp_bytes=n_bytes,
            backward_temp_bytes=n_bytes + numel,
            saves_after=True,
            remakes="activation",
        )
    )


class _Some(NamedTuple):
    """The experts of one rank, and how many tokens each rank has."""

    of: Experts
    n_experts: int
    n_tokens: int


def _route(g: Graph, logits: Ref, experts: Experts) -> tuple[Ref, Ref]:
    """``route``: keeps fp32 scores and the chosen experts' numbers."""
    n, k = g.rows * experts.n_experts, g.rows * experts.per_token
    scores, chosen = g.tensor(4 * n, grad=False), g.tensor(INDEX_BYTES * k, grad=False)
    low = g.dtype != "fp32"
    masks = experts.selection_bias + (experts.n_groups > 1)
    node = Node(
        (logits,),
        (g.tensor(k * g.width),),
        forward=(_traffic(g, "route", (g.width + 8) * n + 16 * k, launches=8),),
        backward=(_traffic(g, "route_backward", 16 * n + 16 * k, backward=True, launches=8),),
        aux=(scores, chosen),
        forward_temp_bytes=4 * n * max(low, masks),
        backward_temp_bytes=4 * n * (1 + low),
        saves_after=True,
    )
    return g.record(node), chosen


def _dispatch(g: Graph, h: Ref, width: int, experts: Experts) -> tuple[Ref, Ref]:
    """``plan_of`` and ``dispatch``: keeps where each choice lies. What planning needs besides is less than the slots."""
    n_bytes, k = g.rows * width * g.width, experts.per_token
    slot_bytes = experts.slots(g.rows) * width * g.width
    slot = g.tensor(INDEX_BYTES * g.rows * k, grad=False)
    node = Node(
        (h,),
        (g.tensor(slot_bytes),),
        forward=(
            _traffic(g, "plan_slots", 8 * INDEX_BYTES * g.rows * k, launches=10),
            _traffic(g, "dispatch", k * n_bytes + slot_bytes, launches=k),
        ),
        backward=(_traffic(g, "dispatch_backward", (3 * k - 1) * n_bytes, backward=True, launches=2 * k - 1),),
        aux=(slot,),
        backward_temp_bytes=n_bytes if k > 1 else 0,
        saves_after=True,
    )
    return g.record(node), slot


def _combine(g: Graph, rows: Ref, weights: Ref, slot: Ref, width: int, experts: Experts) -> Ref:
    """``combine``: keeps the rows, their weights and where they lie."""
    n_bytes, k = g.rows * width * g.width, experts.per_token
    return g.record(
        Node(
            (rows, weights),
            (g.activation(width),),
            forward=(_traffic(g, "combine", (7 * k - 3) * n_bytes, launches=3 * k - 1),),
            backward=(_traffic(g, "combine_backward", 9 * k * n_bytes, backward=True, launches=5 * k),),
            saves=(weights, slot) if g.style.weights_in_experts else (rows, weights, slot),
            forward_temp_bytes=n_bytes if k > 1 else 0,
            backward_temp_bytes=n_bytes,
            saves_after=True,
        )
    )


def _grouped_linear(g: Graph, x: Ref, n_in: int, n_out: int, experts: _Some, *, input_is_cast: bool = False) -> Ref:
    """``grouped_linear`` of all slots; ``input_is_cast``: in fp8 another product has its input already. What capacity leaves empty is computed too, but is no work of the model's; nor is what a
    rank has more than its share of."""
    w, capacity = g.width, experts.of.capacity(experts.n_tokens)
    used = g.rows - 1 if capacity else g.rows
    groups = min(experts.n_experts, used)
    m = -(-used // groups)
    useful = min(1.0, experts.n_tokens * experts.of.per_token / used)
    flops = 2.0 * used * n_in * n_out
    n_bytes = (used * (n_in + n_out) + groups * n_in * n_out) * w
    launches = 1 if capacity else experts.n_experts
    fresh = 0 if g.style.fused_wgrad else n_in
    grad_numel = experts.n_experts * (fresh * n_out + (n_out if experts.of.bias else 0))

    is_fp8 = g.style.fp8 == "te" and n_in % FP8_MULTIPLE == n_out % FP8_MULTIPLE == 0
    dtype = "fp8" if is_fp8 else g.dtype

    def product(name: str, backward: bool, n_bytes: int, *shape: int) -> tuple[Op, ...]:
        return (Op(name, "matmul", backward, dtype, flops, n_bytes, (groups, *shape), launches, useful),)

    n = Numel(used * n_in, groups * n_in * n_out, used * n_out)
    moved = [n_bytes] * 3
    if is_fp8:
        moved = [sum(n) + (w - 1) * written for written in (n.y, n.x, n.weight)]
    p = Products(
        product("grouped", False, moved[0], m, n_out, n_in),
        product("grouped_dgrad", True, moved[1], m, n_in, n_out),
        product("grouped_wgrad", True, moved[2], n_out, n_in, m),
    )
    if is_fp8:
        p = with_casts(g, n, p, input_is_cast=input_is_cast)
    of_weights = (*p.weight_grad, *g.accumulated(grad_numel))
    return g.record(
        Node(
            (x,),
            (g.activation(n_out),),
            forward=p.forward,
            backward=(*p.input_grad, *of_weights),
            saves=() if is_fp8 else (x,),
            aux=(g.tensor(p.kept_bytes, grad=False),) if p.kept_bytes else (),
            forward_temp_bytes=p.forward_temp_bytes,
            backward_temp_bytes=p.backward_temp_bytes,
            param_grad_bytes=grad_numel * w,
            saves_after=True,
            late=Late(p.input_grad, of_weights, grad_numel * w, grad_numel * w),
        )
    )


def _sigmoid(g: Graph, x: Ref) -> Ref:
    n_bytes = g.rows * g.width
    out = g.activation(1)
    return g.record(
        Node(
            (x,),
            (out,),
            forward=(_traffic(g, "sigmoid", 2 * n_bytes),),
            backward=(_traffic(g, "sigmoid_backward", 3 * n_bytes, backward=True),),
            saves=(out,),
        )
    )


def _gated(g: Graph, x: Ref, gate: Ref, width: int) -> Ref:
    """Rows of ``x`` times one number each."""
    n_bytes = g.rows * width * g.width
    return g.record(
        Node(
            (x, gate),
            (g.activation(width),),
            forward=(_traffic(g, "scale_rows", 2 * n_bytes),),
            backward=(_traffic(g, "scale_rows_backward", 5 * n_bytes, backward=True, launches=3),),
            saves=(x, gate),
            backward_temp_bytes=n_bytes,
        )
    )


def _traffic(g: Graph, name: str, n_bytes: int, *, backward: bool = False, launches: int = 1) -> Op:
    return Op(name, "elementwise", backward, g.dtype, 0.0, n_bytes, launches=launches)
