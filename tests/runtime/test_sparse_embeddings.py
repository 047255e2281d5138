"""Gradients of a token embedding exchanged row by row: training as with the whole table, other bytes on the wire."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.predict import lay_out, memory_of, predict, traffic_of
from estimator.schedule.events import AddRows, Collective, PickRows
from runtime import initialize
from runtime.models import Decoder
from runtime.reference import TOLERANCES
from runtime.session import Measurement, SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.groups import run_ranks
from tests.runtime.memory import MODELS, check, compare
from tests.runtime.parity_worker import gloo_group

pytestmark = pytest.mark.timeout(600)

UNTIED_GPT = replace(tiny.GPT, tied_embeddings=False)
PRODUCTS: list[tuple[ModelSpec, int, dict]] = [
    (tiny.LLAMA, 1, {"zero_stage": 0, "dtype": "fp32"}),
    (UNTIED_GPT, 2, {"zero_stage": 1, "dtype": "fp32", "bucket_bytes": 20_000}),
    (tiny.LLAMA, 3, {"zero_stage": 1, "dtype": "bf16", "offload": "optimizer", "offload_fraction": 0.4}),
    (tiny.NEOX, 2, {"zero_stage": 0, "dtype": "fp16", "offload": "optimizer,param", "grad_clip": 1.0}),
    (tiny.LLAMA, 5, {"zero_stage": 0, "dtype": "bf16", "grad_dtype": "fp32", "master_dtype": "model"}),
]
"""Model, micro-batches, strategy; 16 of 61 rows in a micro-batch, all of them in the last."""
OF_WORLD = {1: PRODUCTS[:1], 2: PRODUCTS, 4: PRODUCTS[1:3]}
STEPS = 10


def job_of(product: tuple[ModelSpec, int, dict], world: int, arch: str = "cpu") -> Job:
    spec, n_micro_batches, fields = product
    strategy = Strategy(**{"sparse_embeddings": True, "grad_clip": 0.0, **fields})
    return tiny.job(spec, strategy, world=world, n_micro_batches=n_micro_batches, micro_batch=1, arch=arch)


def rank_of(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        options = SessionOptions(steps=STEPS - 1, warmup=0, reference=True)
        found = [run_session(job_of(product, world), "cpu", options, rank=rank) for product in OF_WORLD[world]]
    Path(folder, f"{rank}").write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_equals_plain_pytorch_with_the_forecast_bytes(world: int, tmp_path: Path) -> None:
    run_ranks(rank_of, world, str(tmp_path))
    for rank in range(world):
        measured: list[Measurement] = pickle.loads((tmp_path / f"{rank}").read_bytes())
        for product, found in zip(OF_WORLD[world], measured, strict=True):
            blueprint = lay_out(job_of(product, world))
            forecast = memory_of(blueprint)
            assert (found.collective_bytes, found.collective_calls, found.copy_bytes) == traffic_of(blueprint.program)
            assert found.category_peak_bytes == pytest.approx(forecast.category_peak_bytes, rel=0, abs=16)
            compare(found, forecast)
            if rank == 0:
                allowed = TOLERANCES[product[2]["dtype"]]
                assert found.parity["params"] <= allowed.params and found.parity["loss"] <= allowed.loss, product
                if world <= 2 and not product[2].get("grad_clip"):
                    assert found.parity["params"] == 0, product


@pytest.mark.parametrize(
    "fields", [{"zero_stage": 0}, {"zero_stage": 1, "grad_dtype": "fp32", "offload": "optimizer"}], ids=str
)
def test_memory_is_the_forecast(fields: dict) -> None:
    for n_micro_batches in (1, 3):
        strategy = Strategy(sparse_embeddings=True, bucket_bytes=300_000, **fields)
        job = tiny.job(MODELS["llama"], strategy, world=16, n_micro_batches=n_micro_batches, seq_len=64)
        assert check(job, rank=9).collective_bytes == predict(job).collective_bytes


def test_bytes_by_hand() -> None:
    """Rows of 32 bf16 and their int64 numbers, of 2 micro-batches of 16 tokens of 4 ranks; the dense table is 61 rows."""
    job = job_of((tiny.LLAMA, 2, {"zero_stage": 0, "dtype": "bf16"}), 4)
    dense = replace(job, strategy=replace(job.strategy, sparse_embeddings=False))
    gathered = traffic_of(lay_out(job).program)[0]
    assert gathered["all_gather"] == 4 * 32 * (8 + 2 * 32)
    assert traffic_of(lay_out(dense).program)[0]["all_reduce"] - gathered["all_reduce"] == 2 * 61 * 32
    events = [e for s in lay_out(job).program.step for e in s.events]
    kinds = [
        type(e)
        for e in events
        if isinstance(e, PickRows | AddRows) or (isinstance(e, Collective) and e.op == "all_gather")
    ]
    assert kinds == [PickRows, Collective, Collective, AddRows]


def test_a_note_says_where_rows_are_more_than_the_table() -> None:
    """Of a table of 1,024 rows of 128 bf16, 2 * 256 KiB in an all-reduce, 2 or 16 ranks send 128 rows of 264 bytes each."""
    for world, noted in ((2, False), (16, True)):
        job = tiny.job(MODELS["llama"], Strategy(sparse_embeddings=True), world=world, seq_len=64)
        notes = [note for note in predict(job).notes if "sparse_embeddings" in note]
        said = "sparse_embeddings receives 0.5 MiB where a sum of the whole table moves 0.5 MiB"
        assert notes == ([said] if noted else [])


def test_a_large_table_is_exchanged_sooner() -> None:
    """256k rows, of which a rank uses 64: less waiting for gradients; clearing the table and adding to it are not free."""
    spec = replace(MODELS["llama"], vocab_size=256_000)
    for stage in (0, 1):
        waits = []
        for sparse in (False, True):
            job = tiny.job(spec, Strategy(zero_stage=stage, sparse_embeddings=sparse), world=16, seq_len=32)
            waits.append(predict(job).time_parts_s["exposed_reduce"])
        assert 0 < waits[1] < 0.8 * waits[0]


class Tables(nn.Module):
    """Any module with an embedding: 50 rows, of which a batch of 3 looks up 3."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids)).square().mean()


