"""``plan``: predict every candidate, rank what fits by throughput, give the reason for the rest.

The forecast itself is quick enough to be the search's only measure: no second formula exists that could disagree with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from estimator.errors import InputError
from estimator.job import Job, Strategy, Workload
from estimator.plan.question import OFFLOADS, PlanQuestion
from estimator.predict import predict
from estimator.report import StepReport

if TYPE_CHECKING:
    from estimator.time.profile import HardwareProfile

NOT_POSSIBLE = "not possible"
HOST_MEMORY = "host memory"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run the job that fits, with its forecast."""

    job: Job
    report: StepReport


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A way to run the job that does not fit, or cannot exist."""

    strategy: Strategy
    micro_batch_size: int
    reason: str
    """One sentence with the number that decides."""
    cause: str
    """What groups rejections: the largest category at the peak, ``"host memory"``, or ``"not possible"``."""
    report: StepReport | None = None
    """The forecast of a job that does not fit."""

    @property
    def excess_bytes(self) -> int:
        """Device bytes missing; 0 where memory was not the reason."""
        if self.report is None or self.report.capacity_bytes is None:
            return 0
        needed = self.report.device_used_bytes or self.report.peak_allocated_bytes or 0
        return max(0, needed - self.report.capacity_bytes)


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """Answer to a ``PlanQuestion``."""

    ranked: tuple[Candidate, ...]
    """What fits, most tokens per second first; equal ones by smaller peak memory."""
    rejected: tuple[Rejection, ...]
    """The rest, in the order in which it was tried."""

    @property
    def n_tried(self) -> int:
        return len(self.ranked) + len(self.rejected)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rejected = [
            {
                "strategy": asdict(r.strategy), "micro_batch_size": r.micro_batch_size, "cause": r.cause, "reason": r.reason,
                "report": r.report.to_dict() if r.report else None,
            }
            for r in self.rejected
        ]  # fmt: skip
        return {"ranked": [c.report.to_dict() for c in self.ranked], "rejected": rejected}


def plan(
    question: PlanQuestion,
    profile: HardwareProfile | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PlanResult:
    """Forecast every candidate of ``question``.

    ``profile`` holds measured curves (default: the shipped ones). ``on_progress(done, total)`` is called after each
    candidate. A candidate that cannot exist becomes a ``Rejection``; where that is every one for the same reason, the
    question itself is wrong and the reason is raised as an ``InputError``.
    """
    pairs = [(strategy, micro) for strategy in question.strategies() for micro in question.micro_batches()]
    ranked: list[Candidate] = []
    rejected: list[Rejection] = []
    for done, (strategy, micro_batch_size) in enumerate(pairs, start=1):
        outcome = _try(question, strategy, micro_batch_size, profile)
        if isinstance(outcome, Candidate):
            ranked.append(outcome)
        else:
            rejected.append(outcome)
        if on_progress:
            on_progress(done, len(pairs))
    if all(r.cause == NOT_POSSIBLE for r in rejected) and not ranked and len({r.reason for r in rejected}) == 1:
        raise InputError(rejected[0].reason)
    ranked.sort(key=_rank)
    return PlanResult(ranked=tuple(ranked), rejected=tuple(rejected))


def alternatives(job: Job, profile: HardwareProfile | None = None) -> list[StepReport]:
    """``job`` under every ZeRO stage and offload, all else equal: what fits first, by throughput."""
    question = PlanQuestion(
        model=job.model,
        cluster=job.cluster,
        seq_len=job.workload.seq_len,
        global_batch_size=job.workload.global_batch_size,
        base=job.strategy,
        offloads=tuple(dict.fromkeys((*OFFLOADS, job.strategy.offload))),
        recomputes=(job.strategy.recompute,),
        micro_batch_sizes=(job.workload.micro_batch_size,),
    )
    result = plan(question, profile)
    return [c.report for c in result.ranked] + [r.report for r in result.rejected if r.report]


def _try(
    question: PlanQuestion, strategy: Strategy, micro_batch_size: int, profile: HardwareProfile | None
) -> Candidate | Rejection:
    try:
        workload = Workload(
            seq_len=question.seq_len, micro_batch_size=micro_batch_size, global_batch_size=question.global_batch_size
        )
        job = Job(model=question.model, workload=workload, strategy=strategy, cluster=question.cluster)
        report = predict(job, profile)
    except InputError as error:
        return Rejection(strategy=strategy, micro_batch_size=micro_batch_size, reason=str(error), cause=NOT_POSSIBLE)
    if report.fits:
        return Candidate(job=job, report=report)
    return Rejection(
        strategy=strategy,
        micro_batch_size=micro_batch_size,
        reason=report.explanation or "does not fit",
        cause=_cause(report),
        report=report,
    )


def _cause(report: StepReport) -> str:
    """What to blame: the largest category on a GPU that is too full, else the host."""
    needed, at_peak = report.device_used_bytes or report.peak_allocated_bytes or 0, report.category_bytes_at_peak
    if needed <= (report.capacity_bytes or 0) or not at_peak:
        return HOST_MEMORY
    return max(at_peak, key=lambda name: at_peak[name])


def _rank(candidate: Candidate) -> tuple[float, int]:
    report = candidate.report
    return -(report.tokens_per_s or 0.0), report.peak_allocated_bytes or 0
