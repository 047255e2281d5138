"""Small jobs that calibration trains with the runtime, and what their steps say of all others.

Seconds of lone kernels add up to less than a step takes: operands come from memory and not from a cache, modules and hooks
issue operators, a chip runs hot. How much is a property of runtime and machine, so that a few jobs tell it: the constants of
``estimator.time.stack.Stack`` with which the forecast of their parts is best. No suite has jobs of these shapes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import log
from typing import Any, NamedTuple

from estimator import catalog
from estimator.errors import InputError
from estimator.job.cluster import Gpu, Host
from estimator.job.job import Job
from estimator.job.model import ModelSpec
from estimator.job.options import JobOptions, assemble_job, job_parts
from estimator.predict import lay_out_stages
from estimator.time.player import time_of
from estimator.time.profile import HardwareProfile, StackPoint, StepPoint
from estimator.time.stack import LONE, Stack
from validator.calibrate.tasks import task_of
from validator.published.fit import fit, fit_lines

PARTS = ("forward", "recompute", "backward", "optimizer", "offload")
"""What is fitted, beside the whole step: waiting for others is told by that."""

LEAST_SHARE = 0.05
"""Of its step: smaller parts are mostly noise."""

FEWEST = 4
"""Of fewer jobs no constants are made."""

UNTOLD = ("overlapped", "straggling")
"""Constants that stay as they are: what this runtime overlaps its program says, and ranks of one machine hardly differ."""


class SmallJob(NamedTuple):
    """One job, in the measure of the device."""

    family: str
    layers: int
    width: int
    seq_len: int
    micro_batch: int
    dtype: str = "fp32"
    zero: int = 0
    grad_accum: int = 1
    more: tuple[tuple[str, Any], ...] = ()
    """Other fields of ``JobOptions``."""

    def job(self, n_ranks: int, gpu: Gpu | None = None, host: Host | None = None) -> Job:
        """On ``n_ranks`` devices of one machine: ``gpu``, or a CPU that was not measured yet. Raises ``InputError`` where it has not the dtype."""
        options = JobOptions(
            model="", gpu="cpu" if gpu is None else gpu.name, gpus=n_ranks, gpus_per_node=n_ranks, seq_len=self.seq_len, dtype=self.dtype,
            micro_batch=self.micro_batch, global_batch=self.micro_batch * self.grad_accum * n_ranks, zero=self.zero, **dict(self.more),
        )  # fmt: skip
        strategy, cluster, batch = job_parts(options, local_gpu=gpu or _UNKNOWN_CPU, local_host=host or _UNKNOWN_HOST)
        return assemble_job(self._model(), cluster, strategy, batch)

    def _model(self) -> ModelSpec:
        shape = catalog.model({"gpt": "gpt-30m", "llama": "llama-30m"}[self.family])
        head_dim = min(64 if self.width < 1024 else 128, self.width)
        n_heads = self.width // head_dim
        wide = {"gpt": 4 * self.width, "llama": round(8 * self.width / 3 / 64) * 64}[self.family]
        n_kv_heads = n_heads // 2 if self.family == "llama" and n_heads % 2 == 0 else n_heads
        return replace(
            shape, name=f"{self.family}-{self.width}", n_layers=self.layers, d_model=self.width, n_heads=n_heads,
            n_kv_heads=n_kv_heads, head_dim=head_dim, d_ff=wide, vocab_size=12 * self.width, max_positions=self.seq_len,
            position_rows=self.seq_len if shape.position_rows else 0,
        )  # fmt: skip


_UNKNOWN_CPU = Gpu(
    name="cpu", arch="cpu", memory_bytes=1 << 40, memory_bytes_per_s=1e10, peak_flops={"fp32": 1e11, "bf16": 1e11}, n_sms=1,
    l2_bytes=0, link_bytes_per_s=1e9, host_link_bytes_per_s=1e10, source="stands for the CPU that is being measured",
)  # fmt: skip
_UNKNOWN_HOST = Host(
    memory_bytes=1 << 40, n_cores=1, memory_bytes_per_s=1e10, source="stands for the machine that is being measured"
)

_FULL = ("recompute", "full")
CPU_JOBS: dict[str, SmallJob] = {
    "narrow": SmallJob("gpt", 6, 192, 64, 2),
    "gpt": SmallJob("gpt", 4, 384, 64, 3),
    "llama bf16": SmallJob("llama", 3, 448, 192, 2, "bf16", 2),
    "llama offload": SmallJob("llama", 4, 320, 192, 1, "fp32", 1, 1, (("offload", "optimizer"),)),
    "gpt bf16 recompute": SmallJob("gpt", 3, 448, 256, 1, "bf16", 0, 1, (_FULL,)),
    "gpt accumulation": SmallJob("gpt", 3, 384, 64, 2, "fp32", 3, 2),
    "llama recompute": SmallJob("llama", 4, 384, 256, 1, "fp32", 3, 1, (_FULL, ("offload", "optimizer,param"))),
    "gpt bf16 offload": SmallJob("gpt", 4, 320, 192, 1, "bf16", 1, 1, (("offload", "optimizer,param"),)),
}
"""By name, the most telling first."""
CUDA_JOBS: dict[str, SmallJob] = {
    "narrow": SmallJob("gpt", 12, 256, 128, 1, "bf16"),
    "gpt": SmallJob("gpt", 5, 2048, 1536, 6, "bf16"),
    "llama": SmallJob("llama", 4, 3072, 3072, 2, "bf16"),
    "llama recompute": SmallJob("llama", 5, 2560, 4096, 2, "bf16", 0, 1, (_FULL,)),
    "gpt offload": SmallJob("gpt", 4, 1536, 1024, 6, "bf16", 0, 1, (("offload", "optimizer"),)),
    "llama long": SmallJob("llama", 3, 2048, 12288, 1, "bf16"),
    "llama fp32": SmallJob("llama", 3, 1536, 1024, 3, "fp32"),
    "gpt accumulation": SmallJob("gpt", 4, 2560, 640, 4, "bf16", 0, 3),
}
WARMUP_STEPS, MEASURED_STEPS = 2, 7
QUICK = 1
"""Jobs that a quick calibration trains."""


def jobs_of(device: str) -> Mapping[str, SmallJob]:
    return CPU_JOBS if device == "cpu" else CUDA_JOBS


@dataclass(frozen=True, eq=False)
class StepCase:
    """One part of one job's step (``step``: the whole), measured."""

    name: str
    workers: int
    part: str
    seconds: float
    spread: float
    forecasts: Forecasts

    def error(self, stack: Stack) -> float:
        """Logarithm of forecast over measured seconds."""
        return log(self.forecasts.of(stack)[self.part] / self.seconds)

    def point(self, stack: Stack) -> StepPoint:
        """For the profile, forecast with ``stack``."""
        forecast_s = self.forecasts.of(stack)[self.part]
        return StepPoint(self.name, self.part, self.seconds, forecast_s, self.workers, self.spread)


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Of one job with one machine's curves; what was worked out is kept."""

    job: Job
    profile: HardwareProfile
    known: dict[Stack, dict[str, float]] = field(default_factory=dict)

    @cached_property
    def _blueprint(self) -> Any:
        return lay_out_stages(self.job)[0]

    def of(self, stack: Stack) -> dict[str, float]:
        """Seconds by part, and of the ``step``."""
        found = self.known.get(stack)
        if found is None:
            time = time_of(self._blueprint.program, self._blueprint.costs, self.job, self.profile, stack)
            found = self.known[stack] = {**time.parts, "step": time.step_s}
        return found


