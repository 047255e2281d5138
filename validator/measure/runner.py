"""Runs cases, each in a process (group) of its own with a time limit, and leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from estimator.errors import InputError
from estimator.job.files import job_to_dict
from estimator.report import StepReport
from validator import provenance
from validator.measure.case import Case, available_cores, write_case
from validator.provenance import TREE
from validator.store.database import Store

WORKER = "validator.measure.worker"
"""Module that each process runs."""
_TORCHRUN_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
MAX_PROCESSES_PER_CORE = 8
"""``cpu``: more than this only measures how processes wait for one another."""
_POLL_S = 0.05
_GRACE_S = 3.0
"""How long torchrun gets to clean up after itself before it is killed."""


class MeasureError(RuntimeError):
    """A case that gave no result: it crashed or ran past its time limit. The message ends with its last words."""


class TimeLimitError(MeasureError):
    """A case that ran past its time limit."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One thing that happened while measuring."""

    case: Case
    stage: Literal["start", "step", "done", "recorded", "failed"]
    """``step``: one step is over; ``recorded``: skipped, the store has it already."""
    step: int = 0
    """Number of the step that is over, 0 to ``case.warmup + case.steps - 1``."""
    step_s: float | None = None
    index: int = 0
    """Place of the case among ``n_cases``."""
    n_cases: int = 1
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case of ``measure_many``."""

    case: Case
    status: Literal["measured", "recorded", "failed"]
    report: StepReport | None = None
    error: str | None = None


OnProgress = Callable[[Progress], None]


def measure(case: Case, on_progress: OnProgress | None = None) -> StepReport:
    """Runs ``case`` and returns what was measured; running out of memory is a report with ``fits=False``.

    Raises ``MeasureError`` when it crashes or takes longer than its limit and ``InputError`` when the backend cannot
    run it here. No process outlives this call, also when it is interrupted.
    """
    tell = on_progress or (lambda _: None)
    most = MAX_PROCESSES_PER_CORE * available_cores()
    if case.backend == "cpu" and case.n_processes > most:
        raise InputError(
            f"backend is 'cpu' with {case.n_processes} processes; allowed: at most {most} on the {available_cores()} core(s) "
            "here, or backend 'fake', which needs one"
        )
    tell(Progress(case=case, stage="start"))
    with (
        tempfile.TemporaryDirectory(prefix="zerocast-", ignore_cleanup_errors=True) as folder,
        _nvme_room(case) as nvme_folder,
    ):
        out, log = Path(folder, "report.json"), Path(folder, "log")
        write_case(replace(case, nvme_folder=nvme_folder), Path(folder, "case.json"))
        kills_before = _kernel_memory_kills()
        with log.open("wb") as log_file, _process_group(case, out, log_file) as process:
            status = _wait(case, process, out, log, tell)
        report = _result(case, status, out, log, kills_before)
    tell(Progress(case=case, stage="done"))
    return report


@contextlib.contextmanager
def _nvme_room(case: Case) -> Iterator[str | None]:
    """A folder of the case's own in its ``nvme_folder`` (which is made): gone afterwards, also when its processes were killed."""
    if case.nvme_folder is None:
        yield None
        return
    try:
        Path(case.nvme_folder).mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="zerocast-", dir=case.nvme_folder, ignore_cleanup_errors=True)
    except OSError as error:
        where = repr(case.nvme_folder)
        raise InputError(f"nvme_folder is {where}, where no folder can be made: {error.strerror}") from None
    with folder as name:
        yield name


