"""What is worked out once for many: layers and operators of a kind, programs, passes of alike pipeline ranks, what memory does in
them, passes that follow one another."""

from __future__ import annotations

from collections.abc import Callable
from math import erfc, exp, log1p, sqrt
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import estimator.predict
from estimator import catalog
from estimator.job.options import JobOptions, build_job
from estimator.memory.reader import PeakReader
from estimator.ops import layers
from estimator.plan import PlanQuestion, plan
from estimator.predict import lay_out_stages, memory_of, predict
from estimator.schedule.events import Compute
from estimator.schedule.pipeline import fewest, orders, periods
from estimator.time.code import PASS, PASSES, joined
from estimator.time.network import CollectiveTimer
from estimator.time.operators import OperatorTimer
from estimator.time.player import INDEX, Player
from estimator.time.stragglers import expected_maximum
from tests.estimator.test_pipeline_program import FIELDS, job
from tests.runtime import tiny

FORWARD = ("forward", "loss")


LARGE = JobOptions(
    model="llama-3.1-405b", gpu="h100-sxm", gpus=16384, zero=1, tp=8, pp=16, seq_len=8192, global_batch=2048
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[tuple[Any, ...]]]:
    """Lists what a function, or a class's method, is given in every call; nothing is known from before."""
    for known in ("_unit_costs", "_program_of", "_stage_programs"):
        getattr(estimator.predict, known).cache_clear()

    def follow(owner: Any, name: str) -> list[tuple[Any, ...]]:
        real, seen = getattr(owner, name), list[tuple[Any, ...]]()

        def followed(*args: Any, **kwargs: Any) -> Any:
            seen.append(args)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, followed)
        return seen

    return follow


@pytest.mark.parametrize(("model", "kinds"), [("llama-3.1-405b", 3), ("gemma-2-27b", 4), ("deepseek-v3", 4)])
def test_a_kind_of_layer_is_worked_out_once(calls, model: str, kinds: int) -> None:
    """Embedding, head, and blocks: all alike; with two windows; dense and with experts."""
    graphs = calls(layers, "unit_graph")
    options = JobOptions(model=model, gpu="h100-sxm", gpus=4096, tp=8, zero=3, global_batch=1024, seq_len=1024)
    predict(build_job(options))
    assert catalog.model(model).n_layers > 40 and len(graphs) == kinds


def test_a_pipeline_is_worked_out_stage_kind_by_stage_kind(calls) -> None:
    """126 layers over 16 ranks: the first, the last, and between them ranks of 7 and of 8. One stage is read in full, and every
    operator and collective is timed once."""
    kinds, read = calls(estimator.predict, "make_layout"), calls(estimator.predict, "read_memory")
    operators, collectives = calls(OperatorTimer, "_time"), calls(CollectiveTimer, "ways")
    predict(build_job(LARGE))
    assert (len(kinds), len(read)) == (4, 1)
    assert 20 < len(operators) == len({op for _, op in operators}) < 80
    assert 5 < len(collectives) == len(set(collectives)) < 30


def test_a_search_over_recomputation_writes_each_program_once(calls) -> None:
    programs = calls(estimator.predict, "build_program")
    job = build_job(JobOptions(model="gpt2", gpu="h100-sxm", gpus=8))
    result = plan(PlanQuestion(model=job.model, cluster=job.cluster, seq_len=1024, global_batch_size=16))
    assert result.n_tried == 4 * 3 * 3 * 2
    assert len(programs) == 4 * 3 * 2  # stages, offloads, numbers of micro-batches


@pytest.mark.parametrize("n", [2, 8, 1000, 1076, 16384, 10**8])
def test_the_expected_maximum_is_the_whole_integral(n: int) -> None:
    """Leaving out where the integrand is 0 or 1 changes no bit."""
    total = 0.0
    for i in range(2201):
        x = -10.0 + i * 0.01
        power = exp(n * log1p(-tail)) if (tail := 0.5 * erfc(x / sqrt(2.0))) < 1.0 else 0.0
        total += (0.5 if i in (0, 2200) else 1.0) * (1.0 - power if x > 0 else 0.5 - power if x == 0 else -power)
    assert expected_maximum(n) == total * 0.01


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
def test_peaks_of_all_stages_are_those_of_reading_each(fields, stage) -> None:
    """Live bytes rise by what passes add, however often; with an optimizer on the host too."""
    stage = min(stage, 1) if fields["pp_schedule"] == "zero_bubble" else stage
    for offload in ("none", "optimizer"):
        if offload != "none" and fields["pp_schedule"] == "zero_bubble":
            continue
        made = job(tiny.GPT, pp=4, n=12, n_layers=9, dp=2, zero_stage=stage, offload=offload, **fields)
        reader, blueprints = PeakReader(), lay_out_stages(made)
        peaks = [reader.read(blueprint.program, blueprint.costs, blueprint.tables) for blueprint in blueprints]
        read = [memory_of(blueprint) for blueprint in blueprints]
        assert peaks == [memory.peak_bytes for memory in read]
        assert len({memory.peak_where for memory in read}) > 1
        report = predict(made)
        assert report.peak_allocated_bytes == max(peaks)
        assert report.rank == peaks.index(max(peaks)) * made.cluster.n_gpus // 4


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
