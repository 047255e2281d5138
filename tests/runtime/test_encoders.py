"""Encoders and encoder-decoders: the same numbers as plain code, the bytes of the forecast, training as in plain PyTorch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.job.encoder import Encoder
from estimator.job.files import job_from_dict, job_to_dict
from estimator.predict import lay_out, memory_of, model_flops_of, traffic_of
from estimator.sharding.units import count_params, model_units
from runtime.biased_attention import biased_attention
from runtime.models import build
from runtime.models.batches import random_batch
from runtime.reference import excess
from runtime.session import SessionOptions, run_session
from runtime.units import find_units
from tests.conftest import Ran
from tests.runtime import encoders, tiny
from tests.runtime.groups import run_ranks
from tests.runtime.memory import check, compare, metered
from tests.runtime.naive import Naive
from tests.runtime.parity_worker import gloo_group

SPECS = {spec.name.removeprefix("tiny-"): spec for spec in encoders.ALL}
STAGES, RECOMPUTES, DTYPES = (0, 1, 2, 3), ("none", "selective", "full"), ("bf16", "fp32", "fp16")


def batch_of(spec: ModelSpec, seq_len: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return random_batch(spec, lambda: torch.randint(spec.vocab_size, (3, seq_len), generator=generator))


# ---- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_units_are_the_estimators(name: str) -> None:
    spec = SPECS[name]
    live = [found.unit for found in find_units(build(spec))]
    assert [(u.name, u.params, u.borrows, u.backward_reads) for u in live] == [
        (u.name, u.params, u.borrows, u.backward_reads) for u in model_units(spec)
    ]
    assert count_params(live) == sum(p.numel() for p in build(spec).parameters())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seq_len", [13, 16])
def test_loss_and_gradients_are_those_of_plain_code(name: str, seq_len: int) -> None:
    spec = SPECS[name]
    model = build(spec)
    model.reset_parameters(3, std=0.2)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())))
    plain = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    batch = batch_of(spec, seq_len)
    got, want = model(*batch), Naive(spec, plain).loss(*batch)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    got.backward()
    want.backward()
    for param_name, param in model.named_parameters():
        torch.testing.assert_close(
            param.grad, plain[param_name].grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=param_name: f"{n}: {m}"
        )


def test_every_seventh_token_is_masked() -> None:
    ids, labels = batch_of(encoders.BERT)
    assert bool((ids[:, ::7] == 0).all()) and bool((labels[:, ::7] >= 0).all())
    assert int((labels != -100).sum()) == 3 * 2
    assert int((batch_of(encoders.T5)[1] == -100).sum()) == 0


def test_sequences_longer_than_the_model_are_refused() -> None:
    for spec in encoders.ALL:
        with pytest.raises(InputError, match="seq_len is 17; allowed: at most 16"):
            build(spec)(*batch_of(spec, 17))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biased_attention_equals_autograd(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 9, 3, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    bias = torch.randn(3, 9, 9, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(2, 9, 3, 8, generator=generator).to(dtype)
    inputs = (q, k, v, bias)
    got = torch.autograd.grad((biased_attention(*inputs) * weights).sum(), inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    q64, k64, v64 = (x.transpose(1, 2) for x in wide[:3])
    out = ((q64 @ k64.mT + wide[3]).softmax(-1) @ v64).transpose(1, 2)
    want = torch.autograd.grad((out * weights).sum(), wide)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.double() - theirs).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()


# ---- what they cost ---------------------------------------------------------------------------------------------------


def wide(name: str) -> ModelSpec:
    spec = SPECS[name]
    rows = 64 + spec.position_rows - spec.max_positions if spec.position_rows else 0
    return replace(
        spec, d_model=128, head_dim=32, n_heads=4, n_kv_heads=4, vocab_size=1024, max_positions=64, position_rows=rows
    )


def case(name: str, stage: int, recompute: str, micro_batch: int, dtype: str, index: int = 0) -> Job:
    strategy = Strategy(
        zero_stage=stage, recompute=recompute, dtype=dtype, bucket_bytes=300_000,  # type: ignore[arg-type]
        kernels_off=("all",) if index % 2 else (), offload="optimizer" if index % 5 == 4 else "none",
        prefetch_depth=1 + index % 2, recompute_every=1 + (index % 6 == 5),
    )  # fmt: skip
    return tiny.job(
        wide(name), strategy, world=2 + 6 * (index % 2), n_micro_batches=1 + index % 3, micro_batch=micro_batch,
        seq_len=60 if index % 4 == 3 and name.startswith("t5") and micro_batch > 1 else 64,
    )  # fmt: skip


GRID = list(itertools.product(SPECS, STAGES, RECOMPUTES, (1, 4), DTYPES))


@pytest.mark.parametrize("index", range(0, len(GRID), 13))
def test_peak_and_states(index: int) -> None:
    check(case(*GRID[index], index))


@pytest.mark.slow
@pytest.mark.parametrize("index", [i for i in range(len(GRID)) if i % 13])
def test_peak_and_states_everywhere(index: int) -> None:
    check(case(*GRID[index], index))


@pytest.mark.parametrize("name", SPECS)
def test_a_cpu_keeps_what_is_forecast(name: str) -> None:
    for recompute, dtype, micro_batch in (("none", "fp32", 4), ("full", "bf16", 1), ("selective", "fp16", 4)):
        strategy = Strategy(zero_stage=3, dtype=dtype, recompute=recompute)  # type: ignore[arg-type]
        job = tiny.job(wide(name), strategy, world=2, micro_batch=micro_batch, seq_len=64, arch="cpu")
        compare(metered(job, "fake-cpu"), memory_of(lay_out(job)))


def test_an_encoders_attention_counts_the_whole_square() -> None:
    """Two blocks of D 32, F 128 and the head's layer: 2 x tokens x weights; attention 4 x S x S x heads x width per sequence."""
    job = tiny.job(encoders.BERT, Strategy(dtype="fp32"), micro_batch=2, seq_len=16)
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 32 * 32 + 32 * 61
    attention = 2 * 2 * 4 * 16 * 16 * 32
    assert model_flops_of(job) == (3 * (2 * 32 * weights + attention), 0)