def measure_many(cases: Sequence[Case], store: Store, on_progress: OnProgress | None = None) -> list[Outcome]:
    """Measures what ``store`` has not recorded yet, adding each report as soon as it exists.

    A failing case does not stop the others. An interrupt (``KeyboardInterrupt``) passes through: calling again
    with the same store goes on where it stopped.
    """
    tell = on_progress or (lambda _: None)
    outcomes: list[Outcome] = []
    for index, case in enumerate(cases):

        def tell_place(progress: Progress, index: int = index) -> None:
            tell(Progress(**{**vars(progress), "index": index, "n_cases": len(cases)}))

        known = _recorded(case, store)
        if known is not None:
            tell_place(Progress(case=case, stage="recorded"))
            outcomes.append(Outcome(case=case, status="recorded", report=known))
            continue
        try:
            report = measure(case, tell_place)
        except (MeasureError, InputError) as error:
            tell_place(Progress(case=case, stage="failed", message=str(error)))
            outcomes.append(Outcome(case=case, status="failed", error=str(error)))
            continue
        store.add(report)
        outcomes.append(Outcome(case=case, status="measured", report=report))
    return outcomes


def _recorded(case: Case, store: Store) -> StepReport | None:
    """The newest record of ``case``, if there is one; of its rank where one is played."""
    reports = store.reports(job_key=case.job.key, origin=case.backend)
    of_rank = [r for r in reports if not case.plays_one_rank or r.rank == case.rank]
    return of_rank[0] if of_rank else None


