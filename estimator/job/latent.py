"""``LatentAttention``: the ranks and widths of multi-head latent attention (DeepSeek-V2, 2024, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.errors import invalid, require_int


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Keys and values of all heads come from one narrow vector per token; positions are rotated in channels of their own.

    Raises ``InputError`` when a field is out of range.
    """

    kv_rank: int
    """Width of the vector from which keys and values are projected (``kv_lora_rank``)."""
    q_rank: int = 0
    """Width of that from which queries are projected (``q_lora_rank``); 0: they are projected from the hidden state."""
    nope_head_dim: int
    """Channels of a query and key head that are not rotated."""
    rope_head_dim: int
    """Channels of a query head that are rotated; the keys' are one head's, which all heads share."""
    value_head_dim: int
    bias: bool = False
    """Projections into the narrow vectors have biases."""

    def __post_init__(self) -> None:
        for field in ("kv_rank", "nope_head_dim", "rope_head_dim", "value_head_dim"):
            require_int(f"model.latent.{field}", getattr(self, field))
        require_int("model.latent.q_rank", self.q_rank, minimum=0)
        if self.rope_head_dim % 2:
            raise invalid("model.latent.rope_head_dim", self.rope_head_dim, "an even number")
        if self.value_head_dim > self.head_dim:
            raise invalid(
                "model.latent.value_head_dim", self.value_head_dim,
                f"at most nope_head_dim + rope_head_dim = {self.head_dim}: attention kernels take one width",
            )  # fmt: skip

    @property
    def head_dim(self) -> int:
        """Width of a query and key head."""
        return self.nope_head_dim + self.rope_head_dim
