"""The process in which kernels are timed: one JSON case per line on stdin, one JSON answer per line on stdout.

An answer is ``{"report": ...}`` or ``{"failed": sentence, "fatal": bool}``; after a fatal one the process is not to be
used again. It ends when stdin closes, which it does when the campaign ends, however it ends.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from typing import Any

from estimator.errors import InputError
from validator.kernels.case import KernelCase
from validator.measure.case import available_cores
from validator.measure.worker import is_out_of_memory


def main() -> int:
    """Entry point."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    cases: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_follow_stdin, args=(cases,), daemon=True).start()
    bench: Any = None
    while True:
        case = KernelCase(**json.loads(cases.get()))
        answer: dict[str, Any]
        try:
            if bench is None or bench.device != case.device:
                bench = _bench(case.device)
            answer = {"report": bench.measure(case).to_dict()}
        except Exception as error:
            answer = _failure(error, case.device)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _bench(device: str) -> Any:
    import torch

    from runtime.host_memory import keep_freed_memory
    from validator.kernels.measure import Bench

    keep_freed_memory()
    torch.set_num_threads(available_cores())
    torch.manual_seed(0)
    return Bench(device)


def _failure(error: Exception, device: str) -> dict[str, Any]:
    text = " ".join(str(error).split())[:400]
    if is_out_of_memory(error):
        import torch

        error.__traceback__ = None  # its frames hold the operands
        if device == "cuda":
            torch.cuda.empty_cache()
        return {"failed": f"out of memory: {text}", "fatal": False}
    if isinstance(error, InputError):
        return {"failed": text, "fatal": False}
    traceback.print_exc()
    return {"failed": f"{type(error).__name__}: {text}", "fatal": True}


def _follow_stdin(cases: queue.Queue[str]) -> None:
    for line in sys.stdin:
        cases.put(line)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
