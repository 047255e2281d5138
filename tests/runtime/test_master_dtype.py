"""bf16 training without fp32 masters, and with bf16 states: as torch.optim steps bf16 parameters, with the forecast's bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from estimator.errors import InputError
from estimator.job import Strategy
from estimator.predict import lay_out, memory_of, predict
from estimator.schedule.buffers import UPDATE_CHUNK_NUMEL, takes_fused_step
from runtime import initialize
from runtime.models import Decoder
from runtime.optimizer import OptimizerConfig, Shard, step_shard
from runtime.reference import PARITY_OPTIMIZER, TOLERANCES, relative_difference
from tests.runtime import tiny
from tests.runtime.grouped import Case, assert_traffic_is_forecast, case, joined, train
from tests.runtime.memory import check
from tests.runtime.parity_worker import batch, run_engine, run_plain
from tests.runtime.test_memory import case as job_case

pytestmark = pytest.mark.timeout(600)

PURE: dict[str, Any] = {"dtype": "bf16", "master_dtype": "model"}
ALL: dict[str, Any] = {**PURE, "state_dtype": "model"}
ONE = [
    case(1, 1, zero_stage=0, **PURE),
    case(1, 4, zero_stage=0, **ALL, optimizer="sgd"),
    case(1, 4, zero_stage=3, **ALL, offload="optimizer,param", grad_dtype="fp32"),
]
TWO = [
    case(2, 1, zero_stage=0, **ALL),
    case(2, 4, zero_stage=1, **PURE, offload="optimizer"),
    case(2, 1, zero_stage=2, **PURE, offload="optimizer", offload_fraction=0.4),
    case(2, 4, zero_stage=3, **ALL),
    case(2, 1, zero_stage=3, **PURE, grad_dtype="fp32", optimizer="adam"),
    case(2, 1, zero_stage=2, dtype="bf16", state_dtype="model", offload="optimizer", delayed_update=True),
]
FOUR = [case(4, 1, zero_stage=1, **ALL), case(4, 4, zero_stage=3, **PURE, offload="optimizer,param")]


def equal(case_: Case, params: torch.Tensor) -> bool:
    return torch.equal(params.float(), joined(run_plain(case_)))  # type: ignore[arg-type]


@pytest.mark.parametrize("case_", ONE, ids=str)
def test_one_process_trains_as_the_reference(case_: Case) -> None:
    torch.set_num_threads(1)  # as in the reference: threads add in another order
    got = run_engine(case_, 0)  # type: ignore[arg-type]  # a case of any kind
    assert equal(case_, joined(got)) and got.losses[-1] < got.losses[0]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(TWO[:2], id="two"),
        pytest.param(TWO[2:], marks=pytest.mark.slow, id="more of two"),
        pytest.param(FOUR, marks=pytest.mark.slow, id="four"),
    ],
)
def test_processes_train_as_the_reference_with_the_forecast_bytes(cases: list[Case], tmp_path: Path) -> None:
    for case_, got in train(cases[0].world, cases, tmp_path).items():
        assert_traffic_is_forecast(case_, got)
        assert got.losses[-1] < got.losses[0]
        if case_.world == 2:
            assert equal(case_, joined(got)), case_
        else:
            want = run_plain(case_)  # type: ignore[arg-type]
            assert relative_difference(got.params, want.params) < TOLERANCES["bf16"].params
            assert got.losses == pytest.approx(want.losses, rel=TOLERANCES["bf16"].loss)


def test_all_in_bf16_is_what_torch_does_to_a_bf16_model() -> None:
    """torch's fused AdamW on bf16 parameters computes in fp32 and rounds to nearest, as the engine does."""
    strategy = Strategy(**ALL, grad_clip=0.0)  # type: ignore[arg-type]
    ours, theirs = Decoder(tiny.LLAMA), Decoder(tiny.LLAMA)
    for model in (ours, theirs):
        model.reset_parameters(0)
    theirs.to(torch.bfloat16)
    engine = initialize(model=ours, strategy=strategy, optimizer=PARITY_OPTIMIZER)
    stepper = torch.optim.AdamW(theirs.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.01, fused=True)
    for _ in range(5):
        engine.backward(engine(*batch(0, 0)))
        engine.step()
        stepper.zero_grad()
        theirs(*batch(0, 0)).backward()
        stepper.step()
    wanted = {name: param.detach() for name, param in theirs.named_parameters()}
    assert relative_difference(engine.full_parameters(), wanted) < 1e-3