def test_flops_of_t5_by_hand() -> None:
    """Encoder (3 blocks) and decoder (2) each see all pairs of places; cross attention is a third product per decoder block.
    D 32, 4 heads of 16, F 96, V 61."""
    job = tiny.job(encoders.T5, Strategy(dtype="fp32"), micro_batch=2, seq_len=16)
    attention, mlp = 4 * 32 * 64, 2 * 32 * 96
    weights = 3 * (attention + mlp) + 2 * (2 * attention + mlp) + 32 * 61
    pairs = (3 + 2 * 2) * 2 * 4 * 16 * 16 * 64
    assert model_flops_of(job) == (3 * (2 * 32 * weights + pairs), 0)


def test_flops_of_barts_decoder_are_causal() -> None:
    job = tiny.job(encoders.BART, Strategy(dtype="fp32"), micro_batch=1, seq_len=16)
    attention, mlp = 4 * 32 * 32, 2 * 32 * 128
    weights = 2 * (attention + mlp) + 2 * (2 * attention + mlp) + 32 * 61
    pairs = 2 * 16 * 16 + 2 * (16 * 17 // 2 + 16 * 16)
    assert model_flops_of(job) == (3 * (2 * 16 * weights + 4 * 32 * pairs), 0)


# ---- training ---------------------------------------------------------------------------------------------------------


def training(name: str, stage: int, index: int, world: int) -> Job:
    strategy = Strategy(
        zero_stage=stage, dtype="fp32", grad_clip=0.0, bucket_bytes=20_000, recompute=RECOMPUTES[index % 3],  # type: ignore[arg-type]
        offload=("none", "optimizer", "optimizer,param")[index % 4 % 3],  # type: ignore[arg-type]
    )  # fmt: skip
    return tiny.job(SPECS[name], strategy, world=world, n_micro_batches=1 + index % 2, arch="cpu")


RUNS = [(name, stage, index) for index, (stage, name) in enumerate(itertools.product(STAGES, SPECS))]


def assert_trains_as_plain(name: str, stage: int, index: int, world: int, rank: int) -> None:
    job = training(name, stage, index, world)
    got = run_session(job, "cpu", SessionOptions(steps=6, warmup=2, reference=True), rank=rank)
    assert (got.collective_bytes, got.collective_calls, got.copy_bytes) == traffic_of(lay_out(job).program)
    if rank == 0:
        assert excess("fp32", got.parity) is None


@pytest.mark.parametrize("run", RUNS[::5], ids=lambda run: f"{run[0]}-{run[1]}")
def test_one_process_trains_as_plain_pytorch(run: tuple[str, int, int]) -> None:
    assert_trains_as_plain(*run, world=1, rank=0)


def worker(rank: int, world: int, folder: str, runs: list[tuple[str, int, int]]) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        for run in runs:
            try:
                assert_trains_as_plain(*run, world, rank)
            except Exception as error:
                raise AssertionError(f"{run} on rank {rank} of {world}") from error


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_two_processes_train_as_plain_pytorch(tmp_path: Path) -> None:
    """Every model and every stage; the slow test below has all pairs."""
    run_ranks(worker, 2, str(tmp_path), RUNS[::5])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_as_plain_pytorch_everywhere(tmp_path: Path) -> None:
    run_ranks(worker, 2, str(tmp_path), RUNS)


# ---- at the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_jobs_are_written_and_read(name: str) -> None:
    job = tiny.job(SPECS[name], Strategy())
    again = job_from_dict(json.loads(json.dumps(job_to_dict(job))))
    assert again == job and again.key == job.key


def test_the_key_knows_the_encoder() -> None:
    keys = {
        tiny.job(replace(encoders.T5, encoder=Encoder(n_layers=n, relative_buckets=8)), Strategy()).key for n in (1, 2)
    }
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tp": 2}, "tp is 2, but tiny-bert has an encoder"),
        ({"pp": 2}, "pp is 2, but tiny-bert has an encoder"),
        ({"cp": 2}, "cp is 2, but tiny-bert has an encoder"),
        ({"recompute": "attention"}, "blocks are recomputed as a whole"),
        ({"recompute": "full", "activation_offload": True}, "activation_offload is on, but tiny-bert has an encoder"),
    ],
)
def test_strategies_that_are_missing(change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny.job(encoders.BERT, Strategy(**change), world=2)


@pytest.mark.parametrize(
    ("spec", "change", "words"),
    [
        (encoders.BERT, {"positions": "relative", "position_rows": 0}, "with model.encoder.relative_buckets"),
        (encoders.T5, {"positions": "none"}, "any other kind without"),
        (encoders.T5, {"encoder": None}, "any other kind without"),
        (encoders.BERT, {"positions": "rotary", "position_rows": 0}, "positions = 'rotary', which is not forecast yet"),
        (encoders.BERT, {"n_kv_heads": 1}, "n_kv_heads = 1"),
        (encoders.BART, {"sliding_window": 8}, "sliding_window = 8"),
        (encoders.BART, {"encoder": Encoder(n_layers=1, token_types=2)}, "token_types is set with a decoder"),
        (encoders.T5, {"encoder": Encoder(relative_buckets=8)}, "with an encoder alone"),
    ],
)
def test_specs_that_contradict_themselves(spec: ModelSpec, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(spec, **change)


def test_from_the_command_line(zerocast: Callable[..., Ran]) -> None:
    for model, tokens in (("bert-base", "seq 512"), ("google-t5/t5-base", "seq 512")):
        ran = zerocast("predict", "--model", model, "--gpu", "a100", "--gpus", 8)
        assert ran.code == 0 and tokens in ran.out and "peak of live tensors" in ran.out
    refused = zerocast("predict", "--model", "t5-11b", "--gpu", "a100", "--gpus", 8, "--tp", 2)
    assert refused.code == 2 and "tp is 2, but t5-11b has an encoder" in refused.err


@pytest.mark.parametrize("change", [{"n_layers": -1}, {"relative_buckets": 7}, {"relative_distance": 0}])
def test_encoder_fields_out_of_range(change: dict) -> None:
    with pytest.raises(InputError, match=f"model.encoder.{next(iter(change))}"):
        Encoder(**change)