def with_steps(profile: HardwareProfile, done: Mapping[str, Mapping[str, Any]]) -> HardwareProfile:
    """``profile`` with the jobs that were trained among ``done`` (results by task key), and the constants that those of one number
    of processes tell, if they are enough; each is forecast with constants of the others."""
    cases = list(_cases(profile, done))
    if not cases:
        return profile
    points: list[StepPoint] = []
    stacks = []
    for workers in sorted({case.workers for case in cases}):
        own = [case for case in cases if case.workers == workers]
        if len({case.name for case in own}) < FEWEST:
            points += [case.point(LONE) for case in own]
            continue
        stack, lines = fit(own, LONE, untold=UNTOLD)
        stacks.append(StackPoint(workers, asdict(stack)))
        for name in dict.fromkeys(case.name for case in own):
            without = fit_lines(lines.of([i for i, case in enumerate(own) if case.name != name]), LONE)
            points += [case.point(without) for case in own if case.name == name]
    return replace(profile, steps=tuple(points), stacks=tuple(stacks))


def _cases(profile: HardwareProfile, done: Mapping[str, Mapping[str, Any]]) -> Iterator[StepCase]:
    """Parts that are large enough to tell anything, of jobs that can be forecast."""
    for key, result in done.items():
        workers, task = task_of(key)
        if task.kind != "step" or "parts" not in result:
            continue
        small = jobs_of("cpu" if profile.arch == "cpu" else "cuda")[task.name]
        forecasts = Forecasts(small.job(workers, profile.gpu, profile.host), profile)
        try:
            expected = forecasts.of(LONE)
        except InputError:  # its dtype was not measured
            continue
        step_s = statistics.median(result["seconds"])
        measured = {**result["parts"], "step": step_s}
        for part in (*PARTS, "step"):
            seconds = measured.get(part, 0.0)
            if seconds >= LEAST_SHARE * step_s and expected.get(part, 0.0) > 0:
                yield StepCase(task.name, workers, part, seconds, _spread(result["seconds"]), forecasts)


def _spread(seconds: list[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return round((high - low) / middle, 4)
