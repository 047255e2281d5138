"""What events are compiled to before they are played: tuples that begin with one of these numbers."""

from __future__ import annotations

from typing import Any

WORK, PASS, WAIT, HOST_WORK, HOST_WAIT, PASSES = range(6)


def joined(code: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """``code`` with passes that follow one another at once as single steps: how far the host may be ahead of the device, or must be
    behind it, for none of them to wait for it; seconds of device and host; seconds by part; and the passes themselves, for
    when one does wait."""
    result: list[tuple[Any, ...]] = []
    run: list[tuple[Any, ...]] = []
    for step in code:
        if step[0] == PASS:
            run.append(step)
            continue
        if run:
            result.append(_as_one(run))
            run = []
        result.append(step)
    return [*result, _as_one(run)] if run else result


def _as_one(run: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    if len(run) == 1:
        return run[0]
    slack, device_s, host_s = float("inf"), 0.0, 0.0
    shares: dict[str, float] = {}
    for _, part, seconds, bound_s, issue_s in run:
        device_s += seconds
        slack = min(slack, device_s - host_s - bound_s)
        host_s += issue_s
        shares[part] = shares.get(part, 0.0) + seconds
    return (PASSES, slack, device_s, host_s, tuple(shares.items()), run)
