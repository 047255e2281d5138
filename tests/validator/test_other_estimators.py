"""Other estimators' formulas, each on a job worked out by hand, and the table of their errors."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from estimator import catalog
from estimator.job import Job, ModelSpec, Strategy, Workload
from estimator.predict import predict
from estimator.units import GIB
from tests.validator.test_published import MPT, write
from validator.published import PublishedRun
from validator.published.expression import job_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_estimators  # noqa: E402
import other_estimators as others  # noqa: E402

LLAMA = ModelSpec(
    name="tiny", family="custom", n_layers=2, d_model=64, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=256, vocab_size=1000,
    max_positions=64, tied_embeddings=True,
)  # fmt: skip
N = 2 * (4 * 64 * 64 + 3 * 64 * 256 + 2 * 64) + 64 + 1000 * 64
"""195,392 parameters."""


FOUNDRY = {**MPT, "framework": "llm-foundry (Composer FSDP)"}


def run(**changed: str) -> PublishedRun:
    return PublishedRun({**FOUNDRY, **changed})


def job(zero: int = 1, model: ModelSpec = LLAMA, n_gpus: int = 4, **fields) -> Job:
    """Two sequences of 32 tokens on each of four A100."""
    strategy = Strategy(**{"zero_stage": zero, "dtype": "bf16", "recompute": "none", **fields})
    dp = n_gpus // strategy.model_parallel
    return Job(
        model=model, workload=Workload(seq_len=32, micro_batch_size=2, global_batch_size=2 * dp), strategy=strategy,
        cluster=catalog.cluster("a100-80", n_gpus),
    )  # fmt: skip


def test_parameters() -> None:
    assert others.n_params(job()) == N
    assert others.largest_module_numel(job()) == 64_000  # the table; the MLP's matrices have 16,384 each


def test_deepspeed_is_its_documented_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """https://deepspeed.readthedocs.io/en/latest/memory.html: 2,851M parameters, 32M in the largest layer, 8 GPUs; GB are 2^30."""
    monkeypatch.setattr(others, "n_params", lambda job: 2851e6)
    monkeypatch.setattr(others, "largest_module_numel", lambda job: 32e6)
    said = {
        (zero, offload): others.deepspeed(job(zero, n_gpus=8, offload=offload))
        for zero, offload in [(2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "optimizer,param")]
    }
    assert [round(n_bytes / GIB, 2) for n_bytes in said.values() if n_bytes] == [15.93, 5.31, 6.09, 0.78, 0.12]


def test_deepspeed_does_not_know_other_stages() -> None:
    assert others.deepspeed(job(1)) is None and others.deepspeed(job(3, tp=2)) is None


def test_accelerate_is_four_models_whatever_the_stage() -> None:
    assert others.accelerate(job(), "fp32") == others.accelerate(job(3), "fp32") == 16 * N
    assert others.accelerate(job(), "bf16") == 8 * N


def test_megatron_by_hand() -> None:
    """Its parameters: norms with biases, the table padded to 1,024 rows. Activations: 34 bytes per token, layer and width, 8 of ids,
    1 of the embedding's dropout, ``4 (1 + 1024 / 64)`` of the head."""
    params = 2 * (4 * 64 * 64 + 3 * 64 * 256 + 4 * 64) + 2 * 64 + 1024 * 64
    kept = 2 * 34 * 64 * 64 + 8 * 64 + 64 * 64 + 4 * 64 * 64 * 17
    assert others.megatron(job()) == pytest.approx(params * (6 + 12 / 4) + kept)
    assert others.megatron(job(0)) == pytest.approx(params * 18 + kept)
    full = kept - 2 * 34 * 64 * 64 + 2 * 2 * 64 * 64
    assert others.megatron(job(recompute="full")) == pytest.approx(params * 9 + full)


