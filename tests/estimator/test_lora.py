"""Adapters: what they are, what they change in parameters, FLOPs and states, and how users ask for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.job.files import job_from_dict, job_to_dict
from estimator.job.hf_lora import adapter_of, load_adapter
from estimator.job.lora import Lora
from estimator.job.options import JobOptions, build_job
from estimator.predict import lay_out, memory_of, model_flops_of, predict
from estimator.run.checkpoint import checkpoint_bytes
from estimator.sharding.units import count_params, model_units, trained_units
from tests.runtime import tiny


def job(lora: Lora | None = None, **strategy: object) -> Job:
    return tiny.job(replace(tiny.LLAMA, lora=lora), Strategy(**strategy), world=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "rank", "trained"),
    [
        (("q", "v"), 16, 6_815_744),
        (("attention",), 16, 13_631_488),
        (("all",), 16, 41_943_040),
        (("all",), 8, 20_971_520),
    ],
)
def test_llama_3_8b_has_as_many_adapters_as_peft_says(targets: tuple[str, ...], rank: int, trained: int) -> None:
    """q and v: 32 layers of 16 x (4096 + 4096) and 16 x (4096 + 1024)."""
    units = model_units(replace(catalog.model("llama-3-8b"), lora=Lora(rank=rank, targets=targets)))
    assert count_params(trained_units(units)) == trained
    assert count_params(units) == 8_030_261_248 + trained


def test_targets_have_one_spelling() -> None:
    assert Lora(rank=4, targets=("k_proj", "q", "v", "o_proj")).targets == ("attention",)
    assert Lora(rank=4, targets=("all-linear",)) == Lora(rank=4) == Lora(rank=4, alpha=4)
    assert Lora(rank=4, targets=("v_proj", "q_proj")).targets == ("q", "v")
    assert Lora(rank=4, alpha=8).scale == 2.0
    assert Lora(rank=4, alpha=8, rank_stabilized=True).scale == 4.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "model.lora.rank is 0"),
        ({"rank": 4, "dropout": 1.0}, "model.lora.dropout is 1.0"),
        ({"rank": 4, "targets": ("qproj",)}, "did you mean 'q_proj'"),
        ({"rank": 4, "init": "zero"}, "model.lora.init is 'zero'"),
    ],
)
def test_what_is_out_of_range_is_named(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Lora(**fields)


def test_what_adapters_do_not_go_with_is_refused() -> None:
    with pytest.raises(InputError, match="has 'gate', which the MLP of tiny-gpt has not"):
        replace(tiny.GPT, lora=Lora(rank=2, targets=("gate",)))
    for field, value in (("tp", 2), ("pp", 2), ("framework", "fsdp2"), ("matmul_dtype", "fp8")):
        strategy = Strategy(
            **{"dtype": "bf16", "framework": "fsdp2" if field == "matmul_dtype" else "zerocast", field: value}
        )
        with pytest.raises(InputError, match=r"model\.lora is set with"):
            tiny.job(replace(tiny.LLAMA, lora=Lora(rank=2)), strategy, world=2)


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    """rank 4 on q and v (32 -> 32 and 32 -> 16) of 2 layers: 2 x 4 x (64 + 48) = 896 parameters."""
    memory = memory_of(lay_out(job(Lora(rank=4, targets=("q", "v")))))
    plain = memory_of(lay_out(job()))
    trained = 896
    assert memory.category_peak_bytes["grads"] == 2 * trained
    assert memory.category_peak_bytes["master_params"] == 4 * trained
    assert memory.category_peak_bytes["optimizer_state"] == 8 * trained
    assert memory.category_peak_bytes["params"] == plain.category_peak_bytes["params"] + 2 * trained


def test_model_flops_leave_frozen_weights_gradients_out() -> None:
    """By hand for rank 1 on k alone: T tokens, D 32, F 84, V 61; blocks 0 and 1."""
    t, d, f, v, kv = 32, 32, 84, 61, 16
    got = model_flops_of(job(Lora(rank=1, targets=("k",))))[0]
    base = 2 * t * (d * d + 2 * d * kv + d * d + 3 * d * f)
    attention = 4.0 * 2 * 4 * 8 * (16 * 17 / 2)
    adapter, of_a, of_b = 2 * t * (d + kv), 2 * t * d, 2 * t * kv
    # block 0: nothing asks for gradients of what q, k, v and A read
    first = base + (base - 2 * t * (d * d + 2 * d * kv)) + adapter + of_a + 2 * of_b + 3 * attention
    second = 2 * base + 3 * adapter + 3 * attention
    assert got == first + second + 2 * 2 * t * d * v
    assert got < model_flops_of(job())[0]


def test_a_checkpoint_holds_states_of_adapters_alone() -> None:
    plain, adapted = checkpoint_bytes(job()), checkpoint_bytes(job(Lora(rank=4, targets=("q", "v"))))
    assert adapted == plain // 12 * 2 + 896 * 12  # bf16 weights; 4 + 8 bytes of each trained one


def test_the_key_of_models_without_adapters_is_what_it_was() -> None:
    assert job().key == job(None).key != job(Lora(rank=4)).key
    assert job(Lora(rank=4)).key != job(Lora(rank=8)).key


def test_a_job_with_adapters_survives_as_plain_data() -> None:
    made = job(Lora(rank=4, alpha=8, targets=("q", "down"), dropout=0.1))
    assert job_from_dict(json.loads(json.dumps(job_to_dict(made)))) == made
    named = {"model": {"name": "llama-3-8b", "lora": {"rank": 8}}, "cluster": {"gpu": "h100-sxm"}}
    assert job_from_dict(named).model.lora == Lora(rank=8)


def test_the_report_says_what_is_trained() -> None:
    notes = predict(job(Lora(rank=4, targets=("q", "v")))).notes
    assert any("adapters of rank 4: 896 of 27,232 parameters are trained (3.29%)" in note for note in notes), notes


ADAPTER = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none",
           "target_modules": ["v_proj", "q_proj"], "modules_to_save": None, "task_type": "CAUSAL_LM"}  # fmt: skip


def test_flags_and_peft_files(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    lora = Lora(rank=16, alpha=32, dropout=0.05, targets=("q", "v"))
    assert load_adapter(tmp_path) == lora
    options = JobOptions(model="llama-3-8b", gpu="h100-sxm")
    assert build_job(replace(options, lora_config=str(tmp_path))).model.lora == lora
    by_flags = replace(options, lora_rank=16, lora_alpha=32.0, lora_dropout=0.05, lora_targets="q, v")
    assert build_job(by_flags).model.lora == lora
    assert build_job(options).model.lora is None
    with pytest.raises(InputError, match="lora_alpha is given without lora_rank"):
        build_job(replace(options, lora_alpha=8.0))
    with pytest.raises(InputError, match="lora_config and lora_rank are both given"):
        build_job(replace(by_flags, lora_config=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["c_attn"]}, "one adapter for projections that are apart"),
        ({"target_modules": ".*q_proj"}, "target_modules"),
        ({"target_modules": ["lm_head"]}, "'lm_head'"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 0}, "r"),
    ],
)
def test_other_adapters_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapter_of({**ADAPTER, **change})
