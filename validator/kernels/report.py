"""``KernelReport``: how fast one kernel ran, beside the memory copy of the same process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from estimator.errors import InputError, invalid, unknown_choice
from validator.kernels.table import kernel

Implementation = Literal["torch", "cuda", "fused", "compile", "liger", "apex"]
"""``torch``: the plain PyTorch body; ``cuda``: this project's own kernel; the others: see ``implementation``."""


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """One kernel on one size. Bytes, seconds and FLOPs of one call."""

    kernel: str
    """Name in the table of kernels, e.g. ``"rms_norm"``."""
    backward: bool = False
    both: bool = False
    """The forward pass and then the backward pass, in one call; ``backward`` is then false."""
    implementation: Implementation = "torch"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "bf16"
    shape: tuple[int, ...] = ()
    """Of the kernel's main operand."""
    bytes: int = 0
    """Every operand read once plus every result written once: the least that any implementation moves."""
    counted_bytes: int = 0
    """Read plus written by the estimator's count for this implementation: more where a plain body takes several passes."""
    flops: int = 0
    """By the estimator's count."""
    seconds: float = 0.0
    """Median of one call; device seconds on a GPU."""
    low_s: float = 0.0
    """Shortest repeat."""
    high_s: float = 0.0
    """Longest repeat."""
    spread_s: float = 0.0
    """Interquartile range."""
    repeats: int = 0
    peak_bytes: int | None = None
    """Most bytes of tensors at one time of a call, operands included, by CUDA's allocator; ``None``: not counted (a CPU's
    allocator keeps no such number)."""
    copy_bytes_per_s: float = 0.0
    """What a large copy within device memory reached in the same process just before (bytes read plus written): the ceiling."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def device_name(self) -> str:
        """What the driver calls the GPU, or the processor's name; empty when the record does not say."""
        gpu = self.provenance.get("gpu")
        name = (
            self.provenance.get("cpu") if self.device == "cpu" else gpu.get("name") if isinstance(gpu, dict) else None
        )
        return str(name or "")

    @property
    def key(self) -> str:
        """Identity of what was measured, without the result: 16 hexadecimal digits."""
        what = [self.kernel, self.backward, self.implementation, self.device, self.dtype, list(self.shape)]
        what += ["both"] if self.both else []
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        shape = "x".join(str(n) for n in self.shape)
        return f"{self.passes} {self.dtype} {shape} [{self.implementation} on {self.device}]"

    @property
    def passes(self) -> str:
        """Kernel and direction."""
        return f"{self.kernel}{' backward' if self.backward else ' forward+backward' if self.both else ''}"

    @property
    def asked_bytes(self) -> int:
        """``n_bytes`` of a case that has this shape."""
        return kernel(self.kernel, self.backward, self.both).size_of(self.shape, self.dtype)

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds

    @property
    def of_copy(self) -> float:
        """Share of the copy's bandwidth; above 1 where caches hold the data."""
        return self.bytes_per_s / self.copy_bytes_per_s

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KernelReport:
        """Inverse of ``to_dict``. Raises ``InputError`` on an unknown or a missing key, or where nothing was measured."""
        names = {f.name for f in fields(cls)}
        for key in data:
            if key not in names:
                raise unknown_choice("kernel record field", key, names)
        if "kernel" not in data:
            raise InputError("the kernel record has no field 'kernel'")
        report = cls(**{**data, "shape": tuple(data.get("shape", ()))})
        for name in ("bytes", "seconds", "copy_bytes_per_s"):
            if not getattr(report, name) > 0:
                raise invalid(f"kernel record field {name}", getattr(report, name), "a number > 0")
        return report
