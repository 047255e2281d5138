"""The engine's manners: order of calls, overflow, generic modules, its own time parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job import Strategy
from estimator.report import TIME_PARTS
from runtime import Engine, OptimizerConfig, initialize
from runtime.models import Decoder
from runtime.optimizer import LossScaler
from runtime.session import SessionOptions, run_session
from tests.runtime import tiny


def engine_of(strategy: Strategy, n: int = 1) -> Engine:
    model = Decoder(tiny.GPT)
    model.reset_parameters(0)
    return initialize(model=model, strategy=strategy, n_micro_batches=n, optimizer=OptimizerConfig(lr=1e-2))


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def test_calls_out_of_order_are_refused() -> None:
    engine = engine_of(Strategy(dtype="fp32"))
    with pytest.raises(RuntimeError, match=r"engine\.step was called where engine\.forward is due"):
        engine.step()
    loss = engine(*tokens())
    with pytest.raises(RuntimeError, match=r"where engine\.backward is due"):
        engine(*tokens())
    engine.backward(loss)
    assert engine.step()


def test_step_only_updates_after_the_last_micro_batch() -> None:
    engine = engine_of(Strategy(dtype="fp32"), n=3)
    done = []
    for i in range(6):
        engine.backward(engine(*tokens(i)))
        done.append(engine.step())
    assert done == [False, False, True] * 2


def test_overflow_skips_the_step_and_halves_the_scale() -> None:
    engine = engine_of(Strategy(dtype="fp16"))
    before = {k: v.clone() for k, v in engine.full_parameters().items()}
    engine.scaler.scale = 2.0**40
    engine.backward(engine(*tokens()))
    assert engine.step()
    assert engine.scaler.skipped_steps == 1 and engine.scaler.scale == 2.0**39
    assert all(torch.equal(before[k], v) for k, v in engine.full_parameters().items())
    engine.scaler.scale = 1024.0
    engine.backward(engine(*tokens()))
    assert engine.step()
    assert engine.scaler.skipped_steps == 1 and engine.scaler.scale == 1024.0
    assert not all(torch.equal(before[k], v) for k, v in engine.full_parameters().items())


def test_overflow_with_an_offloaded_optimizer_leaves_the_device_parameters_alone() -> None:
    engine = engine_of(Strategy(dtype="fp16", offload="optimizer"))
    engine.scaler.scale = 2.0**40
    before = [p.detach().clone() for p in engine.model.parameters()]
    engine.backward(engine(*tokens()))
    engine.step()
    assert engine.scaler.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_a_skipped_step_does_not_count(offload: str) -> None:
    """Bias correction is the first step's in the first step that is taken: AdamW then moves a parameter by the rate."""
    engine = engine_of(Strategy(dtype="fp16", offload=offload))  # type: ignore[arg-type]
    before = {k: v.clone() for k, v in engine.full_parameters().items()}
    for scale in (2.0**40, 2.0**40, 1024.0):
        engine.scaler.scale = scale
        engine.backward(engine(*tokens()))
        engine.step()
    assert engine.scaler.skipped_steps == 2
    largest = max((v - before[k]).abs().max().item() for k, v in engine.full_parameters().items())
    assert largest == pytest.approx(1e-2, rel=2e-2)  # weight decay is a hundredth of that


def scales_of(scaler: LossScaler, overflows: tuple[int, ...]) -> list[float]:
    scales = []
    for overflow in overflows:
        scaler.record(torch.full((1,), float(overflow)))
        scales.append(scaler.scale)
    return scales


def test_loss_scale_grows_after_a_quiet_while() -> None:
    scaler = LossScaler("fp16", initial=4.0, growth_interval=2)
    assert scales_of(scaler, (0, 0, 1, 0, 0, 0, 1, 0, 0)) == [4, 8, 4, 4, 8, 8, 4, 4, 8]
    assert scaler.skipped_steps == 2


def test_loss_scale_has_bounds() -> None:
    assert scales_of(LossScaler("fp16", initial=2.0), (1, 1)) == [1, 1]
    assert scales_of(LossScaler("fp16", initial=2.0**63, growth_interval=1), (0, 0)) == [2.0**64, 2.0**64]


def test_only_fp16_has_a_loss_scale() -> None:
    scaler = LossScaler("bf16")
    assert (scaler.factor, scaler.scale, scaler.skipped_steps) == (1.0, 1.0, 0)
    with pytest.raises(InputError, match=r"loss scale is set to 2\.0; only fp16 has one"):
        scaler.scale = 2.0


class ConvNet(nn.Module):
    """Not a decoder: a generic module whose children run in order, with the loss outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.stages = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for stage in self.stages:
            x = x + stage(x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer,param"])
def test_a_convolutional_network_trains_as_in_plain_pytorch(offload: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
    plain, trained = ConvNet(), ConvNet()
    trained.load_state_dict(plain.state_dict())
    config = OptimizerConfig(lr=1e-2, eps=1e-5)
    engine = initialize(
        model=trained,
        strategy=Strategy(dtype="fp32", offload=offload, grad_clip=0.0),
        optimizer=config,  # type: ignore[arg-type]
    )
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.01, fused=True)
    for _ in range(5):
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        adam.step()
        adam.zero_grad()
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()
    got = engine.full_parameters()
    for name, param in plain.named_parameters():
        torch.testing.assert_close(got[name], param.detach(), rtol=1e-5, atol=1e-7)


class WrongOrder(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for stage in reversed(self.stages):
            x = x + stage(x).relu()
        return self.head(x.mean((2, 3)))


def test_units_that_run_in_another_order_are_an_error() -> None:
    engine = initialize(model=WrongOrder(), strategy=Strategy(dtype="fp32"))
    with pytest.raises(
        RuntimeError, match=r"the model ran forward of stages.1 where its program has forward of stages.0"
    ):
        engine(torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("axis", ["tp", "pp", "cp", "ep"])
def test_other_parallelism_is_refused(axis: str) -> None:
    with pytest.raises(InputError, match=f"{axis} is 2"):
        initialize(model=Decoder(tiny.GPT), strategy=Strategy(**{axis: 2}))


def test_optimizer_settings_are_checked() -> None:
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"lr": float("nan")}):
        with pytest.raises(InputError):
            OptimizerConfig(**bad)


def test_time_parts_are_known_and_add_up_to_the_step() -> None:
    job = tiny.job(tiny.LLAMA, Strategy(dtype="fp32", recompute="full", offload="optimizer"), n_micro_batches=2)
    measured = run_session(job, "cpu", SessionOptions(steps=4, warmup=1, track_memory=False))
    assert set(measured.part_seconds) <= set(TIME_PARTS)
    assert measured.part_seconds["recompute"] > 0
    assert sum(measured.part_seconds.values()) <= 1.5 * max(measured.step_seconds)
    assert measured.peak_allocated_bytes is None and len(measured.losses) == 4
