"""Compiles the kernels of this folder with CuPy, once per process, and launches them on torch's memory and stream.

CuPy keeps compiled modules on disk (``~/.cupy/kernel_cache``, or ``CUPY_CACHE_DIR``), keyed by source text, options and
compiler; that is why headers are pasted into the text here. Nothing is allocated through CuPy and nothing waits for the
device, so that launches can be captured into a CUDA graph (after one warm-up call, which loads the module).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from estimator.errors import InputError, invalid
from estimator.ops.kernels.chip import H200, Chip, tile_of
from estimator.ops.kernels.chip import ceil_div as ceil_div
from runtime.kernels.registry import enabled

FOLDER = Path(__file__).parent
ELEMENT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Names in ``common.cuh`` of the element types that kernels take."""

Argument = Tensor | int | float | None


class Kernel(NamedTuple):
    """One ``extern "C" __global__`` function, compiled with some ``#define``s."""

    family: str
    """The ``.cu`` file's name without its ending."""
    name: str
    defines: tuple[tuple[str, str | int], ...]


class Launcher(Protocol):
    """Launches a kernel: on a GPU, or in tests on the CPU."""

    def __call__(
        self, kernel: Kernel, grid: tuple[int, int], block: int, arguments: tuple[Argument, ...], shared_bytes: int
    ) -> None: ...


def kernel(family: str, name: str, **defines: str | int) -> Kernel:
    """The kernel ``name`` of ``family.cu`` under these ``#define``s. Launchers cache it: building it takes microseconds."""
    return Kernel(family, name, tuple(sorted(defines.items())))


def type_name(dtype: torch.dtype) -> str:
    """The kernels' name of ``dtype``. Raises ``InputError`` for one that they do not take."""
    if dtype not in ELEMENT:
        raise invalid("dtype", dtype, ", ".join(map(str, ELEMENT)))
    return ELEMENT[dtype]


