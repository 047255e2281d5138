"""fp32 gradients of a low-precision model: bytes as forecast, sums as exact as fp32's, training equal to plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from estimator.errors import InputError
from estimator.job import Strategy
from estimator.predict import lay_out, memory_of, traffic_of
from runtime import Engine, initialize
from runtime.models import Decoder
from runtime.reference import PARITY_OPTIMIZER
from tests.runtime import tiny
from tests.runtime.memory import check, metered
from tests.runtime.parity_worker import Case, batch
from tests.runtime.test_memory import case
from tests.runtime.test_parity import outcomes_of, plain

CASES = [
    Case(stage, world, dtype, 4, offload, grad_dtype="fp32")
    for stage, world, dtype, offload in (
        (0, 1, "bf16", "none"), (0, 2, "bf16", "none"), (1, 2, "bf16", "optimizer"), (2, 2, "bf16", "none"),
        (3, 2, "bf16", "optimizer,param"),
    )
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_equals_plain_pytorch_and_moves_the_forecast_bytes(tmp_path: Path) -> None:
    for case_, got in outcomes_of(CASES, tmp_path).items():
        want = plain(case_)
        assert all(torch.equal(got.params[name], want.params[name]) for name in want.params), case_
        assert got.losses == pytest.approx(want.losses, rel=1e-6)
        job = tiny.job(case_.model, case_.strategy, world=case_.world, n_micro_batches=case_.accumulation)
        assert (got.bytes, got.calls) == traffic_of(lay_out(job).program)[:2], case_


def accumulated(strategy: Strategy, n: int = 16) -> torch.Tensor:
    """All gradients of a step of ``n`` micro-batches, before the optimizer takes them."""
    model = Decoder(tiny.LLAMA)
    model.reset_parameters(0)
    engine = initialize(model=model, strategy=strategy, n_micro_batches=n, optimizer=PARITY_OPTIMIZER)
    for micro in range(n):
        engine.backward(engine(*batch(micro, 0)))
        if micro < n - 1:
            engine.step()
    return flat_grads(engine)


def flat_grads(engine: Engine) -> torch.Tensor:
    return torch.cat([param.grad.double().flatten() for param in engine.model.parameters()])  # type: ignore[union-attr]


def test_fp32_sums_are_nearer_to_the_exact_gradient() -> None:
    """The exact sum of the same bf16 gradients is what both round: fp32 loses nothing that can be seen, bf16 a lot."""
    low, high = (accumulated(Strategy(dtype="bf16", grad_clip=0.0, grad_dtype=g)) for g in ("model", "fp32"))  # type: ignore[arg-type]
    exact = torch.stack([accumulated_alone(micro) for micro in range(16)]).sum(0)
    error = {name: float((got - exact).norm() / exact.norm()) for name, got in (("low", low), ("high", high))}
    assert error["high"] < 1e-6 < 1e-3 < error["low"]


def accumulated_alone(micro: int) -> torch.Tensor:
    """One micro-batch's bf16 gradient, scaled as one of 16."""
    model = Decoder(tiny.LLAMA)
    model.reset_parameters(0)
    engine = initialize(model=model, strategy=Strategy(dtype="bf16", grad_clip=0.0), optimizer=PARITY_OPTIMIZER)
    engine.backward(engine(*batch(micro, 0)) / 16)
    return flat_grads(engine)


@pytest.mark.parametrize(
    "args",
    [("gpt", 0, "none", "none", 1, 1), ("llama", 1, "none", "full", 4, 2), ("gpt", 2, "optimizer", "none", 1, 8),
     ("llama", 3, "optimizer,param", "selective", 4, 8), ("llama", 3, "none", "none", 4, 2)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("off", [(), ("all",)], ids=["kernels", "torch"])
def test_live_bytes_are_the_forecast(args: tuple, dtype: str, off: tuple) -> None:
    job = case(*args)
    check(replace(job, strategy=replace(job.strategy, dtype=dtype, grad_dtype="fp32", kernels_off=off)))  # type: ignore[arg-type]


def test_gradients_and_their_traffic_double_and_nothing_else() -> None:
    job = case("llama", 2, "none", "none", 4, 8)
    low = replace(job, strategy=replace(job.strategy, dtype="bf16"))
    high = replace(job, strategy=replace(job.strategy, dtype="bf16", grad_dtype="fp32"))
    a, b = (memory_of(lay_out(j)).category_peak_bytes for j in (low, high))
    assert {c for c in a if a[c] != b[c]} <= {"grads", "reduce_buckets"}
    assert (b["grads"], b["reduce_buckets"]) == (2 * a["grads"], 2 * a["reduce_buckets"])
    (bytes_a, _, _), (bytes_b, _, _) = (traffic_of(lay_out(j).program) for j in (low, high))
    assert bytes_b["reduce_scatter"] == 2 * bytes_a["reduce_scatter"] and bytes_b["all_gather"] == bytes_a["all_gather"]
    assert metered(high).collective_bytes == bytes_b


def test_an_fp32_model_has_fp32_gradients_anyway() -> None:
    assert Strategy(dtype="fp32", grad_dtype="fp32") == Strategy(dtype="fp32")
    job = case("gpt", 0, "none", "none", 1, 1)
    bf16 = replace(job, strategy=Strategy(dtype="bf16"))
    assert bf16.key != replace(job, strategy=Strategy(dtype="bf16", grad_dtype="fp32")).key
    with pytest.raises(InputError, match="grad_dtype is 'fp16'"):
        Strategy(grad_dtype="fp16")  # type: ignore[arg-type]
