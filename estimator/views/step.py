"""``view_step``: a job, forecast and played with a record, which the other views read."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.errors import require_int
from estimator.job.job import Job
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.predict import Blueprint, lay_out_stages, predict
from estimator.report import StepReport
from estimator.time.profile import HardwareProfile, profile_for
from estimator.time.recorder import KEPT_TURNS, StepRecord, record_step
from estimator.time.stack import Stack


@dataclass(frozen=True, kw_only=True)
class StepView:
    """A forecast with all that it was made of. Ranks are pipeline ranks."""

    job: Job
    report: StepReport
    blueprints: tuple[Blueprint, ...]
    record: StepRecord

    @property
    def fullest(self) -> int:
        """The rank that needs most memory, which the report is of."""
        return self.report.rank * self.job.strategy.pp // self.job.cluster.n_gpus


def view_step(
    job: Job, profile: HardwareProfile | None = None, *, stack: Stack | None = None, allocator: AllocatorSettings | None = None,
    kept_turns: int = KEPT_TURNS,
) -> StepView:  # fmt: skip
    """Forecast ``job`` as ``predict`` does, with a record of the first ``kept_turns`` micro-batches and the last.

    Raises ``InputError`` when the profile cannot time the job.
    """
    require_int("kept_turns", kept_turns)
    report = predict(job, profile, stack=stack, allocator=allocator)
    blueprints = tuple(lay_out_stages(job))
    curves, _ = profile_for(job.cluster.gpu, profile)
    record = record_step([(b.program, b.costs) for b in blueprints], job, curves, stack, kept_turns)
    return StepView(job=job, report=report, blueprints=blueprints, record=record)
