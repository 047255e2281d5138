"""Recomputation by parts and of every k-th block, and blocks' inputs in host memory: bytes as forecast, numbers as without."""

from __future__ import annotations

import itertools
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.predict import lay_out, memory_of, traffic_of
from runtime import functional, initialize
from runtime.context import metered_by
from runtime.ledger import Ledger
from runtime.models import Decoder
from runtime.offload.activations import BlockInputs
from runtime.reference import PARITY_OPTIMIZER
from runtime.remake import Remaker, remakable, suspended
from runtime.session import SessionOptions, run_session
from runtime.streams import SideStreams
from tests.runtime import tiny
from tests.runtime.memory import MODELS, compare, metered
from tests.runtime.offload_worker import OffloadCase, run_group
from tests.runtime.parity_worker import run_engine, run_plain

MODES: tuple[dict[str, Any], ...] = (
    {"recompute": "norms"},
    {"recompute": "activation"},
    {"recompute": "activation,norms"},
    {"recompute": "attention"},
    {"recompute": "mlp"},
    {"recompute": "activation,attention,norms", "recompute_every": 2},
    {"recompute": "attention,mlp,norms"},
    {"recompute": "full", "recompute_every": 2},
    {"recompute": "selective", "recompute_every": 3},
    {"recompute": "full", "activation_offload": True},
    {"recompute": "selective", "activation_offload": True},
    {"recompute": "full", "recompute_every": 2, "activation_offload": True},
)
GRID = list(itertools.product(MODES, (0, 1, 2, 3), ("fp32", "fp16", "bf16"), ("meta", "fake-cpu")))
"""modes x stages x dtypes x devices: 288 cases; models, offload, micro-batches and ranks take turns."""
QUICK = GRID[::29]


def name(case: tuple) -> str:
    return "-".join([*map(str, case[0].values()), *map(str, case[1:])])


def check(case: tuple) -> None:
    mode, stage, dtype, device = case
    index = GRID.index(case)
    strategy = Strategy(
        zero_stage=stage, dtype=dtype, bucket_bytes=300_000, prefetch_depth=1 + index % 2,
        offload=("none", "none", "optimizer", "optimizer,param")[index % 4], **mode,
    )  # fmt: skip
    job = tiny.job(
        replace(list(MODELS.values())[index % len(MODELS)], n_layers=4), strategy, world=(1, 2, 8)[index % 3],
        n_micro_batches=1 + index % 3, micro_batch=1 + index % 4, seq_len=64, arch="cpu" if device == "fake-cpu" else "hopper",
    )  # fmt: skip
    got, blueprint = metered(job, device), lay_out(job)
    compare(got, memory_of(blueprint))
    assert got.copy_bytes == traffic_of(blueprint.program)[2]


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_live_bytes_and_copies_are_the_forecast(case: tuple) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in GRID if c not in QUICK], ids=name)
def test_live_bytes_and_copies_are_the_forecast_everywhere(case: tuple) -> None:
    check(case)


# ---- parity -----------------------------------------------------------------------------------------------------------


def parity_cases(world: int) -> list[OffloadCase]:
    """GPT with one micro-batch, Llama with three, both with a third block."""
    return [
        OffloadCase(Strategy(zero_stage=(3, 2)[i % 2], dtype="fp32", grad_clip=0.0, bucket_bytes=20_000, **mode), world, 1 + 2 * (i % 2))
        for i, mode in enumerate(MODES)
        if world == 1 or i % 5 == 2
    ]  # fmt: skip


def same(got: Any, want: Any) -> None:
    assert got.params.keys() == want.params.keys()
    assert all(torch.equal(got.params[name], want.params[name]) for name in want.params)
    assert got.losses == pytest.approx(want.losses, rel=1e-6)


@pytest.mark.parametrize("number", range(len(MODES)), ids=["-".join(map(str, mode.values())) for mode in MODES])
def test_one_process_trains_as_plain_pytorch_to_the_bit(number: int, one_thread: None) -> None:
    case = parity_cases(1)[number]
    same(run_engine(case, 0), run_plain(case))  # type: ignore[arg-type]


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_two_processes_train_as_plain_pytorch_to_the_bit(tmp_path: Path) -> None:
    cases = parity_cases(2)
    for got, case in zip(run_group(cases, tmp_path), cases, strict=True):
        same(got, run_plain(case))  # type: ignore[arg-type]


# ---- outputs made again -----------------------------------------------------------------------------------------------


def read(h: Tensor, w: Tensor) -> Tensor:
    """Two operators that save ``h``, one of them as a view in another layout."""
    return h @ w + (h.view(2, 8).t() ** 2).reshape(4, 4)


