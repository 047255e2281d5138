"""The network on the command line: its flags, machine types, and a profile fitted to nccl-tests output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FIRST = "# nThread 1 nGpus 1 minBytes 8 maxBytes 8589934592 step: 2(factor)\n"
HEADER = """\
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""


@pytest.fixture
def forecast(zerocast) -> Callable[..., dict[str, Any]]:
    def ask(*args: str) -> dict[str, Any]:
        done = zerocast("predict", "--model", "llama-3-8b", "--gpus", "128", "--json", *args)
        assert done.code == 0, done.err
        return json.loads(done.out)

    return ask


def test_levels_of_the_network_change_a_forecast(forecast) -> None:
    plain = forecast("--gpu", "h100-sxm")
    two = forecast("--gpu", "h100-sxm", "--hierarchical", "true")
    slow = forecast("--gpu", "h100-sxm", "--internode-gbps", "50")
    assert two["step_s"] < plain["step_s"] < slow["step_s"]
    assert plain["job_key"] == two["job_key"] == slow["job_key"]
    trays = forecast("--gpu", "gb200", "--gpus-per-node", "4")
    rack = forecast("--gpu", "gb200", "--gpus-per-node", "4", "--nvlink-domain", "64")
    assert rack["time_parts_s"]["exposed_gather"] < 0.5 * trays["time_parts_s"]["exposed_gather"]


def test_a_machine_type_brings_its_network(forecast) -> None:
    fast, slow = (forecast("--gpu", gpu, "--zero", "3") for gpu in ("azure-nd96asr-v4", "aws-p4d.24xlarge"))
    assert fast["job"]["cluster"]["internode_bytes_per_s"] == 4 * slow["job"]["cluster"]["internode_bytes_per_s"]
    assert fast["job"]["cluster"]["gpu"]["name"] == "a100-40" and fast["step_s"] < slow["step_s"]


def test_nccl_tests_output_makes_a_profile_for_forecasts(zerocast, forecast, tmp_path: Path) -> None:
    """A cluster of H100s whose all-gathers over 16 ranks reach a fifth of the nominal network."""
    ranks = "".join(
        f"#  Rank {r:2} Group  0 Pid {100 + r} on node-{r // 8} device {r % 8} [0000:8f:00] NVIDIA H100 80GB HBM3\n"
        for r in range(16)
    )
    rows = ""
    for n_bytes in (1 << 20, 1 << 24, 1 << 28, 1 << 32):
        seconds = 200e-6 + n_bytes * 15 / 16 / 80e9
        rate = n_bytes / seconds / 1e9
        line = f"{seconds * 1e6:.2f} {rate:.2f} {rate * 15 / 16:.2f} 0"
        rows += f"{n_bytes} {n_bytes // 64} float none -1 {line} {line}\n"
    log, out = tmp_path / "all_gather.txt", tmp_path / "cluster.json"
    log.write_text(FIRST + ranks + HEADER + rows)
    text = zerocast("calibrate", "--import-only", "--nccl-tests", str(log), "--out", str(out)).out
    assert "collectives follow 4 points of nccl-tests" in text and f"profile written to {out}" in text
    shipped, fitted = forecast("--gpu", "h100-sxm"), forecast("--gpu", "h100-sxm", "--profile", str(out))
    assert fitted["time_parts_s"]["exposed_gather"] > 2 * shipped["time_parts_s"]["exposed_gather"]
    assert fitted["provenance"]["profile"] == "h100-sxm-fitted"
    assert any("collectives follow 4 points" in note for note in fitted["notes"])
    again = zerocast("calibrate", "--import-only", "--nccl-tests", str(log), "--out", str(out)).out
    assert "all_gather of 16" in again, "a profile that is there takes the points"


def test_a_gpu_whose_name_tells_nothing_must_be_given(zerocast, tmp_path: Path) -> None:
    log = tmp_path / "all_reduce.txt"
    ranks = "".join(f"#  Rank  {r} Group  0 Pid {r} on a device {r} [0000:8f:00] Some Card\n" for r in range(2))
    log.write_text(FIRST + ranks + HEADER + "1048576 262144 float sum -1 50.0 20.97 20.97 0 50.0 20.97 20.97 0\n")
    command = ("calibrate", "--import-only", "--nccl-tests", str(log), "--out", str(tmp_path / "x.json"))
    done = zerocast(*command)
    assert done.code == 2 and "'Some Card' does not tell it" in done.err and done.out == ""
    assert "profile written" in zerocast(*command, "--gpu", "l4").out
