"""Runs the checks of a GPU, one after the other in a process of their own (``python -m validator.gpu.run FIRST``).

That process prints a JSON line before and after each check. One that crashes it or hangs costs only itself: another process goes
on behind it, as it does where a failure stays with the process (an illegal access).
"""

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
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from validator.provenance import TREE

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
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TREE))))}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env,
            start_new_session=True,
        )  # fmt: skip
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_forward, args=(process, lines), daemon=True).start()
        said, pending = 0, False
        try:
            while True:
                patience_s = limit_s if said else limit_s + START_S
                try:
                    line = lines.get(timeout=patience_s)
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
            status = process.wait()
            if not said or pending:
                why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
                yield False, f"took its process down, {why}{_last_words(log)}"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()


def _last_words(log: Any) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    return f"; its last line: {lines[-1].strip()[:200]}" if lines else ""


def _forward(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    """Hands on every line, and an empty one at the end."""
    assert process.stdout is not None
    with contextlib.suppress(ValueError, OSError):  # closed at the end
        for line in process.stdout:
            lines.put(line)
    lines.put("")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
