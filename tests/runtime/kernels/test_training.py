"""Whole models trained through the kernels (their own source, on the CPU): the losses of plain torch, and each off by name."""

from __future__ import annotations

import functools

import pytest
import torch

from estimator.job import ModelSpec, Strategy
from runtime import OptimizerConfig, initialize
from runtime.kernels.loader import Kernel
from runtime.models import Decoder
from tests.runtime import tiny
from tests.runtime.kernels.checks import needs_shim, on_shim

STEPS = 18
USED: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {
        "rms_norm": ("norm_forward", "norm_backward"),
        "rotary": ("rotate",),
        "gated_activation": ("gated_forward", "gated_backward"),
        "linear_cross_entropy": ("row_losses_and_gradients",),
        "adam": ("optimizer_step",),
        "grad_norm": ("chunk_squares", "total_squares"),
    },
    "gpt": {
        "layer_norm": ("norm_forward", "norm_backward"),
        "activation": ("biased_forward", "biased_backward"),
        "linear_cross_entropy": ("row_losses_and_gradients",),
        "adam": ("optimizer_step",),
        "grad_norm": ("chunk_squares", "total_squares"),
    },
}
"""Kernels by name that a step of each model needs, and the functions that they launch."""
MODELS = {"llama": tiny.LLAMA, "gpt": tiny.GPT, "qwen3": tiny.QWEN3, "gemma2": tiny.GEMMA2, "neox": tiny.NEOX}
ALLOWED = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 5e-3}
"""Relative difference of a loss from plain torch's, at every step: rounding, which training carries on."""

pytestmark = needs_shim


@functools.cache
def losses(
    model: str, dtype: str, off: tuple[str, ...] = ("all",), n_micro_batches: int = 1
) -> tuple[list[float], list[Kernel]]:
    """Losses of ``STEPS`` steps on one batch that is learnt by heart, and what was launched."""
    spec: ModelSpec = MODELS[model]
    decoder = Decoder(spec)
    decoder.reset_parameters(0)
    ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    found = []
    with on_shim() as record:
        engine = initialize(
            model=decoder,
            strategy=Strategy(dtype=dtype, kernels_off=off),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(lr=3e-3, eps=1e-6),
            n_micro_batches=n_micro_batches,
        )
        for _ in range(STEPS * n_micro_batches):
            loss = engine(*batch)
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
    return found, [kernel for kernel, _ in record.launches]


def same_curve(got: list[float], want: list[float], dtype: str) -> None:
    assert want[-1] < 0.7 * want[0]
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a == pytest.approx(b, rel=ALLOWED[dtype]), f"step {step}: {got} instead of {want}"


@pytest.mark.parametrize(("model", "dtype"), [("llama", "bf16"), ("gpt", "fp32")])
def test_the_losses_are_those_of_plain_torch(model: str, dtype: str) -> None:
    got, launched = losses(model, dtype, ())
    same_curve(got, losses(model, dtype)[0], dtype)
    assert {name for names in USED[model].values() for name in names} <= {kernel.name for kernel in launched}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", list(MODELS))
def test_all_models_and_dtypes(model: str, dtype: str) -> None:
    same_curve(losses(model, dtype, ())[0], losses(model, dtype)[0], dtype)


@pytest.mark.slow
def test_gradients_of_several_micro_batches() -> None:
    """The loss's own gradient is not 1 then: what was computed in the forward pass is scaled in the backward pass."""
    got, plain = (losses("llama", "fp32", off, 3)[0] for off in ((), ("all",)))
    same_curve(got, plain, "fp32")


def test_nothing_is_launched_when_all_are_off() -> None:
    assert losses("llama", "bf16")[1] == []


@pytest.mark.parametrize("name", list(USED["llama"]))
def test_each_is_switched_off_by_name(name: str) -> None:
    got, launched = losses("llama", "bf16", (name,))
    same_curve(got, losses("llama", "bf16")[0], "bf16")
    functions = {kernel.name for kernel in launched}
    assert functions.isdisjoint(USED["llama"][name])
    assert functions >= {f for other, fs in USED["llama"].items() if other != name for f in fs}
    if name == "linear_cross_entropy":  # the loss itself is still a kernel
        assert functions >= {"row_losses", "row_gradients"}
