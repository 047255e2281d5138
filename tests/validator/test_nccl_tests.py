"""Import of nccl-tests output: what real programs print, old and new, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from estimator import catalog
from estimator.errors import InputError
from estimator.time.collectives import placement, ways
from estimator.time.network import CollectiveTimer
from estimator.time.profile import CollectivePoint, HardwareProfile, LinkModel, profile_for
from estimator.time.profile_file import load_profile, save_profile
from validator.calibrate.nccl_tests import import_nccl_tests, parse, read_nccl_tests, require_same_gpu

NEW_HEADER = """\
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
OLD_HEADER = """\
#                                                     out-of-place                       in-place
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)                     (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
GATHER_ROWS = """\
    67108864       8388608     float    none      -1    100.1  670.29  335.14      0    92.39  726.37  363.19      0
  8589934592    1073741824     float    none      -1   8897.6  965.42  482.71      0   7613.3  1128.28  564.14      0
"""
"""Two lines of a published run on two B200."""
REDUCE_ROWS = """\
           0             0   float     sum    35.20    0.00    0.00    N/A    34.05    0.00    0.00    N/A
     1048576        262144   float     sum    74.78   14.02   24.54    N/A    76.17   13.77   24.09    N/A
  8589934592    2147483648   float     sum    63896  134.44  235.26    N/A    63959  134.30  235.03    N/A
