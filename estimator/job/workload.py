"""``Workload``: how much data one step reads."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.errors import require_int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sequence length and batch sizes of one training step."""

    seq_len: int
    """Tokens per sequence."""
    micro_batch_size: int
    """Sequences per GPU in one forward/backward pass."""
    global_batch_size: int
    """Sequences per optimizer step over all GPUs."""

    def __post_init__(self) -> None:
        require_int("seq_len", self.seq_len)
        require_int("micro_batch", self.micro_batch_size)
        require_int("global_batch", self.global_batch_size)