def command_of(case: Case, case_file: Path, out: Path) -> list[str]:
    """The command that runs ``case``: torchrun when it takes several processes, else the worker itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.n_processes)]
    alone = case.n_processes == 1
    worker = ["-m", WORKER, "--case", str(case_file), "--out", str(out), "--follow-stdin"]
    return [sys.executable, *([] if alone else launcher), *worker]


def command_of_node(case: Case, case_file: Path, out: Path) -> str:
    """What to run on every node of a job that spans several, for a shell; ``out`` is written on the first node."""
    cluster = case.job.cluster
    launcher = f"torchrun --nnodes {cluster.n_nodes} --nproc-per-node {case.n_processes // cluster.n_nodes}"
    meeting = "--rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29400"
    return f"{launcher} {meeting} -m {WORKER} --case {shlex.quote(str(case_file))} --out {shlex.quote(str(out))}"


def _environment(case: Case) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in _TORCHRUN_VARIABLES}
    env["OMP_NUM_THREADS"] = str(case.threads_per_process)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (env.get("PYTHONPATH"), str(TREE))))
    return env


@contextlib.contextmanager
def _process_group(case: Case, out: Path, log_file: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Starts the case; on leaving, however that comes about, all of its processes have ended.

    torchrun puts each worker into a session of its own, out of reach of a signal to the group. So workers also watch
    their stdin, which closes when this process ends for whatever reason, and write down their process ids.
    """
    process = subprocess.Popen(
        command_of(case, out.with_name("case.json"), out),
        stdin=subprocess.PIPE, stdout=log_file, stderr=log_file, env=_environment(case), start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        try:
            if process.stdin is not None:
                process.stdin.close()
            if process.poll() is None:
                _signal_group(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)
        finally:
            if process.poll() is None:
                _signal_group(process.pid, signal.SIGKILL)
            for file in out.parent.glob(f"{out.name}.pid*"):
                pid = int(file.read_text(encoding="utf-8") or 0)
                if pid and pid != process.pid and _still_runs(pid, out):
                    _signal_group(pid, signal.SIGKILL)
            process.wait()


def _still_runs(pid: int, out: Path) -> bool:
    """Whether ``pid`` is still the worker that writes ``out`` (Linux), not a stranger that got its number."""
    try:
        return os.fsencode(out) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _wait(case: Case, process: subprocess.Popen[bytes], out: Path, log: Path, tell: OnProgress) -> int:
    """Exit status of ``process``; passes its steps on meanwhile. Raises ``MeasureError`` past the time limit."""
    deadline = time.monotonic() + case.time_limit_s
    progress_file, seen = out.with_name(f"{out.name}.progress"), 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
        lines = progress_file.read_text(encoding="utf-8").split("\n")[:-1] if progress_file.exists() else []
        for line in lines[seen:]:
            step, step_s = json.loads(line)
            tell(Progress(case=case, stage="step", step=step, step_s=step_s))
        seen = len(lines)
        if process.returncode is not None:
            return process.returncode
        if time.monotonic() > deadline:
            last = f"it had finished {len(lines)} of {case.warmup + case.steps} steps"
            raise TimeLimitError(
                f"{case.label} ran past its limit of {case.time_limit_s:g} s and was ended; {last}{_last_words(log)}"
            )


def _result(case: Case, status: int, out: Path, log: Path, kills_before: int | None) -> StepReport:
    """The report that the ended case left, or what its failure means."""
    if out.exists():
        return StepReport.from_dict(json.loads(out.read_text(encoding="utf-8")))
    failures = [json.loads(f.read_text(encoding="utf-8")) for f in out.parent.glob(f"{out.name}.failure*[0-9]")]
    by_kind: dict[str, dict[str, Any]] = {}
    for failure in sorted(failures, key=lambda f: f["time"]):  # the first to fail is the cause, the others follow
        by_kind.setdefault(failure["kind"], failure)
    if "out_of_memory" in by_kind:
        failure = by_kind["out_of_memory"]
        rank = case.rank if case.plays_one_rank else failure["rank"]
        progress = out.with_name(f"{out.name}.progress")
        n_done = progress.read_text(encoding="utf-8").count("\n") if progress.exists() else 0
        when = f"after {n_done} step(s)" if n_done else "before the first step was over"
        what = f"rank {rank} ran out of memory {when}: {' '.join(failure['message'].split())[:400]}"
        return _does_not_fit(case, rank, what, failure["provenance"])
    if "parity" in by_kind:
        raise MeasureError(f"{case.label}: {by_kind['parity']['message']}")
    if "input" in by_kind:
        raise InputError(by_kind["input"]["message"])
    kills = _kernel_memory_kills()
    silent = by_kind.keys() <= {"lost_rank"}  # nobody said more than that another rank is gone
    if silent and kills_before is not None and kills is not None and kills > kills_before:
        return _does_not_fit(case, 0, "the operating system ended a process because the machine ran out of memory", {})
    if "crash" in by_kind:
        failure = by_kind["crash"]
        what = f"rank {failure['rank']} raised {failure['type']}: {failure['message']}"
        raise MeasureError(f"{case.label} crashed, {what}{_tail(failure['traceback'])}")
    reason = _killed_rank(log) or (by_kind["lost_rank"]["message"] if failures else _manner(status))
    raise MeasureError(f"{case.label} crashed, {reason}{_last_words(log)}")


def _does_not_fit(case: Case, rank: int, explanation: str, origin: dict[str, Any]) -> StepReport:
    gpu = (origin.get("gpu") or {}) if case.on_cuda else {}
    return StepReport(
        origin=case.backend,
        job_key=case.job.key,
        job=job_to_dict(case.job),
        rank=rank,
        fits=False,
        explanation=explanation,
        capacity_bytes=gpu.get("memory_bytes") if case.on_cuda else origin.get("memory_limit_bytes"),
        provenance={**(origin or provenance.collect()), "processes": case.n_processes, "seed": case.seed},
    )


def _killed_rank(log: Path) -> str | None:
    """A rank that a signal ended, other than the one by which torchrun ends the rest, as torchrun wrote it down."""
    text = log.read_text(encoding="utf-8", errors="replace")
    ended = re.findall(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: -(\d+)", text)
    killed = [(rank, int(number)) for rank, number in ended if int(number) != signal.SIGTERM]
    return f"rank {killed[0][0]} was {_manner(-killed[0][1])}" if killed else None


def _manner(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status} and no result"


def _last_words(log: Path) -> str:
    return _tail(log.read_text(encoding="utf-8", errors="replace"))


def _tail(text: str, n_lines: int = 12) -> str:
    """The end of what the case wrote, to finish a message with."""
    lines = [line for line in text.splitlines() if line.strip()]
    return ". Its last lines:\n" + "\n".join(lines[-n_lines:]) if lines else ""


def _kernel_memory_kills() -> int | None:
    """Processes that the Linux kernel has ended for lack of memory since it started; ``None`` elsewhere."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), None)
