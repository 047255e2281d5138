"""Records in files: what was committed is read back whatever happens, and what is torn is said to be."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from estimator.errors import InputError
from runtime.offload import nvme
from runtime.offload.direct import aligned_bytes
from runtime.offload.nvme import StateFiles

PAGE = 4096
RECORDS = (PAGE, 5 * PAGE, 3 * PAGE)
"""With blocks of two pages: one, three and two blocks."""


@contextmanager
def opened(folder: Path, *, resume: bool = False, record_bytes: tuple[int, ...] = RECORDS) -> Iterator[StateFiles]:
    files = StateFiles(folder, record_bytes, resume=resume, block_bytes=2 * PAGE)
    try:
        yield files
    finally:
        files.close()


def content(record: int, version: int, n_bytes: int) -> Tensor:
    """Random bytes of their own for every record and version."""
    generator = torch.Generator().manual_seed(100 * version + record)
    return aligned_bytes(n_bytes).copy_(torch.randint(256, (n_bytes,), generator=generator, dtype=torch.uint8))


def write_version(files: StateFiles, number: int) -> None:
    for i, n_bytes in enumerate(files.record_bytes):
        files.write(i, content(i, number, n_bytes))
    assert files.commit({"n": number}).number == number


def assert_holds(files: StateFiles, number: int) -> None:
    version = next(v for v in files.versions if v.number == number)
    assert version.note == {"n": number}
    for i, n_bytes in enumerate(files.record_bytes):
        got = aligned_bytes(n_bytes)
        files.read(i, got, version=version).wait()
        assert torch.equal(got, content(i, number, n_bytes))


def test_versions_take_turns_and_two_are_there(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        for number in range(4):
            write_version(files, number)
            assert [v.number for v in files.versions] == [number - 1, number][number == 0 :]
            for v in files.versions:
                assert_holds(files, v.number)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["commit.json", "states.0", "states.1"]
    assert all((tmp_path / f"states.{i}").stat().st_size == sum(RECORDS) for i in range(2))
    with opened(tmp_path, resume=True) as files:
        assert files.version is not None and files.version.number == 3
        assert_holds(files, 3)
        assert_holds(files, 2)
        write_version(files, 4)
    with opened(tmp_path, resume=True) as files:
        files.roll_back(3)
        with pytest.raises(InputError, match="does not hold version 2 any more"):
            files.roll_back(2)
        write_version(files, 4)
        assert_holds(files, 4)


def test_the_last_version_is_read_while_the_next_is_written(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        write_version(files, 0)
        for i, n_bytes in enumerate(RECORDS):
            files.write(i, content(i, 1, n_bytes)).wait()
            assert_holds(files, 0)
        assert files.pending == {0, 1, 2}
        files.commit({"n": 1})
        assert_holds(files, 1)


def test_a_read_waits_for_what_must_come_first_and_seconds_are_of_the_union(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        write_version(files, 0)
        files.start_step()
        may_read, into = threading.Event(), aligned_bytes(RECORDS[1]).zero_()
        reading = files.read(1, into, after=[may_read.wait])
        time.sleep(0.3)
        assert not any(f.done() for f in reading.futures) and not into.any()
        may_read.set()
        reading.wait()
        assert torch.equal(into, content(1, 0, RECORDS[1]))
        assert 0 < files.seconds()["nvme_read"] < 0.3
        assert "nvme_write" not in files.seconds()
    assert nvme._union([(0.0, 1.0), (0.5, 2.0), (3.0, 4.0), (3.2, 3.4)]) == 3.0


# ---- opening ------------------------------------------------------------------------------------------------------


def test_a_version_of_another_run_is_not_written_over(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        write_version(files, 0)
    with pytest.raises(
        InputError, match=r"holds version 0 of an earlier run; allowed: a folder without one, or to resume"
    ):
        StateFiles(tmp_path, RECORDS)
    with opened(tmp_path, resume=True) as files:
        assert_holds(files, 0)


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no whole version to resume from"):
        StateFiles(tmp_path / "empty", RECORDS, resume=True)
    with opened(tmp_path) as files:
        write_version(files, 0)
    with pytest.raises(InputError, match="written by a job with other shards or another optimizer"):
        StateFiles(tmp_path, (PAGE,), resume=True)
    (tmp_path / "states.1").write_bytes(b"")
    with pytest.raises(InputError, match="whose data files are cut short"):
        StateFiles(tmp_path, RECORDS, resume=True, block_bytes=2 * PAGE)
    commit = (tmp_path / "commit.json").read_text()
    (tmp_path / "commit.json").write_text(commit.replace('"number": 0', '"number": 7'))
    with pytest.raises(InputError, match=r"commit\.json is damaged"):
        StateFiles(tmp_path, RECORDS, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        StateFiles(tmp_path / "file" / "below", RECORDS)


def test_a_file_system_without_direct_access_is_used_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(nvme, "open_direct", refuse)
    with opened(tmp_path) as files:
        assert not files.direct and files.kind.startswith("buffered (the file system takes no direct access), ")
        write_version(files, 0)
        assert_holds(files, 0)


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_torn_block_is_found_and_the_version_before_is_whole(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        write_version(files, 0)
        write_version(files, 1)
        with (tmp_path / "states.1").open("r+b") as file:
            file.seek(RECORDS[0] + 2 * PAGE + 17)  # record 1, block 1
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            os.fsync(file.fileno())
        with pytest.raises(InputError, match=r"block 1 of record 1 of version 1 .* does not have the checksum") as torn:
            files.read(1, aligned_bytes(RECORDS[1])).wait()
        assert "\n" not in str(torn.value)
        assert_holds(files, 0)


def test_a_file_that_was_cut_is_found(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        write_version(files, 0)
        os.truncate(tmp_path / "states.0", sum(RECORDS) - PAGE)
        with pytest.raises(InputError, match=r"block 1 of record 2 of version 0 .* ends 4096 bytes early"):
            files.read(2, aligned_bytes(RECORDS[2])).wait()


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_version_that_is_not_committed_does_not_exist(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path) as files:
        write_version(files, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail) if name == "fsync" else patch.setattr(Path, "replace", fail)
            with pytest.raises(
                InputError, match=r"version 1 of 36.00 KiB could not be written .* No space left.*; version 0 is whole"
            ):
                write_version(files, 1)
    with opened(tmp_path, resume=True) as files:
        assert files.version is not None and files.version.number == 0
        assert_holds(files, 0)


def child(code: str, *args: object) -> subprocess.Popen[str]:
    text = (
        "from pathlib import Path\nimport sys, resource, torch\nfrom tests.runtime.test_nvme_files import *\n"
        + textwrap.dedent(code)
    )
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_full_disk_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    done = child(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * PAGE, resource.RLIM_INFINITY))
        try:
            StateFiles(Path(sys.argv[1]), RECORDS)
        except InputError as error:
            print(error)
        """,
        tmp_path / "full",
    )  # fmt: skip
    out, err = done.communicate(timeout=60)
    assert "free; allowed: one with room for two versions of 36.00 KiB (File too large)" in out, err
    assert list((tmp_path / "full").iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_last_version_whole(tmp_path: Path) -> None:
    done = child(
        """
        with opened(Path(sys.argv[1])) as files:
            write_version(files, 0)
            write_version(files, 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * PAGE, resource.RLIM_INFINITY))
            try:
                write_version(files, 2)
            except InputError as error:
                print(error)
        """,
        tmp_path,
    )  # fmt: skip
    out, err = done.communicate(timeout=60)
    assert "version 2 of 36.00 KiB could not be written" in out and "File too large; version 1 is whole" in out, err
    with opened(tmp_path, resume=True) as files:
        assert files.version is not None and files.version.number == 1
        assert_holds(files, 1)


def test_a_process_that_is_killed_at_any_moment_leaves_a_whole_version(tmp_path: Path) -> None:
    for attempt, pause_s in enumerate((0.0, 0.011, 0.037)):
        folder = tmp_path / str(attempt)
        writer = child(
            """
            with opened(Path(sys.argv[1]), record_bytes=(64 * PAGE, 32 * PAGE)) as files:
                for number in range(10**6):
                    write_version(files, number)
                    if number == 3:
                        print("going", flush=True)
            """,
            folder,
        )  # fmt: skip
        assert writer.stdout is not None and writer.stdout.readline() == "going\n"
        time.sleep(pause_s)
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=60)
        with opened(folder, resume=True, record_bytes=(64 * PAGE, 32 * PAGE)) as files:
            assert files.version is not None and files.version.number >= 3
            assert_holds(files, files.version.number)
            write_version(files, files.version.number + 1)