class Counted:
    """An operator that knows how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x.sin()


def test_an_output_is_made_again_once_for_all_who_saved_it() -> None:
    ran = Counted()
    operator = remakable("norms", lambda x: ran(x))
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with Remaker(frozenset({"norms"}), nullcontext):
        y = read(operator(x), w)
    assert ran.runs == 1
    y.sum().backward()
    assert ran.runs == 2
    got = x.grad, w.grad
    x.grad = w.grad = None
    read(x.sin(), w).sum().backward()
    assert torch.equal(got[0], x.grad) and torch.equal(got[1], w.grad)  # type: ignore[arg-type]


def test_nothing_is_noted_of_other_parts_in_checkpoints_and_without_gradients() -> None:
    gate, up = (torch.randn(2, 8, requires_grad=True) for _ in range(2))
    weight = torch.ones(8)
    with Remaker(frozenset({"activation"}), nullcontext) as remaker:
        kept = [functional.rms_norm(gate, weight, 1e-6)]
        assert not remaker._notes
        with suspended():
            kept.append(functional.gated_activate(gate, up, "silu"))
        with torch.no_grad():
            kept.append(functional.gated_activate(gate, up, "silu"))
        kept.append(functional.activate(gate, "relu"))  # torch's keeps it itself
        assert not remaker._notes
        kept.append(functional.gated_activate(gate, up, "silu"))
        assert len(remaker._notes) == 1
        kept.pop()
        assert not remaker._notes  # its memory is free for something else


def test_a_block_that_does_not_name_its_parts_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(2, 2) for _ in range(3))

    with pytest.raises(InputError, match="Linear does not say which of its modules are 'mlp'"):
        initialize(model=Own(), strategy=Strategy(dtype="fp32", recompute="mlp"))


# ---- inputs that travel -----------------------------------------------------------------------------------------------

AWAY = Strategy(dtype="fp32", recompute="full", activation_offload=True)


def test_the_device_lets_go_of_what_has_left_and_takes_it_once() -> None:
    inputs, streams = BlockInputs({1}, torch.device("cpu")), SideStreams(torch.device("cpu"))
    weight = torch.randn(4, 4, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return x @ weight

    x = torch.randn(2, 4, requires_grad=True) * 2
    y = torch.randn(2, 4, requires_grad=True) * 2
    values, storage = x.detach().clone(), x.untyped_storage()._cdata
    inputs.offer(1, ((x, None), {"mask": torch.ones(2)}))  # the mask has no gradient: it stays
    out = inputs.keeping(forward)(x)
    assert inputs.leave(1, streams) == (32, None)
    inputs.offer(2, y)  # not one of those that travel
    out = inputs.keeping(forward)(out)
    inputs.drop(1)
    gone: list[int] = []
    weakref.finalize(x.untyped_storage(), gone.append, storage)
    del x
    assert gone == [storage]
    inputs.expect(1)
    assert inputs.come_back(1, streams) == (32, None)
    out.sum().backward()
    assert inputs._here == {1: [None]}
    want = weight.detach().requires_grad_()
    (values @ want @ want).sum().backward()
    assert torch.equal(weight.grad, want.grad)  # type: ignore[arg-type]


def engine_of(strategy: Strategy) -> Any:
    model = Decoder(replace(tiny.LLAMA, n_layers=4))
    model.reset_parameters(0)
    return initialize(model=model, strategy=strategy, optimizer=PARITY_OPTIMIZER)


def step(engine: Any, batch: int, seq_len: int = 16) -> float:
    ids = torch.arange(batch * seq_len).view(batch, seq_len) % 61
    loss = engine(ids, ids)
    engine.backward(loss)
    engine.step()
    return loss.item()


def test_batches_of_other_sizes_get_host_memory_of_their_own(one_thread: None) -> None:
    engine, plain = engine_of(AWAY), engine_of(Strategy(dtype="fp32"))
    ledger = Ledger()
    with metered_by(ledger):
        for batch, seq_len in ((2, 16), (2, 16), (1, 16), (3, 8)):
            ledger.start_step()
            assert step(engine, batch, seq_len) == step(plain, batch, seq_len)
            sizes = [x.numel() for rooms in engine.executor.inputs._away.values() for x in rooms]
            assert sizes == [batch * seq_len * 32] * 3
            assert ledger.report().host_category_peak_bytes["activations"] >= 3 * batch * seq_len * 32 * 4
        ledger.start_step()
        assert ledger.report().host_category_peak_bytes == {"activations": 3 * 3 * 8 * 32 * 4}


def test_evaluation_moves_nothing() -> None:
    engine = engine_of(AWAY)
    ids = torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        before = engine.model(ids, ids).item()
    assert not engine.executor.inputs._away and not engine.executor.copy_bytes
    step(engine, 1)
    with torch.no_grad():
        assert engine.model(ids, ids).item() != before
    assert engine.executor.copy_bytes == {"d2h": 3 * 16 * 32 * 4, "h2d": 3 * 16 * 32 * 4}


def test_a_session_reports_what_its_copies_reached() -> None:
    job = _job(AWAY)
    measured = run_session(job, "cpu", SessionOptions(steps=2, warmup=1, reference=True))
    assert measured.copy_bytes == traffic_of(lay_out(job).program)[2] and measured.copy_bytes["d2h"] > 0
    assert measured.copy_bytes_per_s["d2h"] > 0 and measured.copy_bytes_per_s["h2d"] > 0
    assert measured.parity["params"] <= 1e-6 and measured.part_seconds["offload"] > 0


def _job(strategy: Strategy) -> Job:
    return tiny.job(replace(tiny.LLAMA, n_layers=4), replace(strategy, grad_clip=0.0), arch="cpu")
