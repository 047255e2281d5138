"""What is timed: for every kernel of the table the function of each implementation, all of one signature.

Shapes: R rows, W width. ``gelu(x)``, ``swiglu(gate, up)``, ``rms_norm(x, weight)``, ``layer_norm(x, weight, bias)``,
``add_rms_norm(x, residual, weight)`` and ``add_layer_norm(x, residual, weight, bias)`` (norm and sum), ``rotary(x, cos, sin)``,
``cross_entropy(logits, labels)``, ``linear_cross_entropy(h, weight, labels)``, ``dropout_add(x, residual)``,
``flatten`` and ``unflatten(small, slices, bucket)``, ``grad_norm(grads)``, ``quantize_int8(x)``, ``dequantize_int8(stored, dtype)``.
For optimizers the function takes a ``Flat`` and returns the call that takes one step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import InputError
from estimator.schedule.buffers import UPDATE_CHUNK_NUMEL
from runtime.kernels.activation import activate, activate_reference, gated_activate, gated_activate_reference
from runtime.kernels.bucket import flatten, unflatten
from runtime.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from runtime.kernels.dropout import dropout_residual
from runtime.kernels.grad_norm import squares
from runtime.kernels.lamb import lamb_step
from runtime.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from runtime.kernels.norm import (
    add_layer_norm,
    add_layer_norm_reference,
    add_rms_norm,
    add_rms_norm_reference,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from runtime.kernels.optimizer import optimizer_step
from runtime.kernels.quantize import dequantize_sum, quantize
from runtime.kernels.rotary import rotate, rotate_reference
from runtime.kernels.rules import Adagrad, Adam, Control, Lamb, Lion, Rule, Sgd
from runtime.optimizer import OptimizerConfig, Shard, step_shard, update
from validator.kernels.table import QUANTIZED

EPS = 1e-5
DROPPED = 0.1
CONFIG = OptimizerConfig()
RULES: dict[str, Rule] = {
    "adamw": Adam(), "optimizer_step": Adam(), "adamw8": Adam(), "sgd": Sgd(weight_decay=CONFIG.weight_decay),
    "lion": Lion(), "adagrad": Adagrad(), "lamb": Lamb(),
}  # fmt: skip
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "squared_relu": "relu_squared"}
GATES = {"swiglu": "silu", "geglu": "gelu"}

Function = Callable[..., Any]


class Flat(NamedTuple):
    """Operands of an optimizer step, all of one length."""

    rule: Rule
    master: Tensor
    """fp32"""
    grads: Tensor
    states: list[Any]
    """fp32, or ``Blockwise8``"""
    target: Tensor | None
    """Where the new parameters go in the gradients' 16-bit dtype; ``None``: ``master`` is the parameter itself."""
    step: Tensor
    """fp32 ``[1]``"""
    factor: Tensor | None
    """fp32 ``[1]`` that multiplies the gradients; ``None``: 1"""

    @property
    def control(self) -> Control:
        return Control(lr=CONFIG.lr, step=self.step, factor=self.factor)


def function(kernel: str, implementation: str) -> Function:
    """The function to time. Raises ``InputError`` where there is none."""
    if implementation in ("liger", "apex"):
        from validator.kernels import libraries

        return libraries.function(kernel, implementation)
    found = {"cuda": OURS, "torch": TORCH, "fused": FUSED, "compile": EXPRESSIONS}[implementation].get(kernel)
    if found is None:
        raise InputError(f"kernel {kernel!r} has no implementation {implementation!r}")
    return found if implementation != "compile" else compiled(found) if kernel not in RULES else found


def compiled(expression: Function) -> Function:
    """``torch.compile`` in its default mode, anew for every case: sizes are constants, and it is one graph or an error."""
    torch._dynamo.reset()
    return torch.compile(expression, fullgraph=True, dynamic=False)


# ---- the runtime's: eager, and its kernels ---------------------------------------------------------------------------


def _torch_step(kind: str, flat: Flat) -> Function:
    """As ``runtime.executor`` steps a group without the kernel."""
    low = flat.target is not None
    temp = torch.empty(min(flat.master.numel(), UPDATE_CHUNK_NUMEL), device=flat.master.device) if low else None
    shard = Shard(master=flat.master, grads=flat.grads, states=flat.states, target=flat.target, temp=temp)
    return lambda: step_shard(kind, CONFIG, CONFIG.lr, flat.step, flat.factor, shard)  # type: ignore[arg-type]


def _torch_adamw(flat: Flat) -> Function:
    return lambda: update("adamw", CONFIG, CONFIG.lr, flat.step, flat.master, flat.grads, flat.states)


def _our_step(flat: Flat) -> Function:
    step: Function = lamb_step if isinstance(flat.rule, Lamb) else optimizer_step
    copies, states, control = None if flat.target is None else [flat.target], [[s] for s in flat.states], flat.control
    return lambda: step(flat.rule, [flat.master], [flat.grads], states, control, copies)


def _with(function: Function, last: Any) -> Function:
    """``function`` with a last argument that is no operand."""
    return lambda *operands: function(*operands, last)


TORCH: dict[str, Function] = {
    "flatten": lambda small, slices, bucket: torch._foreach_copy_(slices, small),
    "unflatten": lambda small, slices, bucket: torch._foreach_copy_(small, slices),
    **{kernel: _with(activate_reference, name) for kernel, name in ACTIVATIONS.items()},
    **{kernel: _with(gated_activate_reference, name) for kernel, name in GATES.items()},
    "rms_norm": _with(rms_norm_reference, EPS),
    "layer_norm": _with(layer_norm_reference, EPS),
    "add_rms_norm": _with(add_rms_norm_reference, EPS),
    "add_layer_norm": _with(add_layer_norm_reference, EPS),
    "rotary": rotate_reference,
    "cross_entropy": cross_entropy_reference,
    "linear_cross_entropy": lambda h, weight, labels: linear_cross_entropy_reference(h, weight, None, labels),
    "dropout_add": lambda x, residual: residual + F.dropout(x, DROPPED),
    "adamw": _torch_adamw,
    "optimizer_step": partial(_torch_step, "adamw"),
    "sgd": partial(_torch_step, "sgd"),
    "grad_norm": lambda grads: torch.linalg.vector_norm(grads[0], dtype=torch.float32),
}

