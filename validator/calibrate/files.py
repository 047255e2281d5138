"""Files read and written directly (O_DIRECT): at the device's pace, not at that of the page cache."""

from __future__ import annotations

import mmap
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from estimator.errors import InputError
from estimator.schedule.nvme import FILE_ALIGNMENT_BYTES
from estimator.time.profile import COMMIT
from estimator.units import MIB, format_bytes
from runtime.offload.direct import IN_MEMORY, aligned_bytes, file_system, open_direct
from runtime.offload.nvme import StateFiles
from validator.calibrate.prepared import Prepared, Skip
from validator.calibrate.tasks import Task

_CALL_BYTES = 64 * MIB
"""About what one timed call moves; less where blocks are small, so that slow disks finish."""
_CALL_BLOCKS = 256
_COMMIT_BLOCKS = 16
"""Written before a timed commit: enough that the drive has something to make lasting."""


def require_folder(folder: str | Path) -> Path:
    """``folder`` as an existing folder in which files can be made. Raises ``InputError``."""
    path = Path(folder)
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"nvme is {str(folder)!r}; allowed: a folder that exists and can be written to")
    return path


def prepare_file(task: Task, folder: Path) -> Prepared:
    """``task.sizes``: block bytes, queue, file bytes. ``queue`` threads go through a file in ``folder``, each with one
    block under way; or they take checksums of blocks in memory; or a version is committed (``COMMIT``)."""
    if task.name == COMMIT:
        return _commits(folder, task.sizes[0])
    block_bytes, queue, file_bytes = task.sizes
    file = _scratch(folder, file_bytes) if task.name != "checksum" else -1
    blocks = max(queue, min(_CALL_BLOCKS, _CALL_BYTES // block_bytes) // queue * queue)
    buffers = [_aligned(block_bytes) for _ in range(queue)]
    threads = ThreadPoolExecutor(queue)
    n_places = file_bytes // block_bytes
    start = [0]

    def work(lane: int, first: int) -> None:
        for i in range(lane, blocks, queue):
            offset = (first + i) % n_places * block_bytes
            if task.name == "checksum":
                zlib.crc32(buffers[lane])
                continue
            if task.name == "read":
                n = os.preadv(file, [buffers[lane]], offset)
            else:
                n = os.pwritev(file, [buffers[lane]], offset)
            if n != block_bytes:
                raise OSError(f"{task.name} of {block_bytes} bytes moved {n}")

    def call() -> None:
        first, start[0] = start[0], start[0] + blocks  # go on where the last call stopped
        for done in [threads.submit(work, lane, first) for lane in range(queue)]:
            done.result()

    return Prepared(call, float(blocks * block_bytes), on_host=True, after=threads.shutdown)


def _commits(folder: Path, block_bytes: int) -> Prepared:
    """Ends a version of an optimizer's files; before that, untimed, ``_COMMIT_BLOCKS`` blocks of it are written."""
    if file_system(folder) in IN_MEMORY:
        raise Skip(f"{str(folder)!r} is on {file_system(folder)}, which is memory, not a disk")
    place = TemporaryDirectory(prefix=".zerocast-calibrate-", dir=folder)
    memory = aligned_bytes(_COMMIT_BLOCKS * block_bytes)
    try:
        files = StateFiles(Path(place.name), [len(memory)], block_bytes=block_bytes)
    except InputError as error:
        place.cleanup()
        raise Skip(str(error)) from None

    def after() -> None:
        files.close()
        place.cleanup()

    memory.zero_()
    return Prepared(
        lambda: files.commit({}), 1.0, on_host=True, before=lambda: files.write(0, memory).wait(), after=after
    )


@lru_cache(maxsize=1)
def _scratch(folder: Path, n_bytes: int) -> int:
    """Descriptor of a file of ``n_bytes`` random bytes without a name: whatever ends this process, nothing is left of it."""
    kind = file_system(folder)
    if kind in IN_MEMORY:
        raise Skip(f"{str(folder)!r} is on {kind}, which is memory, not a disk")
    free = shutil.disk_usage(folder).free
    if free < 2 * n_bytes:
        raise Skip(f"{str(folder)!r} has {format_bytes(free)} free, the file needs {format_bytes(n_bytes)}")
    path = folder / f".zerocast-calibrate-{os.getpid()}"
    try:
        file = open_direct(path, os.O_CREAT | os.O_EXCL)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise Skip(f"the file system ({kind}) of {str(folder)!r} refuses direct access: {error.strerror}") from None
    path.unlink()
    try:
        block = _aligned(MIB)
        block[:] = os.urandom(MIB)
        for offset in range(0, n_bytes, MIB):
            os.pwritev(file, [block], offset)
        os.fsync(file)
    except OSError as error:
        os.close(file)
        raise Skip(
            f"the file system ({kind}) of {str(folder)!r} refuses direct access while writing: {error.strerror}"
        ) from None
    return file


def _aligned(n_bytes: int) -> mmap.mmap:
    """Page-aligned memory, as direct access wants it."""
    assert n_bytes % FILE_ALIGNMENT_BYTES == 0
    return mmap.mmap(-1, n_bytes)
