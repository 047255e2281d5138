"""What Hugging Face families have of their own: how their configs are read, and what that keeps, added up by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.job.files import job_from_dict, job_to_dict, load_job
from estimator.job.hf import spec_from_config
from estimator.job.lora import Lora
from estimator.job.tower import with_tower
from estimator.ops.layers import Shape, block_graph, head_graph, unit_costs
from estimator.ops.liveness import unit_cost
from estimator.predict import lay_out, memory_of, predict
from estimator.schedule.events import Collective
from estimator.sharding.units import count_params, model_units
from tests.runtime import tiny
from validator.store.database import Store

SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 96, "vocab_size": 100,
    "max_position_embeddings": 32, "num_key_value_heads": 2,
}  # fmt: skip
FALCON = {
    "model_type": "falcon",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
NEO = {"model_type": "gpt_neo", "hidden_size": 64, "num_heads": 4, "num_layers": 4, "vocab_size": 100, "max_position_embeddings": 32,
       "attention_types": [[["global", "local"], 2]]}  # fmt: skip


def spec(model_type: str, **keys: object) -> ModelSpec:
    return spec_from_config({**SIZES, "model_type": model_type, **keys})


def test_falcons() -> None:
    first = spec_from_config({**FALCON, "num_kv_heads": 4, "multi_query": True})
    assert (first.n_kv_heads, first.parallel_residual, first.shared_norm, first.tied_embeddings) == (
        1,
        True,
        True,
        True,
    )
    new = spec_from_config({**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2})
    assert (new.n_kv_heads, new.parallel_residual, new.shared_norm) == (2, True, False)
    plain = spec_from_config({**FALCON, "parallel_attn": False, "alibi": True, "multi_query": False, "bias": True})
    assert (plain.n_kv_heads, plain.parallel_residual, plain.positions, plain.mlp_bias) == (4, False, "alibi", True)
    old = {
        "hidden_size": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_head_kv": 2,
        "vocab_size": 100,
        "architectures": ["RWForCausalLM"],
    }
    assert spec_from_config({**old, "model_type": "RefinedWeb"}) == replace(new, name="RefinedWeb", family="RefinedWeb")


def test_positions_and_windows() -> None:
    neo = spec_from_config(NEO)
    assert [neo.window_of(layer) for layer in range(4)] == [0, 256, 0, 256]
    smol = spec("smollm3", tie_word_embeddings=False)
    assert [smol.rotates(layer) for layer in range(4)] == [True, True, True, False]
    assert spec("smollm3", no_rope_layers=[1, 1, 1, 1]).unrotated_every == 0
    command = spec("cohere2", sliding_window=8)
    assert [command.window_of(layer) for layer in range(4)] == [8, 8, 8, 0] and not command.rotates(3)
    kinds = {unit.kind for unit in model_units(command)}
    assert kinds == {"embed", "block_w8", "block_still", "head"}
    gptj = spec_from_config(
        {
            "model_type": "gptj",
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 1,
            "n_positions": 8,
            "vocab_size": 9,
            "rotary_dim": 8,
        }
    )
    assert (gptj.rotary_dim, gptj.head_bias, gptj.qkv_bias, gptj.mlp_bias) == (8, True, False, True)


def test_norms_of_their_own() -> None:
    olmo, olmo2 = spec("olmo", clip_qkv=8), spec("olmo2")
    assert not olmo.norm_weight and olmo.clips_qkv and count_params(model_units(olmo)[-1:]) == 100 * 64
    assert olmo2.sandwich_norms and not olmo2.pre_norm and olmo2.qk_norms == "all"
    assert [p.name for p in model_units(olmo2)[1].params if "norm" in p.name] == [
        "attn.q_norm.weight", "attn.k_norm.weight", "attn_post_norm.weight", "mlp_post_norm.weight",
    ]  # fmt: skip
    plus = spec("cohere", use_qk_norm=True)
    assert [p.shape for p in model_units(plus)[1].params if "q_norm" in p.name or "k_norm" in p.name] == [
        (4, 16),
        (2, 16),
    ]
    assert spec("nemotron").activation == "relu2" and not spec("nemotron").gated_mlp
    assert spec("gemma2").caps_logits and not spec("gemma2", final_logit_softcapping=None).caps_logits


SHAPE = Shape(2, 16, "bf16", repeats_kv_heads=False)
ROWS = 2 * 16


def kept(model: ModelSpec) -> int:
    """Bytes that a block's forward pass leaves."""
    return sum(unit_cost(block_graph(model, SHAPE, 0), "none").forward_memory.after.values())


