"""Learning rates and weight decays by parameter name equal torch.optim's parameter groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from torch import nn

from estimator.errors import InputError
from estimator.job import Strategy
from runtime import ParamGroup, initialize
from runtime.param_groups import Coefficients
from tests.runtime import generic
from tests.runtime.generic import OPTIMIZER, Run, assert_trains_as_plain, worker

GROUPS = (
    ParamGroup(names=("*.bias", "*.norm.*"), weight_decay=0.0),
    ParamGroup(names=("embed.*",), lr_scale=0.1),
    ParamGroup(names=("blocks.1.*",), lr_scale=2.0, weight_decay=0.3),
)


def torch_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The same, by hand. The first that matches counts."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = {name: p for name, p in named.items() if name.endswith(".bias") or ".norm." in name}
    embed = {name: p for name, p in named.items() if name.startswith("embed.") and name not in plain}
    second = {name: p for name, p in named.items() if name.startswith("blocks.1.") and name not in plain}
    rest = {name: p for name, p in named.items() if name not in plain | embed | second}
    return [
        {"params": plain.values(), "weight_decay": 0.0}, {"params": embed.values(), "lr": 0.1 * OPTIMIZER.lr},
        {"params": second.values(), "lr": 2 * OPTIMIZER.lr, "weight_decay": 0.3}, {"params": rest.values()},
    ]  # fmt: skip


def run(stage: int, offload: str = "none", **more: Any) -> Run:
    strategy = Strategy(zero_stage=stage, offload=offload, dtype="fp32", grad_clip=0.0, bucket_bytes=3_000, **more)  # type: ignore[arg-type]
    return Run("usual", strategy, param_groups=GROUPS, torch_groups=torch_groups)


RUNS = [run(0), run(1, "optimizer"), run(2), run(3, persistent_numel=30), run(3, "optimizer,param"),
        run(1, "optimizer", offload_fraction=0.4)]  # fmt: skip


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "lists"])
def test_one_process(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``lists``: the spans of one kind in one call, as the kernels take them."""
    if fused:
        from runtime.executor import Executor

        made = Executor.__init__

        def init(self: Executor, *args: Any) -> None:
            made(self, *args)
            self._fused_step = True

        monkeypatch.setattr(Executor, "__init__", init)
    assert_trains_as_plain(run(0), 0, 1)


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(worker, (2, str(tmp_path), RUNS), nprocs=2)


def test_every_element_of_a_shard_has_its_own_coefficients() -> None:
    """24 x 24 weights and 24 biases; the norm before them is 2 x 24, all multiples of 8."""
    model = generic.usual()
    engine = initialize(model=model, strategy=Strategy(bucket_bytes=1), param_groups=GROUPS)
    assert engine.executor.pieces is not None
    names = {"embed": 0, "blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "head": 4}
    pieces = {name: {p.coefficients: p.spans for p in engine.executor.pieces[g]} for name, g in names.items()}
    usual, none = Coefficients(1.0, 0.01), Coefficients(1.0, 0.0)
    assert pieces["embed"] == {Coefficients(0.1, 0.01): (slice(0, 960),)}
    assert pieces["blocks.0"] == {none: (slice(0, 48), slice(48 + 576, 648)), usual: (slice(48, 48 + 576),)}
    assert pieces["blocks.1"][Coefficients(2.0, 0.3)] == (slice(48, 624),)
    assert pieces["head"] == {usual: (slice(0, 960),), none: (slice(960, 1000),)}
    last = engine.executor.pieces[1][0]
    assert last.within(40, 630) == [slice(0, 8), slice(584, 590)] and last.within(50, 600) == []


def test_a_schedule_moves_all_groups_alike() -> None:
    engine = initialize(
        model=generic.usual(),
        strategy=Strategy(dtype="fp32"),
        param_groups=(ParamGroup(names=("head.*",), lr_scale=0.0),),
    )
    engine.set_lr(0.5)
    before = {name: value.clone() for name, value in engine.full_parameters().items()}
    generic.engine_step(engine, Run("usual", engine.strategy, n_micro=1), 0, 0)
    moved = {name: float((value - before[name]).abs().max()) for name, value in engine.full_parameters().items()}
    assert moved["head.weight"] == moved["head.bias"] == 0 and moved["embed.weight"] == pytest.approx(0.5, rel=0.05)


def test_what_cannot_be_is_refused() -> None:
    strategy = Strategy(dtype="fp32")
    with pytest.raises(InputError, match=r"pattern 'heads\.\*', which no trained parameter matches"):
        initialize(model=generic.usual(), strategy=strategy, param_groups=(ParamGroup(names=("heads.*",)),))
    with pytest.raises(InputError, match=r"param_groups\.names"):
        ParamGroup(names="*.bias")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"param_groups\.weight_decay is -1"):
        ParamGroup(names=("*",), weight_decay=-1)
    with pytest.raises(InputError, match=r"param_groups\.lr_scale"):
        ParamGroup(names=("*",), lr_scale=float("nan"))
