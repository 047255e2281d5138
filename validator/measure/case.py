"""``Case``: one job to be measured, and how."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from estimator.errors import InputError, invalid, require_choice, require_int, unknown_choice
from estimator.job import Job
from estimator.job.files import job_from_dict, job_to_dict
from estimator.job.job import young_choices

Backend = Literal["fake", "cpu", "cuda", "cuda-virtual"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One job, the backend that runs it, and for how long. Raises ``InputError`` when a field is out of range."""

    job: Job
    backend: Backend
    """``fake``: one rank without arithmetic (memory and bytes on the wire); ``cpu``: real steps over gloo; ``cuda``: NCCL;
    ``cuda-virtual``: one GPU plays one rank of a job of any size, everything real but the network."""
    steps: int = 8
    """Measured steps (all but ``fake``)."""
    warmup: int = 3
    """Steps before them that are thrown away."""
    time_limit_s: float = 600.0
    """The whole case, start-up included, is ended after this long."""
    rank: int = 0
    """The rank that ``fake`` or ``cuda-virtual`` plays; the other backends run all ranks."""
    seed: int = 0
    memory_limit_bytes: int | None = None
    """``cpu``: most bytes that one process may hold; ``None``: an equal part of the memory that is free."""
    metered: bool = True
    """Whether one further step meters live bytes by category. Its own peak can lie above that of the other steps, so a
    search for what just fits goes without. ``fake`` always meters."""
    reference: bool = False
    """Whether rank 0 then trains the same model on the same batches in plain PyTorch, and the case fails when the two differ
    by more than rounding explains (``runtime.reference``); ``cpu`` and ``cuda``, where all ranks are real."""
    nvme_folder: str | None = None
    """Where a job with offload ``optimizer:nvme`` has its optimizer's files while it is measured (all but ``fake``)."""

    def __post_init__(self) -> None:
        require_choice("backend", self.backend, get_args(Backend))
        require_int("steps", self.steps)
        for name in ("warmup", "rank", "seed"):
            require_int(name, getattr(self, name), minimum=0)
        limit = self.time_limit_s
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise invalid("time_limit_s", limit, "seconds > 0")
        if self.memory_limit_bytes is not None:
            require_int("memory_limit_bytes", self.memory_limit_bytes)
        if type(self.metered) is not bool or (self.backend == "fake" and not self.metered):
            raise invalid("metered", self.metered, "true" if self.backend == "fake" else "true or false")
        if type(self.reference) is not bool or (self.reference and self.plays_one_rank):
            alone = f"false with backend {self.backend!r}, which plays one rank alone"
            raise invalid("reference", self.reference, alone if self.plays_one_rank else "true or false")
        with_files = needs_files(self.job, self.backend)
        if with_files != (self.nvme_folder is not None):
            offload = self.job.strategy.offload
            raise InputError(
                f"nvme_folder is not given; offload {offload!r} needs a folder for the optimizer's files"
                if with_files
                else f"nvme_folder is {self.nvme_folder!r} with offload {offload!r} and backend {self.backend!r}; allowed: only with "
                "offload 'optimizer:nvme' and a backend other than 'fake'"
            )
        if self.on_cuda and not self.warmup:
            raise invalid("warmup", 0, f"at least 1 with backend {self.backend!r}: the peak is read from then on")
        if not self.plays_one_rank and self.rank:
            raise invalid("rank", self.rank, f"0 with backend {self.backend!r}, which runs every rank")
        n_gpus = self.job.cluster.n_gpus
        if self.rank >= n_gpus:
            raise invalid("rank", self.rank, f"a rank of the {n_gpus} GPUs, 0 to {n_gpus - 1}")

    @property
    def plays_one_rank(self) -> bool:
        """Whether one process plays ``rank`` over torch's fake group instead of one process per rank."""
        return self.backend in ("fake", "cuda-virtual")

    @property
    def on_cuda(self) -> bool:
        """Whether the backend needs a GPU."""
        return self.backend in ("cuda", "cuda-virtual")

    @property
    def n_processes(self) -> int:
        """Processes that the backend starts."""
        return 1 if self.plays_one_rank else self.job.cluster.n_gpus

    @property
    def threads_per_process(self) -> int:
        """CPU threads of each process: the machine's cores shared equally, at least one."""
        return max(1, available_cores() // self.n_processes)

    @property
    def label(self) -> str:
        rank = f" rank{self.rank}" if self.rank else ""
        return f"{job_label(self.job)}{rank} [{self.backend}]"


def needs_files(job: Job, backend: str) -> bool:
    """Whether a case of ``job`` has an optimizer's files."""
    return job.strategy.offload_nvme and backend != "fake"


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def job_label(job: Job) -> str:
    """One short line for people: what differs between the cases of one study."""
    s, w = job.strategy, job.workload
    parts = [
        job.model.name,
        f"{job.cluster.n_gpus}x",
        f"zero{s.zero_stage}",
        s.dtype,
        f"seq{w.seq_len}",
        f"mb{w.micro_batch_size}",
    ]
    if job.n_micro_batches > 1:
        parts.append(f"accum{job.n_micro_batches}")
    parts += [f"{axis}{getattr(s, axis)}" for axis in ("tp", "pp", "cp", "ep") if getattr(s, axis) > 1]
    if s.offload != "none":
        parts.append("offload=" + s.offload.replace(",", "+"))
    if s.recompute != "none":
        parts.append(f"recompute={s.recompute}")
    for name, value in young_choices(s).items():
        parts.append(f"{name}={'+'.join(value) if isinstance(value, tuple) else value}")
    return " ".join(parts)


def case_to_dict(case: Case) -> dict[str, Any]:
    """Plain data for JSON: enough to build the same ``Case`` again."""
    data = {f.name: getattr(case, f.name) for f in fields(case)}
    return {**data, "job": job_to_dict(case.job)}


def case_from_dict(data: Mapping[str, Any], nvme_folder: str | None = None) -> Case:
    """Inverse of ``case_to_dict``; ``nvme_folder`` is for a case that needs one and names none. Raises ``InputError`` on an unknown
    or missing key or a bad value."""
    names = {f.name for f in fields(Case)}
    for key in data:
        if key not in names:
            raise unknown_choice("case field", key, names)
    for key in ("job", "backend"):
        if key not in data:
            raise InputError(f"the case has no field {key!r}")
    if not isinstance(data["job"], dict):
        raise invalid("case.job", data["job"], "a table that describes one job")
    job, named = job_from_dict(data["job"]), data.get("nvme_folder")
    folder = nvme_folder if named is None and needs_files(job, data["backend"]) else named
    return Case(**{**data, "job": job, "nvme_folder": folder})


def write_case(case: Case, path: str | Path) -> None:
    """Writes ``case`` as JSON."""
    Path(path).write_text(json.dumps(case_to_dict(case), indent=1) + "\n", encoding="utf-8")


def read_case(path: str | Path, nvme_folder: str | None = None) -> Case:
    """The ``Case`` in a JSON file (``case_from_dict``). Raises ``InputError`` when it cannot be read or is no case."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"case file {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"case file {str(path)!r} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"case file {str(path)!r} holds a {type(data).__name__}; allowed: one JSON object")
    return case_from_dict(data, nvme_folder)
