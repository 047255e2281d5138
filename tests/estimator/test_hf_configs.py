"""Hugging Face configs: exact parameter counts, or one sentence that says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from estimator.errors import InputError
from estimator.job.encoder import Encoder
from estimator.job.experts import Experts
from estimator.job.hf import FAMILIES, load_config, spec_from_config
from estimator.job.latent import LatentAttention
from estimator.job.patches import Patches
from estimator.sharding.units import count_params, model_units

DATA = Path(__file__).parents[1] / "data"
PUBLISHED = json.loads((DATA / "hf_published.json").read_text())
"""Shapes of published models and their published (Llama 2: computed) parameter counts."""
SMALL = json.loads((DATA / "hf_small.json").read_text())
"""Random small configs of every family; counts of the model that transformers 5.23 builds from them (``deepseek``, which has no class
there: added up by hand)."""

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
    "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 32,
}  # fmt: skip
MIXTRAL = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2,
           "num_local_experts": 8}  # fmt: skip
QWEN_MOE = {**MIXTRAL, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_hidden_layers": 4}
DEEPSEEK = {
    **LLAMA, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
BERT = {"model_type": "bert", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96,
        "vocab_size": 100, "max_position_embeddings": 32}  # fmt: skip
T5 = {"model_type": "t5", "is_encoder_decoder": True, "d_model": 64, "d_kv": 8, "num_heads": 4, "d_ff": 96, "num_layers": 2,
      "vocab_size": 100}  # fmt: skip
BART = {"model_type": "bart", "is_encoder_decoder": True, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        "vocab_size": 100, "max_position_embeddings": 32}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": 100}


def refusal(config: object) -> str:
    with pytest.raises(InputError) as caught:
        spec_from_config(config)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("entry", PUBLISHED + SMALL, ids=lambda entry: entry["name"])
def test_parameter_count_is_exact(entry: dict) -> None:
    assert count_params(model_units(spec_from_config(entry["config"]))) == entry["n_params"]


def test_every_family_is_checked() -> None:
    assert {entry["config"]["model_type"] for entry in SMALL + PUBLISHED} == set(FAMILIES)


def test_shapes_are_read() -> None:
    qwen2 = spec_from_config(
        {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
    )
    assert qwen2.qkv_bias and not qwen2.attn_out_bias and qwen2.n_kv_heads == 2
    biased = spec_from_config({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias and biased.attn_out_bias and biased.mlp_bias
    assert spec_from_config(LLAMA).n_kv_heads == 4
    assert spec_from_config(LLAMA).head_dim == 16
    assert spec_from_config({**LLAMA, "rope_parameters": {"rope_theta": 7}}).rope_theta == 7.0
    gpt2 = spec_from_config(GPT2)
    assert (gpt2.d_ff, gpt2.positions, gpt2.position_rows, gpt2.tied_embeddings) == (256, "learned", 32, True)
    assert spec_from_config({**GPT2, "n_inner": 80}).d_ff == 80


def test_class_defaults_of_published_models() -> None:
    specs = {entry["name"]: spec_from_config(entry["config"]) for entry in PUBLISHED}
    assert specs["gemma-2-9b"].window_of(0) == 4096 and specs["gemma-2-9b"].window_of(1) == 0
    assert [specs["gemma-3-1b-it"].window_of(layer) for layer in range(7)] == [512] * 5 + [0, 512]
    assert specs["gemma-2b"].head_dim == 256 and specs["gemma-2b"].activation == "gelu_tanh"
    assert specs["Mistral-7B-v0.1"].sliding_window == 4096
    assert specs["Qwen2-7B"].sliding_window == 0
    assert specs["gpt-neox-20b"].rotary_dim == 24 and specs["gpt-neox-20b"].parallel_residual
    assert specs["opt-1.3b"].position_rows == 2050 and specs["opt-1.3b"].max_positions == 2048
    assert specs["bloom"].embedding_norm and specs["bloom"].positions == "alibi"
    assert specs["mpt-7b"].positions == "alibi" and not specs["mpt-7b"].norm_bias
    assert specs["Qwen3-8B"].qk_norm


def test_mpt_follows_its_own_keys() -> None:
    mpt = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 32, "vocab_size": 100}
    plain = spec_from_config(mpt)
    learned = spec_from_config({**mpt, "attn_config": {"alibi": False}, "no_bias": False, "expansion_ratio": 2})
    assert plain.positions == "alibi" and plain.d_ff == 256 and not plain.qkv_bias
    assert learned.positions == "learned" and learned.position_rows == 32 and learned.d_ff == 128
    assert learned.qkv_bias and learned.mlp_bias and learned.norm_bias
    assert "attn_type" in refusal({**mpt, "attn_config": {"attn_type": "multiquery_attention"}})


def test_experts_are_read() -> None:
    specs = {entry["name"]: spec_from_config(entry["config"]) for entry in PUBLISHED}
    mixtral = specs["Mixtral-8x7B-v0.1"]
    assert mixtral.experts == Experts(n_experts=8, per_token=2, d_ff=14336, balance_loss=0.02)
    v3 = specs["DeepSeek-V3"]
    assert v3.experts == Experts(
        n_experts=256, per_token=8, d_ff=2048, shared_d_ff=2048, first_layer=3, scoring="sigmoid", scale=2.5, n_groups=8,
        groups_per_token=4, selection_bias=True,
    )  # fmt: skip
    assert v3.latent == LatentAttention(
        kv_rank=512, q_rank=1536, nope_head_dim=128, rope_head_dim=64, value_head_dim=128
    )
    assert (v3.head_dim, v3.rotary_dim, v3.n_kv_heads, v3.d_ff) == (192, 64, 128, 18432)
    lite = specs["DeepSeek-V2-Lite"]
    assert lite.latent is not None and lite.latent.q_rank == 0, "null means none"
    assert lite.experts is not None and (lite.experts.n_groups, lite.experts.normalise) == (1, False)
    oss = specs["gpt-oss-20b"]
    assert oss.attn_sinks and oss.experts is not None and oss.experts.bias and oss.experts.clamp == 7.0
    assert [oss.window_of(layer) for layer in range(3)] == [128, 0, 128]
    absent = spec_from_config({**DEEPSEEK, "kv_lora_rank": 16, "num_hidden_layers": 1})
    assert absent.latent is not None and absent.latent.q_rank == 1536, "the class's default"


def test_layers_with_experts() -> None:
    def routed(**keys: object) -> list[int]:
        spec = spec_from_config({**QWEN_MOE, **keys})
        return [layer for layer in range(spec.n_layers) if spec.experts_of(layer)]

    assert routed() == [0, 1, 2, 3]
    assert routed(decoder_sparse_step=2) == [1, 3]
    assert routed(mlp_only_layers=[0, 1]) == [2, 3]
    assert routed(decoder_sparse_step=9) == []


def test_models_with_an_encoder_are_read() -> None:
    bert = spec_from_config({**BERT, "architectures": ["BertForMaskedLM"]})
    assert bert.encoder == Encoder(token_types=2) and not bert.pre_norm and bert.head_bias and bert.position_rows == 32
    roberta = spec_from_config({**BERT, "model_type": "roberta", "type_vocab_size": 1})
    assert (roberta.position_rows, roberta.max_positions) == (32, 30)
    t5 = spec_from_config({**T5, "architectures": ["T5WithLMHeadModel"], "num_decoder_layers": 3})
    assert t5.encoder == Encoder(n_layers=2, relative_buckets=32) and t5.n_layers == 3
    assert (t5.activation, t5.gated_mlp, t5.d_attn, t5.tied_embeddings) == ("relu", False, 32, True)
    gated = spec_from_config({**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
    assert (gated.activation, gated.gated_mlp, gated.tied_embeddings) == ("gelu_tanh", True, False)
    bart = spec_from_config({**BART, "architectures": ["BartModel"]})
    assert bart.position_rows == 34 and bart.encoder == Encoder(n_layers=2)


VIT = {
    "model_type": "vit",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
}


def test_vision_transformers_are_read() -> None:
    """224 x 224 pixels in patches of 16: 14 x 14, and the class's token."""
    usual = spec_from_config({**VIT, "id2label": {"0": "cat", "1": "dog", "2": "neither"}})
    assert usual.patches == Patches(image_size=224, patch_size=16) and usual.encoder == Encoder()
    assert (usual.position_rows, usual.max_positions, usual.vocab_size) == (197, 197, 3)
    assert usual.pre_norm and usual.qkv_bias and usual.head_bias and not usual.tied_embeddings
    assert spec_from_config({**VIT, "qkv_bias": False}).attn_out_bias, "of queries, keys and values alone"
    assert "config.image_size is [224, 192]; allowed: one number" in refusal({**VIT, "image_size": [224, 192]})
    assert "at most image_size = 8" in refusal({**VIT, "image_size": 8})
    assert "ViTForImageClassification, the encoder with its classifier" in refusal(
        {**VIT, "architectures": ["ViTModel"]}
    )


