"""Published runs: what a row becomes, what is skipped and why, and errors by hand."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from estimator.errors import InputError
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.predict import predict
from estimator.units import GIB
from validator.published import PublishedRun, evaluate, read_runs
from validator.published.expression import job_of

MPT = {
    "run_id": "a", "source": "notes", "framework": "llm-foundry (Composer FSDP)", "gpu": "a100_80gb", "n_gpus": "16", "gpus_per_node": "8", "internode_gbps_per_gpu": "200",
    "model": "MPT-1b", "n_layers": "24", "d_model": "2048", "n_heads": "16", "n_kv_heads": "16", "d_ff": "8192", "gated_mlp": "0",
    "vocab_size": "50368", "tied_embeddings": "1", "seq_len": "2048", "zero_stage": "3", "micro_batch_size": "4",
    "grad_accum": "2", "global_batch_size": "128", "compute_dtype": "bf16", "grad_reduce_dtype": "fp32", "attention": "flash",
    "act_checkpointing": "full", "offload": "none", "optimizer": "adamw (decoupled)",
}  # fmt: skip


def run(**changed: str) -> PublishedRun:
    return PublishedRun({**MPT, **changed})


def test_a_row_is_a_job() -> None:
    job = job_of(run())
    assert (job.dp, job.n_micro_batches, job.strategy.zero_stage, job.strategy.recompute) == (16, 2, 3, "full")
    assert job.model.positions == "learned" and job.model.mlp_bias and job.model.tied_embeddings
    assert job.strategy.grads == "fp32" and job.strategy.kernels_off == ("all",)
    assert job.cluster.gpu.name == "a100-80" and job.cluster.internode_bytes_per_s == 25e9
    assert job.strategy.framework == "composer"
    megatron = {"framework": "Megatron-LM", "zero_stage": "1"}
    llama = job_of(run(gated_mlp="1", n_kv_heads="8", tp="2", pp="2", sequence_parallel="1", **megatron))
    assert llama.model.norm == "rmsnorm" and llama.model.n_kv_heads == 8
    assert (llama.mesh.tp, llama.mesh.pp, llama.dp, llama.strategy.pp_schedule) == (2, 2, 4, "1f1b")
    assert job_of(run(pp="2", virtual_pp="2", **megatron)).strategy.pp_schedule == "interleaved_1f1b"
    selective = job_of(run(act_checkpointing="selective", attention="eager", **megatron)).strategy
    assert (selective.recompute, selective.attention) == ("core_attention", "eager")
    titan = {
        "framework": "torchtitan",
        "gpu": "h100_96gb_hbm2e_500w",
        "compute_dtype": "fp8",
        "torch_compile": "1",
        "cp": "2",
    }
    eight = job_of(run(n_gpus="8", gated_mlp="1", **titan)).strategy
    assert (eight.framework, eight.dtype, eight.matmul_dtype, eight.compile, eight.cp_kind) == (
        "fsdp2",
        "bf16",
        "fp8",
        True,
        "ring",
    )
    assert job_of(run(micro_batch_size="", act_checkpointing="")).workload.micro_batch_size == 1


def test_a_gated_model_of_known_widths_is_that_model() -> None:
    """Qwen3-30B-A3B's heads are wider than d_model / n_heads, which no column says."""
    qwen = {
        "d_model": "2048",
        "n_heads": "32",
        "n_kv_heads": "4",
        "n_experts": "128",
        "experts_per_token": "8",
        "expert_d_ff": "768",
    }
    spec = job_of(
        run(model="Qwen3_30B", gated_mlp="1", n_layers="4", framework="Megatron-LM", zero_stage="1", **qwen)
    ).model
    assert spec.head_dim == 128 and spec.qk_norm and spec.n_layers == 4


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"gpu": "tpu_v4"}, "gpu is 'tpu_v4'; known: a100_40gb"),
        ({"compute_dtype": "fp4"}, "compute_dtype is 'fp4'"),
        ({"compute_dtype": "fp8"}, "matmul_dtype is 'fp8', for which a100-80"),
        ({"attention": "sparse"}, "attention is 'sparse'"),
        ({"framework": "JAX"}, "framework is 'JAX'; known: llm-foundry"),
        ({"framework": ""}, "framework is None; known: llm-foundry"),
        ({"model": "llama-lora"}, "LoRA: which parameters are frozen"),
        ({"n_layers": ""}, "n_layers was not published"),
        ({"n_layers": "many"}, "n_layers is 'many'; allowed: a number, or nothing"),
        ({"optimizer": "madgrad"}, "optimizer is 'madgrad'"),
        ({"global_batch_size": "100"}, "global_batch is 100; allowed: a multiple"),
        ({"model": "DeepSeekV3"}, "latent attention is not in the columns"),
    ],
)
def test_what_cannot_be_expressed_says_why(changed: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        job_of(run(**changed))
    assert reason in str(caught.value)
    (row,) = evaluate([run(**changed)]).rows
    assert row.skipped is not None and reason in row.skipped and row.step_time_s is None


def test_errors_by_hand() -> None:
    """Published at half, at once and at a fifth more of the forecast's seconds: errors of +100%, 0 and -1/6."""
    report = predict(job_of(run()))
    assert report.step_s is not None and report.peak_allocated_bytes is not None
    seconds = [report.step_s / 2, report.step_s, report.step_s * 1.2]
    gib = report.peak_allocated_bytes / GIB
    runs = [run(run_id=str(i), step_time_s=repr(s)) for i, s in enumerate(seconds)]
    runs.append(run(run_id="memory", peak_mem_gib=repr(gib / 0.9), peak_mem_kind="allocated"))
    reserved = predict(job_of(run()), allocator=AllocatorSettings()).peak_reserved_bytes
    assert reserved is not None and reserved > report.peak_allocated_bytes
    runs.append(run(run_id="reserved", peak_mem_gib=repr(reserved / GIB / 1.1), peak_mem_kind="reserved"))
    runs.append(run(run_id="used", peak_mem_gib=repr(gib), peak_mem_kind="unknown"))
    runs.append(run(run_id="no", compute_dtype="fp4", step_time_s="1"))
    result = evaluate(runs)
    times, peaks, fits = result.groups
    assert (times.metric, times.n, times.skipped) == ("step_time_s", 3, 1)
    assert times.median_abs_pct == pytest.approx(100 / 6) and times.bias_pct == pytest.approx((100 - 100 / 6) / 3)
    assert times.p90_abs_pct == pytest.approx(100 / 6 + 0.8 * (100 - 100 / 6))
    assert report.step_high_s is not None and report.step_high_s < 1.2 * report.step_s
    assert times.coverage90_pct == pytest.approx(100 / 3)  # only the second is inside the interval
    assert (peaks.metric, peaks.n, peaks.skipped, peaks.bias_pct) == (
        "peak_mem_bytes",
        2,
        1,
        pytest.approx(0, abs=1e-6),
    )
    assert peaks.median_abs_pct == pytest.approx(10)  # of -10% and +10%
    assert (fits.metric, fits.n, fits.skipped, fits.coverage90_pct) == ("fits", 3, 1, 100)
    used = next(row for row in result.rows if row.run_id == "used")
    assert (
        used.peak_mem_bytes is None and used.skipped == "peak_mem_bytes: unknown memory; forecast: allocated, reserved"
    )
    assert used.step_time_s == report.step_s
    assert len(result.rows) == len(runs)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def zerocast(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zerocast", *map(str, args)], capture_output=True, text=True, check=False
    )


def test_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", [{**MPT, "step_time_s": "2.0"}, {**MPT, "run_id": "b", "gpu": "tpu"}])
    told = zerocast("accuracy", "--runs", path, "--json")
    assert told.returncode == 0, told.stderr
    data = json.loads(told.stdout)
    assert [row["run_id"] for row in data["rows"]] == ["a", "b"] and data["rows"][1]["skipped"].startswith(
        "gpu is 'tpu'"
    )
    assert set(data["groups"][0]) == {
        "source", "gpu", "metric", "n", "skipped", "median_abs_pct", "p90_abs_pct", "bias_pct", "coverage90_pct",
    }  # fmt: skip
    shown = zerocast("accuracy", "--runs", path)
    assert shown.returncode == 0 and "step_time_s" in shown.stdout and "skipped 1: gpu is 'tpu'" in shown.stdout


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "other.csv", [{"name": "x"}])
    told = zerocast("accuracy", "--runs", path)
    assert told.returncode == 2 and "has no column 'run_id'" in told.stderr
    told = zerocast("accuracy", "--runs", tmp_path / "none.csv")
    assert told.returncode == 2 and "cannot be read" in told.stderr
    with pytest.raises(InputError, match="cannot be read"):
        read_runs(tmp_path)
