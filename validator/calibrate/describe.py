"""A profile in a few lines of plain text."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from estimator.time.profile import HardwareProfile
from estimator.time.stack import LONE
from estimator.units import format_bytes, format_seconds


def describe(profile: HardwareProfile) -> list[str]:
    """What the machine reaches at best, how many points say so, and what was not measured."""
    return list(_lines(profile))


def _lines(profile: HardwareProfile) -> Iterator[str]:
    versions = ", ".join(f"{k} {v}" for k, v in profile.versions.items() if k in ("torch", "cuda", "driver"))
    yield f"{profile.name} on {profile.host_name or 'an unnamed host'}, {profile.date}, {versions}"
    best = {
        d: max(p.flops_per_s for p in profile.matmul if p.dtype == d) for d in sorted({p.dtype for p in profile.matmul})
    }
    yield "products: " + ", ".join(f"{d} {_rate(f, 'FLOP/s')}" for d, f in best.items()) + _count(profile.matmul)
    for direction in ("forward", "backward"):
        points = [p for p in profile.attention if p.direction == direction]
        if points:
            top = max(points, key=lambda p: p.flops_per_s)
            yield f"attention {direction}: {top.dtype} {_rate(top.flops_per_s, 'FLOP/s')} at {top.seq_len} tokens{_count(points)}"
    if profile.bandwidth:
        large = max(p.bytes for p in profile.bandwidth) / 2
        top_bytes = max(p.bytes_per_s for p in profile.bandwidth if p.bytes > large)
        kinds = len({(p.kind, p.backward) for p in profile.bandwidth})
        yield f"memory: {_rate(top_bytes, 'B/s')} in large kernels{_count(profile.bandwidth, f'of {kinds} kernels')}"
    for direction, words in (
        ("h2d", "host to device"),
        ("d2h", "device to host"),
        ("both", "both at once"),
        ("d2d", "within the device"),
    ):
        yield from _copies(profile, direction, words)
    for op in sorted({p.op for p in profile.collectives}):
        of_op = [p for p in profile.collectives if p.op == op]
        for size in sorted({p.group_size for p in of_op}):
            fastest = max((p for p in of_op if p.group_size == size), key=lambda p: p.bytes / p.seconds)
            least = min(p.seconds for p in of_op if p.group_size == size)
            yield (
                f"{op} of {size}: {_rate(fastest.bytes / fastest.seconds, 'B/s')} at {format_bytes(fastest.bytes)}, "
                f"{format_seconds(least)} at least"
            )
    for h in profile.host_points:
        yield (
            f"host, {h.workers} at once: {_rate(h.adam_elements_per_s, 'elements/s')} of fp32 Adam, {format_seconds(h.op_s)} an "
            f"operator, {format_seconds(h.autograd_op_s)} more in backward"
        )
    for dtype in sorted({p.dtype for p in profile.optimizer_steps}):
        rates = (
            f"{p.threads}: {_rate(p.elements_per_s, 'elements/s')}"
            for p in sorted(profile.optimizer_steps)
            if p.dtype == dtype
        )
        yield f"offloaded step in {dtype} by threads: {', '.join(rates)}"
    for direction in ("read", "write", "checksum"):
        files = [p for p in profile.files if p.direction == direction]
        if files:
            top_file = max(files, key=lambda p: p.bytes_per_s)
            yield (
                f"files, {direction}: {_rate(top_file.bytes_per_s, 'B/s')} in blocks of {format_bytes(top_file.block_bytes)}, "
                f"{top_file.queue} at once{_count(files)}"
            )
    if profile.overheads:
        yield "overheads: " + ", ".join(
            f"{p.name}{f' of {format_bytes(p.bytes)}' if p.bytes else ''} {format_seconds(p.seconds)}"
            for p in profile.overheads
        )
    yield from _steps(profile)
    if profile.spread:
        yield "spread (interquartile range / median): " + ", ".join(
            f"{k} {100 * v:.0f} %" for k, v in profile.spread.items()
        )
    for note in profile.notes:
        yield f"note: {note}"
    for what, why in profile.skipped.items():
        yield f"not measured: {what}: {why}"


def _steps(profile: HardwareProfile) -> Iterator[str]:
    """How well steps are forecast by what the others tell, and what they tell together."""
    whole = [abs(p.forecast_s / p.seconds - 1) for p in profile.steps if p.part == "step"]
    if not whole:
        return
    how = "from the others" if profile.stacks else "from kernels alone"
    yield (
        f"steps of {len(whole)} small job{'s' * (len(whole) != 1)}, each forecast {how}: off by {100 * median(whole):.1f} % in the median, "
        f"{100 * max(whole):.1f} % at most"
    )
    for workers, constants in profile.stacks:
        told = {name: value for name, value in constants.items() if abs(value - getattr(LONE, name)) > 5e-7}
        shown = (f"{k} {format_seconds(v) if k.endswith('_s') else f'{v:.3g}'}" for k, v in told.items())
        yield f"training beside lone kernels, {workers} at once: {', '.join(shown) or 'as fast'}"


def _copies(profile: HardwareProfile, direction: str, words: str) -> Iterator[str]:
    plain = direction != "d2d" and profile.arch != "cpu"  # elsewhere all memory is alike
    found = []
    for pinned, name in ((True, "pinned"), (False, "pageable")):
        points = [p for p in profile.copies if p.direction == direction and p.pinned == pinned]
        if points:
            found.append(f"{name if plain else 'up to'} {_rate(max(p.bytes_per_s for p in points), 'B/s')}")
    if found:
        yield f"copies, {words}: {', '.join(found)}"


def _rate(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}" if unit != "elements/s" else f"{value / 1e6:,.0f} M elements/s"
    return f"{value:.3g} {unit}"


def _count(points: Any, more: str = "") -> str:
    return f" ({len(points)} point{'s' * (len(points) != 1)}{f' {more}' if more else ''})"
