"""Other optimizers than Adam and SGD: run and forecast where their step can be cut anywhere, else forecast alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.job.optimizers import OPTIMIZERS, factored_numel, orthogonal_flops
from estimator.predict import lay_out, memory_of, predict
from runtime import initialize
from runtime.kernels.rules import Adagrad, Lion
from runtime.models import Decoder
from runtime.optimizer import OptimizerConfig, rule_of, update
from runtime.reference import PARITY_OPTIMIZER, excess
from runtime.session import SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.memory import MODELS, check


@pytest.mark.parametrize("optimizer", ["lion", "adagrad"])
@pytest.mark.parametrize(
    "more",
    [{"zero_stage": 0}, {"zero_stage": 3, "kernels_off": ("all",)}, {"zero_stage": 2, "offload": "optimizer"},
     {"zero_stage": 1, "state_dtype": "model"}, {"zero_stage": 3, "offload": "optimizer,param"}],
    ids=lambda more: "-".join(map(str, more.values())),
)  # fmt: skip
def test_live_bytes(optimizer: str, more: dict[str, Any]) -> None:
    check(tiny.job(MODELS["llama"], Strategy(optimizer=optimizer, **more), world=4, micro_batch=2, seq_len=64))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["lion", "adagrad"])
@pytest.mark.parametrize(
    "more",
    [{"dtype": "fp32"}, {"dtype": "bf16", "offload": "optimizer"},
     {"dtype": "fp16", "offload": "optimizer", "delayed_update": True}],
    ids=lambda more: "-".join(map(str, more.values())),
)  # fmt: skip
def test_training_as_plain_pytorch_does(optimizer: str, more: dict[str, Any], one_thread: None) -> None:
    strategy = Strategy(optimizer=optimizer, **more)  # type: ignore[arg-type]
    job = tiny.job(tiny.LLAMA, strategy, arch="cpu")
    parity = run_session(job, "cpu", SessionOptions(steps=8, warmup=0, reference=True)).parity
    assert excess(strategy.dtype, parity) is None


def losses(optimizer: str, dtype: str) -> list[float]:
    """Of a small model that learns one batch by heart."""
    model = Decoder(tiny.LLAMA)
    model.reset_parameters(0)
    strategy = Strategy(optimizer=optimizer, dtype=dtype)  # type: ignore[arg-type]
    engine = initialize(model=model, strategy=strategy, optimizer=OptimizerConfig(lr=3e-3))
    ids = torch.arange(32).view(2, 16) % 61
    found = []
    for _ in range(12):
        loss = engine(ids, ids)
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def test_8_bit_moments_train_as_wide_ones_nearly_do(one_thread: None) -> None:
    """Moments lose 7 of their bits: the loss stays within 3% of AdamW's all along."""
    for dtype in ("fp32", "bf16", "fp16"):
        got, want = losses("adamw8bit", dtype), losses("adamw", dtype)
        assert got[-1] < 0.9 * got[0] and got != want
        assert got == pytest.approx(want, rel=0.03)


def test_live_bytes_of_8_bit_moments() -> None:
    for more in ({"zero_stage": 0}, {"zero_stage": 3, "kernels_off": ("all",)}, {"zero_stage": 2, "dtype": "fp32"}):
        strategy = Strategy(optimizer="adamw8bit", **more)  # type: ignore[arg-type]
        check(tiny.job(MODELS["llama"], strategy, world=4, micro_batch=2, seq_len=64))


def test_a_skipped_step_changes_nothing() -> None:
    for kind in ("lion", "adagrad"):
        param, grad, state = torch.ones(8), torch.full((8,), float("nan")), torch.full((8,), 0.5)
        step = torch.ones(1)
        update(kind, PARITY_OPTIMIZER, 1e-3, step, param, grad, [state], torch.ones(1))  # type: ignore[arg-type]
        assert param.eq(1).all() and state.eq(0.5).all()
        update(kind, PARITY_OPTIMIZER, 1e-3, step, param, torch.ones(8), [state], torch.zeros(1))  # type: ignore[arg-type]
        assert param.ne(1).all() and state.ne(0.5).all()


