"""Context parallelism, both kinds: as plain PyTorch trains, with the forecast's bytes in memory and between ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.job.mesh import Mesh
from estimator.ops.operator import Op
from estimator.predict import lay_out, memory_of, predict, traffic_of
from runtime import initialize
from runtime.comm import Communicator
from runtime.functional import attention
from runtime.models import Decoder
from runtime.parallel.context import made_for
from runtime.parallel.layers import WholeLayers
from tests.runtime import tiny
from tests.runtime.groups import run_ranks
from tests.runtime.memory import MODELS, compare, metered
from tests.runtime.parity_worker import gloo_group
from tests.runtime.sessions import WAYS, train_and_check

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("ulysses", "ring")


def _spec(spec: ModelSpec, cp: int, tp: int) -> ModelSpec:
    """``spec`` with heads for as many ranks."""
    n = cp * tp
    return replace(spec, n_heads=max(spec.n_heads, n), n_kv_heads=max(spec.n_kv_heads, n))


def _cases(world: int) -> list[Job]:
    """Every model, stage, precision and kind of recomputation meets both kinds, beside data and tensor parallelism."""
    jobs = []
    ways = (*WAYS, {"zero_stage": 2, "dtype": "fp32", "recompute": "attention"})
    meshes = {2: ((2, 1),), 4: ((4, 1), (2, 1), (2, 2))}[world]
    for number, (spec, kind) in enumerate(product(MODELS.values(), KINDS)):
        for other, fields in enumerate(ways):
            if (number + other) % 2 and world > 2:
                continue
            cp, tp = meshes[(number + other // 2) % len(meshes)]
            cp = min(cp, 2) if fields["dtype"] == "fp16" else cp  # four times the gradient overflows one step longer
            strategy = Strategy(
                cp=cp, tp=tp, cp_kind=kind, sequence_parallel=other % 2 == 0, bucket_bytes=20_000, **fields  # type: ignore[arg-type]
            )  # fmt: skip
            spec_here = _spec(spec, cp, tp) if kind == "ulysses" else _spec(spec, 1, tp)
            jobs.append(tiny.job(spec_here, strategy, world=world, n_micro_batches=1 + other % 2, arch="cpu"))
    return jobs


QUICK = {2: (17,), 4: (6, 7)}


def _train(world: int, numbers: list[int], folder: Path) -> None:
    cases = _cases(world)
    train_and_check(
        [cases[number] for number in numbers], folder, compared=slice(-1, None)
    )  # the forecast is of a ring's last rank


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_trains_as_plain_pytorch_with_the_forecast_bytes(world: int, tmp_path: Path) -> None:
    _train(world, list(QUICK[world]), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", sorted(QUICK))
def test_all_of_them_do(world: int, tmp_path: Path) -> None:
    _train(world, [n for n in range(len(_cases(world))) if n not in QUICK[world]], tmp_path)


# ---- memory and traffic on tensors without data -------------------------------------------------------------------------

_FEW = (("gpt", "ulysses", "selective", 2, 1), ("llama", "ring", "none", 4, 1), ("qwen3", "ring", "full", 2, 2))
SHAPES = [
    pytest.param(name, kind, stage, recompute, dtype, cp, tp, marks=() if (name, kind, recompute, cp, tp) in _FEW else pytest.mark.slow)
    for name, kind, stage, recompute, dtype, (cp, tp) in product(
        MODELS, KINDS, (0, 3), ("none", "selective", "full", "attention"), ("fp32", "bf16"), ((2, 1), (4, 1), (2, 2))
    )
    if kind == "ulysses" or dtype == "bf16"
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "stage", "recompute", "dtype", "cp", "tp"), SHAPES)
def test_live_bytes_and_traffic_are_the_forecast_s(
    name: str, kind: str, stage: int, recompute: str, dtype: str, cp: int, tp: int
) -> None:
    strategy = Strategy(
        cp=cp, tp=tp, cp_kind=kind, zero_stage=stage, dtype=dtype, recompute=recompute, bucket_bytes=200_000,  # type: ignore[arg-type]
        kernels_off=("all",) if stage else (),
    )  # fmt: skip
    spec = _spec(MODELS[name], cp, tp) if kind == "ulysses" else _spec(MODELS[name], 1, tp)
    world = 2 * cp * tp
    job = tiny.job(spec, strategy, world=world, n_micro_batches=1 + stage % 2, micro_batch=1 + stage % 2, seq_len=64)
    got, blueprint = metered(job, rank=world - 1), lay_out(job)
    assert (got.collective_bytes, got.collective_calls) == traffic_of(blueprint.program, blueprint.costs)[:2]
    compare(got, memory_of(blueprint))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_no_rank_of_a_ring_needs_more_than_the_forecast(rank: int) -> None:
    strategy = Strategy(cp=4, cp_kind="ring", recompute="attention", bucket_bytes=200_000)
    job = tiny.job(MODELS["llama"], strategy, world=4, micro_batch=2, seq_len=64)
    got, want = metered(job, rank=rank), memory_of(lay_out(job))
    assert want.peak_bytes * 0.97 <= got.peak_allocated_bytes <= want.peak_bytes + 128  # type: ignore[operator]  # 128: scalars


# ---- attention alone, against one rank's ----------------------------------------------------------------------------------


def _attention_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        comm = Communicator(Mesh(cp=world))
        for kind in KINDS:
            context = made_for(kind, comm)  # type: ignore[arg-type]
            generator = torch.Generator().manual_seed(3)
            whole = [torch.randn(2, 48, heads, 8, generator=generator) for heads in (8, 4, 4)]
            grad = torch.randn(2, 48, 8, 8, generator=generator)
            for x in whole:
                x.requires_grad_()
            wanted = attention(*whole)
            wanted.backward(grad)
            own = [context.own(x).detach().requires_grad_() for x in whole]
            places = context.places(48 // world, torch.device("cpu"))
            assert torch.equal(own[0], whole[0][:, places])
            got = context.attention(*own)
            got.backward(context.own(grad))
            torch.testing.assert_close(got, context.own(wanted), rtol=1e-5, atol=1e-6)
            for x, y in zip(own, whole, strict=True):
                assert y.grad is not None
                torch.testing.assert_close(x.grad, context.own(y.grad), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(context.mean(torch.tensor(float(rank))), torch.tensor((world - 1) / 2))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_attention_and_its_gradients_are_those_of_one_rank(world: int, tmp_path: Path) -> None:
    run_ranks(_attention_rank, world, str(tmp_path))


# ---- by hand --------------------------------------------------------------------------------------------------------------


def _job(**fields: object) -> Job:
    return tiny.job(tiny.LLAMA, Strategy(cp=2, **fields), world=4)  # type: ignore[arg-type]


def _messages(job: Job) -> tuple[list[Op], list[Op]]:
    block = lay_out(job).costs[1]
    forward, backward = ([op for op in ops if op.kind == "collective"] for ops in (block.forward, block.backward))
    return forward, backward


def test_ulysses_exchanges_queries_keys_values_and_results() -> None:
    """Llama in bf16, 2 x 8 tokens of a rank: 32 channels of queries and of results, 16 of keys and of values."""
    q_bytes, kv_bytes = 16 * 32 * 2, 2 * 16 * 16 * 2
    for ops in _messages(_job()):
        assert sorted((op.name, op.n_bytes) for op in ops) == [
            ("all_to_all", q_bytes),
            ("all_to_all", q_bytes + kv_bytes),
        ]


def test_a_ring_sends_keys_and_values_and_their_gradients_in_fp32() -> None:
    """On two ranks: keys and values once in each pass, their gradients on and home again."""
    kv_bytes = 2 * 16 * 16 * 2
    forward, backward = _messages(_job(cp_kind="ring"))
    assert [(op.n_bytes, op.launches) for op in forward] == [(kv_bytes, 2)]
    assert [(op.n_bytes, op.launches) for op in backward] == [(kv_bytes, 2), (2 * kv_bytes, 2), (2 * kv_bytes, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cp", [2, 4])
def test_ranks_share_the_arithmetic(kind: str, cp: int) -> None:
    spec = replace(tiny.LLAMA, n_kv_heads=4)
    one = tiny.job(spec, Strategy(zero_stage=1), world=1, micro_batch=2)
    many = tiny.job(spec, Strategy(zero_stage=1, cp=cp, cp_kind=kind), world=cp, micro_batch=2)  # type: ignore[arg-type]
    attention_flops = [
        sum(op.flops for op in lay_out(j).costs[1].forward if op.kind == "attention") for j in (one, many)
    ]
    assert attention_flops[1] * cp == pytest.approx(attention_flops[0], rel=1e-12)
    assert predict(many).model_flops == pytest.approx(predict(one).model_flops, rel=1e-12)
    assert predict(many).time_parts_s["exposed_other_comm"] > 0


def test_a_ring_between_nodes_waits_for_its_slowest_link() -> None:
    near = tiny.job(tiny.LLAMA, Strategy(cp=2, cp_kind="ring"), world=4)
    far = replace(near, cluster=replace(near.cluster, gpus_per_node=1))
    assert predict(far).time_parts_s["exposed_other_comm"] > predict(near).time_parts_s["exposed_other_comm"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cp": 4}, "cp is 4 with cp_kind 'ulysses'; allowed: a divisor of n_kv_heads = 2 of tiny-llama, which it spreads, or cp_kind 'ring'"),
        ({"cp": 2, "tp": 2}, "allowed: a divisor of n_kv_heads / tp = 1 of tiny-llama"),
        ({"cp": 16, "cp_kind": "ring"}, "seq_len is 16 with cp_kind 'ring'; allowed: a multiple of 2 * cp = 32, the nearest is 32"),
        ({"cp": 2, "cp_kind": "ring", "dtype": "fp32"}, "cp_kind is 'ring' with dtype 'fp32'"),
        ({"cp": 2, "cp_kind": "rings"}, "cp_kind is 'rings'; allowed: ring, ulysses; did you mean 'ring'?"),
        ({"cp": 3}, "tp * pp * cp is 1 * 1 * 3 = 3; allowed: a divisor of gpus = 16"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_refused_in_a_sentence(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        tiny.job(tiny.LLAMA, Strategy(**fields), world=16)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_window_goes_with_heads_but_not_around_a_ring() -> None:
    spec = replace(tiny.LLAMA, sliding_window=8)
    assert tiny.job(spec, Strategy(cp=2), world=2).strategy.cp_kind == "ulysses"
    with pytest.raises(InputError, match="has a sliding window of 8 tokens"):
        tiny.job(spec, Strategy(cp=2, cp_kind="ring"), world=2)
    assert tiny.job(replace(spec, sliding_window=16), Strategy(cp=2, cp_kind="ring"), world=2)


def test_a_model_is_made_for_its_ranks_and_their_tokens() -> None:
    assert Strategy(cp_kind="ring") == Strategy(), "nothing is shared: one meaning, one key"
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        comm = Communicator(Mesh(cp=2))
        with torch.device("meta"):
            plain, shared = Decoder(tiny.LLAMA), Decoder(tiny.LLAMA, layers=WholeLayers(made_for("ring", comm)))
        with pytest.raises(InputError, match="cp is 2; the model was made for 1"):
            initialize(model=plain, strategy=Strategy(cp=2), comm=comm)
        with pytest.raises(InputError, match="cp_kind is 'ulysses'; the model was made for 'ring'"):
            initialize(model=shared, strategy=Strategy(cp=2), comm=comm)
        ids = torch.zeros(1, 16, dtype=torch.int64, device="meta")
        with pytest.raises(InputError, match=r"seq_len is 16; allowed: 8, this rank's part \(context.own\) of 16"):
            shared(ids, ids)
        assert shared.layers.context.own(torch.arange(16)[None]).tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
        assert made_for("ulysses", comm).own(torch.arange(16)[None]).tolist() == [[8, 9, 10, 11, 12, 13, 14, 15]]
    finally:
        torch.distributed.destroy_process_group()
