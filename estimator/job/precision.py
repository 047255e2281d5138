"""What the dtype fields of a ``Strategy`` may say together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.errors import InputError

if TYPE_CHECKING:
    from estimator.job.strategy import Strategy


def check_precision(s: Strategy) -> None:
    """Raises ``InputError``."""
    for field in ("master_dtype", "state_dtype"):
        if getattr(s, field) == "fp32":
            continue
        if s.dtype == "fp16":
            raise InputError(
                f"{field} is 'model' with dtype fp16; allowed: fp32, or dtype bf16, whose range is fp32's (in fp16 second moments "
                "and small steps become zero)"
            )
        if s.offload_nvme:
            raise InputError(
                f"{field} is 'model' with offload {s.offload!r}, whose files hold fp32; allowed: fp32, or another offload"
            )
