"""What the assembler made of the kernels: memory in 16-byte accesses, and nothing in local memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from runtime.kernels.loader import Kernel
from tests.runtime.kernels import nvrtc
from tests.runtime.kernels.test_loss_nvrtc import QUICK as LOSSES
from tests.runtime.kernels.test_many_nvrtc import QUICK as MANY
from tests.runtime.kernels.test_nvrtc import QUICK, flat

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and nvidia-cuda-nvrtc")


def _disassembler() -> str | None:
    """On the path, in CUDA's folder, or of the packages nvidia-cuda-nvdisasm and triton."""
    folders = [Path("/usr/local/cuda/bin")]
    for name, below in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = find_spec(name)
        folders += [Path(place) / below for place in (spec.submodule_search_locations or () if spec else ())]
    return shutil.which("nvdisasm") or next((str(f / "nvdisasm") for f in folders if (f / "nvdisasm").exists()), None)


LOCAL = re.compile(r"\b(?:LDL|STL)\b")
DISASSEMBLER = _disassembler()
pytestmark = pytest.mark.skipif(
    DISASSEMBLER is None, reason="needs nvdisasm (nvidia-cuda-nvdisasm, triton or CUDA itself)"
)


def instructions(kernel: Kernel, arch: int, folder: Path) -> str:
    """The kernel's machine code as text."""
    path = folder / "kernel.cubin"
    path.write_bytes(nvrtc.compile_kernel(kernel, arch).machine_code)
    done = subprocess.run([str(DISASSEMBLER), "--print-code", str(path)], capture_output=True, text=True, check=True)
    return done.stdout.split(f".text.{kernel.name}:")[1].split("//------")[0]


STREAMS = [
    kernel
    for kernel in (*QUICK, *LOSSES, *MANY)
    if kernel.name not in ("sum_columns", "count_rows", "sum_rows", "total_squares", "lamb_ratios", "dequantize")
]
"""Without the second stages of sums, and int4, of which eight bytes are sixteen elements."""


def test_a_gate_issues_all_its_loads_before_the_first_use(tmp_path: Path) -> None:
    """Two packs of each of three operands, two of each of two results; heads and tails come beside them element by element."""
    code = instructions(flat("gated_backward", "silu", torch.bfloat16), 90, tmp_path)
    loads, stores = ([found.start() for found in re.finditer(rf"\b{name}\.E\.\S*128", code)] for name in ("LDG", "STG"))
    assert len(loads) == 6 and len(stores) == 4 and max(loads) < min(stores)
    assert not LOCAL.search(code)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", STREAMS, ids=lambda kernel: kernel.name)
def test_streams_move_sixteen_bytes_at_a_time(kernel: Kernel, tmp_path: Path) -> None:
    code = instructions(kernel, 90, tmp_path)
    assert re.search(r"\bLDG\.E\.\S*128", code), f"{kernel} loads no 16 bytes at once"
    assert not LOCAL.search(code), f"{kernel} keeps something in local memory"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "stores"), [(MANY[0], 6), (QUICK[-2], 4)], ids=["adamw", "layer_norm"])
def test_whole_packs_are_stored_whole(kernel: Kernel, stores: int, arch: int, tmp_path: Path) -> None:
    """Two accesses of parameters and both moments; four of a row. A plain assignment was taken apart into single words here."""
    code = instructions(kernel, arch, tmp_path)
    assert len(re.findall(r"\bSTG\.E\.\S*128", code)) == stores