OURS: dict[str, Function] = {
    "flatten": lambda small, slices, bucket: flatten(small, bucket),
    "unflatten": lambda small, slices, bucket: unflatten(bucket, small),
    **{kernel: _with(activate, name) for kernel, name in ACTIVATIONS.items()},
    **{kernel: _with(gated_activate, name) for kernel, name in GATES.items()},
    "rms_norm": _with(rms_norm, EPS),
    "layer_norm": _with(layer_norm, EPS),
    "add_rms_norm": _with(add_rms_norm, EPS),
    "add_layer_norm": _with(add_layer_norm, EPS),
    "rotary": rotate,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": lambda h, weight, labels: linear_cross_entropy(h, weight, None, labels),
    "dropout_add": _with(dropout_residual, DROPPED),
    **dict.fromkeys(RULES, _our_step),
    "grad_norm": squares,
    "quantize_int8": lambda x: quantize(x, *QUANTIZED),
    "dequantize_int8": dequantize_sum,
}

# ---- torch's own operators -------------------------------------------------------------------------------------------


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _after_adding(norm: Function) -> Function:
    def both(x: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(total, *rest), total

    return both


def _torch_in_chunks(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(h, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def _fused_step(flat: Flat) -> Function:
    """Gradients widened, torch's fused step (which unscales and so clips them on the way), parameters written back."""
    low, states, rule = flat.target is not None, flat.states, flat.rule
    wide = torch.empty_like(flat.master) if low else flat.grads
    scale = None if flat.factor is None else 1 / flat.factor
    lists, common = ([flat.master], [wide]), {"lr": CONFIG.lr, "maximize": False, "grad_scale": scale}
    step: Any
    if isinstance(rule, Adam):
        moments: Any = ([states[0]], [states[1]], [], [flat.step])
        more: dict[str, Any] = {"beta1": rule.betas[0], "beta2": rule.betas[1], "eps": rule.eps, "amsgrad": False}
        step = partial(torch._fused_adamw_, *lists, *moments, **more, weight_decay=rule.weight_decay, **common)  # type: ignore[call-overload]
    elif isinstance(rule, Sgd):
        more = {"momentum": rule.momentum, "dampening": 0.0, "nesterov": False, "is_first_step": False}
        step = partial(torch._fused_sgd_, *lists, states, **more, weight_decay=rule.weight_decay, **common)  # type: ignore[call-overload]
    else:
        assert isinstance(rule, Adagrad)
        more = {"lr_decay": 0.0, "eps": rule.eps, "weight_decay": rule.weight_decay}
        step = partial(torch._fused_adagrad_, *lists, states, [flat.step], **more, **common)

    @torch.no_grad()
    def call() -> None:
        if low:
            wide.copy_(flat.grads)
        step()
        if flat.target is not None:
            flat.target.copy_(flat.master)

    return call


FUSED: dict[str, Function] = {
    "rms_norm": _rms,
    "layer_norm": _layer,
    "add_rms_norm": _after_adding(_rms),
    "add_layer_norm": _after_adding(_layer),
    "cross_entropy": F.cross_entropy,
    "linear_cross_entropy": _torch_in_chunks,
    **dict.fromkeys(("optimizer_step", "sgd", "adagrad"), _fused_step),
    "grad_norm": lambda grads: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32))),
}

# ---- expressions for torch.compile ----------------------------------------------------------------------------------


def _rms_expression(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.float()).to(x.dtype)


def _rotary_expression(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None, :].float(), sin[:, None, :].float()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _activation_expression(name: str) -> Function:
    if name == "relu_squared":
        return lambda x: F.relu(x).square()
    return partial(F.gelu, approximate="tanh" if name == "gelu_tanh" else "none")


def _compiled_step(flat: Flat) -> Function:
    """The rule in plain torch, in place."""
    control = flat.control

    def expression(master: Tensor, grads: Tensor, states: list[Tensor], target: Tensor | None) -> None:
        wide = grads.float() if control.factor is None else grads.float() * control.factor
        new, new_states = flat.rule.stepped(master, wide, states, control)
        master.copy_(new)
        for state, value in zip(states, new_states, strict=True):
            state.copy_(value)
        if target is not None:
            target.copy_(new)

    step = compiled(torch.no_grad()(expression))
    return lambda: step(flat.master, flat.grads, flat.states, flat.target)


EXPRESSIONS: dict[str, Function] = {
    **{kernel: _activation_expression(name) for kernel, name in ACTIVATIONS.items()},
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "rms_norm": _rms_expression,
    "layer_norm": _layer,
    "add_rms_norm": _after_adding(_rms_expression),
    "add_layer_norm": _after_adding(_layer),
    "rotary": _rotary_expression,
    "cross_entropy": lambda logits, labels: F.cross_entropy(logits.float(), labels),
    "linear_cross_entropy": lambda h, weight, labels: F.cross_entropy(F.linear(h, weight).float(), labels),
    "dropout_add": lambda x, residual: residual + F.dropout(x, DROPPED),
    **dict.fromkeys(("adamw", "optimizer_step", "sgd", "lion", "adagrad", "lamb"), _compiled_step),
    "grad_norm": lambda grads: grads[0].float().square().sum(),
}
