"""Device seconds of one ``Op``: roofline with size-dependent efficiency, or interpolation of what was measured.

GPUs with ``ChipModel`` constants: ``max(compute, bytes / (memory efficiency * bandwidth)) + kernel_s``. A matrix
product runs in whole waves of tiles over the SMs (wave and tile quantisation as in NVIDIA's "Matrix Multiplication
Background User's Guide"); each tile pays ``k_ramp`` extra elements of K. The best tile is taken, as libraries do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from math import ceil, exp, log
from typing import Any

from estimator.errors import InputError
from estimator.job.cluster import Gpu
from estimator.ops.operator import Op
from estimator.time.profile import HardwareProfile, MatmulPoint
from estimator.time.stack import LONE, Stack

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Output tiles (rows, columns) of one SM that matrix libraries choose from."""

SPLITS = (1, 2, 3, 4, 6, 8, 16)
"""Parts of K that different SMs work on where there are fewer than two tiles for each; their fp32 results are written and
added up (split-K). Which parts libraries choose from is a guess, held against SimuMax's efficiency tables of the A100: their root mean
square error is 0.0669 without splits, 0.0651 with these."""

SPLIT_K_LEAST = 1024
"""No part of K is shorter: a guess, from the same tables."""

TILE_HALF_INTENSITY = 16.0
"""A tile of rows x columns reuses an operand ``rows * columns / (rows + columns)`` times; at this reuse the feeding
of operands takes as long as the arithmetic. Small tiles are slower by it: 64 x 64 reaches 0.79 of 256 x 128."""

JOULES_PER_FLOP = {"ampere": 1.45e-12, "blackwell": 2.2e-12}
"""What dense 16-bit arithmetic costs, per FLOP, at full clock, by architecture: products that run for long are throttled to the board's
power, whose need grows with the cube of the clock (voltage follows it). From published long runs of products: A100 1.4e-12 at 300 W
and 1.5e-12 at 400 W, B200 2.2e-12 (SimuMax 1.1's efficiency tables). fp8 is taken to cost half; its own long runs say 1.3e-12 (H100) and
1.6e-12 (GB200) per half an FLOP (cublasLt in power-throttled steady state, Azure's AI benchmarking guide)."""

OTHER_JOULES_PER_FLOP = 1.7e-12
"""Of architectures of whose 16-bit products no long run is published: between all those named."""

COLD_EFFICIENCY = 0.86
"""Fraction of the dense peak of large products that nothing throttles: between the best published A100 row over all shapes (0.87)
and the best over squares (0.85)."""

_LAYOUTS = {"_dgrad": "nn", "_wgrad": "tn"}
"""By the end of a product's name, how its operands lie (``MatmulPoint.layout``); others' as a linear layer's."""

OTHER_LAYOUT = 1.0
"""How far a measured product of another layout is: as one that is e times as long in one dimension."""

_BACKWARD_KINDS = ("forward", "backward")


