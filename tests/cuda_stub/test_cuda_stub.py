"""What only runs on CUDA, through a real CUDA build of torch without a GPU: names, orders of arguments, devices, launches and bytes.

Needs ``ZEROCAST_CUDA_PYTHON``: the Python of an environment with a CUDA build of torch, cupy-cuda13x, nvidia-ml-py and nvidia-cuda-crt.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from estimator.report import StepReport
from tests.cuda_stub.build import environment
from validator.compare.join import predict_for

TREE = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("ZEROCAST_CUDA_PYTHON", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="needs ZEROCAST_CUDA_PYTHON")]

ONLY_WRONG_NUMBERS = ("off by", "hold", "losses are", "cycles take", "come back", "came back", "did not write")
"""What checks of values say where nothing is computed."""


def run(*arguments: str, **chosen: str) -> subprocess.CompletedProcess[str]:
    env = {
        **environment(PYTHON, **chosen),
        "PYTHONPATH": os.pathsep.join((str(TREE / "tests/cuda_stub/hook"), str(TREE))),
    }
    alive, held = os.pipe()  # the doctor's process ends when its standard input does
    try:
        return subprocess.run(
            [PYTHON, *arguments], cwd=TREE, env=env, stdin=alive, capture_output=True, text=True, timeout=280
        )
    finally:
        os.close(alive)
        os.close(held)


def test_every_kernel_is_compiled_and_launched() -> None:
    done = run("-m", "tests.runtime.kernels.sample", STUB_TRACE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("STUB: ") > 50 and "bad launch" not in done.stderr


def test_the_doctor_finds_nothing_but_wrong_numbers() -> None:
    done = run("-m", "validator.gpu.run", "0")
    answers = [json.loads(line) for line in done.stdout.splitlines() if "started" not in line]
    assert len(answers) == 16, done.stderr[-3000:]
    failed = [answer["failed"] for answer in answers if "failed" in answer]
    assert all(any(words in sentence for words in ONLY_WRONG_NUMBERS) for sentence in failed), failed


def test_torch_takes_the_memory_that_is_forecast(tmp_path: Path) -> None:
    """Its own allocator, its own operators with what they keep, its own workspaces."""
    suite = tmp_path / "two.toml"
    suite.write_text(
        'gpu = "here"\nbackend = "cuda"\nsteps = 2\nwarmup = 2\nmodel = "gpt2"\nseq_len = 1024\n'
        "[[matrix]]\ngpus = 1\nzero = 0\nmicro_batch = 2\n"
    )
    done = run(
        "-m", "validator", "campaign", "--suite", str(suite), "--out", str(tmp_path / "out"), "--budget-s", "240"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [
        StepReport.from_dict(json.loads(line)) for line in (tmp_path / "out/records.jsonl").read_text().splitlines()
    ]
    (report,) = reports
    assert predict_for(report).allocator_bytes == pytest.approx(report.peak_allocated_bytes, rel=0.005)
    history = report.provenance["allocator_history"]
    assert history["unmatched"] == 0 and history["simulated"]["simulated_peak_bytes"] == history["peak_reserved_bytes"]
