"""Small models with an encoder."""

from __future__ import annotations

from estimator.job import ModelSpec
from estimator.job.encoder import Encoder
from estimator.job.patches import Patches

BERT = ModelSpec(
    name="tiny-bert", family="bert", n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=128,
    vocab_size=61, max_positions=16, positions="learned", position_rows=16, norm="layernorm", norm_bias=True,
    norm_eps=1e-12, activation="gelu", gated_mlp=False, qkv_bias=True, attn_out_bias=True, mlp_bias=True, head_bias=True,
    embedding_norm=True, final_norm=False, pre_norm=False, tied_embeddings=True, encoder=Encoder(token_types=2),
)  # fmt: skip
T5 = ModelSpec(
    name="tiny-t5", family="t5", n_layers=2, d_model=32, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=96,
    vocab_size=61, max_positions=16, positions="relative", norm_eps=1e-6, activation="relu", gated_mlp=False,
    tied_embeddings=True, encoder=Encoder(n_layers=3, relative_buckets=8, relative_distance=10),
)  # fmt: skip
T5_GATED = ModelSpec(
    name="tiny-t5-gated", family="t5", n_layers=1, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=80,
    vocab_size=61, max_positions=16, positions="relative", norm_eps=1e-6, activation="gelu_tanh", gated_mlp=True,
    encoder=Encoder(n_layers=1, relative_buckets=32),
)  # fmt: skip
BART = ModelSpec(
    name="tiny-bart", family="bart", n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=128,
    vocab_size=61, max_positions=16, positions="learned", position_rows=18, norm="layernorm", norm_bias=True,
    activation="gelu", gated_mlp=False, qkv_bias=True, attn_out_bias=True, mlp_bias=True, embedding_norm=True,
    final_norm=False, pre_norm=False, tied_embeddings=True, encoder=Encoder(n_layers=2),
)  # fmt: skip
VIT = ModelSpec(
    name="tiny-vit", family="vit", n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=128, vocab_size=10,
    max_positions=17, positions="learned", position_rows=17, norm="layernorm", norm_bias=True, norm_eps=1e-12,
    activation="gelu", gated_mlp=False, qkv_bias=True, attn_out_bias=True, mlp_bias=True, head_bias=True, encoder=Encoder(),
    patches=Patches(image_size=16, patch_size=4),
)  # fmt: skip
"""Reads images; tested apart."""
ALL = (BERT, T5, T5_GATED, BART)
