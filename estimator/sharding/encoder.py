"""Units of models with an encoder: ``embed``, encoder blocks, decoder blocks (where there is a decoder), ``head``.

Their parameters are those of transformers' ``BertForMaskedLM``, ``T5ForConditionalGeneration`` and so on, under other names.
"""

from __future__ import annotations

from estimator.job.encoder import Encoder
from estimator.job.model import ModelSpec
from estimator.job.patches import Patches
from estimator.sharding.units import Param, Unit, linear_params, mlp_params, norm_params


def encoder_units(spec: ModelSpec, encoder: Encoder) -> tuple[Unit, ...]:
    """Units in the order in which they run.

    Blocks of encoder-decoders differ in kind at both ends of their stack: the first and the last reader of what a stack shares
    (``Tape.shared_tensor``). The last encoder block has the norm that ends the encoder.
    """
    borrows = (0,) if spec.tied_embeddings else ()
    head = Unit("head", "head", _head(spec, encoder), borrows)
    if spec.patches is not None:
        embed = Unit("embed", "embed", _patches(spec, spec.patches))
        block = _block(spec, cross=False)
        return embed, *(Unit(f"blocks.{layer}", "block", block) for layer in range(spec.n_layers)), head
    if not encoder.n_layers:
        embed = Unit("embed", "embed", _embedding(spec, encoder), backward_reads=spec.embedding_norm)
        block = _block(spec, cross=False)
        return embed, *(Unit(f"blocks.{layer}", "block", block) for layer in range(spec.n_layers)), head
    embed = Unit("embed", "embed", _both_embeddings(spec, encoder), backward_reads=spec.embedding_norm)
    units = [embed]
    for name, n_layers in (("encoder", encoder.n_layers), ("decoder", spec.n_layers)):
        block = _block(spec, cross=name == "decoder")
        ends = tuple(norm_params(spec, "final_norm", spec.d_model)) if name == "encoder" and spec.final_norm else ()
        for layer in range(n_layers):
            is_last = layer == n_layers - 1
            kind = name + ("_first" if layer == 0 else "") + ("_last" if is_last else "")
            units.append(Unit(f"{name}.{layer}", kind, block + ends if is_last else block))
    return *units, head


def _embedding(spec: ModelSpec, encoder: Encoder) -> tuple[Param, ...]:
    params = [Param("tokens.weight", (spec.vocab_size, spec.d_model))]
    if spec.position_rows:
        params.append(Param("positions.weight", (spec.position_rows, spec.d_model)))
    if encoder.token_types:
        params.append(Param("types.weight", (encoder.token_types, spec.d_model)))
    return (*params, *(norm_params(spec, "norm", spec.d_model) if spec.embedding_norm else ()))


def _patches(spec: ModelSpec, patches: Patches) -> tuple[Param, ...]:
    d, size = spec.d_model, patches.patch_size
    tables = Param("first", (1, 1, d)), Param("positions", (1, patches.n_tokens, d))
    return (*tables, Param("project.weight", (d, patches.channels, size, size)), Param("project.bias", (d,)))


def _both_embeddings(spec: ModelSpec, encoder: Encoder) -> tuple[Param, ...]:
    """One table of tokens for sources and targets; all else each has for itself."""
    params = [Param("tokens.weight", (spec.vocab_size, spec.d_model))]
    for side in ("source", "target"):
        if spec.position_rows:
            params.append(Param(f"{side}.positions.weight", (spec.position_rows, spec.d_model)))
        if spec.embedding_norm:
            params += norm_params(spec, f"{side}.norm", spec.d_model)
        if encoder.relative_buckets:
            params.append(Param(f"{side}.bias.table.weight", (encoder.relative_buckets, spec.n_heads)))
    return tuple(params)


def _attention(spec: ModelSpec, name: str) -> list[Param]:
    params = [p for x in "qkv" for p in linear_params(f"{name}.{x}", spec.d_model, spec.d_attn, spec.qkv_bias)]
    params += linear_params(f"{name}.out", spec.d_attn, spec.d_model, spec.attn_out_bias)
    return params + norm_params(spec, f"{name}_norm", spec.d_model)


def _block(spec: ModelSpec, *, cross: bool) -> tuple[Param, ...]:
    params = _attention(spec, "attn") + (_attention(spec, "cross") if cross else [])
    return (*params, *mlp_params(spec), *norm_params(spec, "mlp_norm", spec.d_model))


def _head(spec: ModelSpec, encoder: Encoder) -> tuple[Param, ...]:
    if spec.patches is not None:
        norm = norm_params(spec, "norm", spec.d_model) if spec.final_norm else []
        return (*norm, *linear_params("out", spec.d_model, spec.vocab_size, spec.head_bias))
    params = norm_params(spec, "final_norm", spec.d_model) if spec.final_norm else []
    if not encoder.n_layers:
        params += linear_params("transform", spec.d_model, spec.d_model, bias=True)
        params += norm_params(spec, "norm", spec.d_model)
    if not spec.tied_embeddings:
        params += linear_params("out", spec.d_model, spec.vocab_size, spec.head_bias)
    elif spec.head_bias:
        params.append(Param("out.bias", (spec.vocab_size,)))
    return tuple(params)
