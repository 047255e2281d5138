"""``StateFiles``: records (masters and optimizer states of one group each) in files that survive whatever happens.

Two data files take turns: the records of one version are read from one while those of the next are written to the other.
A version exists once its data is on the disk and the commit record, which names it with a checksum of every block, has been
renamed into place. Until then, and whatever tears or fills up, the version before is whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from estimator.errors import InputError
from estimator.schedule.nvme import FILE_ALIGNMENT_BYTES, IO_BLOCK_BYTES, IO_QUEUE
from estimator.units import format_bytes
from runtime.offload.direct import aligned_bytes, file_system, open_direct

_FORMAT = 1
_COMMIT = "commit.json"
Done = Callable[[], Any]
"""Returns when something that must come first is over."""


@dataclass(frozen=True)
class Version:
    """A whole version: ``checksums[i][j]`` is the CRC-32 of block ``j`` of record ``i``; ``note`` is the writer's own."""

    number: int
    checksums: tuple[tuple[int, ...], ...]
    note: dict[str, Any]


class Transfer:
    """One record under way. ``wait`` returns when it has arrived, or raises the ``InputError`` that stopped it."""

    def __init__(self) -> None:
        self.start_s = self.end_s = 0.0
        self.futures: list[Future[int]] = []
        self._lock = threading.Lock()

    def note_time(self, start_s: float, end_s: float) -> None:
        with self._lock:
            self.start_s = min(self.start_s or start_s, start_s)
            self.end_s = max(self.end_s, end_s)

    def wait(self) -> list[int]:
        """Checksums of the blocks."""
        return [future.result() for future in self.futures]


