"""``zerocast plan``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zerocast.job_flags import JobCommand, JobFlags, job_and_profile, job_flags, json_flag, profile_flag

if TYPE_CHECKING:
    from estimator.job import Job
    from estimator.plan import PlanQuestion, PlanResult

DEFAULT_SEQUENCES = 8
"""Sequences per data-parallel GPU and step when the user names no global batch."""


@click.command(
    "plan",
    cls=JobCommand,
    short_help="Rank every ZeRO stage x offload x recompute x micro-batch for a model and cluster.",
    epilog="Example: zerocast plan --model llama-3-8b --gpu h100-sxm --gpus 8 --seq-len 4096 --global-batch 64 --top 5",
)
@job_flags
@profile_flag
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Ranked strategies to show.")
@json_flag
def command(flags: JobFlags, profile_path: Path | None, top: int, as_json: bool) -> None:
    """Try every ZeRO stage, offload, recompute and micro-batch (powers of two) for one model, cluster and batch.

    A flag that is given (--zero 3, --offload none, ...) is kept; the others are searched. With a job file, those four are
    searched and the rest is kept. Without --global-batch, a step has 8 sequences per data-parallel GPU. What fits is
    ranked by throughput; the rest is listed with the reason.
    """
    from estimator.plan import plan
    from zerocast.show import progress, write_json

    job, profile = job_and_profile(flags, profile_path)
    given = set(flags.given) | ({"global_batch"} if flags.file else set())
    question = _question(job, given)
    with progress() as bar:
        task = bar.add_task("forecasting", total=None)
        result = plan(question, profile, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        data = result.to_dict()
        write_json({**data, "n_ranked": len(data["ranked"]), "ranked": data["ranked"][:top]})
    else:
        _show(question, result, top)


def _question(job: Job, given: set[str]) -> PlanQuestion:
    from estimator.plan import PlanQuestion
    from estimator.plan.question import OFFLOADS, RECOMPUTES, STAGES

    micro = job.workload.micro_batch_size
    default_batch = micro * math.ceil(DEFAULT_SEQUENCES / micro) * job.dp
    return PlanQuestion(
        model=job.model,
        cluster=job.cluster,
        seq_len=job.workload.seq_len,
        global_batch_size=job.workload.global_batch_size if "global_batch" in given else default_batch,
        base=job.strategy,
        zero_stages=(job.strategy.zero_stage,) if "zero" in given else STAGES,
        offloads=(job.strategy.offload,) if "offload" in given else OFFLOADS,
        recomputes=(job.strategy.recompute,) if "recompute" in given else RECOMPUTES,
        micro_batch_sizes=(micro,) if "micro_batch" in given else (),
    )


def _show(question: PlanQuestion, result: PlanResult, top: int) -> None:
    from dashboard.data import CATEGORY_LABELS, rejection_rows, strategy_row
    from zerocast.show import STRATEGY_COLUMNS, bytes_cell, say, strategy_cells, table

    c = question.cluster
    title = (
        f"{question.model.name} | {c.n_gpus} x {c.gpu.name} | seq {question.seq_len} | global batch "
        f"{question.global_batch_size}: {len(result.ranked)} of {result.n_tried} ways fit"
    )
    rows = [strategy_cells(strategy_row(candidate.report)) for candidate in result.ranked[:top]]
    if rows:
        table(title, [("#", "right"), *STRATEGY_COLUMNS], [(str(i), *cells) for i, cells in enumerate(rows, start=1)])
        if len(result.ranked) > top:
            say(f"... and {len(result.ranked) - top} more that fit (--top {len(result.ranked)})\n")
    else:
        say(f"{title}\n")
    groups = rejection_rows(result.rejected)
    if groups:
        columns = [
            ("rejected", "right"),
            ("largest at the peak", "left"),
            ("misses by", "right"),
            ("the closest one", "left"),
        ]
        lines = [
            (
                str(g["count"]),
                CATEGORY_LABELS.get(g["cause"]) or g["cause"],
                bytes_cell(g["excess_bytes"] or None),
                g["example"],
            )
            for g in groups
        ]
        table("What does not fit", columns, lines)
