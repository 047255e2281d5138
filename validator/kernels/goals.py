"""Our kernels beside everybody else's on the same operands, and whether that is what was set out for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from estimator.units import MIB, format_bytes, format_seconds
from validator.kernels.implementation import FAMILIES, RIVALS
from validator.kernels.report import KernelReport

LARGE_BYTES = 64 * MIB
"""Goals are about calls that move at least this."""
PRODUCTS = ("linear_cross_entropy",)
"""Bound by matrix products, not by memory."""
NOT_STREAMING = (*PRODUCTS, "lamb")
"""LAMB is two passes by nature."""
NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
LOSSES = ("cross_entropy", "linear_cross_entropy")


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What was measured of one kernel, direction, dtype and size on one device."""

    by: dict[str, KernelReport]
    """By implementation."""

    @property
    def any(self) -> KernelReport:
        """One of them, for what they have in common."""
        return next(iter(self.by.values()))

    @property
    def ours(self) -> KernelReport | None:
        return self.by.get("cuda")

    @property
    def rivals(self) -> dict[str, KernelReport]:
        return {name: self.by[name] for name in RIVALS if name in self.by}

    def faster(self, rival: str) -> float | None:
        """How many times faster ours is than ``rival``."""
        if self.ours is None or rival not in self.by:
            return None
        return self.by[rival].seconds / self.ours.seconds

    @property
    def best_rival(self) -> str | None:
        """The fastest of the others."""
        return min(self.rivals, key=lambda name: self.by[name].seconds, default=None)

    def peak_ratio(self, rival: str) -> float | None:
        """The rival's peak memory over ours."""
        ours, other = self.ours, self.by.get(rival)
        if ours is None or other is None or not ours.peak_bytes or not other.peak_bytes:
            return None
        return other.peak_bytes / ours.peak_bytes


def contests(reports: Iterable[KernelReport]) -> list[Contest]:
    """``reports`` by what they are of, in their order; of equal ones the last counts."""
    found: dict[tuple[object, ...], dict[str, KernelReport]] = {}
    for r in reports:
        what = (r.device, r.device_name, r.kernel, r.backward, r.both, r.dtype, r.shape)
        found.setdefault(what, {})[r.implementation] = r
    return [Contest(by=by) for by in found.values()]


Status = Literal["met", "not met", "not measured here"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Something that was set out for, and what was found."""

    name: str
    status: Status
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.status} ({self.detail})"


def goals(reports: Iterable[KernelReport]) -> list[Goal]:
    """The four goals of the kernels, as far as ``reports`` can say. Only a GPU's count."""
    large = [c for c in contests(r for r in reports if r.device == "cuda") if c.any.bytes >= LARGE_BYTES and c.ours]
    single, both = [c for c in large if not c.any.both], [c for c in large if c.any.both]
    streaming = [name for name in FAMILIES if name not in NOT_STREAMING]
    best = [(ratio, c.any) for c in both if c.best_rival and (ratio := c.faster(c.best_rival))]
    absent = [rival for rival in RIVALS if not any(rival in c.by for c in both)]
    return [
        _judged(
            "streaming kernels reach 90% of a copy's bandwidth from 64 MiB on", "{:.0%} of a copy", 0.9, streaming,
            [(c.ours.of_copy, c.ours) for c in single if c.ours is not None],
        ),
        _judged(
            "the AdamW step is 1.3 times as fast as torch's fused one with cast, unscaling and clipping",
            "{:.2f}x of fused", 1.3, ("optimizer_step",),
            [(ratio, c.any) for c in single if c.any.dtype != "fp32" and (ratio := c.faster("fused"))],
        ),
        _judged(
            "norms and cross-entropy, forward and backward, are as fast as the best of the others",
            "{:.2f}x of the best", 1.0, (*NORMS, "cross_entropy"), best,
            f"not among the others: {', '.join(absent)}" if absent else "",
        ),
        _judged(
            "cross-entropy halves the loss's peak memory", "{:.2f}x less than torch", 2.0, LOSSES,
            [(ratio, c.any) for c in both if (ratio := c.peak_ratio("torch"))],
        ),
    ]  # fmt: skip


def _judged(
    name: str,
    form: str,
    least: float,
    wanted: Sequence[str],
    found: Sequence[tuple[float, KernelReport]],
    more: str = "",
) -> Goal:
    """Met when each of the ``wanted`` kernels was measured and all of their numbers are at least ``least``."""
    found = [item for item in found if item[1].kernel in wanted]
    if not found:
        return Goal(name=name, status="not measured here", detail="it takes a GPU and both sides at 64 MiB or more")
    worst, of = min(found, key=lambda item: item[0])
    enough = sum(value >= least for value, _ in found)
    detail = f"{enough} of {len(found)}, least {form.format(worst)}: {of.passes} {of.dtype} {format_bytes(of.bytes)}"
    unmeasured = [kernel for kernel in wanted if kernel not in {r.kernel for _, r in found}]
    if unmeasured:
        detail += f"; not measured: {', '.join(unmeasured)}"
    status: Status = "not met" if enough < len(found) else "not measured here" if unmeasured else "met"
    return Goal(name=name, status=status, detail=f"{detail}; {more}" if more else detail)


def table_lines(found: Sequence[Contest], implementations: Sequence[str]) -> Iterator[str]:
    """One row per contest: what it moves, our time, bandwidth and share of a copy; for each rival how many times faster ours
    is, or its time where ours was not measured."""
    rivals = [name for name in RIVALS if name in implementations]
    yield f"{'kernel':38} {'bytes':>11} {'ours':>9} {'GB/s':>7} {'of copy':>9}" + "".join(
        f"{name:>10}" for name in rivals
    )
    for contest in found:
        r = contest.ours
        mine = f"{'-':>9} {'-':>7} {'-':>9}"
        if r is not None:
            mine = f"{format_seconds(r.seconds):>9} {r.bytes_per_s / 1e9:7.4g} {r.of_copy:9.0%}"
        cells = "".join(f"{_cell(contest, name):>10}" for name in rivals)
        yield f"{contest.any.passes:38} {format_bytes(contest.any.bytes):>11} {mine}{cells}"


def _cell(contest: Contest, rival: str) -> str:
    if rival not in contest.by:
        return "-"
    ratio = contest.faster(rival)
    return f"{ratio:.2f}x" if ratio else format_seconds(contest.by[rival].seconds)


def memory_lines(found: Sequence[Contest]) -> Iterator[str]:
    """Peak memory of the losses, forward and backward: ours, and ours over each rival's."""
    for contest in found:
        ours = contest.ours
        if contest.any.kernel not in LOSSES or not contest.any.both:
            continue
        if ours is None or ours.peak_bytes is None:
            on_cpu = contest.any.device == "cpu"
            why = "not counted, a CPU's allocator keeps no such number" if on_cpu else "ours was not measured"
            yield f"peak memory of {contest.any.passes}: {why}"
            continue
        shares = (f"{1 / ratio:.2f} of {name}'s" for name in RIVALS if (ratio := contest.peak_ratio(name)))
        yield f"peak memory of {contest.any.passes}: {', '.join((format_bytes(ours.peak_bytes), *shares))}"
