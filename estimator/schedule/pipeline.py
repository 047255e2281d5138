"""In which order each rank of a pipeline runs its passes. Pure arithmetic.

A rank holds ``chunks`` parts of the model: chunk ``c`` of rank ``r`` is stage ``c * pp + r`` of ``pp * chunks``. Every
micro-batch goes forward through all stages and then backward. The schedules:

- ``gpipe`` (Huang et al. 2019): all forward passes, then all backward passes.
- ``1f1b`` (PipeDream-flush: Narayanan et al. 2021, section 2.2.1): as soon as a rank can, it goes back and forth in turn.
- ``interleaved_1f1b`` (the same, section 2.2.2): several chunks per rank; ``pp`` micro-batches go through one chunk, then
  through the next.
- ``zero_bubble`` (ZB-H1: Qi et al. 2023, section 3): backward is two passes, for the gradient of the input, which the rank
  before waits for, and for that of the weights, which nobody waits for; as many micro-batches are in flight as 1F1B has at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Literal, NamedTuple

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]
Direction = Literal["forward", "backward", "input_grad", "weight_grad"]
"""Zero bubble has ``input_grad`` and ``weight_grad`` where the others have ``backward``."""


class Action(NamedTuple):
    """One micro-batch's pass, in one direction, over one chunk of a rank."""

    direction: Direction
    micro_batch: int
    chunk: int = 0