def test_rules_of_the_kernels() -> None:
    config = OptimizerConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    assert rule_of("lion", config) == Lion(betas=(0.8, 0.9), weight_decay=0.1)
    assert rule_of("adagrad", config) == Adagrad(eps=1e-6, weight_decay=0.1)


def job(optimizer: str, **more: Any) -> Job:
    return tiny.job(MODELS["llama"], Strategy(optimizer=optimizer, **more), world=4)  # type: ignore[arg-type]


def state_bytes(of: Job) -> int:
    return memory_of(lay_out(of)).category_peak_bytes["optimizer_state"]


def test_states_that_are_forecast() -> None:
    layout = lay_out(job("adamw", zero_stage=1)).layout
    numel = sum(group.shard_numel for group in layout.groups)
    want = {"lamb": 8 * numel, "lion": 4 * numel, "adagrad": 4 * numel}
    for optimizer, n_bytes in want.items():
        assert state_bytes(job(optimizer, zero_stage=1)) == n_bytes, optimizer
    blocks = sum(-(-group.shard_numel // 256) for group in layout.groups)
    assert state_bytes(job("adamw8bit", zero_stage=1)) == 2 * numel + 2 * 4 * blocks
    params = [param for unit in layout.units for param in unit.params]
    # a row's and a column's mean of every matrix, and all of a vector
    sums = sum(p.shape[0] + p.shape[1] if len(p.shape) == 2 else p.shape[0] for p in params)
    assert 4 * sums / 4 <= state_bytes(job("adafactor", zero_stage=1)) <= 4 * (sums / 4 + len(layout.groups))
    # Adam's second moment for embedding, head and norms; momentum for all
    matrices = sum(p.numel for u in layout.units for p in u.params if u.name.startswith("blocks") and len(p.shape) == 2)
    others = sum(p.numel for p in params) - matrices
    got = state_bytes(job("muon", zero_stage=1)) - 4 * numel
    assert others <= got <= others + 4 * len(layout.groups)


def test_steps_that_are_forecast() -> None:
    assert orthogonal_flops((4, 6)) == 5 * (2 * 4 * 4 * 6 + 2 * 4 * 4 * 4 + 2 * 4 * 4 * 6)
    assert orthogonal_flops((3, 4, 6)) == 3 * orthogonal_flops((4, 6)) and orthogonal_flops((7,)) == 0
    assert factored_numel((4, 6)) == 10 and factored_numel((3, 4, 6)) == 30 and factored_numel((7,)) == 7
    seconds = {name: predict(job(name)).time_parts_s["optimizer"] for name in OPTIMIZERS}
    assert seconds["adamw8bit"] < seconds["lion"] < seconds["adamw"] < seconds["lamb"]
    assert seconds["muon"] > seconds["sgd"]
    # of the largest matrix, the embedding's and head's apart: 6 bf16 tensors as large
    temps = [memory_of(lay_out(job(o, zero_stage=3, dtype="fp32"))).category_peak_bytes for o in ("muon", "adafactor")]
    assert temps[0]["temporaries"] >= 12 * 128 * 344 and temps[1]["temporaries"] >= 8 * 128 * 344 // 4


def test_what_does_not_go_together() -> None:
    with pytest.raises(InputError, match="optimizer is 'muon' with offload 'optimizer'; allowed: none, or adamw"):
        Strategy(optimizer="muon", offload="optimizer")
    with pytest.raises(InputError, match="optimizer is 'adamw8bit' with state_dtype 'model'; allowed: fp32"):
        Strategy(optimizer="adamw8bit", state_dtype="model")
    with pytest.raises(InputError, match="optimizer is 'lamb', whose step is only forecast with ZeRO's flat"):
        initialize(model=Decoder(tiny.LLAMA), strategy=Strategy(optimizer="lamb"))
    small = tiny.job(tiny.LLAMA, Strategy(optimizer="adamw8bit"), arch="cpu")
    with pytest.raises(InputError, match="optimizer is 'adamw8bit', which rounds moments in blocks of flat shards"):
        run_session(small, "cpu", SessionOptions(steps=1, warmup=0, reference=True))
    with pytest.raises(InputError, match="optimizer is 'adanw'"):
        Strategy(optimizer="adanw")  # type: ignore[arg-type]
    assert replace(job("lion"), strategy=Strategy()).key == tiny.job(MODELS["llama"], Strategy(), world=4).key