def test_what_blocks_keep() -> None:
    """bf16, 32 rows of width 32; 4 heads of 8, 2 of them for keys and values; d_ff 84 (Llama) and 128 (GPT-NeoX)."""
    llama, neox = tiny.LLAMA, tiny.NEOX
    assert kept(replace(llama, clips_qkv=True)) - kept(llama) == ROWS * (32 + 16 + 16) * 2
    plain = replace(neox, activation="relu")
    assert kept(replace(plain, activation="relu2")) - kept(plain) == ROWS * 128 * 2
    assert kept(neox) - kept(replace(neox, shared_norm=True)) == ROWS * (32 * 2 + 2 * 4), (
        "a result, a mean and a deviation"
    )
    assert kept(replace(llama, unrotated_every=1, positions="none")) == kept(llama)
    every = unit_costs(replace(llama, unrotated_every=2), model_units(replace(llama, unrotated_every=2)), SHAPE, "none")
    assert [sum(op.name == "rotary" for op in cost.forward) for cost in every] == [0, 2, 0, 0]


def test_capped_logits_are_kept_once_more() -> None:
    def after(model: ModelSpec) -> int:
        return sum(unit_cost(head_graph(model, SHAPE), "none").forward_memory.after.values())

    assert after(replace(tiny.LLAMA, caps_logits=True)) - after(tiny.LLAMA) == ROWS * 61 * 2


GEMMA = {
    "model_type": "gemma3", "mm_tokens_per_image": 4, "text_config": {"model_type": "gemma3_text", **SIZES, "head_dim": 16},
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                      "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_use_head": False},
}  # fmt: skip
TOWER = 2 * (4 * 33 * 32 + 33 * 48 + 49 * 32 + 4 * 32) + 32 * (3 * 14 * 14 + 1) + 4 * 32 + 2 * 32 + 32 + 32 * 64
"""Layers; patches and four places; the last norm, the projector's norm and the projector."""


def test_a_vision_tower_is_held() -> None:
    model = spec_from_config({**GEMMA, "architectures": ["Gemma3ForConditionalGeneration"]})
    text = spec_from_config({**SIZES, "head_dim": 16, "model_type": "gemma3_text"})
    assert model.tower is not None and model.tower.numel == TOWER
    assert replace(model, tower=None) == replace(text, name=model.name, family="gemma3")
    assert count_params(model_units(model)) == count_params(model_units(text)) + TOWER
    job = tiny.job(model, Strategy(zero_stage=3), world=2, seq_len=16)
    assert job_from_dict(job_to_dict(job)) == job and job_from_dict(job_to_dict(job)).key == job.key
    assert f"vision tower and its projector ({TOWER:,} parameters) are held frozen" in " ".join(predict(job).notes)


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 2), (3, 2)])
def test_what_a_tower_takes(stage: int, world: int) -> None:
    """Frozen: bf16 parameters; trained: fp32 masters and two states of each rank's share too. It is never gathered."""
    model = spec_from_config(GEMMA)
    bytes_of: dict[str, dict[str, int]] = {}
    gathered = set()
    for name, one in {
        "none": replace(model, tower=None),
        "frozen": model,
        "trained": with_tower(model, trained=True),
    }.items():
        job = tiny.job(one, Strategy(zero_stage=stage), world=world, seq_len=16)
        layout = lay_out(job)
        bytes_of[name] = dict(memory_of(layout).category_peak_bytes)
        events = [e for section in layout.program.step for e in section.events]
        gathered.add(sum(e.n_bytes for e in events if isinstance(e, Collective) and e.op == "all_gather"))

    def more(name: str, category: str) -> int:
        return bytes_of[name].get(category, 0) - bytes_of["none"].get(category, 0)

    padding = 1 << 12
    for name in ("frozen", "trained"):
        assert more(name, "params") == pytest.approx(2 * TOWER / (world if stage == 3 else 1), abs=padding)
    share = world if stage else 1
    assert more("frozen", "optimizer_state") == 0
    assert more("trained", "optimizer_state") == pytest.approx(8 * TOWER / share, abs=padding)
    assert more("trained", "master_params") == pytest.approx(4 * TOWER / share, abs=padding)
    if stage == 3:
        assert len(gathered) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"zero_optimization": {"stage": 2}}, "is a DeepSpeed configuration; allowed: sections model"),
        ({"distributed_type": "FSDP", "fsdp_config": {}}, "is an Accelerate configuration"),
        ({"model": {"name": "llama3"}, "training": {"seq_len": 8}, "parallelism": {}}, "is a torchtitan configuration"),
        (GEMMA | {"transformers_version": "5"}, "is a Hugging Face model config; allowed: sections model"),
        ({"model": {"name": "gpt2"}, "cluster": {}, "training": {}}, "unknown key 'training'"),
    ],
)
def test_other_programs_files_are_named(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=words):
        load_job(path)