class OperatorTimer:
    """Seconds of operators on ``gpu``; equal operators are timed once.

    ``workers`` is the number of processes that share the machine (ranks of one node): it picks the points of a
    calibrated CPU, on which N processes run with ``cores // N`` threads each. ``stack``: constants of training with a
    framework; without them, or with ``LONE``, operators are timed as lone kernels are. Raises ``InputError`` for an operator
    whose dtype was never measured.
    """

    def __init__(self, gpu: Gpu, profile: HardwareProfile, workers: int = 1, stack: Stack | None = None) -> None:
        self.gpu, self.profile, self.workers = gpu, profile, workers
        self.stack, self.is_lone = stack or LONE, stack is None or stack is LONE
        self._seconds: dict[Op, float] = {}
        self._points: dict[tuple[Any, ...], list[Any]] = {}
        host = profile.host_point(workers)
        self.host_op_s, self.autograd_op_s = host.op_s, host.autograd_op_s
        self.is_cpu = gpu.arch == "cpu"

    def seconds(self, op: Op) -> float:
        """Device seconds of ``op`` (on a CPU: wall seconds, dispatch included)."""
        known = self._seconds.get(op)
        if known is None:
            known = self._seconds[op] = self._time(op)
        return known

    def host_seconds(self, op: Op) -> float:
        """Seconds in which the host issues ``op``; none on a CPU, where ``seconds`` includes them."""
        if self.is_cpu:
            return 0.0
        return op.launches * (self.host_op_s + (self.autograd_op_s if op.backward else self.stack.issue_s))

    def _time(self, op: Op) -> float:
        if op.flops <= 0 and op.n_bytes <= 0:
            return 0.0
        if not self.profile.is_measured:
            return self._model(op)
        seconds = self._measured(op)
        if op.kind in ("matmul", "attention"):
            seconds /= self.stack.matmul if op.kind == "matmul" else self._attention_share(op)
        else:
            seconds /= self.stack.memory
        if self.is_cpu:
            seconds += (op.launches - 1) * self.host_op_s
            if op.backward and op.kind in ("matmul", "attention"):  # the others' backward was timed through autograd
                seconds += self.autograd_op_s * op.launches
            elif not op.backward:
                seconds += self.stack.issue_s * op.launches
        return seconds

    def traffic_seconds(self, n_bytes: int, kind: str = "elementwise", dtype: str = "fp32") -> float:
        """Seconds of one streaming kernel that reads and writes ``n_bytes`` together."""
        return self.seconds(Op("traffic", kind, False, dtype, 0.0, n_bytes))  # type: ignore[arg-type]

    # ---- from constants -------------------------------------------------------------------------------------------

    def _model(self, op: Op) -> float:
        chip = self.profile.chip
        assert chip is not None, f"profile {self.profile.name} has no chip constants"
        memory_s = op.n_bytes / self.memory_bytes_per_s
        if op.kind == "matmul":
            return max(self._matmul_model(op) / self.stack.matmul, memory_s) + op.launches * chip.kernel_s
        if op.kind == "attention":
            return max(self._attention(op) / self._attention_share(op), memory_s) + op.launches * chip.kernel_s
        seconds = max(op.flops / self.gpu.peak_flops["fp32"], memory_s)
        if op.kind == "loss":
            seconds /= self.stack.loss
        return seconds + op.launches * chip.kernel_s

    @property
    def memory_bytes_per_s(self) -> float:
        """What large streaming kernels reach."""
        chip = self.profile.chip
        assert chip is not None
        return min(1.0, chip.memory_efficiency * self.stack.memory) * self.gpu.memory_bytes_per_s

    def peak_flops(self, dtype: str) -> float:
        """Dense peak of ``dtype``; without a fast path (bf16 on Volta) the fp32 peak."""
        return self.gpu.peak_flops.get(dtype) or self.gpu.peak_flops["fp32"]

    def _attention_share(self, op: Op) -> float:
        share = self.stack.attention_backward if op.backward else self.stack.attention
        return share * self.stack.attention_wide if op.shape[4] > 64 else share

    def _matmul_efficiency(self, dtype: str) -> float:
        """Of the dense peak, for large products: what lone ones reach, or what the board's power sustains if that is less."""
        chip = self.profile.chip
        assert chip is not None
        lone = min(1.0, chip.matmul_efficiency.get(dtype) or chip.matmul_efficiency["bf16"])
        peak = self.gpu.peak_flops.get("bf16") or self.gpu.peak_flops.get("fp16")
        if self.is_lone or not self.gpu.tdp_watts or not peak or dtype == "fp32":
            return lone
        joules = JOULES_PER_FLOP.get(self.gpu.arch, OTHER_JOULES_PER_FLOP)
        return min(lone, COLD_EFFICIENCY * min(1.0, self.gpu.tdp_watts / (joules * peak)) ** (1 / 3))

    def _matmul_model(self, op: Op) -> float:
        chip = self.profile.chip
        assert chip is not None
        batch, m, n, k = op.shape
        sms = max(1, self.gpu.n_sms)
        flops_per_sm_s = self.peak_flops(op.dtype) / sms * self._matmul_efficiency(op.dtype)
        best = float("inf")
        top = _reuse(*TILES[0])
        for rows, columns in TILES:
            tiles = batch * ceil(m / rows) * ceil(n / columns) / sms
            slower = top / _reuse(rows, columns)
            for split in SPLITS:
                if split > 1 and (tiles >= 2.0 or k < split * SPLIT_K_LEAST):
                    break
                waves = chip.quantization * ceil(tiles * split) + (1.0 - chip.quantization) * max(1.0, tiles * split)
                seconds = waves * slower * 2.0 * rows * columns * (k / split + chip.k_ramp) / flops_per_sm_s
                if split > 1:
                    seconds += 8.0 * split * batch * m * n / self.memory_bytes_per_s
                best = min(best, seconds)
        return max(best, op.flops / (sms * flops_per_sm_s))

    def _attention(self, op: Op) -> float:
        """From points; a published point's rate is scaled from its reference GPU's peak to this GPU's."""
        seq_len, head_dim = op.shape[3], op.shape[4]
        span = min(seq_len, op.shape[5] or seq_len)
        points = self._pick("attention", self.profile.attention, op.dtype)
        direction = _BACKWARD_KINDS[op.backward]
        points = [p for p in points if p.direction == direction]
        if not points:
            raise self._unmeasured("attention", op)
        rate = _nearby([((log(p.seq_len), log(p.head_dim)), p.flops_per_s) for p in points], (log(span), log(head_dim)))
        if not self.profile.is_measured:
            reference = self.profile.reference
            assert reference is not None
            fraction = min(1.0, rate / reference.peak_flops["bf16" if "bf16" in reference.peak_flops else "fp16"])
            rate = fraction * self.peak_flops(op.dtype)
        return op.flops / rate

    # ---- from measured points -------------------------------------------------------------------------------------

    def _measured(self, op: Op) -> float:
        if op.kind == "attention":
            return self._attention(op)
        if op.kind == "matmul":
            points = self._pick("matmul", self.profile.matmul, op.dtype)
            if not points:
                raise self._unmeasured("matrix multiplication", op)
            return op.flops / self._product_rate(points, op)
        return curve_seconds(self._bandwidth_points(op), op.n_bytes)

    def _product_rate(self, points: Sequence[MatmulPoint], op: Op) -> float:
        """By shape and, where the layout of ``op``'s operands was measured, by layout."""
        layout = next((found for end, found in _LAYOUTS.items() if op.name.endswith(end)), "nt")
        if layout not in {p.layout for p in points}:
            layout = "nt"
        _, m, n, k = op.shape
        places = [
            ((log(p.m), log(p.n), log(p.k), 0.0 if p.layout == layout else OTHER_LAYOUT), p.flops_per_s) for p in points
        ]
        return _nearby(places, (log(m), log(n), log(k), 0.0))

    def _bandwidth_points(self, op: Op) -> list[tuple[float, float]]:
        """The curve of the operator itself (by name), else of its kind, else of plain elementwise traffic."""
        key = ("curve", op.name, op.kind, op.dtype, op.backward)
        curve = self._points.get(key)
        if curve is None:
            points = self._pick("bandwidth", self.profile.bandwidth, op.dtype)
            name = op.name.removesuffix("_backward")
            for kind in (name, op.kind, "elementwise"):
                of_kind = [p for p in points if p.kind == kind]
                chosen = [p for p in of_kind if p.backward == op.backward] or of_kind
                if chosen:
                    break
            else:
                raise self._unmeasured(op.kind, op)
            curve = self._points[key] = seconds_curve((p.bytes, p.bytes / p.bytes_per_s) for p in chosen)
        return curve

    def _pick(self, name: str, points: Sequence[Any], dtype: str) -> list[Any]:
        """Points of ``dtype`` (published attention: of any) taken with the nearest number of workers."""
        key = (name, dtype)
        if key not in self._points:
            same = [p for p in points if p.dtype == dtype] if self.profile.is_measured else list(points)
            if same:
                workers = min({p.workers for p in same}, key=lambda w: (abs(w - self.workers), w))
                same = [p for p in same if p.workers == workers]
            self._points[key] = same
        return self._points[key]

    def _unmeasured(self, what: str, op: Op) -> InputError:
        dtypes = sorted({p.dtype for p in self.profile.matmul}) or ["none"]
        if op.dtype in dtypes:
            return InputError(
                f"profile {self.profile.name!r} has no {what} of dtype {op.dtype!r}{' backward' if op.backward else ''}; "
                "calibrate again with a larger budget"
            )
        return InputError(
            f"dtype is {op.dtype!r}, but profile {self.profile.name!r} has no {what} in it; "
            f"measured: {', '.join(dtypes)}; calibrate with that dtype"
        )


