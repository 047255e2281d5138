"""Takes the machine's own speed out of runs: what a step would have taken at the baseline's speed, by its yardstick."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from validator.gate.baseline import Run

TRACKING = 0.1
"""Part of a change of the machine's speed (in logarithms) that may not show in the yardstick as it does in the step: a
neighbour slows some kinds of work down more than others. Assumed: wider than what ``benchmarks/bench_gate.py --real`` has
measured for one step (a slope of 0.99 in 38 runs on a busy machine and in 72 on a quiet one), because other steps may differ.
"""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How the machine's speed differed between the baseline and now."""

    change: float
    """By how much the yardstick takes longer now than in the baseline: 0.1 is 10 % slower."""
    taken_out: bool = True
    """Whether the figures are brought to one pace; where the yardstick moved more wildly than the steps, they are better not."""

    @property
    def doubt(self) -> float:
        """What of the change may still be in the figures, as a difference of logarithms."""
        return (TRACKING if self.taken_out else 1.0) * abs(math.log1p(self.change))

    @property
    def text(self) -> str:
        if abs(self.change) < 0.0005:
            return "the machine itself was as fast as before"
        how = f"the machine itself was {100 * abs(self.change):.1f} % {'slower' if self.change > 0 else 'faster'}"
        return f"{how}, which is {'taken out' if self.taken_out else 'allowed for'}"


def at_one_pace(
    old: Sequence[Run], new: Sequence[Run], *, paired: bool = False
) -> tuple[Sequence[Run], Sequence[Run], Pace | None]:
    """The runs as they would be at the median pace of ``old``, and the change of pace that was taken out: between the medians, or
    the median change within pairs.

    Where a timed run on either side has no yardstick, or two have different ones, the runs come back as they are.
    """
    timed = [run for run in (*old, *new) if run.step_s is not None or run.kernel_bytes_per_s is not None]
    if not new or not timed or timed[0].yardstick is None or len({run.yardstick for run in timed}) > 1:
        return old, new, None
    then, now = (_paces(runs) for runs in (old, new))
    if len(then) + len(now) < len(timed) or not then or not now:
        return old, new, None
    middle = statistics.median(then)
    ratios = [b / a for a, b in zip(then, now, strict=True)] if paired and len(then) == len(now) else None
    pace = Pace(change=(statistics.median(ratios) if ratios else statistics.median(now) / middle) - 1)
    return [_at(run, middle) for run in old], [_at(run, middle) for run in new], pace


def _paces(runs: Sequence[Run]) -> list[float]:
    """Yardstick seconds of the runs that can be brought to another pace."""
    return [
        run.yardstick_s
        for run in runs
        if run.yardstick_s and (run.step_yardsticks if run.step_s is not None else run.kernel_bytes_per_s)
    ]


def _at(run: Run, yardstick_s: float) -> Run:
    """``run`` on a machine whose yardstick takes ``yardstick_s``."""
    if run.kernel_bytes_per_s is not None and run.yardstick_s:
        return replace(run, kernel_bytes_per_s=run.kernel_bytes_per_s * run.yardstick_s / yardstick_s)
    if run.step_s is None or run.step_yardsticks is None:
        return run
    step_s = run.step_yardsticks * yardstick_s
    tokens = None if run.tokens_per_s is None else run.tokens_per_s * run.step_s / step_s
    return replace(run, step_s=step_s, tokens_per_s=tokens)
