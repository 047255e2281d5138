"""``Remote``: times kernels in a process of its own, started when needed and again after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict

from validator.kernels.case import KernelCase
from validator.kernels.report import KernelReport
from validator.measure.runner import MeasureError, TimeLimitError
from validator.provenance import TREE

WORKER = "validator.kernels.worker"
START_S = 120.0
"""What the first case of a fresh process may take longer: importing torch, finding the GPU, timing the copy."""


class Remote:
    """Use as a context manager: no process outlives it."""

    def __init__(self, worker: str = WORKER) -> None:
        self._module = worker
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Remote:
        self._log = tempfile.TemporaryFile(prefix="zerocast-kernels-")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def measure(self, case: KernelCase, limit_s: float) -> KernelReport:
        """Times ``case``, in a fresh process if none is running. Raises ``MeasureError`` when it fails, runs out of
        memory or takes its process down, ``TimeLimitError`` past the limit."""
        if not self.is_running:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(asdict(case)) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            self.stop()
            raise TimeLimitError(f"{case.label} ran past its limit of {limit_s:g} s and was ended") from None
        except OSError:
            line = ""
        if not line:
            process.wait()
            status = process.returncode
            self.stop()
            why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise MeasureError(f"the process crashed, {why}{self._last_words()}")
        answer = json.loads(line)
        if "report" in answer:
            return KernelReport.from_dict(answer["report"])
        if answer["fatal"]:
            self.stop()
        raise MeasureError(answer["failed"])

    def _start(self) -> None:
        self.stop()
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TREE))))}
        self._log.truncate(0)
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, env=env, start_new_session=True,
        )  # fmt: skip
        self._answers = queue.Queue()
        threading.Thread(target=_forward, args=(self._process, self._answers), daemon=True).start()

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
        return f"; its last line: {lines[-1].strip()[:200]}" if lines else ""


def _forward(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    """Hands on every line, and an empty one at the end."""
    for line in _lines(process):
        answers.put(line)
    answers.put("")


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    with contextlib.suppress(ValueError, OSError):  # closed by ``stop``
        yield from process.stdout
