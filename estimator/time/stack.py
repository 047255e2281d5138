"""``Stack``: what training with one framework on one kind of GPU reaches of what lone kernels and collectives reach.

Curves say what a kernel does that runs alone for a moment. In training chips run hot (clocks drop under power limits), pointwise
operators of a framework are more or fewer kernels than ours, attention is some version of its kernel, collectives share
SMs and memory with compute, and every rank waits for the slowest. These few constants say how much; each has a range that
physics allows, and was fitted on published runs (``validator.published.fit``). ``catalog/stacks.json`` holds them. Those of this
runtime on a machine at hand come from steps that its calibration takes (``validator.calibrate.steps``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from math import log
from pathlib import Path
from typing import NamedTuple

from estimator import catalog
from estimator.job.cluster import Gpu
from estimator.job.job import Job
from estimator.time.profile import HardwareProfile
from estimator.time.stragglers import expected_maximum

STACKS = Path(__file__).resolve().parent.parent / "catalog" / "stacks.json"


class Range(NamedTuple):
    """What a constant may be: bounds, and where it lies before anything was measured."""

    low: float
    prior: float
    high: float
    width: float
    """How far from ``prior`` is no surprise."""
    why: str


RANGES: dict[str, Range] = {
    "matmul": Range(0.7, 1.0, 1.2, 0.1, "rate of products over that of lone ones within the board's power"),
    "attention": Range(0.35, 0.8, 1.8, 0.3, "rate over FlashAttention-2's alone, forward: older kernels reach 0.4 to 0.7 of it, cuDNN's and FlashAttention-3 up to 1.8"),
    "attention_backward": Range(0.35, 0.8, 1.8, 0.3, "the same, backward"),
    "attention_wide": Range(0.6, 1.0, 1.3, 0.1, "that of heads wider than 64 over that of others: registers spill"),
    "memory": Range(0.4, 1.0, 1.3, 0.15, "bandwidth over a lone stream's of what is bound by memory; above 1 where kernels are fused, low where a CPU faults fresh pages in"),
    "loss": Range(0.5, 1.0, 1.5, 0.15, "the same of the loss"),
    "network": Range(0.3, 0.9, 1.0, 0.2, "rate over a lone collective's"),
    "contention": Range(0.0, 0.3, 1.0, 0.2, "seconds by which a second of collective beside it slows compute"),
    "overlapped": Range(0.0, 0.1, 0.95, 0.2, "share of collectives within layers, and of gathers of new parameters, that compute hides"),
    "straggling": Range(0.0, 0.003, 0.03, 0.003, "standard deviation of ranks' steps over their mean"),
    "step_s": Range(0.0, 0.01, 0.05, 0.01, "seconds of a step in which the framework runs nothing on the GPU"),
    "issue_s": Range(0.0, 0.0, 3e-4, 1e-4, "seconds of the host that modules and hooks add to issuing an operator of a forward pass"),
}  # fmt: skip
"""By field of ``Stack``."""


UNTOLD = frozenset({"issue_s"})
"""Constants that published runs do not tell, as hosts' own pace was not published: the files of these have none."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Constants of ``RANGES``; at these defaults training is what lone kernels are."""

    matmul: float = 1.0
    attention: float = 1.0
    attention_backward: float = 1.0
    attention_wide: float = 1.0
    memory: float = 1.0
    loss: float = 1.0
    network: float = 1.0
    contention: float = 0.0
    overlapped: float = 0.0
    straggling: float = 0.0
    step_s: float = 0.0
    issue_s: float = 0.0

    def slowed(
        self, parts: dict[str, float], busy_s: dict[str, float], n_ranks: int, zero_stage: int
    ) -> dict[str, float]:
        """``parts`` of a step, played without them, with what surrounds the program: new parameters are gathered while the next step
        begins (stages 1 and 2), compute slows while collectives hold SMs and bandwidth, each of ``n_ranks`` waits for the slowest,
        and the framework has work of its own."""
        parts = dict(parts)
        if zero_stage in (1, 2):
            parts["exposed_gather"] *= 1 - self.overlapped
        exposed_s = parts["exposed_gather"] + parts["exposed_reduce"]
        hidden_s = max(0.0, busy_s.get("gather", 0.0) + busy_s.get("reduce", 0.0) - exposed_s)
        compute_s = sum(parts[name] for name in ("forward", "backward", "recompute"))
        if compute_s > 0:
            for name in ("forward", "backward", "recompute"):
                parts[name] *= 1 + self.contention * hidden_s / compute_s
        parts["exposed_other_comm"] += self.straggling * expected_maximum(n_ranks) * sum(parts.values())
        parts["data"] += self.step_s
        return parts


LONE = Stack()
PRIOR = Stack(**{name: r.prior for name, r in RANGES.items()})
"""Before anything was measured."""


class Evidence(NamedTuple):
    """A stack, and what a reader of a forecast with it must know."""

    stack: Stack
    words: str
    """Where its constants are from; empty where nothing was fitted because nothing needs to be."""
    errors: tuple[float, ...] = ()
    """Logarithms of forecast over measured (or published) seconds of runs that are as comparable as there are, each with constants
    that it took no part in."""


Chip = tuple[str, int]
"""Architecture and number of SMs."""


