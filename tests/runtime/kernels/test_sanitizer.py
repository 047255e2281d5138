"""The sample of all kernels: complete, and clean under compute-sanitizer where there is a GPU that it can watch."""

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

TREE = Path(__file__).resolve().parents[3]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@needs_shim
def test_the_sample_has_every_kernel() -> None:
    torch.manual_seed(0)
    with on_shim() as record:
        sample.run("cpu")
    launched = {kernel.family for kernel, _ in record.launches}
    assert launched == {path.stem for path in loader.FOLDER.glob("*.cu")}


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
