"""DeepSpeed's steps, in which layers are units: pieces of units, parameters that come and go, buckets (by hand; against DeepSpeed itself:
``tests/runtime/test_deepspeed_oracle.py``)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from estimator.job import Strategy
from estimator.ops.cost import PassMemory
from estimator.predict import Blueprint, lay_out, memory_of, predict, traffic_of
from estimator.schedule.events import Alloc, Collective, Compute, Free
from tests.runtime import tiny

BLOCK = (32 * 32, 16 * 32, 16 * 32, 32 * 32, 84 * 32, 84 * 32, 32 * 84)  # q, k, v, out, gate, up, down
TABLE = 61 * 32


def layers(stage: int = 3, *, world: int = 2, micro: int = 1, **fields: Any) -> Blueprint:
    fields = {"persistent_numel": 32, **fields} if stage == 3 else fields
    strategy = Strategy(zero_stage=stage, framework="deepspeed", **fields)
    return lay_out(tiny.job(tiny.LLAMA, strategy, world=world, n_micro_batches=micro))


def moved(blueprint: Blueprint, op: str) -> list[int]:
    """Elements of the collectives ``op`` of parameters."""
    events = [e for section in blueprint.program.step for e in section.events * section.repeat]
    return [e.n_bytes // 2 for e in events if isinstance(e, Collective) and e.op == op and e.purpose == "params"]


def summed(memories: list[PassMemory]) -> Counter[str]:
    total: Counter[str] = Counter()
    for memory in memories:
        total.update(memory.after)
    return Counter({category: n for category, n in total.items() if n})


@pytest.mark.parametrize("again", ["none", "full", "selective"])
def test_pieces_add_up_to_their_units(again: str) -> None:
    blueprint = layers(recompute=again)
    assert blueprint.whole is not None
    names = [unit.name for unit in blueprint.layout.units if unit.whole == "blocks.1" and unit.params]
    assert [name.removeprefix("blocks.1 ") for name in names][1:4] == ["attn.q", "attn.k", "attn.v"]
    for unit, cost in zip(blueprint.whole.layout.units, blueprint.whole.costs, strict=True):
        own = [c for u, c in zip(blueprint.layout.units, blueprint.costs, strict=True) if u.whole == unit.name]
        assert tuple(op for c in own for op in c.forward) == cost.forward
        assert tuple(op for c in reversed(own) for op in c.backward) == cost.backward
        assert tuple(op for c in own for op in c.again) == cost.again
        assert summed([c.forward_memory for c in own]) == Counter(cost.forward_memory.after)
        backward = [c.backward_memory for c in own] + [c.replayed.memory for c in own if c.replayed is not None]
        assert summed(backward) == Counter(cost.backward_memory.after)


def test_what_is_needed_at_once_is_gathered_alone_and_what_lies_ahead_together() -> None:
    alone = layers(prefetch_numel=1, live_numel=1)
    back = [*reversed(BLOCK), *reversed(BLOCK), TABLE]  # the head stays: its backward pass is next
    assert moved(alone, "all_gather") == [TABLE, *BLOCK, *BLOCK, TABLE, *back]
    # 3,000 may be there: the table leaves room for a look that ends when it has found q and k
    ahead = layers(prefetch_numel=3000, live_numel=3000)
    assert moved(ahead, "all_gather")[:2] == [TABLE, 1024 + 512]
    far = layers(prefetch_numel=50_000_000, live_numel=1_000_000_000)
    assert moved(far, "all_gather") == [TABLE, 2 * sum(BLOCK) + TABLE]  # and all of it stays until it is read again


def test_a_message_stays_until_all_of_it_has_been_waited_for() -> None:
    program = layers(prefetch_numel=50_000_000, live_numel=1_000_000_000).program
    events = list(program.step[0].events)
    gathered = [e.buffer.n_bytes for e in events if isinstance(e, Alloc) and e.buffer.role == "gathered"]
    assert sum(gathered) == 2 * (2 * sum(BLOCK) + TABLE)
    gone = next(i for i, e in enumerate(events) if isinstance(e, Free) and e.buffer.role == "gathered")
    computed = [e.phase for e in events[:gone] if isinstance(e, Compute)]
    assert computed.count("forward") == len([u for u in layers().layout.units if u.whole != "head"])


def test_a_full_bucket_is_reduced_while_the_next_gradient_waits() -> None:
    blueprint = layers(bucket_bytes=2 * 6000, prefetch_numel=1, live_numel=1)
    sent = [
        e.buffer.n_bytes // 2
        for e in blueprint.program.step[0].events
        if isinstance(e, Alloc) and e.buffer.role == "sent_bucket"
    ]
    attention = 1024 + 512 + 512 + 1024
    assert sent == [
        TABLE + 2688 + 2688,  # head and down; up waits
        2688 + 2688 + 1024,  # up and gate; the last projection of attention waits
        attention + 2688 + 2688,  # and so on, in the first block
        2688 + 2688 + 1024,
        attention + TABLE + 5 * 32,  # what is left, with all norms
    ]


def test_stage_1_keeps_gradients_as_they_come_and_steps_its_own() -> None:
    blueprint = layers(1, world=4)
    events = [e for section in blueprint.program.step for e in section.events]
    made = sum(e.buffer.n_bytes for e in events if isinstance(e, Alloc) and e.buffer.role.startswith("grads_of_"))
    own = sum(e.buffer.n_bytes for e in events if isinstance(e, Alloc) and e.buffer.role == "own_grads")
    assert made == 4 * own == 2 * sum(group.padded_numel for group in blueprint.layout.groups)


def test_traffic_and_flops_are_those_of_whole_units() -> None:
    for stage in (1, 2, 3):
        blueprint = layers(stage, recompute="full", micro=2)
        assert blueprint.whole is not None
        scattered = [traffic_of(b.program)[0]["reduce_scatter"] for b in (blueprint, blueprint.whole)]
        assert scattered[0] == pytest.approx(scattered[1], rel=0.01)  # padding is by group
        assert (
            memory_of(blueprint).phase_category_bytes["init"].keys()
            == memory_of(blueprint.whole).phase_category_bytes["init"].keys()
        )
    strategy = Strategy(zero_stage=3, framework="deepspeed", recompute="full", persistent_numel=32)
    report = predict(tiny.job(tiny.LLAMA, strategy, world=2))
    assert report.hfu is not None and report.mfu is not None and report.hfu > 1.2 * report.mfu
    assert report.time_parts_s["recompute"] > 0
