"""Speed of what people wait for: start-up, one forecast, one plan. ``make bench`` prints medians in milliseconds: of the processor, so
that what else the machine does counts little; of the clock where a process is started.

A forecast's first call is that of a new process which has imported the project; ``--first NAME`` times it in this one. Where llm-analysis is
installed, its own time for the 405B model is printed too.
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from estimator.job import Job
from estimator.job.options import JobOptions, build_job
from estimator.plan import PlanQuestion, plan
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


def median_ms(function: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time) -> float:
    """Median milliseconds of ``repeats`` calls after one that warms caches."""
    function()
    seconds = []
    for _ in range(repeats):
        start = clock()
        function()
        seconds.append(clock() - start)
    return 1e3 * statistics.median(seconds)


def plan_all(job: Job) -> None:
    """Every strategy for the job's model and cluster, with four sequences per GPU."""
    n_gpus = job.cluster.n_gpus
    plan(PlanQuestion(model=job.model, cluster=job.cluster, seq_len=job.workload.seq_len, global_batch_size=4 * n_gpus))


def first_call_ms(name: str) -> float:
    """Milliseconds of the first forecast in this process."""
    job = build_job(JOBS[name])
    start = time.process_time()
    predict(job)
    return 1e3 * (time.process_time() - start)


def in_new_processes_ms(name: str, repeats: int) -> float:
    """Median of ``first_call_ms`` in as many processes."""
    command = [sys.executable, __file__, "--first", name]
    told = (subprocess.run(command, capture_output=True, check=True, text=True).stdout for _ in range(repeats))
    return statistics.median(map(float, told))


def llm_analysis_ms() -> float | None:
    """What llm-analysis takes for 405B with tp 8, pp 16 and ZeRO-1; ``None`` where it is not installed."""
    try:
        from llm_analysis import analysis, config
    except ImportError:
        return None
    logging.disable(logging.CRITICAL)
    model = config.ModelConfig(
        name="llama-3.1-405b", num_layers=126, n_head=128, num_key_value_heads=8, hidden_dim=16384, vocab_size=128256,
        max_seq_len=8192, ffn_embed_dim=79872, expansion_ratio=79872 / 16384,
    )  # fmt: skip
    gpu = config.GPUConfig(
        name="h100", mem_per_GPU_in_GB=80, hbm_bandwidth_in_GB_per_sec=3350, intra_node_bandwidth_in_GB_per_sec=450,
        intra_node_min_message_latency=8e-6, peak_fp16_TFLOPS=989,
    )  # fmt: skip
    layout = config.ParallelismConfig(tp_size=8, pp_size=16, dp_size=128, sp_size=8)
    tool = analysis.LLMAnalysis(model, gpu, config.DtypeConfig(name="w16a16e16"), layout, flops_efficiency=0.5)
    return median_ms(lambda: tool.training(batch_size_per_gpu=1, seq_len=8192, ds_zero=analysis.DSZeRO(1)), 5)


def main() -> None:
    if sys.argv[1:2] == ["--first"]:
        print(first_call_ms(sys.argv[2]))
        return
    command = [sys.executable, "-m", "zerocast", "--help"]
    rows = [
        (
            "zerocast --help",
            median_ms(lambda: subprocess.run(command, capture_output=True, check=True), 10, time.perf_counter),
        )
    ]
    for name, options in JOBS.items():
        job = build_job(options)
        rows.append((f"predict {name}, first call", in_new_processes_ms(name, 5)))
        rows.append((f"predict {name}", median_ms(lambda job=job: predict(job), 20)))
        if name in PLANNED:
            rows.append((f"plan {name}", median_ms(lambda job=job: plan_all(job), 3)))
    rivals_ms = llm_analysis_ms()
    if rivals_ms is not None:
        rows.append(("llm-analysis, the same model, tp 8, pp 16, ZeRO-1", rivals_ms))
    for label, milliseconds in rows:
        print(f"{milliseconds:10.2f} ms  {label}")


if __name__ == "__main__":
    main()
