"""What is worked out once for many: passes of alike pipeline ranks, what memory does in them, passes that follow one another."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.memory.reader import Passings
from estimator.predict import lay_out, lay_out_stages, memory_of
from estimator.schedule.events import Compute
from estimator.schedule.pipeline import fewest, orders, periods
from estimator.time.code import PASS, PASSES, joined
from estimator.time.player import INDEX, Player
from tests.estimator.test_pipeline_program import FIELDS, job
from tests.runtime import tiny

FORWARD = ("forward", "loss")


@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: f["pp_schedule"])
@pytest.mark.parametrize("n", [4, 24])
def test_sections_written_for_few_micro_batches_are_those_of_all(fields, n) -> None:
    """A rank's passes, repeats written out, are its order, action by action."""
    made = job(pp=4, n=n, n_layers=8, **fields)
    chunks = made.strategy.virtual_pp
    for rank, blueprint in enumerate(lay_out_stages(made)):
        done = []
        for section in blueprint.program.step:
            for events in section.passes * section.repeat:
                first = next((e for e in events if isinstance(e, Compute)), None)
                if first is not None:
                    chunk = 0 if chunks == 1 else _chunk_of(blueprint, first.unit)
                    done.append(("forward" if first.phase in FORWARD else first.phase, chunk))
        order = orders(made.strategy.pp_schedule, 4, chunks, n)[rank]
        assert done == [(action.direction, action.chunk) for action in order]


def _chunk_of(blueprint, unit: int) -> int:
    """Of two: the first has the first layers."""
    name = blueprint.layout.units[unit].name
    if name in ("embed", "head"):
        return int(name == "head")
    return int(int(name.removeprefix("blocks.")) >= 4)


@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: f["pp_schedule"])
def test_fewest_leaves_out_whole_repeats(fields) -> None:
    schedule, chunks = fields["pp_schedule"], fields.get("virtual_pp", 1)
    few, left_out = fewest(schedule, 4, chunks, 256)
    assert few == 256 - left_out * (4 if chunks > 1 else 1) < 64
    for long, short in zip(periods(schedule, 4, chunks, 256), periods(schedule, 4, chunks, few), strict=True):
        assert [p.repeat - left_out for p in long] == [p.repeat for p in short] == [2] * len(short)
        assert [p.length for p in long] == [p.length for p in short]
        assert long[0].start == short[0].start


def test_alike_ranks_share_their_passes_and_no_others_do() -> None:
    """Four stages of two blocks each: the two in the middle are alike."""
    passes = [
        {id(events) for section in blueprint.program.step for events in section.passes}
        for blueprint in lay_out_stages(job(pp=4, n=12, n_layers=8))
    ]
    assert passes[1] & passes[2]
    assert not passes[0] & passes[1] and not passes[2] & passes[3] and not passes[0] & passes[3]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: f["pp_schedule"])
@pytest.mark.parametrize("stage", [1, 3])
def test_reading_stages_together_is_reading_each_alone(fields, stage) -> None:
    """With every stage's own names, and with an optimizer on the host too."""
    stage = min(stage, 1) if fields["pp_schedule"] == "zero_bubble" else stage
    for offload in ("none", "optimizer"):
        if offload != "none" and fields["pp_schedule"] == "zero_bubble":
            continue
        made = job(tiny.GPT, pp=4, n=12, n_layers=9, dp=2, zero_stage=stage, offload=offload, **fields)
        passings: Passings = {}
        together = [memory_of(blueprint, passings) for blueprint in lay_out_stages(made)]
        assert together == [memory_of(lay_out(made, rank)) for rank in range(4)]
        assert len({memory.peak_where for memory in together}) > 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["forward", "recompute", "backward"]), st.integers(1, 20), st.integers(0, 30), st.integers(0, 15)
        ),
        min_size=2, max_size=8,
    ),
    st.integers(-60, 60), st.booleans(),
)  # fmt: skip
def test_joined_passes_take_what_they_take_one_by_one(passes, ahead, serial) -> None:
    """Whether the host is ahead of the device or not, and where it was busy otherwise before."""
    code = [(PASS, part, device, max(bound, device), host) for part, device, bound, host in passes]
    as_one = joined(code)
    assert [step[0] for step in as_one] == [PASSES]
    ends = []
    for steps in (code, as_one):
        player = Player(SimpleNamespace(overlap=1.0), serial=serial)  # type: ignore[arg-type]
        player.clocks[0], player.clocks[INDEX["host"]] = 100.0, 100.0 + ahead
        if ahead > 0:
            player.host_log.append((100.0 + ahead / 2, 100.0 + ahead, "offload"))
        player.run(steps)
        ends.append((player.clocks, player.parts, player.busy, list(player.host_log)))
    assert ends[0] == ends[1]


def test_only_passes_are_joined() -> None:
    one, other = (PASS, "forward", 1.0, 1.0, 0.0), (PASS, "backward", 2.0, 2.0, 0.5)
    work = (0, 0, 1.0, 0.0, "optimizer", None)
    assert joined([one, work, one]) == [one, work, one]
    ((kind, slack, device_s, host_s, shares, steps),) = joined([one, other, one])
    assert (kind, device_s, host_s, steps) == (PASSES, 4.0, 0.5, [one, other, one])
    assert slack == 0.0  # of 0 before the first, 1 before the second, 2.5 before the third
    assert shares == (("forward", 2.0), ("backward", 2.0))
