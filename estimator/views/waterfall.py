"""Where the time goes: from the model's FLOPs at the dense peak, term by term, to the forecast step."""

from __future__ import annotations

from collections import Counter
from copy import copy
from typing import NamedTuple

from estimator.ops.operator import Op
from estimator.schedule.events import Compute, Recv, Send, Sent
from estimator.time.durations import Durations, chains_of
from estimator.time.player import WORK, Player
from estimator.views.step import StepView

COMPUTE_PARTS = ("forward", "backward", "recompute")


class Term(NamedTuple):
    """One step of the waterfall; its seconds may be negative (operators that do better than the term before says)."""

    name: str
    label: str
    seconds: float


class _Work(NamedTuple):
    """Device seconds of the forward and backward passes of one rank, without recomputation."""

    matmul_s: float
    attention_s: float
    memory_s: float
    """Of all other operators."""
    ideal_matmul_s: float
    ideal_attention_s: float
    """Of the model's own FLOPs at the dense peak."""


def waterfall(view: StepView) -> tuple[Term, ...]:
    """Terms of the rank that ends last; their sum is the report's ``step_s``.

    The ideal is the job's model FLOPs over all its GPUs at the dense peak of its dtype, i.e. ``mfu * step_s``. What a term adds is what
    the next fact costs: products and attention at the rates that they reach, then every other operator, and so on.
    """
    record, report = view.record.ranks[view.record.last], view.report
    assert report.step_s is not None and report.mfu is not None
    played, told = record.parts, view.record.time.parts
    work = _work(view, view.record.last)
    ideal_s = report.mfu * report.step_s
    own_ideal_s = work.ideal_matmul_s + work.ideal_attention_s
    if len(view.blueprints) == 1:
        own_ideal_s = ideal_s
    passes_s = played["forward"] + played["backward"]
    attention_s = work.attention_s - work.ideal_attention_s
    matmul_s = work.matmul_s - (own_ideal_s - work.ideal_attention_s)
    issue_s = passes_s - (own_ideal_s + matmul_s + attention_s + work.memory_s)
    terms = [
        Term("ideal", "model FLOPs at the dense peak", ideal_s),
        Term("uneven", "more FLOPs on this stage than on the mean one", own_ideal_s - ideal_s),
        Term("matmul", "products at the rates they reach", matmul_s),
        Term("attention", "attention at the rate it reaches", attention_s),
        Term("memory_bound", "operators bound by memory", work.memory_s),
        Term("issue", "kernels that the host issues late", _unless_rounding(issue_s, passes_s)),
        Term("recompute", "recomputation", played["recompute"]),
        Term("exposed_gather", "waiting for parameters", told["exposed_gather"]),
        Term("exposed_reduce", "waiting for gradients", told["exposed_reduce"]),
        Term("exposed_other_comm", "waiting for other communication", played["exposed_other_comm"]),
        Term("optimizer", "optimizer", told["optimizer"]),
        Term("offload", "waiting for offload", told["offload"]),
        Term("pipeline_bubble", "pipeline bubble", told["pipeline_bubble"]),
        Term("data", "data", played["data"]),
    ]
    terms += [Term(name, name, seconds) for name, seconds in surroundings(view)]
    return tuple(term for term in terms if term.seconds)


def _unless_rounding(seconds: float, of: float) -> float:
    return seconds if abs(seconds) > 1e-9 * of else 0.0


def surroundings(view: StepView) -> list[tuple[str, float]]:
    """What the forecast adds to the program as it was played (``Stack.slowed``)."""
    added = added_s(view)
    named = (
        ("compute slowed by collectives beside it", sum(added[name] for name in COMPUTE_PARTS)),
        ("waiting for the slowest rank", added["exposed_other_comm"]),
        ("the framework's own time", added["data"]),
    )
    return [(name, seconds) for name, seconds in named if seconds]


def added_s(view: StepView) -> dict[str, float]:
    """By part, what the forecast adds to the program as it was played; negative: what other steps hide."""
    told, played = view.record.time.parts, view.record.ranks[view.record.last].parts
    return {name: told[name] - played[name] for name in told}


def durations_of(view: StepView, rank: int) -> Durations:
    """Those of one pipeline rank's units."""
    own = copy(view.record.durations)
    own.costs = view.blueprints[rank].costs
    return own


def op_counts(view: StepView, rank: int) -> dict[tuple[Op, str], int]:
    """How often each operator runs in one step of a rank, by operator and part (``forward``, ``backward``, ``recompute``)."""
    blueprint = view.blueprints[rank]
    passes: Counter[tuple[int, str]] = Counter()
    cost_of = {id(cost): cost for cost in blueprint.costs}
    for section in blueprint.program.step:
        for event in section.events:
            if isinstance(event, Compute):
                passes[id(blueprint.costs[event.unit]), event.phase] += section.repeat
    counts: Counter[tuple[Op, str]] = Counter()
    for (cost, phase), n in passes.items():
        for part, ops in chains_of(cost_of[cost], phase).items():
            for op in ops:
                counts[op, part] += n
    return counts


def _work(view: StepView, rank: int) -> _Work:
    timer, strategy, gpu = view.record.durations.ops, view.job.strategy, view.job.cluster.gpu
    seconds = {"matmul": 0.0, "attention": 0.0, "other": _adding_s(view, rank)}
    flops = {"matmul": 0.0, "attention": 0.0}
    for (op, part), n in op_counts(view, rank).items():
        if part == "recompute" or op.kind == "collective":
            continue
        seconds[op.kind if op.kind in flops else "other"] += n * timer.seconds(op)
        if op.kind in flops and part == "forward" and not op.backward:
            flops[op.kind] += 3 * n * op.flops * op.useful
    peak = gpu.peak_flops[strategy.dtype]
    return _Work(
        seconds["matmul"], seconds["attention"], seconds["other"], flops["matmul"] / peak, flops["attention"] / peak
    )


def _adding_s(view: StepView, rank: int) -> float:
    """Kernels between the passes that count as part of these (gradients that are added to others)."""
    player = Player(durations_of(view, rank), serial=True)
    total_s = 0.0
    for section in view.blueprints[rank].program.step:
        events = [event for event in section.events if not isinstance(event, Compute | Send | Sent | Recv)]
        for step in player.compile(events):
            if step[0] == WORK and step[1] == 0 and step[4] in ("forward", "backward"):
                total_s += section.repeat * step[2]
    return total_s
