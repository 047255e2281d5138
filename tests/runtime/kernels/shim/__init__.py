"""Runs the kernels' own ``.cu`` text on the CPU: compiled by g++ under ``shim.h``, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import getpass
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.loader import Argument, Kernel, source

HEADER = Path(__file__).parent / "shim.h"
COMPILER = shutil.which("g++")
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-w",
    "-U_FORTIFY_SOURCE",
)

SANITIZE = ("-g", "-fsanitize=address", "--param=asan-stack=0")
"""Also watch reads and writes outside of allocations: for processes that ``ZEROCAST_SHIM_SANITIZE`` is set for, and that g++'s
``libasan.so`` was preloaded into. (Not the stack's, which the shim's threads switch.)"""


class Shim:
    """A ``loader.Launcher``. ``order`` is the order in which the threads of a block (and the blocks) run."""

    def __init__(self, order: int = 0) -> None:
        self.order = order
        self.launched: list[Kernel] = []

    def __call__(
        self, kernel: Kernel, grid: tuple[int, int], block: int, arguments: tuple[Argument, ...], shared_bytes: int = 0
    ) -> None:
        self.launched.append(kernel)
        run_text(source(kernel.family), kernel, grid, block, arguments, shared_bytes, self.order)


def run_text(
    text: str, kernel: Kernel, grid: tuple[int, int], block: int, arguments: tuple[Argument, ...],
    shared_bytes: int = 0, order: int = 0,
) -> None:  # fmt: skip
    """Runs ``kernel.name`` of the CUDA text. Raises ``AssertionError`` for what a GPU would leave undefined."""
    library = _library(text, kernel.defines)
    codes = getattr(library, f"shim_codes_{kernel.name}")
    codes.restype = ctypes.c_char_p
    given = "".join("f" if isinstance(a, float) else "i" if isinstance(a, int) else "p" for a in arguments)
    assert given == codes().decode(), f"{kernel.name} takes {codes().decode()}, was given {given}"
    values = [_value(a) for a in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    run = getattr(library, f"shim_run_{kernel.name}")
    run.restype = ctypes.c_char_p
    problem = run(pointers, (ctypes.c_uint * 5)(*grid, block, shared_bytes, order))
    assert problem is None, f"{kernel.name}: {problem.decode()}"


def _value(argument: Argument) -> ctypes._SimpleCData:
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_longlong(argument.data_ptr() if isinstance(argument, Tensor) else argument or 0)


@functools.cache
def _library(text: str, defines: tuple[tuple[str, str | int], ...]) -> ctypes.CDLL:
    """Compiled once per text, defines and shim; kept in the temporary folder of this user."""
    assert COMPILER
    names = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)', text)
    exports = "\n".join(f"SHIM_EXPORT({name})" for name in names)
    watched = SANITIZE if os.environ.get("ZEROCAST_SHIM_SANITIZE") else ()
    flags = (*_FLAGS, *watched, *(f"-D{key}={value}" for key, value in defines))
    key = hashlib.sha256("\0".join((text, exports, HEADER.read_text(), *flags)).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"zerocast-shim-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{key}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        command = [COMPILER, *flags, "-include", str(HEADER), "-x", "c++", "-", "-o", str(partial)]
        done = subprocess.run(command, input=f"{text}\n{exports}\n", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.replace(path)
    return ctypes.CDLL(str(path))


def guarded(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, Tensor]:
    """A NaN-filled tensor ``offset`` elements past a 16-byte boundary, and the NaN-filled memory around it.

    Whatever is written outside the tensor shows in the second one: see ``intact``.
    """
    numel, guard = torch.Size(shape).numel(), 64
    whole = torch.full((numel + offset + 3 * guard,), float("nan"), dtype=dtype)
    start = guard + (-(whole.data_ptr() // whole.itemsize) % (16 // whole.itemsize)) + offset
    return whole[start : start + numel].view(shape), whole


def intact(inner: Tensor, whole: Tensor) -> bool:
    """Whether the memory around ``inner`` still holds NaN."""
    start = (inner.data_ptr() - whole.data_ptr()) // whole.itemsize
    return bool(whole[:start].isnan().all() and whole[start + inner.numel() :].isnan().all())
