"""Which implementations of a kernel there are here: torch's own, and the kernels of ``runtime.kernels``.

The runtime's own steps are plain torch so far: its CUDA kernels are measured here before they take their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from estimator.errors import InputError, require_choice

IMPLEMENTATIONS = ("cuda", "torch")

FAMILIES = {
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
    "dropout_add": "dropout_residual",
    "flatten": "bucket",
    "unflatten": "bucket",
    "adamw": "adam",
    "optimizer_step": "adam",
    "grad_norm": "grad_norm",
}
"""Kernels that ``calls`` can have from ``runtime.kernels``, with the name by which ``runtime.kernels`` switches it."""


def missing(kernel: str, implementation: str, device: str) -> str | None:
    """Why ``kernel`` has no such implementation on ``device``; ``None`` when it has."""
    require_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "torch":
        return None
    if device != "cuda":
        return f"implementation is 'cuda' on device {device!r}; allowed there: 'torch'"
    from runtime.kernels import registry

    if FAMILIES.get(kernel) not in registry.KERNELS:
        return f"implementation is 'cuda', and the runtime has no such kernel for {kernel!r} yet; allowed: 'torch'"
    return None


@contextmanager
def using(kernel: str, implementation: str) -> Iterator[None]:
    """Inside, the runtime's functions take ``implementation`` for ``kernel``."""
    from runtime.kernels import registry

    family = FAMILIES.get(kernel)
    if family not in registry.KERNELS:
        yield
    elif implementation == "torch":
        with registry.switched_off(family):
            yield
    elif not registry.enabled(family):
        raise InputError(
            f"implementation is 'cuda', and {registry.ENVIRONMENT} switches {family!r} off; allowed: 'torch'"
        )
    else:
        yield


def check(kernel: str, implementation: str, call: Callable[[], Any]) -> None:
    """Runs ``call`` once. Raises ``InputError`` when it launched kernels of ours for ``torch``, or none for ``cuda``:
    a measurement must not be of something else than it says."""
    n = _launches(call)
    if bool(n) != (implementation == "cuda"):
        raise InputError(
            f"kernel {kernel!r} launched {n} CUDA kernels of the runtime with implementation {implementation!r}"
        )


def _launches(call: Callable[[], Any]) -> int:
    from runtime.kernels import loader

    n, launch = 0, loader._launch_on_gpu

    def counted(*arguments: Any) -> None:
        nonlocal n
        n += 1
        launch(*arguments)

    loader._launch_on_gpu = counted  # type: ignore[assignment]
    try:
        call()
    finally:
        loader._launch_on_gpu = launch
    return n
