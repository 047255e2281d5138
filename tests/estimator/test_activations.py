"""Recomputation of parts and of every k-th block, and blocks' inputs that travel: forecasts added up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.ops.graph import Graph
from estimator.ops.layers import Shape, block_graph
from estimator.ops.liveness import unit_cost
from estimator.predict import lay_out, memory_of, predict, traffic_of
from estimator.schedule.events import Alloc, Compute, Copy, Free, Wait
from estimator.time.stack import LONE
from tests.runtime import tiny

SPEC = replace(tiny.LLAMA, n_layers=5)
INPUT = 2 * 16 * 32 * 2
"""Bytes of a block's input: two sequences of 16 tokens, 32 wide, bf16."""


def block() -> Graph:
    """x[4, 8] -> norm (h) -> linear 16 (p) -> SiLU (a) -> linear 8 (y), fp32: x, h, y are 128 B, p and a 256 B."""
    g = Graph("fp32", rows=4)
    x = g.input = g.activation(8)
    with g.call(x):
        h = g.norm(x, 8, rms=True, bias=False)
        with g.part("mlp"), g.call(h):
            a = g.activate(g.linear(h, 8, 16, bias=False), 16, "silu")
            g.output = g.linear(a, 16, 8, bias=False)
    return g


STATS = 4 * 4
"""One fp32 for each row, kept by the norm."""


@pytest.mark.parametrize(
    ("recompute", "kept", "again"),
    [
        ("none", 128 + 256 + 256 + STATS, []),  # h, p, a; x was there before
        ("norms", 256 + 256 + STATS, ["rms_norm"]),
        ("activation", 128 + 256 + STATS, ["activation"]),
        ("activation,norms", 256 + STATS, ["activation", "rms_norm"]),
        ("mlp", 128 + STATS, ["linear", "activation"]),
        ("mlp,norms", STATS, ["rms_norm", "linear", "activation"]),
        ("full", 0, ["rms_norm", "linear", "activation"]),
        ("attention", 128 + 256 + 256 + STATS, []),  # there is none
    ],
)
def test_parts_keep_and_run_again_what_they_say(recompute: str, kept: int, again: list[str]) -> None:
    cost = unit_cost(block(), recompute)
    assert cost.forward_memory.after == {"activations": kept + 128}  # and y, which goes on
    assert cost.backward_memory.after == {"activations": -(kept + 128)}  # and x
    assert [op.name for op in cost.recompute] == again
    assert cost.input_bytes == 128
    assert cost.forward == unit_cost(block(), "none").forward and cost.backward == unit_cost(block(), "none").backward


def test_an_output_made_again_is_there_when_it_is_read_and_gone_after() -> None:
    """Last product: a comes back (256), then grad a (256) and grad W2 (512) are made."""
    memory = unit_cost(block(), "activation").backward_memory
    assert memory.peak == {"activations": 256, "temporaries": 256 + 512}
    # a checkpoint makes p and a: 512
    assert unit_cost(block(), "mlp").backward_memory.peak == {"activations": 512, "temporaries": 256 + 512}


def test_the_norm_after_an_addition_is_made_from_the_sum() -> None:
    shape = Shape(2, 16, "bf16", False, kernels=frozenset({"rms_norm"}))
    cost = unit_cost(block_graph(SPEC, shape, window=0), "norms")
    assert [op.name for op in cost.recompute] == ["rms_norm", "rms_norm"]
    assert "add_rms_norm" in [op.name for op in cost.forward]


def job(**fields: object) -> Job:
    return tiny.job(SPEC, Strategy(**fields))  # type: ignore[arg-type]


def test_every_kth_block_recomputes() -> None:
    costs = lay_out(job(recompute="full", recompute_every=2)).costs
    assert [bool(cost.recompute) for cost in costs] == [False, True, False, True, False, True, False]
    none, half, full = (
        memory_of(lay_out(job(**how))).category_peak_bytes["activations"]
        for how in ({}, {"recompute": "full", "recompute_every": 2}, {"recompute": "full"})
    )
    assert full < half < none