def test_megatron_along_tensor_parallel_ranks() -> None:
    """Korthikanti et al., equations 2 and 4: without sequence parallelism ten bytes of 34 are not divided."""
    params = 2 * (4 * 64 * 64 + 3 * 64 * 256 + 4 * 64) + 2 * 64 + 1024 * 64
    rest = 8 * 64 + 64 * 64 + 4 * 64 * 64 * 17
    assert others.megatron(job(tp=2)) == pytest.approx(params / 2 * 12 + (2 * 34 * 64 * 64 + rest) / 2)
    apart = others.megatron(job(tp=2, sequence_parallel=False))
    assert apart == pytest.approx(params / 2 * 12 + 2 * (10 + 24 / 2) * 64 * 64 + rest / 2)


def test_eleuther_by_hand() -> None:
    kept = 2 * 34 * 64 * 64
    assert others.eleuther(job(1)) == pytest.approx((2 + 2 + 12 / 4) * N + kept)
    assert others.eleuther(job(2)) == pytest.approx((2 + 14 / 4) * N + kept)
    assert others.eleuther(job(3)) == pytest.approx(16 / 4 * N + kept)
    assert others.eleuther(job(3, recompute="full")) == pytest.approx(4 * N + 2 * 2 * 64 * 64)
    scores = 2 * 64 * 64 * 5 * 4 * 32 / 64
    assert others.eleuther(job(3, attention="eager", framework="fsdp2")) == pytest.approx(4 * N + kept + scores)


def test_llm_analysis_by_hand() -> None:
    """An MLP of two matrices 384 wide; ``table`` has the last norm with it."""
    layer, table = 4 * 64 * 64 + 2 * 64 * 384 + 2 * 64, 1000 * 64 + 64
    attention = 2 * 64 * 64 * 5 + 2 * (2 * 64 * 64 + 4 * 4 * 64) + 64 * 64
    mlp = 2 * 64 * 64 * (1 + 2 * 384 / 64)
    kept = 2 * (attention + mlp + 2 * 4 * 64 * 64) + 2 * 1000 * 64 + 4 * 64 * 64
    assert others.llm_analysis(job(1)) == pytest.approx((2 + 12 / 4 + 4) * (2 * layer + table) + kept)
    assert others.llm_analysis(job(3)) == pytest.approx(18 / 4 * (2 * layer + table) + kept)
    full = 2 * 2 * 64 * 64 + 2 * 1000 * 64
    assert others.llm_analysis(job(3, recompute="full")) == pytest.approx(18 / 4 * (2 * layer + table) + full)


def test_rule_by_hand() -> None:
    """Eight sequences of 32 tokens; half of four A100's 312 TFLOP/s."""
    flops = 6 * N * 256 + 12 * 2 * 64 * 32 * 256
    assert others.rule_flops(job()) == flops
    assert others.rule_seconds(job(), 0.5) == pytest.approx(flops / (4 * 312e12 * 0.5))


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of one source, published at 80% of our seconds and 125% of our bytes."""
    report = predict(job_of(run()))
    measured = {
        "step_time_s": repr(report.step_s * 0.8), "peak_mem_gib": repr(report.peak_allocated_bytes / GIB * 1.25),
        "peak_mem_kind": "allocated",
    }  # fmt: skip
    path = write(
        tmp_path / "runs.csv", [{**FOUNDRY, **measured}, {**FOUNDRY, **measured, "run_id": "b", "model": "again"}]
    )
    monkeypatch.setattr(sys, "argv", ["bench_estimators.py", "--runs", str(path)])
    runpy.run_path(str(BENCHMARKS / "bench_estimators.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert "| notes | zerocast | 2 | 20.0% | 20.0% | -20.0% |" in lines
    assert "| notes | zerocast | 2 | 25.0% | 25.0% | +25.0% |" in lines
    assert "| notes | 6ND rule, model left out | 2 | 0.0% | 0.0% | +0.0% |" in lines  # the other run says all about it
    said = others.deepspeed(job_of(run()))
    assert said is not None
    error = 100 * (said / report.peak_allocated_bytes / 1.25 - 1)
    assert f"| notes | DeepSpeed | 2 | {abs(error):.1f}% | {abs(error):.1f}% | {error:+.1f}% |" in lines


def test_a_run_without_other_models_has_no_constant() -> None:
    timed = [(run(run_id=i), job_of(run()), 1.0) for i in "ab"]
    assert bench_estimators._rule_errors(timed) == []
