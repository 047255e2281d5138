"""The sample of all kernels: complete, and clean under g++'s address sanitizer on a CPU, and under compute-sanitizer where there is a
GPU that it can watch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.kernels import loader
from tests.runtime.kernels import sample
from tests.runtime.kernels.checks import needs_shim, on_shim
from tests.runtime.kernels.shim import COMPILER

TREE = Path(__file__).resolve().parents[3]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@needs_shim
def test_the_sample_has_every_kernel() -> None:
    torch.manual_seed(0)
    with on_shim() as record:
        sample.run("cpu")
    launched = {kernel.family for kernel, _ in record.launches}
    assert launched == {path.stem for path in loader.FOLDER.glob("*.cu")}


_SAMPLE = """
import torch
from tests.runtime.kernels import sample
from tests.runtime.kernels.checks import on_shim
torch.manual_seed(0)
with on_shim():
    sample.run("cpu")
"""
_PAST_THE_END = """
import torch
from runtime.kernels.loader import Kernel
from tests.runtime.kernels.shim import run_text
text = 'extern "C" __global__ void late(float* x, long long n) { if (threadIdx.x == 0) x[0] = x[n]; }'
run_text(text, Kernel("late", "late", ()), (1, 1), 32, (torch.zeros(1000), 1000))
"""


def _watched(program: str) -> subprocess.CompletedProcess[str]:
    """``program`` in a Python whose memory g++'s address sanitizer watches."""
    assert COMPILER
    libraries = [subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
                 for name in ("libasan.so", "libstdc++.so")]  # fmt: skip
    env = {
        **os.environ, "LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "PYTHONMALLOC": "malloc", "ZEROCAST_SHIM_SANITIZE": "1", "PYTHONPATH": str(TREE),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", program], cwd=TREE, env=env, capture_output=True, text=True, timeout=280
    )


@needs_shim
@pytest.mark.slow
def test_no_kernel_reads_or_writes_outside_of_its_tensors() -> None:
    caught = _watched(_PAST_THE_END)
    assert caught.returncode != 0 and "heap-buffer-overflow" in caught.stderr, caught.stderr[-4000:]
    done = _watched(_SAMPLE)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_clean_under_compute_sanitizer(tool: str) -> None:
    """torch's caching allocator is off, so that an access past a tensor's end is one past an allocation's."""
    assert SANITIZER
    command = [
        SANITIZER,
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        sys.executable,
        "-m",
        "tests.runtime.kernels.sample",
    ]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(TREE)}
    done = subprocess.run(command, cwd=TREE, env=env, capture_output=True, text=True, timeout=280)
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer cannot watch this machine's GPU")
    assert done.returncode == 0, said[-4000:]
