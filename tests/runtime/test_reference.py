"""The reference is plain PyTorch, and what differs from it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from estimator.job import Strategy
from runtime import OptimizerConfig
from runtime.executor import Executor
from runtime.optimizer import squared_norm
from runtime.reference import excess, relative_difference, train_plain
from runtime.session import SessionOptions, run_session
from tests.runtime import tiny


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.layer(x).squeeze(-1), y)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_ranks_and_micro_batches_are_one_big_batch(stage: int, clip: float) -> None:
    """Two ranks with two micro-batches of four rows each step as sixteen rows do, with torch's own clipping."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 2, 2, 4, 3), torch.randn(3, 2, 2, 4)
    model, whole = Line(), Line()
    whole.load_state_dict(model.state_dict())
    config = OptimizerConfig(lr=0.1, weight_decay=0.0, betas=(0.9, 0.999))
    strategy = Strategy(zero_stage=stage, dtype="fp32", optimizer="sgd", grad_clip=clip)  # type: ignore[arg-type]
    plain = train_plain(
        model, strategy, config, lambda s, r, m: (x[s, r, m], y[s, r, m]), n_ranks=2, n_micro_batches=2, steps=3
    )
    sgd = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        loss = whole(x[step].flatten(0, 2), y[step].flatten())
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(whole.parameters(), clip)
        sgd.step()
        sgd.zero_grad()
        assert torch.tensor(plain.losses[step]).mean().item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(plain.params["layer.weight"], whole.layer.weight.detach(), rtol=1e-5, atol=1e-6)


def test_a_session_holds_itself_against_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bit by bit as it is; a runtime that forgets one of two micro-batches is found out."""
    strategy = Strategy(dtype="fp32", grad_clip=0.0)
    job = tiny.job(replace(tiny.LLAMA, n_layers=1), strategy, n_micro_batches=2, arch="cpu")
    options = SessionOptions(steps=2, warmup=1, reference=True)
    assert run_session(job, "cpu", options).parity == {"loss": 0.0, "params": 0.0}
    finish = Executor.finish

    def forget(self: Executor) -> None:
        finish(self)
        if forget.turn % 2 == 0:  # type: ignore[attr-defined]
            for storage in self.storages:
                storage.tensors["full_grads"].zero_()
        forget.turn += 1  # type: ignore[attr-defined]

    forget.turn = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Executor, "finish", forget)
    parity = run_session(job, "cpu", options).parity
    assert parity["params"] > 1e-3 and "params differs" in str(excess("fp32", {**parity, "loss": 0.0}))


def test_what_is_beyond_the_tolerance_is_one_sentence() -> None:
    assert excess("fp32", {"loss": 1e-6, "params": 1e-6}) is None
    assert excess("bf16", {"loss": 2e-2, "params": 2e-3}) is None
    told = excess("fp32", {"loss": 0.0, "params": 2.34e-5})
    assert told == "params differs from plain PyTorch by 2.3e-05 relative; allowed with fp32: 1e-06"
    assert "loss differs" in str(excess("bf16", {"loss": float("nan"), "params": 0.0}))


def test_relative_difference_is_over_all_parameters() -> None:
    want = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    got = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])}
    assert relative_difference(got, want) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"differ in name: \['b'\]"):
        relative_difference({"a": want["a"]}, want)


@pytest.mark.parametrize("numel", [1, 4095, 4096, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_long_vector_is_exact_to_rounding(numel: int, dtype: torch.dtype) -> None:
    """torch's own loses 1e-5 at a million elements on a CPU."""
    flat = (torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    assert squared_norm(flat).item() == pytest.approx(flat.double().square().sum().item(), rel=2e-6)
