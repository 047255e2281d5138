"""How a kernel's result is held against an fp64 truth, and what its launches touch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.kernels import loader
from runtime.kernels.loader import Argument, Kernel
from tests.runtime.kernels.shim import COMPILER, Shim

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIGNIFICAND_BITS = {torch.bfloat16: 8, torch.float16: 11}
_SMALLEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14}

needs_shim = pytest.mark.skipif(COMPILER is None, reason="needs g++ to compile the kernels for the CPU")


def gradient_and_residual(numel: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What error feedback works on: a random gradient of ``dtype`` and an fp32 residual of half its size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator).to(dtype), torch.randn(numel, generator=generator) * 0.5


def half_step(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of neighbouring numbers of a 16-bit ``dtype`` around ``truth`` (fp64); 0 for fp32."""
    if dtype == torch.float32:
        return torch.zeros_like(truth)
    exponent = torch.frexp(truth).exponent - 1
    exponent = exponent.clamp(min=_SMALLEST_EXPONENT[dtype])
    return torch.ldexp(torch.ones_like(truth), exponent - _SIGNIFICAND_BITS[dtype])


def assert_close(got: Tensor, truth: Tensor, what: str = "", scale: Tensor | float = 0.0, rel: float = 1e-6) -> None:
    """``got`` is ``truth`` (fp64) within ``rel`` of it and of ``scale`` (the size of what was summed), plus one rounding
    to ``got``'s dtype. NaN and infinities are where the truth has them or, for infinities, beyond ``got``'s dtype."""
    assert got.shape == truth.shape, what
    got64 = got.detach().double()
    rounded = truth.detach().to(got.dtype).double()
    finite = rounded.isfinite() & got64.isfinite()
    odd = ~finite & ~((got64 == rounded) | (got64.isnan() & rounded.isnan()))
    if odd.any():  # the largest finite number beside infinity is one rounding
        limit = torch.finfo(got.dtype).max
        odd &= ~(truth.abs().sub(limit).abs() <= limit * 2**-8)
    assert not odd.any(), f"{what}: {got64[odd][:4]} where {truth[odd][:4]} is right"
    allowed = 1.001 * half_step(rounded, got.dtype) + rel * (truth.abs() + scale) + 1e-44
    error = torch.where(finite, (got64 - truth).abs() / allowed, 0)
    worst = int(error.argmax()) if error.numel() else 0
    assert not error.numel() or error.flatten()[worst] <= 1, (
        f"{what}: {got64.flatten()[worst]} where {truth.flatten()[worst]} is right, "
        f"{float(error.flatten()[worst]):.3g} times what rounding explains"
    )


class Recorder:
    """A launcher that also keeps every launch."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner
        self.launches: list[tuple[Kernel, tuple[Argument, ...]]] = []

    def __call__(
        self, kernel: Kernel, grid: tuple[int, int], block: int, arguments: tuple[Argument, ...], shared_bytes: int
    ) -> None:
        self.launches.append((kernel, arguments))
        if self.inner is not None:
            self.inner(kernel, grid, block, arguments, shared_bytes)

    @property
    def n_bytes(self) -> int:
        """Every tensor that a launch was given, once: right for kernels that read or write each of theirs once."""
        return sum(a.numel() * a.itemsize for _, given in self.launches for a in given if isinstance(a, Tensor))


@contextmanager
def on_shim(order: int = 0) -> Iterator[Recorder]:
    """CPU tensors go through the kernels."""
    recorder = Recorder(Shim(order))
    with loader.cpu_launcher(recorder):
        yield recorder


class Lives(TorchDispatchMode):
    """Bytes of every storage born inside (positive) and of its death (negative), in the order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []
        self._refs: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in {*given, *self._refs}:
                self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            del self._refs[key]
            self.events.append(-n_bytes)

        self._refs[key] = weakref.ref(storage, gone)
        self.events.append(n_bytes)


def lives(
    call: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, device: str = "meta"
) -> tuple[list[int], list[int]]:
    """What the forward and the backward pass of ``call`` on tensors of ``shapes`` make, and let go themselves."""
    leaves = [torch.ones(s, device=device, dtype=dtype).requires_grad_() for s in shapes]
    with Lives() as forward:
        outputs = call(*leaves)
    in_forward = [*forward.events]
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = tuple(torch.ones_like(o) for o in outputs)
    with Lives() as backward:
        gradients = torch.autograd.grad(outputs, leaves, incoming)
    in_backward = [*backward.events]
    del gradients
    return in_forward, in_backward


def gradients(
    call: Callable[..., Any], inputs: tuple[Tensor, ...], incoming: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of ``call(*inputs)`` and the gradients of the inputs under ``incoming``."""
    leaves = tuple(x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs)
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, incoming)
    return tuple(o.detach() for o in outputs), grads


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


def at_offset(x: Tensor, elements: int) -> Tensor:
    """A copy of ``x`` that starts ``elements`` past a 16-byte boundary."""
    room = torch.empty(x.numel() + elements + 16, dtype=x.dtype, device=x.device)
    start = -(room.data_ptr() // x.itemsize) % (16 // x.itemsize) + elements
    view = room[start : start + x.numel()].view(x.shape)
    view.copy_(x)
    return view
