"""``ModelSpec``: the shape of a transformer, independent of any framework."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from estimator.errors import InputError, invalid, require_choice, require_int
from estimator.job.encoder import Encoder, check_encoder
from estimator.job.experts import Experts
from estimator.job.latent import LatentAttention
from estimator.job.lora import Lora, check_lora
from estimator.job.patches import Patches, check_patches
from estimator.job.tower import Tower, check_tower
from estimator.job.traced import Traced

Positions = Literal["learned", "rotary", "alibi", "none", "relative"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]
"""``relu2``: the square of ReLU (Nemotron)."""
QkNorms = Literal["head", "each", "all", "plain"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One transformer: a decoder unless it has an ``encoder``. Every field is read from the user's config, none is guessed.

    Raises ``InputError`` when a field is out of range or two fields contradict each other.
    """

    name: str
    """Name shown in reports, e.g. ``"llama-3-8b"``."""
    family: str
    """Hugging Face ``model_type`` (``"gpt2"``, ``"llama"``, ...) or ``"custom"``."""
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    """Key/value heads; equal to ``n_heads`` without grouped-query attention."""
    head_dim: int
    """Width of one head; ``n_heads * head_dim`` need not equal ``d_model`` (Gemma, Qwen3)."""
    d_ff: int
    """Hidden width of the MLP (of each of the two input projections when gated)."""
    vocab_size: int
    max_positions: int
    """Longest sequence that the model accepts."""
    positions: Positions = "rotary"
    position_rows: int = 0
    """Rows of the learned position table (OPT has two more than ``max_positions``); 0 when not learned."""
    rotary_fraction: float = 1.0
    """Share of each head that is rotated (GPT-NeoX: 0.25)."""
    rope_theta: float = 10000.0
    norm: Norm = "rmsnorm"
    norm_bias: bool = False
    """LayerNorm has a bias vector (always False for RMSNorm)."""
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of ``head_dim`` weights on queries and on keys (Qwen3, Gemma 3)."""
    sandwich_norms: bool = False
    """A second norm after attention and after the MLP (Gemma 2 and 3)."""
    parallel_residual: bool = False
    """Attention and MLP read the same residual stream (GPT-NeoX)."""
    embedding_norm: bool = False
    """A norm right after the token embedding (BLOOM)."""
    embed_dim: int = 0
    """Token-embedding width when projected to ``d_model`` (OPT-350m); 0 means ``d_model``."""
    final_norm: bool = True
    pre_norm: bool = True
    """Norms stand before attention and MLP; False puts them after the residual (OPT-350m)."""
    tied_embeddings: bool = False
    """The head shares the token-embedding matrix."""
    sliding_window: int = 0
    """Attention window in tokens of the windowed layers; 0 means none."""
    global_every: int = 0
    """Every n-th layer attends globally although ``sliding_window`` is set (Gemma 2: 2, Gemma 3: 6); 0: none does."""
    encoder: Encoder | None = None
    """Encoder models and encoder-decoders; the fields above are then those of all their blocks."""
    attn_sinks: bool = False
    """Each head has a learned logit that takes a share of its attention and gives nothing (GPT-OSS)."""
    experts: Experts | None = None
    """A mixture of experts instead of the MLP."""
    latent: LatentAttention | None = None
    """Multi-head latent attention; ``head_dim`` is then its queries' and keys', and there is no ``n_kv_heads`` to choose."""

    patches: Patches | None = None
    """With an ``encoder`` alone: patches of images are read in place of tokens, and ``vocab_size`` is the number of classes."""
    shared_norm: bool = False
    """With ``parallel_residual``: attention and MLP read what one norm makes (GPT-J, Falcon-7B, Phi, Command-R)."""
    norm_weight: bool = True
    """False: norms of the residual stream have no weights (OLMo)."""
    qk_norms: QkNorms = "head"
    """With ``qk_norm``, what it is. ``head``: as said there. Of the model's own kind of norm, without bias: ``each``, with weights of
    each head's own (Command-R+, StableLM 2); ``all``, over all heads together (OLMo 2); ``plain``, of each head, without weights
    (Llama 4)."""
    caps_logits: bool = False
    """Logits go through ``cap * tanh(logits / cap)`` before the loss (Gemma 2)."""
    clips_qkv: bool = False
    """Queries, keys and values are clamped (OLMo, DBRX)."""
    global_first: bool = False
    """With ``global_every`` n it is layers 0, n, 2 n, ... that attend globally (GPT-Neo), not n - 1, 2 n - 1, ..."""
    unrotated_every: int = 0
    """Every n-th layer leaves positions out (SmolLM3, Llama 4); 0: none does."""
    lora: Lora | None = None
    """Adapters, which alone are trained: everything else is frozen."""
    tower: Tower | None = None
    """A vision tower that is held while text alone is trained on."""
    traced: Traced | None = None
    """A module of the user's own: these records say all there is to know of it (``traced_spec``), the fields above nothing."""

    def __post_init__(self) -> None:
        for field in (
            "n_layers",
            "d_model",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "vocab_size",
            "max_positions",
        ):
            require_int(f"model.{field}", getattr(self, field))
        for field in ("position_rows", "embed_dim", "sliding_window", "global_every", "unrotated_every"):
            require_int(f"model.{field}", getattr(self, field), minimum=0)
        require_choice("model.positions", self.positions, get_args(Positions))
        require_choice("model.norm", self.norm, get_args(Norm))
        require_choice("model.activation", self.activation, get_args(Activation))
        require_choice("model.qk_norms", self.qk_norms, get_args(QkNorms))
        if self.n_heads % self.n_kv_heads:
            raise invalid("model.n_kv_heads", self.n_kv_heads, f"a divisor of n_heads = {self.n_heads}")
        if not 0.0 < self.rotary_fraction <= 1.0:
            raise invalid("model.rotary_fraction", self.rotary_fraction, "more than 0, at most 1")
        if (self.positions == "learned") != (self.position_rows > 0):
            raise InputError(
                f"model.position_rows is {self.position_rows} with positions = {self.positions!r}; "
                "a learned table needs rows, any other kind has none"
            )
        if self.norm == "rmsnorm" and self.norm_bias:
            raise InputError("model.norm_bias is True with norm = 'rmsnorm'; RMSNorm has no bias")
        self._check_norms()
        check_encoder(self)
        check_patches(self)
        if self.activation == "relu2" and self.gated_mlp:
            raise InputError(
                "model.activation is 'relu2' with gated_mlp, which is not forecast yet; allowed: an MLP without a gate"
            )
        if self.experts is not None and not self.gated_mlp:
            raise InputError("model.gated_mlp is False with experts; experts are gated MLPs")
        if self.latent is not None:
            self._check_latent(self.latent)
        check_lora(self)
        check_tower(self)

    def _check_norms(self) -> None:
        if self.shared_norm and not self.parallel_residual:
            raise InputError("model.shared_norm is True without parallel_residual, whose two norms it makes one")
        if self.parallel_residual and (self.sandwich_norms or not self.pre_norm):
            raise InputError(
                "model.parallel_residual is True with norms behind attention and MLP; allowed: before them"
            )
        if not self.norm_weight and self.norm_bias:
            raise InputError("model.norm_bias is True with norm_weight False; allowed: neither, or weights")
        if self.qk_norms != "head" and not self.qk_norm:
            raise InputError(f"model.qk_norms is {self.qk_norms!r} without qk_norm")

    def _check_latent(self, latent: LatentAttention) -> None:
        if self.head_dim != latent.head_dim:
            raise invalid("model.head_dim", self.head_dim, f"nope_head_dim + rope_head_dim = {latent.head_dim}")
        if self.n_kv_heads != self.n_heads:
            raise invalid("model.n_kv_heads", self.n_kv_heads, f"n_heads = {self.n_heads} with latent attention")
        if self.positions != "rotary" or self.rotary_fraction != 1.0:
            raise InputError(
                "model.positions and rotary_fraction are not 'rotary' and 1.0, which latent attention needs"
            )
        for field in ("qkv_bias", "qk_norm", "attn_sinks", "unrotated_every", "clips_qkv"):
            if getattr(self, field):
                raise InputError(
                    f"model.{field} is {getattr(self, field)!r} with latent attention, which is described without"
                )

    @property
    def d_attn(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of all key (or value) heads together."""
        return self.n_kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of one head; 0 when positions are not rotary."""
        if self.latent is not None:
            return self.latent.rope_head_dim
        return int(self.head_dim * self.rotary_fraction) if self.positions == "rotary" else 0

    def table_numel(self, seq_len: int, layers: Iterable[int] | None = None) -> int:
        """Numbers beside the parameters: cosines and sines for ``seq_len`` places, biases for choosing experts of ``layers``
        (default: all)."""
        held = range(self.n_layers) if layers is None else layers
        biased = [e.n_experts for e in map(self.experts_of, held) if e is not None and e.selection_bias]
        return 2 * seq_len * (self.rotary_dim // 2) + sum(biased)

    def experts_of(self, layer: int) -> Experts | None:
        """The mixture of experts that ``layer`` (0-based) has instead of the dense MLP, if it has one."""
        return self.experts if self.experts is not None and self.experts.in_layer(layer) else None

    def window_of(self, layer: int) -> int:
        """Attention window of ``layer`` (0-based) in tokens; 0 when it attends globally."""
        if self.sliding_window and self.global_every and (layer + (not self.global_first)) % self.global_every == 0:
            return 0
        return self.sliding_window

    def rotates(self, layer: int) -> bool:
        """Whether ``layer`` (0-based) rotates queries and keys by their positions."""
        return self.rotary_dim > 0 and not (self.unrotated_every and (layer + 1) % self.unrotated_every == 0)


def traced_spec(name: str, traced: Traced) -> ModelSpec:
    """The model ``name`` that ``traced`` records; nothing reads its widths."""
    return ModelSpec(
        name=name, family="traced", n_layers=len(traced.units), d_model=1, n_heads=1, n_kv_heads=1, head_dim=1, d_ff=1,
        vocab_size=1, max_positions=traced.seq_len, positions="none", traced=traced,
    )  # fmt: skip