"""
"""Three lines of a published run on eight A100."""
FOOTER = "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 68.4048\n#\n"


def ranks(n: int, per_node: int = 8, gpu: str = "NVIDIA B200") -> str:
    return "# nThread 1 nGpus 1 minBytes 8 maxBytes 8589934592 step: 2(factor)\n#\n# Using devices\n" + "".join(
        f"#  Rank {r:2} Group  0 Pid   {2000 + r} on node-{r // per_node} device {r % per_node:2} [0000:8f:00] {gpu}\n"
        for r in range(n)
    )


def old_ranks(n: int) -> str:
    return "".join(f"#   Rank  {r} Pid 112424 on localhost device  {r} [0x00] A100-SXM4-40GB\n" for r in range(n))


def write(folder: Path, name: str, *parts: str) -> Path:
    path = folder / name
    path.write_text("".join(parts), encoding="utf-8")
    return path


def test_a_new_table_with_the_name_in_the_file_name(tmp_path: Path) -> None:
    found = read_nccl_tests([write(tmp_path, "all_gather.txt", ranks(2), NEW_HEADER, GATHER_ROWS)])
    assert [p[:6] for p in found.points] == [
        ("all_gather", 2, 1, 67108864, pytest.approx(100.1e-6), "fp32"),
        ("all_gather", 2, 1, 8589934592, pytest.approx(8897.6e-6), "fp32"),
    ]
    assert found.sources[found.points[0].source].startswith(
        "nccl-tests output all_gather.txt: all_gather over 2 x NVIDIA"
    )
    assert "no closing line" in found.notes[0]


def test_an_old_table_tells_its_collective_by_numbers(tmp_path: Path) -> None:
    """bus / algorithm = 235.26 / 134.44 = 1.75 = 2 x 7 / 8, and it sums: all-reduce. Size 0 is no point."""
    log = "localhost:3442:3442 [0] NCCL INFO Launch mode Parallel\n"
    path = write(tmp_path, "log.txt", "# nThread 1 nGpus 8\n", old_ranks(8), OLD_HEADER, log, REDUCE_ROWS, FOOTER)
    found = read_nccl_tests([path])
    assert [(p.op, p.group_size, p.n_nodes, p.bytes) for p in found.points] == [
        ("all_reduce", 8, 1, 1048576),
        ("all_reduce", 8, 1, 8589934592),
    ]
    assert found.notes == () and found.gpus == {"A100-SXM4-40GB"}


def test_blank_columns_of_an_old_alltoall(tmp_path: Path) -> None:
    row = "    33554432       1048576   float            237.5  141.30  123.64    N/A    234.5  143.11  125.22    N/A\n"
    path = write(tmp_path, "alltoall.log", "# nThread 1 nGpus 8\n", old_ranks(8), OLD_HEADER, row, FOOTER)
    (point,) = read_nccl_tests([path]).points
    assert (point.op, point.bytes, point.seconds) == ("all_to_all", 33554432, pytest.approx(237.5e-6))


def test_several_nodes_several_runs_and_mpiruns_prefix(tmp_path: Path) -> None:
    """16 ranks: factor 2 x 15 / 16 = 1.875 and 15 / 16 = 0.9375."""
    reduce = "  1073741824     268435456  bfloat16     sum      -1    10000  107.37  201.33      0    10000  107.37  201.33      0\n"
    scatter = "  1073741824      16777216      half     sum      -1     5000  214.75  201.33      0     5000  214.75  201.33      0\n"
    first = "$ mpirun ./build/all_reduce_perf -b 1G\n" + ranks(16) + NEW_HEADER + reduce + FOOTER
    second = "# Collective test starting: reduce_scatter_perf\n" + ranks(16) + NEW_HEADER + scatter + FOOTER
    text = "".join(f"[1,0]<stdout>:{line}\n" for line in (first + second).splitlines())
    found = read_nccl_tests([write(tmp_path, "job-123.out", text)])
    assert [(p.op, p.group_size, p.n_nodes, p.dtype) for p in found.points] == [
        ("all_reduce", 16, 2, "bf16"),
        ("reduce_scatter", 16, 2, "fp16"),
    ]


@pytest.mark.parametrize(
    "prefix", ["[prterun-node-1@1,0]<stdout>: ", "[launcher-0] ", "2024-05-01T10:00:00.12Z [1,0]<stdout>:"]
)
def test_what_launchers_and_loggers_put_before_lines(prefix: str) -> None:
    text = "./all_gather_perf\n" + ranks(2) + NEW_HEADER + GATHER_ROWS
    (run,) = parse("".join(f"{prefix}{line}\n" for line in text.splitlines()), "x")
    assert (run.said, run.group_size, [row.n_bytes for row in run.rows]) == ("all_gather", 2, [67108864, 8589934592])


def test_groups_that_run_at_once_are_counted_apart() -> None:
    text = ranks(4).replace("Rank  2 Group  0", "Rank  2 Group  1").replace("Rank  3 Group  0", "Rank  3 Group  1")
    (run,) = parse(text + NEW_HEADER + GATHER_ROWS, "x")
    assert run.group_size == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello\nworld\n", "has no table of nccl-tests; it begins with 'hello'"),
        ("", "has no table"),
        (ranks(2) + NEW_HEADER, "has no table"),
        (NEW_HEADER + GATHER_ROWS, "line 5: a row comes before any '#  Rank ...' line"),
        (ranks(2) + GATHER_ROWS, "line 6: a row comes before the header"),
        (ranks(2) + NEW_HEADER + GATHER_ROWS[:150], "line 11 is cut off or not of nccl-tests"),
        (ranks(2) + NEW_HEADER + GATHER_ROWS.replace("100.1", "xyz.1"), "line 10 has something else than numbers"),
        (ranks(2) + NEW_HEADER + GATHER_ROWS.replace("335.14      0", "335.14     12"), "line 10: 12 wrong values"),
        (ranks(2) + NEW_HEADER + GATHER_ROWS.replace("100.1", "300.1"), "line 10: 67108864 bytes in 300.1 us are 223"),
        (ranks(4) + NEW_HEADER + GATHER_ROWS, "line 13: busbw 482.71 beside algbw 965.42 is not what all_gather over 4"),
        ("./broadcast_perf -b 8\n" + ranks(2) + NEW_HEADER + GATHER_ROWS, "is of broadcast_perf; allowed: all_gather"),
        (ranks(2) + NEW_HEADER + GATHER_ROWS.replace(" -1 ", "  0 "), "line 10: root is 0: a broadcast, reduce, gather or"),
        (ranks(2) + NEW_HEADER + GATHER_ROWS.replace("100.1", "  inf"), "line 10: time is inf us; allowed: a finite number"),
        (ranks(1) + NEW_HEADER + GATHER_ROWS, "is of one rank, which sends nothing; allowed: at least 2"),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_line(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, "all_gather.txt", text)
    with pytest.raises(InputError) as refusal:
        read_nccl_tests([path])
    assert words in str(refusal.value) and str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unnamed_gather_is_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not say which collective it is of \(all_gather or all_to_all"):
        read_nccl_tests([write(tmp_path, "log.txt", ranks(2), NEW_HEADER, GATHER_ROWS)])


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_nccl_tests([tmp_path / "none.txt"])
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not text"):
        read_nccl_tests([tmp_path / "x.bin"])


def test_points_go_into_a_profile_in_place_of_its_own(tmp_path: Path) -> None:
    own = CollectivePoint("all_gather", 2, 1, 67108864, 0.5, "fp32")
    other = CollectivePoint("all_reduce", 2, 1, 4096, 1e-5, "fp32")
    profile = HardwareProfile(
        name="b200", arch="blackwell", origin="measured", date="2026-11-22", collectives=(own, other),
        skipped={"collectives": "this machine has one GPU", "files": "x"},
    )  # fmt: skip
    save_profile(profile, tmp_path / "p.json")
    files = [write(tmp_path, "all_gather.txt", ranks(2), NEW_HEADER, GATHER_ROWS, FOOTER)]
    import_nccl_tests(tmp_path / "p.json", files)
    again = load_profile(tmp_path / "p.json")
    assert [(p.op, p.bytes) for p in again.collectives] == [
        ("all_reduce", 4096), ("all_gather", 67108864), ("all_gather", 8589934592),
    ]  # fmt: skip
    assert again.collectives[1].seconds == pytest.approx(100.1e-6)
    assert dict(again.skipped) == {"files": "x"}
    assert set(again.sources) == {"nccl-tests:all_gather.txt"}
    import_nccl_tests(tmp_path / "p.json", files)
    assert load_profile(tmp_path / "p.json").collectives == again.collectives, "twice is once"


def test_a_gpu_that_the_catalogue_does_not_know_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path, "all_gather.txt", ranks(2, gpu="NVIDIA Z900"), NEW_HEADER, GATHER_ROWS, FOOTER)
    assert read_nccl_tests([path]).notes == (
        "collectives were taken on 'NVIDIA Z900', which the catalogue does not know",
    )


def test_another_gpus_output_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "all_gather.txt", ranks(2, gpu="NVIDIA H100 80GB HBM3"), NEW_HEADER, GATHER_ROWS)
    with pytest.raises(InputError, match="NVIDIA H100 80GB HBM3"):
        require_same_gpu(read_nccl_tests([path]), "a100-80")
    unknown = write(tmp_path, "all_gather.txt", ranks(2, gpu="NVIDIA Z900"), NEW_HEADER, GATHER_ROWS)
    require_same_gpu(read_nccl_tests([unknown]), "a100-80")
    with pytest.raises(InputError, match="of 'NVIDIA Z900', the profile of 'cpu'"):
        require_same_gpu(read_nccl_tests([unknown]), "cpu")


def log_of(link: LinkModel, op: str, n_ranks: int, per_node: int) -> str:
    """What nccl-tests would print of ``op`` on H100s whose collectives follow ``link``."""
    cluster, place = catalog.cluster("h100-sxm", 8), placement(n_ranks, per_node)
    factor = (2 if op == "all_reduce" else 1) * (n_ranks - 1) / n_ranks
    redop = "none" if op == "all_gather" else "sum"
    rows = ""
    for n_bytes in (1 << k for k in range(12, 34, 2)):
        seconds = min(way.seconds for way in ways(op, n_bytes, place, cluster, link))  # type: ignore[arg-type]
        rate = n_bytes / seconds / 1e9
        line = f"{seconds * 1e6:10.2f} {rate:8.2f} {rate * factor:8.2f} 0 "
        rows += f"{n_bytes:12d} {n_bytes // 4:12d} float {redop} -1 {line} {line}\n"
    return ranks(n_ranks, per_node, "NVIDIA H100 80GB HBM3") + NEW_HEADER + rows + FOOTER


def test_a_network_is_fitted_where_there_is_no_profile(tmp_path: Path) -> None:
    """A cluster with a slow network and a long floor, from 8 and 16 ranks: forecasts of 64 ranks follow."""
    shipped = profile_for(catalog.gpu("h100-sxm"))[0]
    assert shipped.link is not None
    real = replace(shipped.link, launch_s=35e-6, ring_efficiency=0.7, inter_efficiency=0.5, inter_floor_s=120e-6)
    files = [
        write(tmp_path, f"{op}_{n}.txt", log_of(real, op, n, 8)) for op in ("all_gather", "all_reduce") for n in (8, 16)
    ]
    profile = import_nccl_tests(tmp_path / "cluster.json", files)
    assert load_profile(tmp_path / "cluster.json").link == profile.link and profile.gpu == catalog.gpu("h100-sxm")
    assert profile.link is not None and profile.link.inter_efficiency == pytest.approx(0.5, rel=0.1)
    assert any(note.startswith("collectives follow 44 points of nccl-tests, 0%") for note in profile.notes), (
        profile.notes
    )
    cluster = catalog.cluster("h100-sxm", 64)
    served, _ = profile_for(cluster.gpu, profile)
    for n_bytes in (1 << 20, 1 << 28, 1 << 32):
        took = [
            CollectiveTimer(cluster, replace(shipped, link=link), 64, 8).seconds("all_gather", n_bytes)
            for link in (served.link, real, shipped.link)
        ]
        assert took[0] == pytest.approx(took[1], rel=0.1) and took[0] > 1.2 * took[2]


def test_a_gpu_that_the_output_does_not_tell_must_be_given(tmp_path: Path) -> None:
    path = write(tmp_path, "all_gather.txt", ranks(2, gpu="NVIDIA Z900"), NEW_HEADER, GATHER_ROWS, FOOTER)
    with pytest.raises(InputError, match="'NVIDIA Z900' does not tell it"):
        import_nccl_tests(tmp_path / "none.json", [path])
    assert import_nccl_tests(tmp_path / "z.json", [path], "b200").name == "b200-fitted"
