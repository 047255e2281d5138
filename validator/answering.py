"""``Answering``: a process of its own that answers with lines, and may crash or hang."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence

from validator.provenance import TREE


class Answering:
    """``command``, at the head of a process group. What it writes to standard error is kept."""

    def __init__(self, command: Sequence[str]) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TREE))))}
        self._log = tempfile.TemporaryFile(prefix="zerocast-")  # noqa: SIM115  # ``end`` closes it
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env,
            start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._forward, daemon=True).start()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def tell(self, line: str) -> None:
        """Raises ``OSError`` when it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self, limit_s: float) -> str:
        """Its next line; empty at its end. Raises ``queue.Empty`` when none came within the limit."""
        return self._lines.get(timeout=limit_s)

    def why_it_ended(self) -> str:
        """Its signal or exit status, and its last words. Waits for its end."""
        status = self._process.wait()
        why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        self._log.seek(0)
        said = [line for line in self._log.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
        return f"{why}; its last line: {said[-1].strip()[:200]}" if said else why

    def end(self) -> None:
        """Its whole group ends."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _forward(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed by ``end``
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put("")
