"""Orders of pipeline passes: small ones by hand, closed forms, and torch's own."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.schedule.pipeline import (
    Action,
    bubble_share,
    n_in_flight,
    n_warmup,
    orders,
    periods,
    play,
)
from estimator.sharding.stages import split_blocks, units_of_rank

SHORT = {"forward": "F", "backward": "B", "input_grad": "I", "weight_grad": "W"}


def text(order: tuple[Action, ...], chunks: int = 1) -> str:
    return " ".join(f"{SHORT[a.direction]}{a.micro_batch}{'abcdefgh'[a.chunk] if chunks > 1 else ''}" for a in order)


def test_gpipe_by_hand():
    assert {text(order) for order in orders("gpipe", 3, 1, 3)} == {"F0 F1 F2 B0 B1 B2"}


def test_1f1b_by_hand():
    """Narayanan et al. 2021, figure 4 (top is figure 3's), with four micro-batches on three ranks."""
    assert [text(order) for order in orders("1f1b", 3, 1, 4)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_1f1b_with_fewer_micro_batches_than_ranks():
    assert [text(order) for order in orders("1f1b", 4, 1, 2)][:2] == ["F0 F1 B0 B1", "F0 F1 B0 B1"]
    assert text(orders("1f1b", 4, 1, 1)[3]) == "F0 B0"


def test_interleaved_by_hand():
    """Two chunks (a, b) on two ranks, four micro-batches."""
    assert [text(order, 2) for order in orders("interleaved_1f1b", 2, 2, 4)] == [
        "F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a",
        "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a",
    ]


def test_zero_bubble_by_hand():
    """Qi et al. 2023, figure 3 (ZB-H1): every rank holds at most as many micro-batches as there are ranks."""
    assert [text(order) for order in orders("zero_bubble", 3, 1, 4)] == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


CASES = st.tuples(
    st.sampled_from(["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]), st.integers(1, 8), st.integers(1, 4),
    st.integers(1, 24),
)  # fmt: skip


def shaped(case: tuple) -> tuple:
    """Only the interleaved schedule has chunks; it takes whole rounds."""
    schedule, pp, chunks, n = case
    return (schedule, pp, chunks, -(-n // pp) * pp) if schedule == "interleaved_1f1b" else (schedule, pp, 1, n)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_every_micro_batch_once_each_way_and_no_rank_waits_in_a_circle(case):
    schedule, pp, chunks, n = shaped(case)
    ranks = orders(schedule, pp, chunks, n)
    ways = ("forward", "input_grad", "weight_grad") if schedule == "zero_bubble" else ("forward", "backward")
    for order in ranks:
        assert Counter(order) == Counter(Action(way, m, c) for way in ways for m in range(n) for c in range(chunks))
    assert len(play(ranks, chunks)) == len(ways) * n * chunks * pp


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_micro_batches_in_flight(case):
    """GPipe: all. 1F1B: ``pp - rank``. Interleaved: Korthikanti et al. 2022, section 4.2.3: ``pp + (pp - 1) / chunks``
    micro-batches' worth on the first rank. ZB-H1: ``pp`` on every rank."""
    schedule, pp, chunks, n = shaped(case)
    ranks = orders(schedule, pp, chunks, n)
    got = [n_in_flight(order) for order in ranks]
    if schedule == "gpipe":
        assert got == [n] * pp
    elif schedule == "1f1b":
        assert got == [min(n, pp - rank) for rank in range(pp)]
    elif schedule == "zero_bubble":
        assert got == [min(n, pp)] * pp
    else:
        assert got == [min(n_warmup(schedule, rank, pp, chunks, n) + 1, n * chunks) for rank in range(pp)]
        if n > pp:
            assert got[0] == pp * chunks + pp - 1


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_messages_of_one_kind_between_two_ranks_keep_their_order(case):
    """So the k-th receive takes the k-th send, and neither needs to name its micro-batch."""
    schedule, pp, chunks, n = shaped(case)
    ranks, n_stages = orders(schedule, pp, chunks, n), pp * chunks
    back = "input_grad" if schedule == "zero_bubble" else "backward"
    for way, ahead in (("forward", 1), (back, -1)):
        passes = [
            [(a.chunk * pp + r, a.micro_batch) for a in order if a.direction == way] for r, order in enumerate(ranks)
        ]
        for rank in range(pp):
            sent = [(s + ahead, m) for s, m in passes[rank] if 0 <= s + ahead < n_stages]
            ends = 0 if ahead == 1 else n_stages - 1
            assert sent == [(s, m) for s, m in passes[(rank + ahead) % pp] if s != ends]


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_periods_repeat(case):
    schedule, pp, chunks, n = shaped(case)
    many = (3 + n % 6) * pp
    ranks, parts = orders(schedule, pp, chunks, many), periods(schedule, pp, chunks, many)
    assert len({tuple(p.repeat for p in mine) for mine in parts}) == 1
    firsts = {(a.direction, a.chunk): a.micro_batch for order in ranks for a in reversed(order)}
    lasts = {(a.direction, a.chunk): a.micro_batch for order in ranks for a in order}
    for order, mine in zip(ranks, parts, strict=True):
        for start, length, repeat in mine:
            first = order[start : start + length]
            step = max(Counter((a.direction, a.chunk) for a in first).values())
            for i in range(repeat):
                again = order[start + i * length : start + (i + 1) * length]
                assert again == tuple(a._replace(micro_batch=a.micro_batch + i * step) for a in first)
                for a in again:
                    assert firsts[a.direction, a.chunk] < a.micro_batch < lasts[a.direction, a.chunk]
            assert order[start + repeat * length][::2] == first[0][::2]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"])
def test_bubbles_of_equal_stages(schedule):
    """Every pass takes one second (backward: two, or one and one): what is idle is what the papers say."""
    for pp in (2, 4):
        chunks, n = 3 if schedule == "interleaved_1f1b" else 1, 4 * pp
        ends: dict[tuple[int, int, str], float] = {}
        clocks = [0.0] * pp
        for rank, (way, micro, chunk) in play(orders(schedule, pp, chunks, n), chunks):
            stage = chunk * pp + rank
            kind = "backward" if way == "input_grad" else way
            before = {"forward": stage - 1, "backward": stage + 1}.get(kind, stage)
            needed = ends.get((before, micro, kind if kind != "weight_grad" else "backward"), 0.0)
            clocks[rank] = max(clocks[rank], needed) + (2.0 if way == "backward" else 1.0)
            ends[stage, micro, kind] = clocks[rank]
        work = 3.0 * n * chunks
        assert max(clocks) / work - 1 == pytest.approx(bubble_share(schedule, pp, chunks, n))


def test_blocks_are_divided_evenly_or_as_told():
    assert [len(r) for r in split_blocks(10, 4)] == [2, 3, 2, 3]
    assert split_blocks(6, 3, (1, 2, 3)) == (range(0, 1), range(1, 3), range(3, 6))
    sizes = [len(r) for r in split_blocks(126, 16)]
    assert sum(sizes) == 126 and set(sizes) == {7, 8} and sizes[0] == 7


def test_embedding_first_and_head_last():
    blocks = split_blocks(4, 4)
    assert units_of_rank(0, 2, blocks) == (range(0, 2), range(3, 4))
    assert units_of_rank(1, 2, blocks) == (range(2, 3), range(4, 6))
    assert units_of_rank(0, 1, split_blocks(4, 1)) == (range(0, 6),)


# ---- torch's own orders ---------------------------------------------------------------------------------------------


def torchs(name: str, rank: int, pp: int, chunks: int, n: int) -> list[Action]:
    """``rank``'s order by torch's schedule ``name``, without idle places."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    cls = getattr(schedules, name)
    schedule = cls.__new__(cls)  # without stages, which its order does not ask for
    if issubclass(cls, schedules.PipelineScheduleSingle):
        schedule._n_microbatches, schedule._num_stages = n, pp
        if not hasattr(cls, "_get_pipeline_order"):
            pytest.skip("this torch has no order to compare with")
        found = schedule._get_pipeline_order()[rank]
    else:
        schedule.pp_group_size, schedule.n_local_stages, schedule.rank, schedule._n_microbatches = pp, chunks, rank, n
        rounds = max(1, n // pp)
        schedule.number_of_rounds, schedule.microbatches_per_round = rounds, n // rounds
        found = schedule._calculate_single_rank_operations(rank)
    ways = {
        "FORWARD": "forward",
        "FULL_BACKWARD": "backward",
        "BACKWARD_INPUT": "input_grad",
        "BACKWARD_WEIGHT": "weight_grad",
    }
    return [
        Action(ways[a.computation_type.name], a.microbatch_index, a.stage_index // pp)
        for a in found
        if a is not None and a.computation_type.name in ways
    ]


SIZES = [(2, 4), (3, 3), (4, 8), (8, 16)]


@pytest.mark.parametrize(("pp", "n"), SIZES)
def test_gpipe_and_1f1b_are_torchs(pp, n):
    """torch's 1F1B numbers the forward passes of the last rank from 1 (as of 2.13 an error of its printed order alone: its
    ``_step_microbatches`` begins with 0)."""
    for rank in range(pp):
        assert torchs("ScheduleGPipe", rank, pp, 1, n) == list(orders("gpipe", pp, 1, n)[rank])
        got = torchs("Schedule1F1B", rank, pp, 1, n)
        if rank == pp - 1:
            got = [a._replace(micro_batch=a.micro_batch - (a.direction == "forward")) for a in got]
        assert got == list(orders("1f1b", pp, 1, n)[rank])


@pytest.mark.parametrize(("pp", "n"), SIZES)
@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaved_is_torchs(pp, n, chunks):
    for rank in range(pp):
        want = torchs("ScheduleInterleaved1F1B", rank, pp, chunks, n)
        assert list(orders("interleaved_1f1b", pp, chunks, n)[rank]) == want


@pytest.mark.parametrize(("pp", "n"), SIZES)
def test_zero_bubble_is_torchs_with_one_chunk(pp, n):
    for rank in range(pp):
        want = torchs("ScheduleInterleavedZeroBubble", rank, pp, 1, n)
        assert list(orders("zero_bubble", pp, 1, n)[rank]) == want
