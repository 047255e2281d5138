"""Models beyond decoders: frozen, unused and repeated parameters, small ones that stay. As in plain PyTorch, to the byte."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job import Strategy
from runtime import initialize
from runtime.units import find_units
from tests.runtime import generic
from tests.runtime.generic import MODELS, Run, assert_trains_as_plain, worker

STAGES, OFFLOADS, SMALL = (0, 1, 2, 3), ("none", "optimizer", "optimizer,param"), (0, WIDTH := generic.WIDTH, 10**6)


def strategy(stage: int, offload: str, small: int, index: int) -> Strategy:
    return Strategy(
        zero_stage=stage, offload=offload, persistent_numel=small, dtype=("fp32", "bf16")[index % 5 == 4],  # type: ignore[arg-type]
        grad_dtype=("model", "fp32")[index % 2], grad_clip=(0.0, 0.5)[index % 3 == 2], bucket_bytes=3_000,  # type: ignore[arg-type]
        prefetch_depth=index % 3, recompute=("none", "full")[index % 4 == 3],  # type: ignore[arg-type]
    )  # fmt: skip


EVERY = [
    Run(name, strategy(stage, offload, small, index), n_micro=1 + index % 3)
    for index, (name, stage, offload, small) in enumerate(itertools.product(MODELS, STAGES, OFFLOADS, SMALL))
    if small == 0 or stage == 3 or offload == "optimizer,param"
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_one_process(name: str, offload: str) -> None:
    for small in SMALL if offload == "optimizer,param" else (0,):
        assert_trains_as_plain(Run(name, strategy(3, offload, small, len(name))), 0, 1)


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(worker, (2, str(tmp_path), EVERY[::7]), nprocs=2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_run(world: int, tmp_path: Path) -> None:
    mp.spawn(worker, (world, str(tmp_path), EVERY), nprocs=world)


def test_frozen_parameters_have_neither_gradients_nor_states() -> None:
    """Per block: 24 x 24 + 24 frozen; 2 x 24, 24 x 2 and the norm's 2 x 24 trained. fp32, one process."""
    run = Run("adapted", Strategy(dtype="fp32", grad_clip=0.0, bucket_bytes=1))
    memory = generic.assert_live_bytes(generic.train_engine(run, 0), run, 0)
    trained = 2 * (48 + 48 + 48) + 40 * 24
    frozen = 40 * 24 + 2 * (576 + 24) + (576 + 24 + 48) + 40
    assert memory.category_peak_bytes["params"] == 4 * (trained + frozen)
    assert memory.category_peak_bytes["grads"] == 4 * trained
    assert memory.category_peak_bytes["optimizer_state"] == 8 * trained


def test_frozen_parameters_are_left_alone_and_low_precision() -> None:
    engine = generic.train_engine(Run("adapted", Strategy(dtype="bf16")), 0)
    start = generic._model(Run("adapted", Strategy()))
    for name, param in start.named_parameters():
        got = engine.full_parameters()[name]
        assert torch.equal(got.float(), param.bfloat16().float()) != param.requires_grad, name


def test_a_model_that_is_frozen_as_a_whole_is_refused() -> None:
    with pytest.raises(InputError, match="no parameter of the model requires a gradient"):
        find_units(generic.usual().requires_grad_(False))


class Skips(generic.Model):
    """Leaves one block out."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.embed(ids)))


def test_a_unit_that_is_skipped_is_named() -> None:
    model = Skips([generic.Block(nn.Linear(WIDTH, WIDTH)) for _ in range(2)])
    engine = initialize(model=model, strategy=Strategy(dtype="fp32"))
    with pytest.raises(
        RuntimeError,
        match=r"the model ran forward of blocks\.1 where its program has forward of blocks\.0; every unit must run once",
    ):
        engine(torch.zeros(4, dtype=torch.int64))


class Detaches(generic.Model):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.embed(ids)).detach())


def test_a_unit_whose_backward_pass_is_cut_off_is_named() -> None:
    engine = initialize(model=Detaches([generic.Block(nn.Linear(WIDTH, WIDTH))]), strategy=Strategy(dtype="fp32"))
    with pytest.raises(RuntimeError, match=r"the backward pass never reached backward of blocks\.0"):
        engine.backward(engine(torch.zeros(4, dtype=torch.int64)).sum())
