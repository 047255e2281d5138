"""What events are compiled to before they are played: tuples that begin with one of these numbers."""

from __future__ import annotations

from itertools import groupby
from typing import Any

WORK, PASS, WAIT, HOST_WORK, HOST_WAIT, PASSES = range(6)


def joined(code: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """``code`` with passes that follow one another at once as single steps: how far the host may be ahead of the device, or must be
    behind it, for none of them to wait for it; seconds of device and host; seconds by part; and the passes themselves, for
    when one does wait."""
    result: list[tuple[Any, ...]] = []
    for is_pass, steps in groupby(code, lambda step: step[0] == PASS):
        run = list(steps)
        if not is_pass or len(run) == 1:
            result += run
            continue
        slack, device_s, host_s = float("inf"), 0.0, 0.0
        shares: dict[str, float] = {}
        for _, part, seconds, bound_s, issue_s in run:
            device_s += seconds
            slack = min(slack, device_s - host_s - bound_s)
            host_s += issue_s
            shares[part] = shares.get(part, 0.0) + seconds
        result.append((PASSES, slack, device_s, host_s, tuple(shares.items()), run))
    return result
