"""A model that is drawn into its groups starts from the same values as one that is there as a whole, in less memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from estimator.job import ModelSpec, Strategy
from runtime import initialize
from runtime.hollow import hollow
from runtime.ledger import Ledger
from runtime.models import Decoder
from runtime.models.decoder import initial_values
from tests.runtime import tiny

CPU = torch.device("cpu")


def hollow_decoder(spec: ModelSpec) -> Decoder:
    with torch.device("meta"):
        model = Decoder(spec)
    hollow(model, CPU)
    model.fill_tables()
    return model


@pytest.mark.parametrize("spec", tiny.ALL, ids=lambda spec: spec.name)
@pytest.mark.parametrize(("offload", "bucket_bytes"), [("none", 20_000), ("none", 1 << 30), ("optimizer,param", 1)])
def test_the_same_values_bit_by_bit(spec: ModelSpec, offload: str, bucket_bytes: int) -> None:
    strategy = Strategy(dtype="fp32", offload=offload, bucket_bytes=bucket_bytes)  # type: ignore[arg-type]
    whole = Decoder(spec)
    whole.reset_parameters(3)
    drawn = hollow_decoder(spec)
    want = initialize(model=whole, strategy=strategy)
    got = initialize(model=drawn, strategy=strategy, fill=initial_values(CPU, 3))
    theirs = want.full_parameters()
    for name, param in got.full_parameters().items():
        assert torch.equal(param, theirs[name]), name
    ids = torch.arange(16).view(1, 16) % spec.vocab_size
    assert torch.equal(got(ids, ids), want(ids, ids))


def test_a_hollow_model_has_a_place_a_shape_and_no_memory() -> None:
    model = hollow_decoder(tiny.GPT)
    assert all(p.untyped_storage().nbytes() == 0 and p.device == CPU for p in model.parameters())
    assert model.head.out.weight is model.embed.tokens.weight and model.head.out.weight.shape == (61, 32)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_it_is_never_there_as_a_whole() -> None:
    """Beside what stays, drawing takes the memory of one group in fp32, not of the model."""
    model = hollow_decoder(replace(tiny.LLAMA, n_layers=8))
    ledger = Ledger()
    with ledger:  # not told to look away from the runtime's own scratch
        engine = initialize(model=model, strategy=Strategy(dtype="bf16", bucket_bytes=1), fill=initial_values(CPU, 0))
        memory = ledger.report()
        ledger.start_step()
        stays_bytes = ledger.report().peak_bytes
    largest, whole = (f(g.padded_numel for g in engine.layout.groups) for f in (max, sum))
    assert memory.peak_bytes - stays_bytes == pytest.approx(4 * largest, abs=1024)
    assert 5 * largest < whole
