"""Speed of what people wait for: start-up, one forecast, one plan. ``make bench`` prints medians in milliseconds: of the processor, so
that what else the machine does counts little; of the clock where a process is started.

A forecast has three: of the first call in a new process that has imported the project; of the first call after that of another model on
other GPUs, which has found every module but nothing of this job; and of another call.

Where llm-analysis is installed, its own time for the 405B model is printed too, its first call and another one, without what it writes
to its log (it tells no pipeline schedules apart and plays no streams). It needs no place in the project's environment:

    pip install --target rivals --no-deps llm-analysis fire termcolor
    PYTHONPATH=rivals:. python benchmarks/bench_predict.py

Calculon is not on PyPI (the package of that name is another).
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from estimator.job import Job
from estimator.job.options import JobOptions, build_job
from estimator.plan import PlanQuestion, PlanResult, plan
from estimator.predict import predict

LARGE: dict[str, Any] = {"model": "llama-3.1-405b", "gpu": "h100-sxm", "gpus": 16384}
JOBS = {
    "llama-3-8b on 8 x h100-sxm": JobOptions(model="llama-3-8b", gpu="h100-sxm", gpus=8, zero=3, global_batch=8),
    "llama-3.1-405b on 16,384 x h100-sxm": JobOptions(
        model="llama-3.1-405b", gpu="h100-sxm", gpus=16384, zero=3, offload="optimizer", global_batch=16384
    ),
    "llama-3.1-405b on 16,384 x h100-sxm, ZeRO-3, tp 8": JobOptions(**LARGE, zero=3, tp=8, global_batch=2048),
    "llama-3.1-405b on 16,384 x h100-sxm, ZeRO-1, tp 8, pp 16, dp 128": JobOptions(
        **LARGE, zero=1, tp=8, pp=16, seq_len=8192, global_batch=2048
    ),
    "llama-3.1-405b on 16,384 x h100-sxm, ZeRO-1, tp 8, pp 8, cp 16, dp 16": JobOptions(
        **LARGE, zero=1, tp=8, pp=8, cp=16, cp_kind="ring", seq_len=131072, global_batch=256
    ),
    "llama-3.1-405b on 16,384 x h100-sxm, interleaved pipeline, 256 micro-batches": JobOptions(
        **LARGE, zero=1, tp=8, pp=16, pp_schedule="interleaved_1f1b", virtual_pp=2, seq_len=8192, global_batch=256 * 128
    ),
}
PLANNED = tuple(JOBS)[:2]
OTHER = JobOptions(model="gpt2", gpu="a100-80", gpus=8)
"""Another model on other GPUs."""


class Row(NamedTuple):
    """Milliseconds of the first call in a new process, of the first after ``OTHER``'s, and of another; ``None``: not measured."""

    label: str
    first: float | None
    after_other: float | None
    again: float


def ms(function: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Of one call."""
    start = clock()
    function()
    return 1e3 * (clock() - start)


def median_ms(function: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time) -> float:
    """Median of ``repeats`` calls after one that warms caches."""
    function()
    return statistics.median(ms(function, clock) for _ in range(repeats))


def task(what: str, name: str) -> Callable[[], object]:
    """``predict`` or ``plan`` of one of ``JOBS``."""
    job = build_job(JOBS[name])
    return (lambda: predict(job)) if what == "predict" else (lambda: plan_all(job))


def plan_all(job: Job) -> PlanResult:
    """Every strategy for the job's model and cluster, with four sequences per GPU."""
    n_gpus = job.cluster.n_gpus
    return plan(
        PlanQuestion(model=job.model, cluster=job.cluster, seq_len=job.workload.seq_len, global_batch_size=4 * n_gpus)
    )


def in_new_processes_ms(what: str, name: str, *, after_other: bool, repeats: int = 5) -> float:
    """Median of the first call in as many processes."""
    command = [sys.executable, __file__, "--first", what, name, *(["--after-other"] if after_other else [])]
    told = (subprocess.run(command, capture_output=True, check=True, text=True).stdout for _ in range(repeats))
    return statistics.median(map(float, told))


def tell_first_call(what: str, name: str, *, after_other: bool) -> None:
    """What ``in_new_processes_ms`` starts."""
    if after_other:
        predict(build_job(OTHER))
    print(ms(task(what, name)))


def measured(what: str, name: str, repeats: int) -> Row:
    first, after_other = (in_new_processes_ms(what, name, after_other=after) for after in (False, True))
    label = f"{what} {name}"
    if what == "plan":
        n_jobs = plan_all(build_job(JOBS[name])).n_tried
        label += f": {n_jobs} jobs, {1e3 * n_jobs / first:.0f} a second"
    return Row(label, first, after_other, median_ms(task(what, name), repeats))


def command_row(*words: str) -> Row:
    """Of the clock: a command's whole process."""
    command = [sys.executable, "-m", "zerocast", *words]
    again = median_ms(lambda: subprocess.run(command, capture_output=True, check=True), 10, time.perf_counter)
    return Row(f"zerocast {' '.join(words)}", None, None, again)


def llm_analysis_row() -> Row | None:
    """What llm-analysis takes for 405B with tp 8, pp 16 and ZeRO-1; ``None`` where it is not installed."""
    logging.disable(logging.CRITICAL)
    try:
        from llm_analysis import analysis, config
    except ImportError:
        return None
    model = config.ModelConfig(
        name="llama-3.1-405b", num_layers=126, n_head=128, num_key_value_heads=8, hidden_dim=16384, vocab_size=128256,
        max_seq_len=8192, ffn_embed_dim=79872, expansion_ratio=79872 / 16384,
    )  # fmt: skip
    gpu = config.GPUConfig(  # with more memory: it times nothing that does not fit by its count
        name="h100", mem_per_GPU_in_GB=800, hbm_bandwidth_in_GB_per_sec=3350, intra_node_bandwidth_in_GB_per_sec=450,
        intra_node_min_message_latency=8e-6, peak_fp16_TFLOPS=989,
    )  # fmt: skip
    layout = config.ParallelismConfig(tp_size=8, pp_size=16, dp_size=128, sp_size=8)
    tool = analysis.LLMAnalysis(model, gpu, config.DtypeConfig(name="w16a16e16"), layout, flops_efficiency=0.5)

    def training() -> object:
        return tool.training(batch_size_per_gpu=1, seq_len=8192, ds_zero=analysis.DSZeRO(1))

    return Row("llm-analysis, the same model, tp 8, pp 16, ZeRO-1", ms(training), None, median_ms(training, 20))


def main() -> None:
    if sys.argv[1:2] == ["--first"]:
        tell_first_call(*sys.argv[2:4], after_other="--after-other" in sys.argv)
        return
    rows = [command_row("--help"), command_row("predict", "--model", "llama-3-8b", "--gpu", "h100-sxm", "--gpus", "8")]
    rows += [measured("predict", name, 20) for name in JOBS]
    rows += [measured("plan", name, 3) for name in PLANNED]
    rival = llm_analysis_row()
    print("first call   after another's      again milliseconds")
    for row in rows if rival is None else [*rows, rival]:
        cells = zip((10, 17, 10), row[1:], strict=True)
        print(*(" " * width if value is None else f"{value:{width}.2f}" for width, value in cells), row.label)


if __name__ == "__main__":
    main()
