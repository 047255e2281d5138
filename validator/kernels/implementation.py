"""Whose body of a kernel is timed: this project's own, torch's in several forms, other libraries'.

``torch``    eager operators: what the runtime does where its kernel is switched off, and on CPUs
``cuda``     the kernel of ``runtime.kernels``, which the runtime launches on GPUs
``fused``    torch's own operator for the whole of it (``F.rms_norm``, ``torch._fused_adamw_``, ``torch._foreach_norm``, ...),
             with the passes around it that ours contains
``compile``  ``torch.compile`` of a plain expression, default mode, for the shape at hand
``liger``    Liger-Kernel, ``apex`` NVIDIA Apex, where they are installed
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from estimator.errors import InputError, require_choice
from estimator.job.kernels import KERNELS

IMPLEMENTATIONS = ("cuda", "torch", "fused", "compile", "liger", "apex")
RIVALS = IMPLEMENTATIONS[1:]
"""What our own kernels are held against."""

FAMILIES = {
    "flatten": "bucket",
    "unflatten": "bucket",
    "gelu": "activation",
    "gelu_tanh": "activation",
    "squared_relu": "activation",
    "swiglu": "gated_activation",
    "geglu": "gated_activation",
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "add_layer_norm": "layer_norm",
    "rotary": "rotary",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "dropout_add": "dropout_residual",
    "adamw": "adam",
    "optimizer_step": "adam",
    "adamw8": "adam",
    "sgd": "sgd",
    "lion": "lion",
    "adagrad": "adagrad",
    "lamb": "lamb",
    "grad_norm": "grad_norm",
    "quantize_int8": "quantize",
    "dequantize_int8": "quantize",
}
"""Kernels that ``runtime.kernels`` has, with the name by which it switches them."""
assert set(FAMILIES.values()) <= set(KERNELS)

NOT_IN_TORCH = ("lion", "adagrad", "lamb", "adamw8", "quantize_int8", "dequantize_int8")
"""Kernels for which the runtime has no body of torch's own operators: its reference is there to be right, not to be timed."""
FUSED = (
    "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "cross_entropy", "linear_cross_entropy",
    "optimizer_step", "sgd", "adagrad", "grad_norm",
)  # fmt: skip
COMPILED = (
    "gelu", "gelu_tanh", "squared_relu", "swiglu", "geglu", "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm",
    "rotary", "cross_entropy", "linear_cross_entropy", "dropout_add", "adamw", "optimizer_step", "sgd", "lion", "adagrad", "lamb",
    "grad_norm",
)  # fmt: skip
LIGER = (
    "swiglu", "geglu", "rms_norm", "layer_norm", "add_rms_norm", "rotary", "cross_entropy", "linear_cross_entropy",
)  # fmt: skip
APEX = ("rms_norm", "layer_norm", "adamw", "optimizer_step")

USES_UP = {("cross_entropy", "cuda"), ("linear_cross_entropy", "cuda"), ("linear_cross_entropy", "fused")}
"""Kernel and implementation whose backward pass can run once after a forward pass; ``compile`` and ``liger`` always."""
_EXTENSIONS = {"rms_norm": "fused_layer_norm_cuda", "layer_norm": "fused_layer_norm_cuda"}
"""Modules of Apex's CUDA extensions; its optimizers' is ``amp_C``. A PyPI package of the name apex is something else."""


def missing(kernel: str, implementation: str, device: str) -> str | None:
    """Why ``kernel`` has no such implementation on ``device``, in this process; ``None`` when it has."""
    require_choice("implementation", implementation, IMPLEMENTATIONS)
    why = _missing(kernel, implementation, device)
    return f"implementation is {implementation!r}, {why}" if why else None


def _missing(kernel: str, implementation: str, device: str) -> str | None:
    if implementation == "torch":
        return f"and torch has no such operator as {kernel!r}" if kernel in NOT_IN_TORCH else None
    if implementation in ("cuda", "liger", "apex") and device != "cuda":
        return f"and that needs a GPU, not {device!r}; allowed there: 'torch', 'fused', 'compile'"
    if implementation == "cuda":
        return None if kernel in FAMILIES else f"and the runtime has no such kernel for {kernel!r}; allowed: 'torch'"
    if implementation == "fused":
        if kernel not in FUSED:
            return f"and torch has no operator for the whole of {kernel!r}"
        return None if kernel != "linear_cross_entropy" else _without_linear_cross_entropy()
    if implementation == "compile":
        if kernel not in COMPILED:
            return f"and no expression is compiled for {kernel!r}"
        return _without_compiler(device)
    if kernel not in (LIGER if implementation == "liger" else APEX):
        return f"and the library has nothing for {kernel!r}"
    module = "liger_kernel" if implementation == "liger" else _EXTENSIONS.get(kernel, "amp_C")
    return None if find_spec(module) else f"and {module!r} is not installed"


def _without_linear_cross_entropy() -> str | None:
    import torch

    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        return None
    return f"and torch {torch.__version__} has no F.linear_cross_entropy"


def _without_compiler(device: str) -> str | None:
    """torch.compile makes C++ for CPUs and Triton for GPUs."""
    if device == "cuda":
        return None if find_spec("triton") else "and 'triton' is not installed"
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    return None if any(map(shutil.which, names)) else "and there is no C++ compiler (g++ or clang++)"


def default(kernel: str, device: str) -> str:
    """The implementation that the runtime uses on ``device`` for ``kernel`` in this process."""
    from runtime.kernels import registry

    ours = device == "cuda" and kernel in FAMILIES and registry.enabled(FAMILIES[kernel])
    return "cuda" if ours else "torch"


@contextmanager
def using(kernel: str, implementation: str) -> Iterator[None]:
    """Inside, ``runtime.kernels`` does the work where ``implementation`` is ``cuda``, and none of it does otherwise.

    Raises ``InputError`` when the kernel is to be timed and the environment switches it off.
    """
    from runtime.kernels import registry

    if implementation != "cuda":
        with registry.switched_off("all"):
            yield
        return
    if not registry.enabled(FAMILIES[kernel]):
        raise InputError(
            f"implementation is 'cuda', and {registry.ENVIRONMENT} switches {FAMILIES[kernel]!r} off; "
            f"allowed: {', '.join(map(repr, RIVALS))}"
        )
    yield


def check(kernel: str, implementation: str, call: Callable[[], Any]) -> None:
    """Runs ``call`` once. Raises ``InputError`` when it launched no kernel of ours for ``cuda``, or one for anything else:
    a measurement must not be of something else than it says."""
    from runtime.kernels import loader

    with loader.counting() as launched:
        call()
    if bool(launched()) != (implementation == "cuda"):
        raise InputError(
            f"kernel {kernel!r} launched {launched()} CUDA kernels of the runtime with implementation {implementation!r}"
        )