def test_sgd_without_momentum_is_a_step_down_the_gradient() -> None:
    shard = Shard(master=torch.ones(8), grads=torch.full((8,), 2.0), states=[torch.zeros(8)], target=None, temp=None)
    config = OptimizerConfig(lr=0.25, betas=(0.0, 0.999), weight_decay=0.0)
    step_shard("sgd", config, config.lr, torch.ones(1), None, shard)
    assert (shard.master == 0.5).all()


def test_small_steps_are_lost_without_masters() -> None:
    """A step of less than half a bf16 spacing changes nothing; fp32 masters add it up. A chunk's end changes nothing either."""
    numel = UPDATE_CHUNK_NUMEL + 8
    one = torch.ones(numel, dtype=torch.bfloat16)
    grads, temp = torch.ones(numel, dtype=torch.bfloat16), torch.empty(3 * UPDATE_CHUNK_NUMEL)
    config, step = OptimizerConfig(lr=1e-3, betas=(0.5, 0.999), weight_decay=0.0), torch.ones(1)
    pure = Shard(master=one.clone(), grads=grads, states=[one.clone().zero_()], target=None, temp=temp)
    exact = Shard(master=one.float(), grads=grads, states=[torch.zeros(numel)], target=one.clone(), temp=temp)
    for shard in (pure, exact):
        for _ in range(3):
            step_shard("sgd", config, config.lr, step, None, shard)
    assert (pure.master == 1).all() and torch.allclose(exact.master, torch.tensor(1 - 0.001 - 0.0015 - 0.00175))
    assert exact.target is not None and (exact.target == 1 - 2**-8).all()


@pytest.mark.parametrize("fields", [PURE, ALL, {"dtype": "bf16", "state_dtype": "model"}], ids=str)
@pytest.mark.parametrize(
    "args",
    [("gpt", 0, "none", "none", 1, 1), ("llama", 1, "optimizer", "full", 4, 2), ("gpt", 2, "none", "none", 1, 8),
     ("llama", 3, "optimizer,param", "selective", 4, 8), ("llama", 3, "none", "none", 4, 2)],
    ids=str,
)  # fmt: skip
def test_live_bytes_are_the_forecast(args: tuple, fields: dict) -> None:
    job = job_case(*args)
    for more in ({}, {"grad_dtype": "fp32", "optimizer": "sgd"}, {"kernels_off": ("all",)}):
        check(replace(job, strategy=replace(job.strategy, **fields, **more)))


def test_bytes_of_the_states_by_hand() -> None:
    """Of 16 bytes per parameter (Rajbhandari et al. 2020) 12 are left without masters, 8 with bf16 states; no kernel takes them."""
    job = job_case("llama", 0, "none", "none", 1, 1)
    numel = sum(group.padded_numel for group in lay_out(job).layout.groups)
    states = ("params", "grads", "master_params", "optimizer_state")
    for fields, width in (({"dtype": "bf16"}, 16), (PURE, 12), (ALL, 8)):
        j = replace(job, strategy=replace(job.strategy, **{"dtype": "bf16", "master_dtype": "fp32", **fields}))
        held = memory_of(lay_out(j)).category_peak_bytes
        assert sum(held.get(category, 0) for category in states) == width * numel
        kernels = frozenset({"adam"})
        assert takes_fused_step(j.strategy, kernels) == (width == 16) and not takes_fused_step(j.strategy, frozenset())


def test_a_step_in_plain_torch_is_forecast_slower_than_the_kernel() -> None:
    job = job_case("llama", 0, "none", "none", 1, 1)
    seconds = [
        predict(replace(job, strategy=Strategy(**fields))).time_parts_s["optimizer"]  # type: ignore[arg-type]
        for fields in ({"dtype": "bf16"}, PURE, ALL)
    ]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dtype": "fp16", "master_dtype": "model"},
         "master_dtype is 'model' with dtype fp16; allowed: fp32, or dtype bf16, whose range is fp32's (in fp16 second moments and "
         "small steps become zero)"),
        ({"offload": "optimizer:nvme", "state_dtype": "model"},
         "state_dtype is 'model' with offload 'optimizer:nvme', whose files hold fp32; allowed: fp32, or another offload"),
        ({"master_dtype": "bf16"}, "master_dtype is 'bf16'; allowed: fp32, model"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(fields: dict, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        Strategy(**fields)
    assert str(error.value) == sentence


def test_an_fp32_model_has_fp32_everything_anyway() -> None:
    assert Strategy(dtype="fp32", master_dtype="model", state_dtype="model") == Strategy(dtype="fp32")