def test_opt_350m_norms_come_last() -> None:
    config = {"model_type": "opt", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096,
              "word_embed_proj_dim": 512, "do_layer_norm_before": False, "vocab_size": 50272,
              "max_position_embeddings": 2048}  # fmt: skip
    spec = spec_from_config(config)
    assert (spec.embed_dim, spec.pre_norm, spec.final_norm) == (512, False, False)
    assert count_params(model_units(spec)) == 331_196_416


def test_windows() -> None:
    qwen2 = {
        **LLAMA,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "num_key_value_heads": 2,
        "sliding_window": 8,
    }
    assert spec_from_config({**qwen2, "use_sliding_window": True, "max_window_layers": 0}).sliding_window == 8
    assert spec_from_config({**qwen2, "use_sliding_window": True, "max_window_layers": 2}).sliding_window == 0
    assert "max_window_layers is 1" in refusal({**qwen2, "use_sliding_window": True, "max_window_layers": 1})
    mistral = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert spec_from_config({**mistral, "sliding_window": None}).sliding_window == 0
    gemma = {
        **LLAMA,
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
    }
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert spec_from_config({**gemma, "layer_types": kinds}).global_every == 3
    assert "irregularly" in refusal({**gemma, "layer_types": kinds[::-1]})
    assert "layer_types" in refusal({**gemma, "layer_types": kinds[:3]})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "arctic", "num_local_experts": 8}, "mixture of experts (8 experts)"),
        ({"model_type": "new_moe", "n_routed_experts": 64}, "mixture of experts (64 experts)"),
        ({"model_type": "pegasus", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "newseq", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "albert"}, "shares the parameters of its layers"),
        ({"model_type": "qwen3_next", "num_experts": 512}, "linear attention"),
        ({"model_type": "newbert", "architectures": ["NewBertForMaskedLM"]}, "encoder without a causal decoder"),
        ({"model_type": "deit", "image_size": 224}, "vision tower"),
        ({"model_type": "mllama", "text_config": {}, "vision_config": {}}, "vision tower"),
        ({"model_type": "falcon"}, "config.hidden_size is missing"),
        ({"model_type": "mamba"}, "state-space"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "llama\nx"}, "not known here"),
        ({"model_type": 3}, "config.model_type is 3"),
        ({}, "no 'model_type'"),
        ({"architectures": ["GrokForCausalLM"]}, "not known here"),
        ({**LLAMA, "num_experts": 8}, "mixture of experts"),
        ({**GPT2, "moe": {"num_experts": [4]}}, "mixture of experts"),
        ({**MIXTRAL, "n_shared_experts": 1}, "mixture of experts"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "the experts within reach"),
        ({**MIXTRAL, "num_experts": 4}, "two names of one thing"),
        ({**QWEN_MOE, "mlp_only_layers": [1]}, "the first layers, so that the others follow regularly"),
        ({**QWEN_MOE, "mlp_only_layers": [7]}, "numbers of layers below 4"),
        ({**QWEN_MOE, "use_sliding_window": True, "max_window_layers": 2}, "at least num_hidden_layers = 4"),
        ({**DEEPSEEK, "moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({**DEEPSEEK, "topk_method": "noaux_tc"}, "greedy, group_limited_greedy"),
        ({**DEEPSEEK, "v_head_dim": 200}, "attention kernels take one width"),
        ({**DEEPSEEK, "model_type": "deepseek", "architectures": None, "kv_lora_rank": 8}, "low-rank"),
        ({**LLAMA, "kv_lora_rank": 512}, "low-rank"),
        ({**LLAMA, "num_nextn_predict_layers": 1}, "multi-token"),
        ({**LLAMA, "qk_norm": True}, "normalises queries"),
        ({**LLAMA, "vision_config": {"hidden_size": 8}}, "vision tower"),
        ({**GPT2, "add_cross_attention": True}, "attends to an encoder"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
        ({**LLAMA, "architectures": ["LlamaModel"]}, "language-model head"),
        ({**LLAMA, "architectures": ["MistralForCausalLM"]}, "LlamaForCausalLM"),
        ({**LLAMA, "architectures": "LlamaForCausalLM"}, "a list of class names"),
        ({**BERT, "architectures": ["BertModel"]}, "BertForMaskedLM, the encoder with its language-model head"),
        ({**BERT, "architectures": ["BertForPreTraining"]}, "BertForMaskedLM"),
        ({**BERT, "architectures": ["BertForSequenceClassification"]}, "BertForMaskedLM"),
        ({**BERT, "is_decoder": True}, "BERT as a decoder"),
        ({**BERT, "position_embedding_type": "relative_key"}, "'absolute'"),
        ({**BERT, "tie_word_embeddings": False}, "not forecast yet; allowed: true"),
        ({**BERT, "model_type": "roberta", "max_position_embeddings": 2}, "more than pad_token_id + 1 = 2"),
        ({"model_type": "distilbert", "sinusoidal_pos_embds": True}, "not trained"),
        ({**T5, "architectures": ["T5EncoderModel"]}, "T5ForConditionalGeneration, the encoder-decoder with its"),
        ({**T5, "feed_forward_proj": "gated-swiglu"}, "with or without 'gated-'"),
        ({**T5, "feed_forward_proj": 3}, "config.feed_forward_proj is 3"),
        ({**T5, "relative_attention_num_buckets": 7}, "even number"),
        ({**BART, "scale_embedding": True}, "scale_embedding"),
        ({**BART, "encoder_ffn_dim": 64}, "that of encoder_ffn_dim, 64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_with_the_reason(config: dict, words: str) -> None:
    assert words in refusal(config)


BAD_SIZES = ["32", None, -1, 0, 32.0, float("nan"), True, [32], {"a": 1}, 10**30, 10**6000]


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", BAD_SIZES, ids=lambda value: str(type(value).__name__))
def test_bad_sizes_name_the_key(key: str, value: object) -> None:
    assert f"config.{key}" in refusal({**LLAMA, key: value})


def test_missing_keys_are_named() -> None:
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert f"config.{key} is missing" in refusal({k: v for k, v in LLAMA.items() if k != key})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 3}, "n_kv_heads"),
        ({"num_key_value_heads": -2}, "num_key_value_heads"),
        ({"num_attention_heads": 5}, "a divisor of the hidden size"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"attention_bias": 1}, "true or false"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"partial_rotary_factor": 1.5}, "rotary_fraction"),
        ({"num_hidden_layers": 10**9}, "<= 10000"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)  # fmt: skip
def test_bad_values(change: dict, words: str) -> None:
    assert words in refusal({**LLAMA, **change})


def test_contradicting_spellings() -> None:
    assert "two names of one thing" in refusal({**GPT2, "hidden_size": 128})


@pytest.mark.parametrize("junk", [[1], "x", 3, None, True])
def test_config_must_be_an_object(junk: object) -> None:
    assert "a table of named values" in refusal(junk)


def test_model_type_may_come_from_the_architecture() -> None:
    spec = spec_from_config({k: v for k, v in LLAMA.items() if k != "model_type"})
    assert spec.family == "llama"


def test_load_config_from_file_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert load_config(folder) == load_config(folder / "config.json")
    assert load_config(folder).name == "my-model"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "line 1 column 2"),
        (b'{"a": 1,\n "b": }', "line 2 column 7"),
        (b"[1, 2]", "a table"),
        (b"\xff\xfe\x00", "not a UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"", "not valid JSON"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, "a\0b", "x" * 5000):
        with pytest.raises(InputError):
            load_config(path)