@functools.cache
def source(family: str) -> str:
    """The text of ``family.cu`` with its local headers pasted in, each once."""
    seen: set[str] = set()

    def paste(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (FOLDER / name).read_text(encoding="utf-8")
        return re.sub(r'^#include "([^"]+)"$', lambda found: paste(found[1]), text, flags=re.MULTILINE)

    return paste(f"{family}.cu")


def compiler_options(defines: tuple[tuple[str, str | int], ...]) -> tuple[str, ...]:
    """Options for NVRTC. CuPy adds the architecture and ``-ftz=true``: fp32 denormals count as zero on GPUs."""
    return ("--std=c++17", *(f"-D{key}={value}" for key, value in defines))


def widened(x: Tensor) -> Tensor:
    """``x`` in the dtype that references compute in: fp32, or fp64 where it is fp64 already (tests)."""
    return x if x.dtype == torch.float64 else x.float()


# ---- who does the work ------------------------------------------------------------------------------------------------

_cpu_launcher: Launcher | None = None


def device_has_kernels(device: torch.device) -> bool:
    """Whether kernels (those that are switched on) do the work on ``device``: GPUs and what stands for one."""
    return device.type in ("cuda", "meta") or _cpu_launcher is not None


def uses_kernel(name: str, x: Tensor) -> bool:
    """Whether kernel ``name`` does the work on ``x``; its plain-torch reference does otherwise.

    On GPUs it does unless it is switched off; on CPUs never. ``meta`` tensors stand for a GPU: launchers then allocate
    what they would allocate there, and launch nothing. Raises ``InputError`` for a dtype that no kernel takes.
    """
    if not device_has_kernels(x.device) or not enabled(name):
        return False
    if x.dtype not in ELEMENT:
        raise invalid(f"dtype of the input of {name}", x.dtype, ", ".join(map(str, ELEMENT)))
    return True


@contextmanager
def cpu_launcher(launcher: Launcher) -> Iterator[None]:
    """For tests: CPU tensors go through the launchers too, and ``launcher`` runs the kernels."""
    global _cpu_launcher
    before, _cpu_launcher = _cpu_launcher, launcher
    try:
        yield
    finally:
        _cpu_launcher = before


def outside_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` ends its graph before ``function`` and starts another after it.

    For launches, and for references that are autograd functions: torch 2.11 compiles those to wrong gradients (measured).
    ``torch.compiler.disable`` alone would import the compiler (more than a second) into every process.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args)
        return function(*args)

    return call


# ---- launching --------------------------------------------------------------------------------------------------------


_n_launched = 0


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many kernels this process has launched since, on a GPU or in place of one."""
    before = _n_launched
    yield lambda: _n_launched - before


def launch(
    kernel: Kernel, grid: int | tuple[int, int], block: int, *arguments: Argument, shared_bytes: int = 0
) -> None:
    """Runs ``kernel`` on ``grid`` blocks of ``block`` threads, on the current stream of the first tensor's device.

    Tensors become pointers to their first element (``None``: a null pointer), ``int`` a ``long long``, ``float`` a
    ``float``. An empty grid launches nothing. Dtypes, strides and alignment are the caller's to check.
    """
    x, y = (grid, 1) if isinstance(grid, int) else grid
    first = next(a for a in arguments if isinstance(a, Tensor))
    if first.is_meta or x * y == 0:
        return
    global _n_launched
    _n_launched += 1
    if first.is_cuda:
        _launch_on_gpu(kernel, (x, y), block, arguments, shared_bytes, first.device)
        return
    assert _cpu_launcher is not None, f"kernel {kernel.name} was launched on {first.device}"
    _cpu_launcher(kernel, (x, y), block, arguments, shared_bytes)


def _launch_on_gpu(
    kernel: Kernel, grid: tuple[int, int], block: int, arguments: tuple[Argument, ...], shared_bytes: int, device: Any
) -> None:
    assert all(a.device == device for a in arguments if isinstance(a, Tensor)), "tensors on different devices"
    with torch.cuda.device(device):
        function = _function(kernel, device.index, shared_bytes)
        with _stream(torch.cuda.current_stream(device).cuda_stream, device.index):
            function(grid, (block,), tuple(map(_packed, arguments)), shared_mem=shared_bytes)


def _packed(argument: Argument) -> Any:
    if isinstance(argument, Tensor):
        return np.int64(argument.data_ptr())
    if isinstance(argument, float):
        return np.float32(argument)
    return np.int64(argument or 0)


@functools.cache
def _stream(pointer: int, device_index: int) -> Any:
    return cupy().cuda.ExternalStream(pointer, device_index)


@functools.cache
def _function(kernel: Kernel, device_index: int, shared_bytes: int) -> Any:
    function = _module(kernel.family, kernel.defines).get_function(kernel.name)
    runtime_error = cupy().cuda.runtime.CUDARuntimeError
    try:
        function.compile()
        if shared_bytes > 48 * 1024:
            function.max_dynamic_shared_size_bytes = shared_bytes
    except runtime_error as error:
        raise InputError(f"CUDA kernel {kernel.name} cannot run: {error}; {_ADVICE}") from error
    return function


@functools.cache
def _module(family: str, defines: tuple[tuple[str, str | int], ...]) -> Any:
    return cupy().RawModule(code=source(family), options=compiler_options(defines), backend="nvrtc")


_ADVICE = (
    "install zerocast[gpu] for a CUDA 13 driver or zerocast[gpu12] for a CUDA 12 driver, "
    "or set ZEROCAST_KERNELS_OFF=all to run plain torch"
)


@functools.cache
def cupy() -> Any:
    """The CuPy module. Raises ``InputError`` where it is missing."""
    try:
        import cupy as module
    except ImportError as error:
        raise InputError(f"the CUDA kernels need CuPy, which cannot be imported ({error}); {_ADVICE}") from error
    return module


# ---- the chip and the shapes of launches --------------------------------------------------------------------------------


_meta_chip = H200


def chip(device: torch.device) -> Chip:
    """The chip behind ``device``; ``meta`` tensors (and tests on a CPU) stand for an H200, or what ``standing_for`` says."""
    return _cuda_chip(device) if device.type == "cuda" else _meta_chip


@functools.cache
def _cuda_chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    arch = properties.major * 10 + properties.minor
    return Chip(arch, properties.multi_processor_count, tile_of(arch))


@contextmanager
def standing_for(chip: Chip) -> Iterator[None]:
    """Inside, ``meta`` tensors stand for a GPU with this chip."""
    global _meta_chip
    before, _meta_chip = _meta_chip, chip
    try:
        yield
    finally:
        _meta_chip = before


def pack_width(*tensors: Tensor | None, row: int = 0) -> int:
    """Elements per access, a power of two: as many as 16 bytes of the smallest type hold, every pointer's alignment
    allows and, where ``row`` is given, divide a row."""
    present = [t for t in tensors if t is not None]
    width = 16 // min(t.itemsize for t in present)
    while width > 1 and (row % width or any(t.data_ptr() % min(16, width * t.itemsize) for t in present)):
        width //= 2
    return width


def pack_width_and_head(*tensors: Tensor) -> tuple[int, int]:
    """For elementwise kernels: elements per access, and how many of the first access lie before element 0.

    Tensors of one type that are equally far from a 16-byte boundary (a slice of each, say) still get whole accesses.
    """
    size = tensors[0].itemsize
    past = {t.data_ptr() % 16 for t in tensors}
    if len(past) == 1 and all(t.itemsize == size for t in tensors):
        return 16 // size, past.pop() // size
    return pack_width(*tensors), 0
