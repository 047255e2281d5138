"""Runs the checks of a GPU, one after the other in a process of their own (``python -m validator.gpu.run FIRST``).

That process prints a JSON line before and after each check. One that crashes it or hangs costs only itself: another process goes
on behind it, as it does where a failure stays with the process (an illegal access).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from validator.answering import Answering

LIMIT_S = 25.0
"""For one check."""
START_S = 45.0
"""What the first of a process may take longer: importing torch."""
BUDGET_S = 90.0
"""For all of them: what has not begun by then is not run."""
NAMES = (
    "driver", "product", "attention", "memory statistics", "allocator history", "NVML", "events", "pinned copies",
    "CuPy and NVRTC", "a kernel of ours", "more than 48 KiB of shared memory", "a kernel on a side stream, in a graph", "NCCL",
    "a training step", "a rank of eight, offloaded", "tools",
)  # fmt: skip
"""Of ``validator.gpu.checks.CHECKS``, in their order; known without importing torch."""


def main(argv: Sequence[str]) -> int:
    """The checks from number ``argv[0]`` on; before each a line with its number, then one with what it found."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    import torch

    from validator.gpu.checks import CHECKS

    torch.manual_seed(0)
    for number in range(int(argv[0]), len(CHECKS)):
        _say(answers, {"started": number})
        try:
            answer = {"found": CHECKS[number][1]()}
        except Exception as error:
            name = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            answer = {"failed": name + " ".join(str(error).split())[:400]}
        _say(answers, answer)
        if "failed" in answer and not _still_usable(torch):
            return 1
    return 0


def _still_usable(torch: Any) -> bool:
    """A CUDA error stays with the process."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def _say(answers: Any, line: dict[str, Any]) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


def run_checks(
    *, limit_s: float = LIMIT_S, budget_s: float = BUDGET_S, command: Sequence[str] = (), names: Sequence[str] = NAMES
) -> Iterator[tuple[str, bool, str]]:
    """Name, whether it works, and a sentence for each check, as they end; all of them within about ``budget_s``.

    ``command`` and ``names`` stand in for this module's process and checks in tests.
    """
    command = command or (sys.executable, "-m", "validator.gpu.run")
    ends_s, first = time.monotonic() + budget_s, 0
    while first < len(names):
        if time.monotonic() >= ends_s:
            for name in names[first:]:
                yield name, False, f"not run: the {budget_s:g} s for all checks are over"
            return
        with contextlib.closing(_run_from(first, command, limit_s)) as answers:
            for fine, sentence in answers:
                yield names[first], fine, sentence
                first += 1
                if first == len(names) or time.monotonic() >= ends_s:
                    break


def _run_from(first: int, command: Sequence[str], limit_s: float) -> Generator[tuple[bool, str], None, None]:
    """What a process says of the checks from ``first`` on, until it ends or is ended; at least of one."""
    process = Answering([*command, str(first)])
    said, pending = 0, False
    try:
        while True:
            patience_s = limit_s if said else limit_s + START_S
            try:
                line = process.answer(patience_s)
            except queue.Empty:
                yield False, f"hung: ended after {patience_s:g} s"
                return
            if not line:
                break
            answer = json.loads(line)
            if "started" in answer:
                said += 1
                pending = True
                continue
            pending = False
            yield "found" in answer, answer.get("found") or answer["failed"]
        if not said or pending:
            yield False, f"took its process down, {process.why_it_ended()}"
    finally:
        process.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