def test_a_model_of_ones_own_names_its_tables() -> None:
    strategy = Strategy(dtype="fp32", sparse_embeddings=True)
    engine = initialize(model=Tables(), strategy=strategy, sparse_rows={"words.weight": 3})
    assert [group.kind.table for group in engine.layout.groups] == ["weight", ""]
    engine.backward(engine(torch.tensor([1, 2, 2])))
    assert engine.step()
    for rows, name in (({}, "sparse_embeddings is True with sparse_rows {}"), ({"word.weight": 3}, "sparse_rows names 'word.weight'"),
                       ({"head.bias": 3}, "sparse_rows names 'head.bias'"), ({"words.weight": 0}, "sparse_rows\\['words.weight'\\] is 0")):  # fmt: skip
        with pytest.raises(InputError, match=name):
            initialize(model=Tables(), strategy=strategy, sparse_rows=rows)
    with pytest.raises(InputError, match="sparse_embeddings is False with sparse_rows"):
        initialize(model=Tables(), strategy=Strategy(dtype="fp32"), sparse_rows={"words.weight": 3})


def too_many(rank: int, world: int, folder: str) -> None:
    with gloo_group(rank, world, folder):
        engine = initialize(
            model=Tables(), strategy=Strategy(dtype="fp32", sparse_embeddings=True), sparse_rows={"words.weight": 2}
        )
        with pytest.raises(
            InputError, match="sparse_rows allows 2 rows of an embedding in a step, whose gradients have 3"
        ):
            engine.backward(engine(torch.tensor([1, 2, 3])))


@pytest.mark.slow
def test_more_rows_than_said_are_an_error(tmp_path: Path) -> None:
    run_ranks(too_many, 2, str(tmp_path))


def test_tied_models_have_no_table_to_look_up() -> None:
    strategy = Strategy(sparse_embeddings=True)
    with pytest.raises(InputError) as error:
        tiny.job(tiny.GPT, strategy, world=2)
    assert str(error.value) == (
        "sparse_embeddings is on, but tiny-gpt has a head that is tied to its embedding; allowed: decoders with an embedding of its own"
    )
    with pytest.raises(InputError, match=r"sparse_rows names 'embed.tokens.weight'"):
        initialize(model=Decoder(tiny.GPT), strategy=strategy, sparse_rows={"embed.tokens.weight": 16})


@pytest.mark.parametrize(
    "fields",
    [{"zero_stage": 2}, {"zero_stage": 1, "shard_size": 2}, {"grad_compression": "one_bit"}, {"tp": 2}],
    ids=str,
)
def test_what_cannot_be_is_refused(fields: dict) -> None:
    with pytest.raises(
        InputError, match=r"^sparse_embeddings is on with zero .* data parallelism alone and exact sums over all$"
    ):
        Strategy(sparse_embeddings=True, **fields)
    with pytest.raises(InputError, match=r"^sparse_embeddings is 1; allowed: true or false$"):
        Strategy(sparse_embeddings=1)  # type: ignore[arg-type]
