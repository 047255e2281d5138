"""``RunQuestion``: what a whole training run is asked for, beside its job."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.errors import InputError, require_int
from estimator.job.fields import number, refuse

NODE_POWER_FACTOR = 1.5
"""Watts of a whole server in training over its GPUs' rated watts: 8.4 kW were measured of 8 x H100, which are rated 8 x 700 W and in
a server of 10.2 kW (Latif et al. 2024, arXiv 2412.08602)."""
PUE = 1.1
"""Watts into the building over those into its servers: a hyperscaler's (Patterson et al. 2021, arXiv 2104.10350, table 4: 1.10 to 1.12);
the industry's mean is near 1.6."""
RESTART_S = 600.0
"""From a failure until the job reads its checkpoint: found and diagnosed in under ten minutes (MegaScale, arXiv 2402.15627, section 4)."""


@dataclass(frozen=True, kw_only=True)
class RunQuestion:
    """Raises ``InputError`` when a figure is out of range."""

    tokens: int
    """Tokens to train on."""
    usd_per_gpu_hour: float | None = None
    node_power_factor: float = NODE_POWER_FACTOR
    pue: float = PUE
    mtbf: str | float = "llama-3"
    """GPU-hours between failures, a name of ``FAILURE_RATES``, or ``"none"``."""
    restart_s: float = RESTART_S
    """Of a failure, before the checkpoint is read."""
    checkpoint_every_s: float | None = None
    """Seconds of training between checkpoints; ``None``: what loses least (Daly 2006)."""
    asynchronous: bool = False
    """Checkpoints are copied to host memory and written from there while training goes on."""
    storage_bytes_per_s: float | None = None
    """That all nodes together write or read; ``None``: 1 GB/s for each node."""
    data_bytes_per_token: float = 4.0
    """Of token numbers as they are stored: 4 bytes, or 2 for vocabularies up to 65,536."""

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens)
        for field, low, high in (("node_power_factor", 0.1, 10.0), ("pue", 1.0, 10.0)):
            if not low <= number(field, getattr(self, field)) <= high:
                raise refuse(field, getattr(self, field), f"a number from {low:g} to {high:g}")
        number("restart_s", self.restart_s)
        number("data_bytes_per_token", self.data_bytes_per_token)
        for field in ("usd_per_gpu_hour", "checkpoint_every_s", "storage_bytes_per_s"):
            value = getattr(self, field)
            if value is not None and not number(field, value) > 0:
                raise refuse(field, value, "a number > 0")


SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def token_count(text: str) -> int:
    """``"15T"``, ``"300B"``, ``"2e9"`` or ``"1000000"`` as a whole number. Raises ``InputError``."""
    body = text.strip().upper().replace(",", "").replace("_", "")
    suffix = body[-1:] if body[-1:] in SUFFIXES else ""
    try:
        value = float(body[: len(body) - len(suffix)]) * SUFFIXES[suffix]
        if not 1 <= value < 1e18:
            raise ValueError
    except ValueError:
        raise InputError(f"tokens is {text!r}; allowed: a number such as 15T, 300B or 2e9") from None
    return round(value)
