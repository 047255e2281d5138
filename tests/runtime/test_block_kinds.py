"""Blocks of families that arrange norms, positions and residual streams in ways of their own: live bytes equal the forecast's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from estimator.errors import InputError
from estimator.job import ModelSpec, Strategy
from runtime.models.decoder import Decoder
from tests.runtime import tiny
from tests.runtime.memory import MODELS, check

KINDS: dict[str, ModelSpec] = {
    "one norm for attention and MLP": replace(MODELS["neox"], name="gptj", shared_norm=True),
    "norms behind attention and MLP": replace(
        MODELS["llama"], name="olmo2", pre_norm=False, sandwich_norms=True, qk_norm=True, qk_norms="all"
    ),
    "LayerNorm of all queries": replace(MODELS["neox"], name="parallel", qk_norm=True, qk_norms="all"),
    "every second layer without rotation": replace(MODELS["llama"], name="smollm3", unrotated_every=2),
}


def run(kind: str, stage: int, recompute: str, dtype: str, off: tuple[str, ...] = ()) -> None:
    strategy = Strategy(
        zero_stage=stage, recompute=recompute, dtype=dtype, bucket_bytes=300_000, kernels_off=off,  # type: ignore[arg-type]
    )  # fmt: skip
    check(tiny.job(KINDS[kind], strategy, world=2, micro_batch=4 if off else 1, seq_len=64))


@pytest.mark.parametrize("kind", KINDS)
def test_live_bytes(kind: str) -> None:
    run(kind, 3, "none", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("off", [(), ("all",)])
@pytest.mark.parametrize(
    ("stage", "recompute", "dtype"), [(3, "none", "bf16"), (1, "selective", "fp32"), (2, "full", "fp16")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_live_bytes_everywhere(kind: str, stage: int, recompute: str, dtype: str, off: tuple[str, ...]) -> None:
    run(kind, stage, recompute, dtype, off)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "relu2"}, "squared ReLU"),
        ({"norm_weight": False, "norm_bias": False}, "norms without weights"),
        ({"qk_norm": True, "qk_norms": "each"}, "of the kind 'each'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_reference_decoder_lacks(change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Decoder(replace(tiny.GPT, **change))
