"""``Remote``: times kernels in a process of its own, started when needed and again after a crash."""

from __future__ import annotations

import json
import queue
import sys
from dataclasses import asdict

from validator.answering import Answering
from validator.kernels.case import KernelCase
from validator.kernels.report import KernelReport
from validator.measure.runner import MeasureError, TimeLimitError

WORKER = "validator.kernels.worker"
START_S = 120.0
"""What the first case of a fresh process may take longer: importing torch, finding the GPU, timing the copy."""


class Remote:
    """Use as a context manager: no process outlives it."""

    def __init__(self, worker: str = WORKER) -> None:
        self._module = worker
        self._process: Answering | None = None

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.is_running

    def measure(self, case: KernelCase, limit_s: float) -> KernelReport:
        """Times ``case``, in a fresh process if none is running. Raises ``MeasureError`` when it fails, runs out of
        memory or takes its process down, ``TimeLimitError`` past the limit."""
        if self._process is None or not self._process.is_running:
            self.stop()
            self._process = Answering((sys.executable, "-m", self._module))
        try:
            self._process.tell(json.dumps(asdict(case)))
            line = self._process.answer(limit_s)
        except queue.Empty:
            self.stop()
            raise TimeLimitError(f"{case.label} ran past its limit of {limit_s:g} s and was ended") from None
        except OSError:
            line = ""
        if not line:
            why = self._process.why_it_ended()
            self.stop()
            raise MeasureError(f"the process crashed, {why}")
        answer = json.loads(line)
        if "report" in answer:
            return KernelReport.from_dict(answer["report"])
        if answer["fatal"]:
            self.stop()
        raise MeasureError(answer["failed"])

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.end()
