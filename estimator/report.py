"""``StepReport``: one shape for a predicted and for a measured step, joined on the job key."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from estimator.errors import InputError, unknown_choice

CATEGORIES = (
    "params", "grads", "master_params", "optimizer_state", "activations", "logits_loss", "gathered_params",
    "reduce_buckets", "offload_staging", "workspace", "temporaries", "cuda_context", "comm_buffers", "fragmentation",
)  # fmt: skip
PHASES = ("init", "forward", "loss", "backward", "reduce", "optimizer")
TIME_PARTS = ("forward", "backward", "recompute", "exposed_gather", "exposed_reduce", "exposed_other_comm",
              "optimizer", "offload", "pipeline_bubble", "data")  # fmt: skip

Origin = Literal["predicted", "fake", "cpu", "cuda", "cuda-virtual"]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step in steady state, of one rank. Bytes, seconds and FLOPs; ``None`` means not known, never zero."""

    origin: Origin
    job_key: str
    job: dict[str, Any] = field(default_factory=dict)
    """The job as written by ``estimator.job.files.job_to_dict``: enough to build the same ``Job`` again."""
    rank: int = 0
    # memory
    peak_allocated_bytes: int | None = None
    """Largest number of live device bytes (what ``torch.cuda.max_memory_allocated`` counts)."""
    peak_reserved_bytes: int | None = None
    """Largest number of bytes held by the caching allocator."""
    device_used_bytes: int | None = None
    """Reserved bytes plus context and communication buffers (what ``nvidia-smi`` shows); where it was predicted without reserved bytes,
    live bytes in their place."""
    allocator_bytes: int | None = None
    """Predicted, with the allocator simulated: the largest number of bytes that it hands out, with its rounding and the workspace of
    matrix products (what ``torch.cuda.max_memory_allocated`` shows without a meter)."""
    alloc_retries: int | None = None
    """Requests per step for which the allocator gave back its cache first, because the device was full."""
    peak_phase: str | None = None
    """Phase in which ``peak_allocated_bytes`` is reached."""
    peak_where: str | None = None
    """Unit and pass at the peak, e.g. ``"backward of blocks.31"``."""
    category_bytes_at_peak: dict[str, int] = field(default_factory=dict)
    """Live bytes by category at the peak."""
    category_peak_bytes: dict[str, int] = field(default_factory=dict)
    """Each category's own maximum over the step."""
    phase_peak_bytes: dict[str, int] = field(default_factory=dict)
    phase_category_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Live bytes by category at each phase's own peak; ``init`` is what lives from step to step."""
    host_bytes: int | None = None
    """Host memory of this rank's offloaded buffers at their peak."""
    pinned_bytes: int | None = None
    """Page-locked part of ``host_bytes``."""
    # time
    step_s: float | None = None
    step_low_s: float | None = None
    step_high_s: float | None = None
    time_parts_s: dict[str, float] = field(default_factory=dict)
    """Seconds by part (``TIME_PARTS``); they add up to ``step_s`` when it was predicted."""
    step_spread_s: float | None = None
    """Measured: interquartile range of the steps."""
    tokens_per_s: float | None = None
    """Tokens per second of the whole job."""
    model_flops: float | None = None
    """Model FLOPs per step of the whole job, causal attention counted once, no recompute."""
    mfu: float | None = None
    """Model FLOPs utilisation of the dense peak of the job's dtype."""
    hfu: float | None = None
    """The same with recomputed FLOPs counted."""
    # communication
    collective_bytes: dict[str, int] = field(default_factory=dict)
    """Payload bytes per step by collective (full, unsharded tensor), e.g. ``{"all_gather": ...}``."""
    collective_calls: dict[str, int] = field(default_factory=dict)
    copy_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes per step copied between device and host by direction (``h2d``, ``d2h``)."""
    copy_s: dict[str, float] = field(default_factory=dict)
    """Measured: seconds per step for which these copies occupied their streams, overlapped or not. ``copy_bytes`` over
    ``copy_s`` is the rate reached."""
    # correctness
    parity: dict[str, float] = field(default_factory=dict)
    """Measured, where asked for: largest relative difference from plain PyTorch of the losses (``loss``) and of the
    parameters (``params``, norm over norm) after the same steps."""
    # verdict
    capacity_bytes: int | None = None
    fits: bool | None = None
    fits_probability: float | None = None
    """Predicted: how likely it is to fit; ``fits`` where that is at least one half."""
    explanation: str | None = None
    """One sentence with the number that decides: why it does not fit, or what bounds the step."""
    notes: tuple[str, ...] = ()
    """Provenance the reader must know: curves borrowed from another GPU, unsourced figures, ..."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Measured: versions, host, date, command, commit. Predicted: versions, profile."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the fields by name, bytes and seconds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepReport:
        """Inverse of ``to_dict``. Raises ``InputError`` on an unknown or a missing key."""
        names = {f.name for f in fields(cls)}
        for key in data:
            if key not in names:
                raise unknown_choice("record field", key, names)
        for key in ("origin", "job_key"):
            if key not in data:
                raise InputError(f"record has no field {key!r}")
        return cls(**{**data, "notes": tuple(data.get("notes", ()))})
