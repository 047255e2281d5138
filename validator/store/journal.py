"""``Journal``: a campaign's results in a folder, one JSON line each, on the disk before the next measurement starts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from estimator.errors import InputError

Tell = Callable[[str], None]
"""Called with one line for people at a time."""
Identity = tuple[str, str, int | None]
"""What was measured, without the result."""
R = TypeVar("R")


class Journal(Generic[R]):
    """The results in ``folder/name`` and the failures beside them. Opening one locks the folder until the process ends
    or ``close``. Raises ``InputError`` when the folder cannot be used, is in use, or holds a damaged line."""

    def __init__(
        self, folder: Path, name: str, tell: Tell, *, parse: Callable[[str], R], identity: Callable[[R], Identity]
    ) -> None:
        self.path, self.failures = folder / name, folder / "failures.jsonl"
        self._parse, self._identity = parse, identity
        self._known: dict[Identity, R] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
            try:
                self._failed = self._read(tell)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise InputError(f"campaign folder {str(folder)!r} cannot be used: {error.strerror or error}") from None

    def _read(self, tell: Tell) -> set[Identity]:
        """Takes in both files; returns what failed."""
        for number, line in enumerate(_whole_lines(self.path, tell), start=1):
            try:
                self._remember(self._parse(line))
            except InputError as error:
                raise InputError(f"records file {str(self.path)!r}, line {number}: {error}") from None
        try:
            failed = [json.loads(line)["id"] for line in _whole_lines(self.failures, tell)]
            return {(kind, key, place) for kind, key, place in failed}
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{str(self.failures)!r} is damaged; allowed: what a campaign wrote, or no such file"
            ) from None

    def close(self) -> None:
        """Let another campaign use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def known(self, identity: Identity) -> R | None:
        """The last result of ``identity``."""
        return self._known.get(identity)

    def failed_before(self, identity: Identity) -> bool:
        """Whether it gave no result in an earlier campaign."""
        return identity in self._failed

    def write(self, result: R, line: str) -> None:
        """Append ``result`` as ``line``; it is on the disk when this returns. Raises ``InputError`` when it cannot be."""
        append_line(self.path, line)
        self._remember(result)

    def write_failure(self, identity: Identity, error: str, details: dict[str, Any]) -> None:
        """Append what gave no result."""
        append_line(self.failures, json.dumps({"id": identity, "error": error, **details}))

    def _remember(self, result: R) -> None:
        self._known[self._identity(result)] = result


def append_line(path: Path, line: str) -> None:
    """Add ``line`` to the file at ``path``, whole and on the disk, or not at all. Raises ``InputError``."""
    data = line.encode() + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(None, "only part of the line was written, the disk may be full")
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from None


def _lock(folder: Path) -> int | None:
    """Holds ``folder`` for this process; ``None`` where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"another campaign is running in {str(folder)!r}; allowed: another folder, or wait") from None
    return handle


def _whole_lines(path: Path, tell: Tell) -> list[str]:
    """The lines of ``path``; what a killed campaign left of an unfinished last line is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        tell(f"{path}: the last line is not finished ({len(data) - end} bytes); it is cut off and its case runs again")
        os.truncate(path, end)
    return [line for line in data[:end].decode("utf-8", errors="replace").split("\n") if line.strip()]