def test_the_key_does_not_change_by_default_and_names_are_brought_to_one() -> None:
    assert job(recompute="full").key == job(recompute="full", recompute_every=1, activation_offload=False).key
    assert job(recompute="full").key != job(recompute="full", recompute_every=2).key
    assert Strategy(recompute="norms, attention").recompute == Strategy(recompute="attention,norms").recompute
    assert Strategy(recompute="mlp,activation") == Strategy(recompute="mlp")
    assert Strategy(recompute_every=3) == Strategy()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"recompute": "mpl"}, "did you mean 'mlp'"),
        ({"recompute": "full,mlp"}, "none, selective, full alone"),
        ({"recompute": 3}, "recompute is 3"),
        ({"recompute": "full", "recompute_every": 0}, "recompute_every is 0"),
        ({"activation_offload": True}, "activation_offload is on with recompute 'none'"),
        ({"activation_offload": True, "recompute": "mlp"}, "only with recompute 'full' or 'selective'"),
        ({"activation_offload": "yes"}, "true or false"),
    ],
)
def test_what_is_refused(fields: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Strategy(**fields)


def around(events: tuple, unit: int, phase: str) -> tuple[list[object], list[object]]:
    """What of inputs is said directly before and after a pass (other events do not come between, as nothing is sharded)."""
    at = events.index(Compute(unit, phase))  # type: ignore[arg-type]
    mine = [e for e in events if not isinstance(e, Alloc | Free) or e.buffer.role == "block_input"]
    at = mine.index(Compute(unit, phase))  # type: ignore[arg-type]
    before, after = [], []
    while not isinstance(mine[at - 1 - len(before)], Compute):
        before.insert(0, mine[at - 1 - len(before)])
    while at + 1 + len(after) < len(mine) and not isinstance(mine[at + 1 + len(after)], Compute):
        after.append(mine[at + 1 + len(after)])
    return before, after


def test_inputs_leave_behind_the_next_unit_and_come_back_one_ahead() -> None:
    """Units: embedding 0, blocks 1-5, head 6; inputs of 1-4 travel."""
    program = lay_out(job(recompute="full", activation_offload=True)).program
    held = [e.buffer for e in program.init if e.buffer.role == "host_input"]  # type: ignore[union-attr]
    assert [(b.group, b.n_bytes, b.place) for b in held] == [(unit, INPUT, "host") for unit in (1, 2, 3, 4)]
    events = program.step[0].events

    def out(unit: int) -> Copy:
        return Copy("d2h", "activations", unit, INPUT, ("act_out", unit))

    def here(kind: type, unit: int) -> object:
        return next(
            e for e in events if type(e) is kind and (e.buffer.role, e.buffer.group) == ("block_input", unit)  # type: ignore[union-attr]
        )  # fmt: skip

    assert around(events, 1, "forward")[1] == [out(1)]
    assert around(events, 2, "forward")[1] == [Wait("compute", ("act_out", 1)), here(Free, 1), out(2)]
    assert around(events, 5, "forward")[1] == [Wait("compute", ("act_out", 4)), here(Free, 4)]
    back = [here(Alloc, 3), Copy("h2d", "activations", 3, INPUT, ("act_in", 3)), Wait("compute", ("act_in", 4))]
    assert around(events, 4, "backward")[0] == back
    assert around(events, 5, "backward")[0] == [here(Alloc, 4), Copy("h2d", "activations", 4, INPUT, ("act_in", 4))]
    assert around(events, 1, "backward")[0] == [Wait("compute", ("act_in", 1))]


def test_what_travels_is_counted_on_the_host_and_missing_on_the_device() -> None:
    """Forward leaves all inputs on the device otherwise: those of 1-4 are gone, but for one on its way beside the last one's."""
    stays, leaves = job(recompute="full"), job(recompute="full", activation_offload=True)
    (before, after), n = [memory_of(lay_out(j)) for j in (stays, leaves)], 2
    assert after.host_category_peak_bytes["activations"] == 4 * INPUT and before.host_peak_bytes == 0
    assert (
        before.phase_category_bytes["loss"]["activations"] - after.phase_category_bytes["loss"]["activations"]
        == 4 * INPUT
    )
    assert traffic_of(lay_out(leaves).program)[2] == {"d2h": 4 * INPUT, "h2d": 4 * INPUT}
    many = tiny.job(SPEC, leaves.strategy, n_micro_batches=n)
    assert traffic_of(lay_out(many).program)[2] == {"d2h": n * 4 * INPUT, "h2d": n * 4 * INPUT}
    every_other = job(recompute="full", recompute_every=2, activation_offload=True)
    assert traffic_of(lay_out(every_other).program)[2]["d2h"] == 2 * INPUT  # of blocks 0 and 2; 4 is the last one


def test_copies_are_hidden_where_a_block_takes_longer_than_its_copy() -> None:
    """A wide block: the forecast's step is the same with and without, up to the host's issue of events.

    The step's peak is the same too: at stage 0 it falls on the last of the backward pass, where all gradients are there.
    """
    wide = replace(
        SPEC, d_model=4096, n_heads=32, n_kv_heads=32, head_dim=128, d_ff=11008, max_positions=4096, n_layers=8
    )
    plain, travels = (
        predict(tiny.job(wide, Strategy(recompute="full", activation_offload=on), seq_len=4096), stack=LONE)
        for on in (False, True)
    )
    assert travels.step_s is not None and plain.step_s is not None
    assert travels.step_s < 1.01 * plain.step_s
    assert plain.phase_peak_bytes["loss"] - travels.phase_peak_bytes["loss"] == 7 * 2 * 4096 * 4096 * 2  # of 8 blocks
    narrow = replace(SPEC, d_model=64, n_layers=8, max_positions=4096)  # whose blocks are done before a copy is
    plain, travels = (
        predict(
            tiny.job(narrow, Strategy(recompute="full", activation_offload=on), seq_len=4096, micro_batch=64),
            stack=LONE,
        )
        for on in (False, True)
    )
    assert travels.step_s is not None and plain.step_s is not None and travels.time_parts_s is not None
    assert travels.time_parts_s["offload"] > 0 and travels.step_s > plain.step_s
