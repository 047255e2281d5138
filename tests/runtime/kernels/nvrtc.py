"""Compiles kernels to machine code without a GPU or a driver, and reads what the assembler says about them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from runtime.kernels.loader import Kernel, compiler_options, source

AS_CUPY = ("-ftz=true", "--device-as-default-execution-space")
"""Options that CuPy adds to ours."""


class Compiled(NamedTuple):
    registers: int
    spilled_bytes: int
    """Stores plus loads of spilled registers, per thread."""
    stack_bytes: int
    shared_bytes: int
    machine_code: bytes


def compile_family(family: str, defines: tuple[tuple[str, str | int], ...], arch: int) -> dict[str, Compiled]:
    """Every kernel of ``family.cu``, compiled for ``sm_<arch>``. Raises ``AssertionError`` with the compiler's log."""
    log, code = _compile(family, defines, (f"-arch=sm_{arch}", "--ptxas-options=-v"), "CUBIN")
    return {part.split("'")[0]: _read(part, code) for part in log.split("Compiling entry function '")[1:]}


def intermediate(family: str, defines: tuple[tuple[str, str | int], ...], arch: int) -> str:
    """The same as PTX text."""
    return _compile(family, defines, (f"-arch=compute_{arch}",), "PTX")[1].decode()


def _compile(
    family: str, defines: tuple[tuple[str, str | int], ...], options: tuple[str, ...], result: str
) -> tuple[str, bytes]:
    """The compiler's log and its result (``CUBIN`` or ``PTX``)."""
    from cuda.bindings import nvrtc

    def value(answer: tuple[Any, ...], log: str = "") -> Any:
        assert answer[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{answer[0]}\n{log}"
        return answer[1] if len(answer) > 1 else None

    program = value(nvrtc.nvrtcCreateProgram(source(family).encode(), f"{family}.cu".encode(), 0, [], []))
    flags = [o.encode() for o in (*compiler_options(defines), *AS_CUPY, *options)]
    compiled = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    log = bytearray(value(nvrtc.nvrtcGetProgramLogSize(program)))  # not bytes: Python shares those of one byte
    value(nvrtc.nvrtcGetProgramLog(program, log))
    value(compiled, log.decode())
    code = bytearray(value(getattr(nvrtc, f"nvrtcGet{result}Size")(program)))
    value(getattr(nvrtc, f"nvrtcGet{result}")(program, code))
    value(nvrtc.nvrtcDestroyProgram(program))
    return log.decode(), bytes(code)


def compile_kernel(kernel: Kernel, arch: int) -> Compiled:
    return compile_family(kernel.family, kernel.defines, arch)[kernel.name]


def assert_no_spills(kernel: Kernel, arch: int) -> None:
    """``kernel`` and its neighbours in the file become machine code that keeps everything in registers."""
    for name, compiled in compile_family(kernel.family, kernel.defines, arch).items():
        assert compiled.machine_code.startswith(b"\x7fELF")
        assert compiled.spilled_bytes == 0, f"{name} on sm_{arch}: {compiled._replace(machine_code=b'')}"


def _read(log: str, code: bytes) -> Compiled:
    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    registers = number(r"Used (\d+) registers")
    assert registers, log
    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Compiled(registers, spilled, number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes smem"), code)
