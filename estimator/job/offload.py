"""What the offload fields of a ``Strategy`` may say together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.errors import InputError, invalid

if TYPE_CHECKING:
    from estimator.job.strategy import Strategy


def check_offload(s: Strategy) -> None:
    """Raises ``InputError``."""
    fraction = s.offload_fraction
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise invalid("offload_fraction", fraction, "a number above 0 and at most 1")
    if not isinstance(s.delayed_update, bool):
        raise invalid("delayed_update", s.delayed_update, "true or false")
    if fraction < 1 and s.offload != "optimizer":
        raise InputError(
            f"offload_fraction is {fraction} with offload {s.offload!r}; allowed: a part of the optimizer only with offload "
            "'optimizer', else 1"
        )
    if s.delayed_update and s.offload != "optimizer":
        raise InputError(
            f"delayed_update is on with offload {s.offload!r}; allowed: only with offload 'optimizer', whose step runs on the host"
        )
    if s.delayed_update and fraction < 1:
        raise InputError(
            f"delayed_update is on with offload_fraction {fraction}; allowed: 1, as the device's part of a step cannot be late"
        )
