"""Measures the cases of a baseline again, on the machine that it was made on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from estimator.errors import InputError
from estimator.job.files import job_from_dict
from estimator.report import StepReport
from validator.gate.baseline import BaselineCase, environment_of
from validator.kernels.case import KernelCase
from validator.kernels.remote import START_S, Remote
from validator.kernels.report import KernelReport
from validator.measure.case import Case
from validator.measure.runner import OnProgress, measure
from validator.provenance import TREE

_ASK = "import json; from validator.provenance import collect; print(json.dumps(collect(with_torch=True)))"


KERNEL_LIMIT_S = 60.0
"""Longest that one kernel may take."""


class _MeasuresKernels(Protocol):
    def measure(self, case: KernelCase, limit_s: float) -> KernelReport: ...


def local_environment() -> dict[str, str | None]:
    """This machine's environment, asked in a process of its own: this one shall hold neither torch nor a CUDA context."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TREE))))}
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, env=env, timeout=120)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"the environment of this machine cannot be found out: {last}")
    return environment_of(json.loads(done.stdout.splitlines()[-1]))


def case_of(case: BaselineCase) -> Case:
    """The case to measure. Raises ``InputError`` when the baseline's job is no longer the same job for this version."""
    try:
        job = job_from_dict(case.job)
        again = Case(
            job=job, backend=case.origin, rank=case.rank or 0, steps=case.steps, warmup=case.warmup, seed=case.seed  # type: ignore[arg-type]
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"baseline case {case.name!r} cannot be measured: {error}") from None
    if job.key != case.job_key:
        raise InputError(
            f"baseline case {case.name!r} has job_key {case.job_key!r}, but its job has {job.key!r}; "
            "allowed: a case that 'zerocast check --update' wrote with this version of Zerocast"
        )
    return again


def kernel_case_of(case: BaselineCase) -> KernelCase:
    """The kernel to measure. Raises ``InputError`` when this version would measure something else, or cannot."""
    what = {name: value for name, value in case.job.items() if name != "shape"}
    try:
        again = KernelCase(**what)
    except (InputError, TypeError) as error:
        raise InputError(f"baseline case {case.name!r} cannot be measured: {error}") from None
    if again.key != case.job_key:
        raise InputError(
            f"baseline case {case.name!r} cannot be measured: this version of Zerocast gives it the shape {list(again.shape)}, "
            f"and it was measured with {case.job.get('shape')}"
        )
    return again


def remeasure(
    cases: Sequence[BaselineCase],
    n_runs: int,
    on_progress: OnProgress | None = None,
    measure_one: Callable[[Case, OnProgress | None], StepReport] = measure,
    kernels: Callable[[], AbstractContextManager[_MeasuresKernels]] = Remote,
) -> Iterator[StepReport | KernelReport]:
    """Runs every case ``n_runs`` times and yields each report at once; functions are left to their own tests.

    Round by round over all cases, every second round backwards, so that a machine that slowly drifts hits all cases
    alike. ``fake`` is measured once: it has no noise. The kernels of one round share a process.
    """
    chosen = [case_of(case) for case in cases if case.kind == "step"]
    small = [kernel_case_of(case) for case in cases if case.kind == "kernel"]
    for number in range(n_runs):
        for case in reversed(chosen) if number % 2 else chosen:
            if case.backend != "fake" or number == 0:
                yield measure_one(case, on_progress)
        if small:
            with kernels() as remote:
                for kernel in reversed(small) if number % 2 else small:
                    yield remote.measure(kernel, START_S + KERNEL_LIMIT_S)