def _reuse(rows: int, columns: int) -> float:
    intensity = rows * columns / (rows + columns)
    return intensity / (intensity + TILE_HALF_INTENSITY)


def _nearby(points: Sequence[tuple[tuple[float, ...], float]], at: tuple[float, ...]) -> float:
    """Value at ``at`` as the geometric mean of the points, weighted by distance to the power -4 (Shepard 1968).

    Coordinates are logarithms. Equals a point's value at that point; never leaves the range of the values.
    """
    total = weighted = 0.0
    for where, value in points:
        square = 0.0
        for a, b in zip(where, at, strict=True):
            square += (a - b) * (a - b)
        if square < 1e-12:
            return value
        weight = 1.0 / (square * square)
        total += weight
        weighted += weight * log(value)
    return exp(weighted / total)


def seconds_curve(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """``(bytes, seconds)`` sorted, seconds made non-decreasing (more bytes are never faster)."""
    curve: list[tuple[float, float]] = []
    for n_bytes, seconds in sorted(points):
        seconds = max(seconds, curve[-1][1]) if curve else seconds
        if curve and curve[-1][0] == n_bytes:
            curve[-1] = (n_bytes, seconds)
        else:
            curve.append((n_bytes, seconds))
    return curve


def curve_seconds(curve: Sequence[tuple[float, float]], n_bytes: float) -> float:
    """Seconds at ``n_bytes``: log-log between points, the first point's below them, its bandwidth above the last."""
    if n_bytes <= curve[0][0]:
        return curve[0][1]
    if n_bytes >= curve[-1][0]:
        return curve[-1][1] * n_bytes / curve[-1][0]
    i = bisect_left(curve, (n_bytes, 0.0))
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return float(y0 * (y1 / y0) ** (log(n_bytes / x0) / log(x1 / x0)))