def chip_of(gpu: Gpu) -> Chip:
    """GPUs of one chip differ in memory, links and power alone, which forecasts know: their constants are the same."""
    return gpu.arch, gpu.n_sms


class Shipped(NamedTuple):
    """What ``catalog/stacks.json`` holds."""

    stacks: dict[tuple[str, str], Stack]
    """By framework and GPU; GPU ``*``: the framework's over all its GPUs."""
    errors: dict[tuple[str, str, str], dict[str, float]]
    """By framework, GPU and what was left out (``model``, ``gpu``, ...): errors by run."""
    date: str = ""


def stack_of(job: Job, profile: HardwareProfile) -> Evidence:
    """Constants for ``job``: those of its framework on its GPU, or on another of the same chip, else the framework's over all GPUs, else
    medians over frameworks.

    A profile that was measured through this runtime has those of the steps that were trained with it on that machine; without
    steps it has none.
    """
    if profile.is_measured and job.strategy.framework == "zerocast":
        return _measured(profile, min(job.cluster.n_gpus, job.cluster.gpus_per_node))
    return _evidence(job.strategy.framework, job.cluster.gpu.name, chip_of(job.cluster.gpu))


@lru_cache(maxsize=64)
def _measured(profile: HardwareProfile, workers: int) -> Evidence:
    steps = [p for p in profile.steps if p.part == "step"]
    if not profile.stacks:
        few = "too few" if steps else "no"
        words = f"profile {profile.name} has {few} measured steps; seconds of lone kernels are added up, and steps take longer"
        return Evidence(LONE, words)
    errors = tuple(log(p.forecast_s / p.seconds) for p in steps)
    nearest = min(profile.stacks, key=lambda p: (abs(p.workers - workers), p.workers))
    return Evidence(Stack(**nearest.constants), f"constants of {len(steps)} small jobs trained on this machine", errors)


@lru_cache(maxsize=256)
def _evidence(framework: str, gpu: str, chip: Chip) -> Evidence:
    shipped = shipped_stacks()

    def errors(by: str, of: str = "*", on: str = "*") -> tuple[float, ...]:
        found = (own for (f, g, b), own in shipped.errors.items() if b == by and of in (f, "*") and on in (g, "*"))
        return tuple(error for own in found for error in own.values())

    exact = shipped.stacks.get((framework, gpu))
    if exact is not None:
        known = errors("model", framework, gpu)
        return Evidence(exact, f"constants of {framework} on {gpu}, from {len(known)} published runs", known)
    whole = shipped.stacks.get((framework, "*"))
    alike = [g for f, g in sorted(shipped.stacks) if f == framework and g != "*" and chip_of(catalog.gpu(g)) == chip]
    if alike:
        words = f"{framework} on {gpu} was never measured; its constants on {alike[0]}, the same chip, are taken"
        return Evidence(shipped.stacks[framework, alike[0]], words, errors("gpu", framework))
    if whole is not None:
        on = ", ".join(sorted(g for f, g in shipped.stacks if f == framework and g != "*"))
        return Evidence(
            whole, f"{framework} on {gpu} was never measured; its constants on {on} are taken", errors("gpu", framework)
        )
    others = sorted(f for f, g in shipped.stacks if g == "*")
    if not others:
        return Evidence(PRIOR, f"{framework} was never measured; physical guesses are taken")
    medians = typical([shipped.stacks[f, "*"] for f in others])
    return Evidence(
        medians,
        f"{framework} was never measured on GPUs; medians over {', '.join(others)} are taken",
        errors("framework"),
    )


def typical(stacks: list[Stack]) -> Stack:
    """Medians, each constant by itself. (``statistics`` takes milliseconds to load, and most forecasts come here.)"""
    values = {f.name: sorted(getattr(stack, f.name) for stack in stacks) for f in fields(Stack)}
    return Stack(**{name: (own[(len(own) - 1) // 2] + own[len(own) // 2]) / 2 for name, own in values.items()})


@lru_cache(maxsize=1)
def shipped_stacks() -> Shipped:
    """What comes with the project."""
    if not STACKS.exists():
        return Shipped({}, {})
    data = json.loads(STACKS.read_text(encoding="utf-8"))
    return Shipped(
        {(row["framework"], row["gpu"]): Stack(**row["constants"]) for row in data["stacks"]},
        {(row["framework"], row["gpu"], row["left_out"]): row["log_errors"] for row in data["errors"]},
        data["date"],
    )


def write_stacks(path: Path, shipped: Shipped) -> None:
    """``shipped`` as JSON, one line per stack and group of errors."""
    stacks = [
        {"framework": f, "gpu": g, "constants": {k: round(v, 4) for k, v in asdict(stack).items() if k not in UNTOLD}}
        for (f, g), stack in sorted(shipped.stacks.items())
    ]
    errors = [
        {"framework": f, "gpu": g, "left_out": by, "log_errors": {run: round(e, 4) for run, e in sorted(own.items())}}
        for (f, g, by), own in sorted(shipped.errors.items())
    ]
    parts = (
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for name, rows in (("stacks", stacks), ("errors", errors))
    )
    path.write_text("{\n" + f' "date": {json.dumps(shipped.date)},\n' + ",\n".join(parts) + "\n}\n", encoding="utf-8")
