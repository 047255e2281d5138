"""A rank that is lost makes the others stop with one sentence; gradients that are not finite are named and harm nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from estimator.errors import InputError
from estimator.job import Strategy
from estimator.schedule.events import Update
from runtime import Engine, LostRankError, OptimizerConfig, faults, initialize, process_group
from runtime.models import Decoder
from tests.runtime import tiny
from tests.runtime.groups import free_port, run_ranks, start_ranks
from tests.runtime.parity_worker import gloo_group

TIMEOUT_S = 4.0
PATIENCE_S = 30.0
"""What a loaded machine may add to starting processes and training two steps."""


def tokens(rank: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(rank))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def engine_of(strategy: Strategy) -> Engine:
    model = Decoder(tiny.LLAMA)
    model.reset_parameters(0)
    return initialize(model=model, strategy=strategy, optimizer=OptimizerConfig(lr=1e-2))


# ---- lost ranks -----------------------------------------------------------------------------------------------------


def trouble(how: str) -> None:
    if how in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    if how == "hang":
        time.sleep(1000)
    raise ValueError("a bad sample")


def prepare_trouble(engine: Engine, how: str, where: str) -> None:
    """Rank 1 meets ``how`` the next time it is in the middle of ``where``."""
    blocks: Any = engine.model.blocks
    if where == "forward":
        blocks[1].register_forward_pre_hook(lambda *_: trouble(how))
    elif where == "backward":
        blocks[0].register_full_backward_hook(lambda *_: trouble(how))
    elif where == "optimizer":
        engine.executor._handlers[Update] = lambda _: trouble(how)
    else:
        trouble(how)


def train(rank: int, world: int, folder: str, port: int, how: str, where: str) -> None:
    """Two good steps, then trouble on rank 1; what this rank says at its end goes into ``folder``."""
    faults.BEAT_S, faults.GRACE_S = 0.1, 1.0
    torch.set_num_threads(1)
    os.dup2(os.open(f"{folder}/stderr{rank}", os.O_CREAT | os.O_WRONLY), 2)
    meet = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": world}
    with process_group("gloo", timeout_s=TIMEOUT_S, **meet):
        engine = engine_of(Strategy(dtype="fp32", zero_stage=2))
        for step in range(3):
            if rank == 1 and step == 2:
                prepare_trouble(engine, how, where)
            if rank == 0 and step == 2 and where == "apart":
                time.sleep(1000)
            engine.backward(engine(*tokens(rank)))
            engine.step()


def sentences(folder: Path, world: int, how: str, where: str) -> list[str]:
    """The last line that each survivor wrote, of a run in which rank 1 is lost. All end non-zero and in time."""
    ranks = start_ranks(train, world, str(folder), free_port(), how, where)
    deadline = time.monotonic() + TIMEOUT_S + PATIENCE_S
    try:
        survivors = [process for rank, process in enumerate(ranks) if rank != 1]
        for process in survivors:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in survivors] == [1] * (world - 1)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [Path(folder, f"stderr{rank}").read_text().splitlines()[-1] for rank in range(world) if rank != 1]


PLACES = {"forward": "the forward pass", "backward": "the backward pass", "optimizer": "the optimizer step"}


@pytest.mark.parametrize(
    ("world", "where"),
    [(2, "forward"), (2, "optimizer"), (4, "backward")]
    + [pytest.param(*rest, marks=pytest.mark.slow) for rest in ((2, "backward"), (4, "forward"), (4, "optimizer"))],
)
def test_a_killed_rank_stops_the_others(tmp_path: Path, world: int, where: str) -> None:
    said = sentences(tmp_path, world, "kill", where)
    assert all(line.endswith("of step 2: rank 1 no longer answers") for line in said), said
    assert all("LostRankError: rank" in line and "stopped in the" in line for line in said)


def test_a_rank_that_raises_says_why(tmp_path: Path) -> None:
    (said,) = sentences(tmp_path, 2, "raise", "forward")
    assert said.endswith("of step 2: rank 1 raised ValueError: a bad sample")
    assert "a bad sample" in Path(tmp_path, "stderr1").read_text()


def test_a_rank_that_stands_still_is_given_up_after_the_time_out(tmp_path: Path) -> None:
    (said,) = sentences(tmp_path, 2, "stop", "forward")
    assert said.endswith(("rank 1 no longer answers", f"rank 1 has not answered for {TIMEOUT_S:g} s")), said


def test_a_rank_that_is_late_is_named_with_what_it_does(tmp_path: Path) -> None:
    (said,) = sentences(tmp_path, 2, "hang", "between")
    assert said.endswith("rank 1 did not come within the time-out (rank 1 is in no pass of the engine)"), said


def test_a_process_stuck_elsewhere_is_ended(tmp_path: Path) -> None:
    (said,) = sentences(tmp_path, 2, "raise", "apart")
    assert said == "rank 0 stopped: rank 1 raised ValueError: a bad sample"


def test_other_errors_pass_and_a_lost_rank_is_told_once() -> None:
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"), faults.told("the forward pass"):
        raise RuntimeError("shape mismatch")
    with pytest.raises(LostRankError, match=r"^rank 2 stopped$"), faults.told("the forward pass"):
        raise LostRankError("rank 2 stopped")


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        (
            "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9. This is typically",
            "another rank no longer answers (Connection closed by peer [::1]:9)",
        ),
        ("[gloo/x.cc:78] Timed out waiting 8000ms for recv", "another rank did not answer within the time-out"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_what_the_libraries_say_of_a_lost_rank(text: str, sign: str | None) -> None:
    assert faults._sign_of_loss(RuntimeError(text)) == sign


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("inf"), float("nan"), True, "60"])
def test_a_time_out_is_a_number_of_seconds(timeout_s: Any) -> None:
    with pytest.raises(InputError, match=r"timeout_s is .*seconds > 0"), process_group("gloo", timeout_s=timeout_s):
        pass


def test_ranks_leave_together(tmp_path: Path) -> None:
    run_ranks(leave, 2, str(tmp_path))


def leave(rank: int, world: int, folder: str) -> None:
    with gloo_group(rank, world, folder):
        if rank == 1:
            time.sleep(0.5)
        assert dist.is_initialized()
    assert not dist.is_initialized()


# ---- gradients that are not finite ----------------------------------------------------------------------------------

SPOILT = "blocks.1.mlp.down.weight"


def spoil(engine: Engine, value: float) -> Any:
    """The next backward passes give ``SPOILT`` a gradient with one ``value`` in it."""

    def change(grad: Tensor) -> Tensor:
        changed = grad.clone()
        changed.view(-1)[-1] = value
        return changed

    return dict(engine.model.named_parameters())[SPOILT].register_hook(change)


def masters(engine: Engine) -> Tensor:
    return torch.cat([p.flatten() for p in engine.full_parameters().values()])


def check_spoilt_step(engine: Engine, rank: int, *, here: bool, value: float, clip: bool) -> None:
    """A good step, a spoilt one that is named and changes nothing, and a good one that trains as if it had not been."""

    def step() -> None:
        engine.backward(engine(*tokens(rank)))
        engine.step()

    engine.check_gradients = True
    step()
    assert engine.nonfinite_gradients == [] and engine.skipped_steps == 0
    before, handle = masters(engine), spoil(engine, value) if here else None
    step()
    assert engine.nonfinite_gradients == [SPOILT]
    assert engine.skipped_steps == 1 and torch.equal(masters(engine), before)
    if handle is not None:
        handle.remove()
    engine.check_gradients = not clip
    step()
    assert engine.skipped_steps == 1 and masters(engine).isfinite().all() and not torch.equal(masters(engine), before)


@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer,param"])
@pytest.mark.parametrize(("dtype", "clip"), [("fp32", 1.0), ("fp32", 0.0), ("bf16", 1.0), ("bf16", 0.0)])
def test_a_gradient_that_is_not_finite_is_named_and_the_step_skipped(offload: str, dtype: str, clip: float) -> None:
    engine = engine_of(Strategy(dtype=dtype, grad_clip=clip, offload=offload))  # type: ignore[arg-type]
    check_spoilt_step(engine, 0, here=True, value=float("nan") if clip else float("inf"), clip=clip > 0)


def sharded(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        for stage in (0, 1, 2, 3):
            for clip in (0.0, 1.0):
                engine = engine_of(Strategy(dtype="fp32", zero_stage=stage, grad_clip=clip, bucket_bytes=20_000))
                check_spoilt_step(engine, rank, here=rank == 1, value=float("nan"), clip=clip > 0)


def test_every_rank_names_what_one_rank_has_spoilt(tmp_path: Path) -> None:
    run_ranks(sharded, 3, str(tmp_path))


def test_with_clipping_a_step_is_skipped_without_being_asked() -> None:
    engine = engine_of(Strategy(dtype="bf16"))
    before = masters(engine)
    spoil(engine, float("nan"))
    engine.backward(engine(*tokens(0)))
    engine.step()
    assert engine.skipped_steps == 1 and torch.equal(masters(engine), before)
    assert engine.grad_norm is not None and not engine.grad_norm.isfinite() and engine.nonfinite_gradients == []
