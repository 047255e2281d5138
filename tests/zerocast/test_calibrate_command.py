"""``zerocast calibrate`` and ``python -m validator calibrate``: nccl-tests output into a profile that is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from estimator.time.profile import HardwareProfile
from estimator.time.profile_file import load_profile, save_profile
from validator.__main__ import main

LOG = """\
# Collective test starting: all_reduce_perf
# nThread 1 nGpus 2 minBytes 1073741824 maxBytes 1073741824 step: 2(factor) warmup iters: 1 iters: 20
#  Rank  0 Group  0 Pid   2114 on node-0 device  0 [0000:8f:00] NVIDIA B200
#  Rank  1 Group  0 Pid   2114 on node-0 device  1 [0000:90:00] NVIDIA B200
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
  1073741824     268435456     float     sum      -1   1073.7 1000.04 1000.04      0   1073.7 1000.04 1000.04      0
# Avg bus bandwidth    : 1000.04
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A profile without collectives, and a log."""
    profile = HardwareProfile(name="b200", arch="blackwell", origin="measured", date="2026-11-22")
    log = tmp_path / "log.txt"
    log.write_text(LOG, encoding="utf-8")
    return save_profile(profile, tmp_path / "p.json"), log


def test_zerocast_puts_collectives_into_a_profile(zerocast, home: Path, files: tuple[Path, Path]) -> None:
    path, log = files
    done = zerocast("calibrate", "--import-only", "--nccl-tests", log, "--out", path)
    assert done.code == 0, done
    assert "all_reduce of 2: 1 TB/s at 1.00 GiB" in done.out
    (point,) = load_profile(path).collectives
    assert (point.op, point.group_size, point.n_nodes, point.bytes) == ("all_reduce", 2, 1, 1 << 30)
    again = zerocast("calibrate", "--import-only", "--nccl-tests", log, "--out", path, "--json")
    assert len(json.loads(again.out)["profile"]["collectives"]) == 1


def test_the_source_tree_does_the_same(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path, log = files
    assert main(["calibrate", "--import-only", "--nccl-tests", str(log), "--out", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out == "" and f"profile written to {path}" in said.err
    assert len(load_profile(path).collectives) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--import-only"], "--import-only is given without --nccl-tests FILE"),
        (["--nccl-tests", "/nowhere"], "'/nowhere' cannot be read"),
        (["--nvme", "/nowhere"], "nvme is '/nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(zerocast, home: Path, tmp_path: Path, args: list[str], words: str) -> None:
    done = zerocast("calibrate", "--out", tmp_path / "p.json", *args)
    assert done.code == 2 and words in done.err and done.out == "", done
    assert not (tmp_path / "p.json").exists()


def test_output_of_a_gpu_is_no_part_of_a_cpus_profile(zerocast, home: Path, files: tuple[Path, Path]) -> None:
    done = zerocast("calibrate", "--out", files[0].parent / "cpu.json", "--nccl-tests", files[1])
    assert done.code == 2 and "output is of 'NVIDIA B200' (b200), the profile of 'cpu'" in done.err
