"""Kernels of Liger-Kernel and NVIDIA Apex, with the signatures of ``functions``.

Written from their public interfaces (``liger_kernel.transformers.functional`` of Liger-Kernel 0.6;
``apex.normalization.fused_layer_norm`` and ``apex.optimizers`` of Apex 25). Untested: neither has been installed where this
was written. A call that does not fit raises there, and the measurement fails; nothing is measured in its place.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from validator.kernels.functions import CONFIG, EPS, Flat, Function


def function(kernel: str, implementation: str) -> Function:
    """The library's function for ``kernel``, one of ``implementation.LIGER`` or ``APEX``."""
    return (_liger if implementation == "liger" else _apex)()[kernel]


def _liger() -> dict[str, Function]:
    """GEGLU is Liger's tanh form, and RMSNorm rounds before the weight, as Llama's does."""
    f: Any = importlib.import_module("liger_kernel.transformers.functional")
    return {
        "swiglu": f.liger_swiglu,
        "geglu": f.liger_geglu,
        "rms_norm": lambda x, weight: f.liger_rms_norm(x, weight, EPS),
        "layer_norm": lambda x, weight, bias: f.liger_layer_norm(x, weight, bias, EPS),
        "add_rms_norm": lambda x, residual, weight: f.liger_fused_add_rms_norm(x, residual, weight, EPS),
        "rotary": _liger_rotary(f),
        "cross_entropy": lambda logits, labels: f.liger_cross_entropy(logits, labels),
        "linear_cross_entropy": lambda h, weight, labels: f.liger_fused_linear_cross_entropy(h, weight, labels),
    }


def _liger_rotary(f: Any) -> Function:
    """Liger turns queries and keys together, ``[B, heads, S, D]`` with tables ``[1, S, D]``: here all of ``x`` and one head more."""
    prepared: list[tuple[Tensor, Tensor, Tensor]] = []

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not prepared:
            key = torch.zeros_like(x[:, :, :1].detach()).transpose(1, 2)
            prepared.append((key, torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]))
        key, wide_cos, wide_sin = prepared[0]
        return f.liger_rope(x.transpose(1, 2), key, wide_cos, wide_sin)[0].transpose(1, 2)

    return rotate


def _apex() -> dict[str, Function]:
    norms: Any = importlib.import_module("apex.normalization.fused_layer_norm")
    return {
        "rms_norm": lambda x, weight: norms.fused_rms_norm_affine(x, weight, weight.shape, EPS),
        "layer_norm": lambda x, weight, bias: norms.fused_layer_norm_affine(x, weight, bias, weight.shape, EPS),
        "adamw": _apex_adam,
        "optimizer_step": _apex_adam,
    }


def _apex_adam(flat: Flat) -> Function:
    """``FusedAdam`` with fp32 masters of its own; ``capturable`` is the form that takes a factor on the gradients from the
    device (here 1), as ours does."""
    optimizers: Any = importlib.import_module("apex.optimizers")
    param = torch.nn.Parameter(flat.master if flat.target is None else flat.target)
    param.grad = flat.grads
    optimizer = optimizers.FusedAdam(
        [param], lr=CONFIG.lr, betas=CONFIG.betas, eps=CONFIG.eps, adam_w_mode=True, weight_decay=CONFIG.weight_decay,
        capturable=True, master_weights=flat.target is not None,
    )  # fmt: skip
    return optimizer.step
