"""``KernelCase``: one kernel on one size, to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from estimator.errors import InputError, require_choice, require_int
from estimator.units import MIB
from validator.kernels.implementation import missing
from validator.kernels.report import Implementation, KernelReport
from validator.kernels.table import Kernel, kernel

MOST_BYTES = 1 << 40


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """Raises ``InputError`` for a combination that does not exist here."""

    kernel: str
    backward: bool = False
    both: bool = False
    """The forward pass and then the backward pass, in one call."""
    dtype: str = "bf16"
    n_bytes: int = 64 * MIB
    """About what one call moves, by the estimator's count of the plain body."""
    implementation: Implementation = "torch"
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        require_choice("device", self.device, ("cpu", "cuda"))
        entry = self.entry
        if require_int("n_bytes", self.n_bytes) > MOST_BYTES:
            raise InputError(f"n_bytes is {self.n_bytes}; allowed: at most {MOST_BYTES}")
        require_choice("dtype", self.dtype, entry.dtypes)
        reason = missing(self.kernel, self.implementation, self.device)
        if reason:
            raise InputError(reason)

    @property
    def entry(self) -> Kernel:
        return kernel(self.kernel, self.backward, self.both)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the main operand."""
        return self.entry.shape_for(self.n_bytes, self.dtype)

    def report(self, **results: object) -> KernelReport:
        """A report about this case."""
        return KernelReport(
            kernel=self.kernel, backward=self.backward, both=self.both, implementation=self.implementation,
            device=self.device, dtype=self.dtype, shape=self.shape, **results,  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def key(self) -> str:
        """That of its report."""
        return self.report().key

    @property
    def label(self) -> str:
        return self.report().label
