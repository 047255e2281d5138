"""``whole_run``: from the forecast of one step to what training on so many tokens costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import ceil, exp, inf
from typing import Any

from estimator.errors import InputError
from estimator.job.job import Job
from estimator.report import StepReport
from estimator.run.checkpoint import STORAGE_BYTES_PER_S_PER_NODE, Checkpoint, checkpoint_of
from estimator.run.failures import daly_interval_s, failure_rate, goodput, young_interval_s
from estimator.run.question import RunQuestion
from estimator.run.utilisation import Utilisation, utilisation
from estimator.units import format_bytes

DAY_S, HOUR_S, JOULES_PER_KWH = 86_400.0, 3_600.0, 3.6e6


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A whole training run. ``None``: not known (no price, no rated power, no failures)."""

    job_key: str
    tokens: int
    n_steps: int
    n_gpus: int
    step_s: float
    tokens_per_s: float
    """While training goes on."""
    utilisation: Utilisation
    checkpoint: Checkpoint
    checkpoint_every_s: float | None
    """Seconds of training between checkpoints; ``None``: none is needed."""
    optimum_s: float | None
    """Of ``checkpoint_every_s`` (Daly 2006)."""
    young_s: float | None
    """Young's first-order optimum (1974)."""
    n_checkpoints: int
    mtbf_s: float | None
    """Of the job: between failures of any of its GPUs."""
    n_failures: float
    """Expected in the whole run."""
    day_without_failure: float
    """Its probability."""
    goodput: float
    """Share of the wall clock that makes progress: without saving, lost work and restarts."""
    days: float
    """Of wall clock."""
    days_low: float | None
    days_high: float | None
    """By the interval of the step's time."""
    gpu_hours: float
    usd: float | None
    tokens_per_usd: float | None
    kwh: float | None
    """Of servers and building."""
    tokens_per_kwh: float | None
    mean_watts: float | None
    data_bytes_per_s: float
    """That the loader must deliver to all ranks together."""
    storage_bytes_per_s: float
    data_bytes: float
    """Of the whole data set as it is stored."""
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def whole_run(job: Job, report: StepReport, question: RunQuestion) -> RunReport:
    """What ``question`` asks, of a run of steps like ``report``'s, which is of ``job``. Raises ``InputError`` for a report without a
    step time."""
    if report.step_s is None or not report.step_s > 0:
        raise InputError("the report has no step time; allowed: one that has")
    cluster = job.cluster
    step_tokens = job.workload.global_batch_size * job.workload.seq_len
    n_steps = ceil(question.tokens / step_tokens)
    busy_s = n_steps * report.step_s
    storage = question.storage_bytes_per_s or STORAGE_BYTES_PER_S_PER_NODE * cluster.n_nodes
    saved = checkpoint_of(job, storage_bytes_per_s=storage, asynchronous=question.asynchronous)
    rate = failure_rate(question.mtbf)
    mtbf_s = rate.gpu_hours * HOUR_S / cluster.n_gpus
    # a save that goes on beside training is of use only when it has ended: a failure in between loses that much more
    restart_s = question.restart_s + saved.read_s + (saved.write_s - saved.blocked_s)
    optimum_s = max(daly_interval_s(saved.blocked_s, mtbf_s), saved.write_s - saved.blocked_s, report.step_s)
    interval_s = question.checkpoint_every_s or optimum_s
    share = goodput(interval_s, saved.blocked_s, restart_s, mtbf_s)
    if share <= 0:
        raise InputError(
            f"the job would fail every {mtbf_s:.0f} s and needs {restart_s:.0f} s to restart; it never gets anywhere: allowed: "
            "a longer mtbf, faster storage or fewer GPUs"
        )
    wall_s = busy_s / share
    days = wall_s / DAY_S
    gpu_hours = wall_s * cluster.n_gpus / HOUR_S
    usd = None if question.usd_per_gpu_hour is None else gpu_hours * question.usd_per_gpu_hour
    watts = cluster.gpu.tdp_watts * question.node_power_factor * question.pue * cluster.n_gpus or None
    kwh = None if watts is None else watts * wall_s / JOULES_PER_KWH
    data_rate = step_tokens * question.data_bytes_per_token / report.step_s
    fails = mtbf_s != inf
    return RunReport(
        job_key=report.job_key,
        tokens=question.tokens,
        n_steps=n_steps,
        n_gpus=cluster.n_gpus,
        step_s=report.step_s,
        tokens_per_s=step_tokens / report.step_s,
        utilisation=utilisation(job, report),
        checkpoint=saved,
        checkpoint_every_s=None if interval_s == inf else interval_s,
        optimum_s=optimum_s if fails else None,
        young_s=young_interval_s(saved.blocked_s, mtbf_s) if fails else None,
        n_checkpoints=0 if interval_s == inf else ceil(busy_s / interval_s),
        mtbf_s=mtbf_s if fails else None,
        n_failures=wall_s / mtbf_s,
        day_without_failure=exp(-DAY_S / mtbf_s),
        goodput=share,
        days=days,
        days_low=None if report.step_low_s is None else days * report.step_low_s / report.step_s,
        days_high=None if report.step_high_s is None else days * report.step_high_s / report.step_s,
        gpu_hours=gpu_hours,
        usd=usd,
        tokens_per_usd=None if usd is None else question.tokens / usd,
        kwh=kwh,
        tokens_per_kwh=None if kwh is None else question.tokens / kwh,
        mean_watts=watts,
        data_bytes_per_s=data_rate,
        storage_bytes_per_s=storage,
        data_bytes=question.tokens * question.data_bytes_per_token,
        notes=_notes(job, report, question, saved, rate.source, data_rate, storage),
    )


def _notes(
    job: Job,
    report: StepReport,
    question: RunQuestion,
    saved: Checkpoint,
    failures: str,
    data_rate: float,
    storage: float,
) -> tuple[str, ...]:
    cluster, notes = job.cluster, [f"failures: {failures}"]
    if report.fits is False:
        notes.insert(0, f"the job does not fit: {report.explanation}")
    if question.storage_bytes_per_s is None:
        notes.append(
            "storage: 1 GB/s for each node, as no rate was given (Llama 3: 2 TB/s sustained for some 2,000 nodes)"
        )
    writers_per_node = min(cluster.gpus_per_node, saved.n_writers)
    copy_bytes = saved.rank_bytes * writers_per_node
    if question.asynchronous and copy_bytes > cluster.host.memory_bytes:
        notes.append(
            f"checkpoints: the copies of a node's ranks take {format_bytes(copy_bytes)}, its host has {format_bytes(cluster.host.memory_bytes)}"
        )
    if data_rate > storage:
        notes.append(
            f"data: loading needs {data_rate / 1e9:.3g} GB/s, storage gives {storage / 1e9:.3g} GB/s; training waits for it, "
            "which no figure here counts"
        )
    if cluster.gpu.tdp_watts:
        notes.append(
            f"power: {question.node_power_factor:g} x {cluster.gpu.tdp_watts:.0f} W per GPU in its server, x PUE {question.pue:g}"
        )
    else:
        notes.append(f"power: the rated power of {cluster.gpu.name} is not known")
    return tuple(notes)