@lru_cache(maxsize=64)
def orders(schedule: PipelineSchedule, pp: int, chunks: int, n_micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """What every rank does in one step, by rank. Only ``interleaved_1f1b`` has several ``chunks``; it takes a multiple of
    ``pp`` micro-batches."""
    places = [_place(k, pp, chunks) for k in range(n_micro_batches * chunks)]
    back: Direction = "input_grad" if schedule == "zero_bubble" else "backward"
    forwards = [Action("forward", micro, chunk) for micro, chunk in places]
    backwards = [Action(back, micro, chunks - 1 - chunk) for micro, chunk in places]
    if schedule == "gpipe":
        return (tuple(forwards + backwards),) * pp
    warmups = [n_warmup(schedule, rank, pp, chunks, n_micro_batches) for rank in range(pp)]
    if schedule != "zero_bubble":
        return tuple(_back_and_forth(forwards, backwards, warmup) for warmup in warmups)
    weights = [Action("weight_grad", micro, chunk) for micro, chunk in places]
    return tuple(_zero_bubble(forwards, backwards, weights, *at) for at in enumerate(warmups))


def n_warmup(schedule: PipelineSchedule, rank: int, pp: int, chunks: int, n_micro_batches: int) -> int:
    """Forward passes of ``rank`` before the one that its first backward pass follows at once."""
    behind = pp - 1 - rank
    wanted = 2 * behind + (chunks - 1) * pp if schedule == "interleaved_1f1b" else behind
    return min(wanted, n_micro_batches * chunks)


def _back_and_forth(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> tuple[Action, ...]:
    """After ``warmup`` forward passes each is followed by the next backward pass; those that are left come last."""
    turns = zip(forwards[warmup:], backwards, strict=False)
    return (*forwards[:warmup], *chain.from_iterable(turns), *backwards[len(backwards) - warmup :])


def _zero_bubble(
    forwards: Sequence[Action], inputs: Sequence[Action], weights: Sequence[Action], rank: int, warmup: int
) -> tuple[Action, ...]:
    """The same, and each backward pass is followed by the weights' of ``rank`` micro-batches before: the first ranks wait longest for
    input gradients, the last ones have weights left over."""
    order = list(forwards[:warmup])
    for k, back in enumerate(inputs):
        order += forwards[warmup + k : warmup + k + 1]
        order.append(back)
        order += weights[k - rank : k - rank + 1] if k >= rank else ()
    return (*order, *weights[max(0, len(weights) - rank) :])


def _place(k: int, pp: int, chunks: int) -> tuple[int, int]:
    """Micro-batch and chunk of the k-th pass in one direction, chunks counted in that direction."""
    if chunks == 1:
        return k, 0
    rounds, within = divmod(k, pp * chunks)
    return rounds * pp + within % pp, within // pp


def n_in_flight(order: Sequence[Action]) -> int:
    """Largest number of (micro-batch, chunk) pairs whose forward pass is done and whose last backward pass is not."""
    ends = "weight_grad" if any(action.direction == "weight_grad" for action in order) else "backward"
    live = most = 0
    for action in order:
        live += (action.direction == "forward") - (action.direction == ends)
        most = max(most, live)
    return most


def bubble_share(schedule: PipelineSchedule, pp: int, chunks: int, n_micro_batches: int) -> float:
    """Idle time over working time of a step whose passes take equally long on all ranks and whose sends take none.

    Narayanan et al. 2021, sections 2.2.1 and 2.2.2; Qi et al. 2023, table 2 with input gradients, weight gradients and
    forward passes of one length.
    """
    share = (pp - 1) / n_micro_batches / chunks
    return share / 3 if schedule == "zero_bubble" else share


class Period(NamedTuple):
    """Where a rank's order repeats: actions before, actions that are repeated, and how often; the rest comes after."""

    start: int
    length: int
    repeat: int


@lru_cache(maxsize=256)
def periods(schedule: PipelineSchedule, pp: int, chunks: int, n: int) -> tuple[tuple[Period, ...], ...]:
    """By rank: parts of its order that repeat with one pass of every chunk's micro-batches exchanged for the next.

    All ranks have as many periods, with equal repeats, and what a rank does in its i-th repeat depends only on what others
    do in theirs up to the i-th. The first and the last pass of every chunk in each direction lie outside.
    """
    if schedule == "gpipe":
        one = (Period(1, 1, n - 2), Period(n + 1, 1, n - 2)) if n > 2 else ()
        return (one,) * pp
    size = pp * chunks if chunks > 1 else 1
    late = pp if schedule == "zero_bubble" else 0  # weights lag behind by the rank
    warmups = [n_warmup(schedule, rank, pp, chunks, n) for rank in range(pp)]
    begins = [size + late + rank for rank in range(pp)]
    room = min(n * chunks - w - size - begin for w, begin in zip(warmups, begins, strict=True))
    repeat = room // size
    if repeat < 2:
        return ((),) * pp
    per_turn = 3 if schedule == "zero_bubble" else 2
    result = []
    for rank, (warmup, begin) in enumerate(zip(warmups, begins, strict=True)):
        skipped = min(begin, rank) if schedule == "zero_bubble" else 0  # turns that have no weight pass yet
        result.append((Period(warmup + per_turn * begin - skipped, per_turn * size, repeat),))
    return tuple(result)


def fewest(schedule: PipelineSchedule, pp: int, chunks: int, n: int) -> tuple[int, int]:
    """With how few micro-batches all ranks still do everything that they do with ``n``, and how many of a period's repeats that
    leaves out."""
    of_first = periods(schedule, pp, chunks, n)[0]
    left_out = max(0, of_first[0].repeat - 2) if of_first else 0
    return n - left_out * (pp if chunks > 1 else 1), left_out


def play(ranks: Sequence[Sequence[Action]], chunks: int) -> list[tuple[int, Action]]:
    """Every rank's actions in an order in which each comes after what it needs. Raises ``ValueError`` when there is none."""
    pp, done, at = len(ranks), set[tuple[int, int, str]](), [0] * len(ranks)
    played: list[tuple[int, Action]] = []
    while len(played) < sum(map(len, ranks)):
        before = len(played)
        for rank, order in enumerate(ranks):
            while at[rank] < len(order) and _needs(order[at[rank]], rank, pp, chunks) <= done:
                action = order[at[rank]]
                way = "backward" if action.direction == "input_grad" else action.direction
                done.add((action.chunk * pp + rank, action.micro_batch, way))
                played.append((rank, action))
                at[rank] += 1
        if len(played) == before:
            raise ValueError(
                f"every rank waits for another: {[order[i:][:1] for order, i in zip(ranks, at, strict=True)]}"
            )
    return played


def _needs(action: Action, rank: int, pp: int, chunks: int) -> set[tuple[int, int, str]]:
    stage, micro = action.chunk * pp + rank, action.micro_batch
    if action.direction == "forward":
        return {(stage - 1, micro, "forward")} if stage else set()
    if action.direction == "weight_grad":
        return {(stage, micro, "backward")}
    after = {(stage + 1, micro, "backward")} if stage < pp * chunks - 1 else set()
    return after | {(stage, micro, "forward")}