def test_a_store_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; allowed: a file"):
        Store(tmp_path).records()


def changed(section: str, **keys: object) -> dict[str, Any]:
    return {**GEMMA, section: {**GEMMA[section], **keys}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            changed("text_config", model_type="mamba"),
            "config.text_config.model_type is 'mamba'; allowed: gemma, gemma2",
        ),
        (changed("text_config", model_type=[]), "config.text_config.model_type is []"),
        (changed("text_config", num_hidden_layers=0), "in config.text_config: config.num_hidden_layers is 0"),
        (changed("text_config", tie_word_embeddings=False), "that of the whole model is True; allowed: the same"),
        (changed("vision_config", model_type="swin"), "config.vision_config.model_type is 'swin'; allowed: siglip"),
        ({**GEMMA, "architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForConditionalGeneration"),
        ({**FALCON, "multi_query": 1}, "config.multi_query is 1; allowed: true or false"),
        ({**NEO, "attention_types": [[["local", "global"], 2]]}, "'global' and 'local' in turn"),
        ({**NEO, "attention_types": 3}, "pairs of a list of kinds and a number"),
        ({**SIZES, "model_type": "phi", "qk_layernorm": True}, "Phi's norms of queries and keys"),
        ({**SIZES, "model_type": "smollm3", "no_rope_layers": [0, 1, 1, 1]}, "4 ones, of which every 4-th may be 0"),
        ({**SIZES, "model_type": "cohere2", "sliding_window": None}, "Cohere2 without windows"),
        ({**SIZES, "model_type": "chatglm"}, "the first ChatGLM"),
        ({**SIZES, "model_type": "helium", "head_dim": 8}, "which Helium's output needs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_with_the_reason(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as refusal:
        spec_from_config(config)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_does_not_go_with_a_tower_or_such_norms() -> None:
    model = with_tower(spec_from_config(GEMMA), trained=True)
    with pytest.raises(InputError, match="no vision tower; allowed: false"):
        with_tower(tiny.LLAMA, trained=True)
    adapted = replace(spec_from_config(GEMMA), lora=Lora(rank=2))
    assert [p.name for p in model_units(adapted)[0].params if "lora" in p.name] == [], "a tower has no adapters"
    with pytest.raises(InputError, match="framework fsdp2, where parameters without gradients"):
        tiny.job(model, Strategy(zero_stage=3, framework="fsdp2"), world=2)
    with pytest.raises(InputError, match="have weights for every head; allowed: 1"):
        job: Job = tiny.job(spec("olmo2"), Strategy(zero_stage=1, tp=2), world=2)
        assert job