class StateFiles:
    """The files of one rank in ``folder``. Not for two writers at once."""

    def __init__(
        self, folder: Path, record_bytes: Sequence[int], *, resume: bool = False, queue: int = IO_QUEUE,
        block_bytes: int = IO_BLOCK_BYTES,
    ) -> None:  # fmt: skip
        """``record_bytes``: sizes of the records, multiples of 4096. ``resume``: go on from the last whole version.

        Both data files get their full size at once. Raises ``InputError`` where ``folder`` has no room, holds a version although
        ``resume`` is off, or none (or one of other records) although it is on.
        """
        assert (
            all(n > 0 and n % FILE_ALIGNMENT_BYTES == 0 for n in record_bytes)
            and block_bytes % FILE_ALIGNMENT_BYTES == 0
        )
        self.folder, self.record_bytes, self._block_bytes = folder, tuple(record_bytes), block_bytes
        self._offsets = [0, *accumulate(self.record_bytes)]
        self.versions: list[Version] = []
        """Whole versions, oldest first: two at most, of which the older is lost when the next is begun."""
        self._files: list[int] = []
        self._written: dict[int, Transfer] = {}
        self._seconds: dict[str, list[Transfer]] = {"nvme_read": [], "nvme_write": []}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"nvme_folder is {str(folder)!r}, which cannot be made: {error.strerror}") from None
        self._open(resume)
        self._readers = ThreadPoolExecutor(queue, "zerocast-nvme-read")
        self._writers = ThreadPoolExecutor(queue, "zerocast-nvme-write")

    # ---- opening --------------------------------------------------------------------------------------------------

    def _open(self, resume: bool) -> None:
        found = _read_commit(self.folder)
        if found is not None and not resume:
            raise InputError(
                f"nvme_folder is {str(self.folder)!r}, which holds version {found[1][-1].number} of an earlier run; allowed: a "
                "folder without one, or to resume from it"
            )
        if resume:
            if found is None:
                raise InputError(f"nvme_folder is {str(self.folder)!r}, which holds no whole version to resume from")
            if found[0] != (self.record_bytes, self._block_bytes):
                raise InputError(
                    f"nvme_folder is {str(self.folder)!r}, which was written by a job with other shards or another optimizer"
                )
            self.versions = found[1]
        paths = [self.folder / f"states.{i}" for i in range(2)]
        try:
            self._files, self.direct = _open_both(paths)
            if not resume:
                for file in self._files:
                    os.posix_fallocate(file, 0, self._offsets[-1])
                _sync_folder(self.folder)
        except OSError as error:
            self._close_files()
            if not resume:
                for path in paths:
                    path.unlink(missing_ok=True)
            raise InputError(
                f"nvme_folder is {str(self.folder)!r} with {format_bytes(_free(self.folder))} free; allowed: one with room for "
                f"two versions of {format_bytes(self._offsets[-1])} ({error.strerror})"
            ) from None
        if any(os.fstat(file).st_size < self._offsets[-1] for file in self._files):
            self._close_files()
            raise InputError(f"nvme_folder is {str(self.folder)!r}, whose data files are cut short")

    @property
    def kind(self) -> str:
        """For reports: how the files are accessed and on what."""
        how = "direct" if self.direct else "buffered (the file system takes no direct access)"
        return f"{how}, {file_system(self.folder)}"

    @property
    def version(self) -> Version | None:
        """The last whole version."""
        return self.versions[-1] if self.versions else None

    @property
    def pending(self) -> Set[int]:
        """Records of the next version that have been written, or are being."""
        return self._written.keys()

    def roll_back(self, number: int) -> None:
        """Go on from the older version ``number``. Raises ``InputError`` where it is not there."""
        if number not in (v.number for v in self.versions):
            raise InputError(f"nvme_folder is {str(self.folder)!r}, which does not hold version {number} any more")
        self.versions = [v for v in self.versions if v.number <= number]

    # ---- moving ---------------------------------------------------------------------------------------------------

    def read(self, record: int, into: Tensor, after: Iterable[Done] = (), version: Version | None = None) -> Transfer:
        """Start reading a record of ``version`` (default: the last one) once ``after`` is over.

        ``into``: aligned uint8 of the record's size. Waiting raises ``InputError`` where a block is not what was written.
        """
        version = version or self.version
        assert version is not None, "nothing has been committed"
        file, wanted, memory = self._files[version.number % 2], version.checksums[record], _memory(into)
        first = [*after]

        def work(block: int) -> int:
            for done in first:
                done()
            start_s, (low, high) = time.perf_counter(), self._block(record, block)
            offset = self._offsets[record] + low
            try:
                n = _read_all(file, memory[low:high], offset)
            except OSError as error:
                raise self._torn(record, block, version, f"cannot be read: {error.strerror}") from None
            if n != high - low:
                raise self._torn(record, block, version, f"ends {high - low - n} bytes early")
            checksum = zlib.crc32(memory[low:high])
            transfer.note_time(start_s, time.perf_counter())
            if checksum != wanted[block]:
                raise self._torn(record, block, version, "does not have the checksum that it was written with")
            return checksum

        transfer = Transfer()
        transfer.futures = [self._readers.submit(work, block) for block in range(self._n_blocks(record))]
        self._seconds["nvme_read"].append(transfer)
        return transfer

    def write(self, record: int, source: Tensor) -> Transfer:
        """Start writing a record of the next version; ``source`` must not change until that is over."""
        number = self._next
        self.versions = [v for v in self.versions if v.number % 2 != number % 2]
        file, memory = self._files[number % 2], _memory(source)

        def work(block: int) -> int:
            start_s, (low, high) = time.perf_counter(), self._block(record, block)
            checksum = zlib.crc32(memory[low:high])
            try:
                _write_all(file, memory[low:high], self._offsets[record] + low)
            except OSError as error:
                raise self._full(number, error) from None
            transfer.note_time(start_s, time.perf_counter())
            return checksum

        transfer = Transfer()
        transfer.futures = [self._writers.submit(work, block) for block in range(self._n_blocks(record))]
        self._written[record] = transfer
        self._seconds["nvme_write"].append(transfer)
        return transfer

    def commit(self, note: dict[str, Any]) -> Version:
        """Make what has been written since the last commit (every record, once) the newest whole version."""
        assert self._written.keys() == set(range(len(self.record_bytes))), "a record of the version is missing"
        number = self._next
        checksums = tuple(tuple(self._written[i].wait()) for i in range(len(self.record_bytes)))
        new = Version(number, checksums, note)
        versions = [*self.versions, new]
        try:
            os.fsync(self._files[number % 2])
            _write_commit(self.folder, self.record_bytes, self._block_bytes, versions)
        except OSError as error:
            raise self._full(number, error) from None
        self.versions, self._written = versions, {}
        return new

    def start_step(self) -> None:
        """Forget the transfers of the past."""
        for transfers in self._seconds.values():
            transfers.clear()

    def seconds(self) -> dict[str, float]:
        """Seconds since ``start_step`` in which something was read, and in which something was written."""
        return {way: _union((t.start_s, t.end_s) for t in moved) for way, moved in self._seconds.items() if moved}

    def close(self) -> None:
        """Wait for what is under way and give the files back. They stay."""
        self._readers.shutdown()
        self._writers.shutdown()
        self._close_files()

    # ---- help -----------------------------------------------------------------------------------------------------

    @property
    def _next(self) -> int:
        return self.versions[-1].number + 1 if self.versions else 0

    def _n_blocks(self, record: int) -> int:
        return -(-self.record_bytes[record] // self._block_bytes)

    def _block(self, record: int, block: int) -> tuple[int, int]:
        low = block * self._block_bytes
        return low, min(low + self._block_bytes, self.record_bytes[record])

    def _close_files(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []

    def _torn(self, record: int, block: int, version: Version, what: str) -> InputError:
        return InputError(
            f"block {block} of record {record} of version {version.number} in nvme_folder {str(self.folder)!r} {what}; "
            "nothing has been written over"
        )

    def _full(self, number: int, error: OSError) -> InputError:
        whole = f"version {number - 1} is whole" if number else "no version was whole yet"
        return InputError(
            f"version {number} of {format_bytes(self._offsets[-1])} could not be written to nvme_folder {str(self.folder)!r}, which "
            f"has {format_bytes(_free(self.folder))} free: {error.strerror}; {whole}"
        )


def _memory(tensor: Tensor) -> memoryview:
    assert tensor.data_ptr() % FILE_ALIGNMENT_BYTES == 0
    return tensor.numpy().data


def _read_all(file: int, memory: memoryview, offset: int) -> int:
    """Bytes read; fewer than asked for only at the file's end."""
    done = 0
    while done < len(memory):
        n = os.preadv(file, [memory[done:]], offset + done)
        if n == 0:
            break
        done += n
    return done


def _write_all(file: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        done += os.pwritev(file, [memory[done:]], offset + done)


def _open_both(paths: Sequence[Path]) -> tuple[list[int], bool]:
    """Descriptors for reading and writing, and whether they bypass the page cache.

    Some file systems refuse direct access only when it is tried: one block is read, or written where the file is empty.
    """
    files: list[int] = []
    try:
        for path in paths:
            files.append(open_direct(path, os.O_CREAT))
            block = _memory(aligned_bytes(FILE_ALIGNMENT_BYTES).zero_())
            if _read_all(files[-1], block, 0) == 0:
                _write_all(files[-1], block, 0)
        return files, True
    except OSError as error:
        for file in files:
            os.close(file)
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths], False


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _write_commit(folder: Path, record_bytes: Sequence[int], block_bytes: int, versions: Sequence[Version]) -> None:
    body = json.dumps(
        {
            "format": _FORMAT, "record_bytes": list(record_bytes), "block_bytes": block_bytes,
            "versions": [
                {"number": v.number, "note": v.note, "checksums": ["".join(f"{c:08x}" for c in record) for record in v.checksums]}
                for v in versions
            ],
        }
    )  # fmt: skip
    text = f"{zlib.crc32(body.encode()):08x}\n{body}\n"
    fresh = folder / f"{_COMMIT}.new"
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / _COMMIT)
    _sync_folder(folder)


def _read_commit(folder: Path) -> tuple[tuple[tuple[int, ...], int], list[Version]] | None:
    """Record sizes and block size, and the whole versions; ``None`` without any."""
    try:
        text = (folder / _COMMIT).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        raise InputError(f"nvme_folder is {str(folder)!r}, whose {_COMMIT} cannot be read") from None
    checksum, _, body = text.partition("\n")
    if checksum != f"{zlib.crc32(body.rstrip().encode()):08x}":
        raise InputError(f"nvme_folder is {str(folder)!r}, whose {_COMMIT} is damaged")
    data = json.loads(body)
    if data["format"] != _FORMAT:
        raise InputError(f"nvme_folder is {str(folder)!r}, in format {data['format']}; allowed: format {_FORMAT}")
    versions = [
        Version(
            v["number"],
            tuple(tuple(int(record[i : i + 8], 16) for i in range(0, len(record), 8)) for record in v["checksums"]),
            v["note"],
        )
        for v in data["versions"]
    ]
    return (tuple(data["record_bytes"]), data["block_bytes"]), versions


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of ``spans``."""
    total, reached = 0.0, float("-inf")
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, reached))
        reached = max(reached, high)
    return total
