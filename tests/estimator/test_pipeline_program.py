"""A pipeline rank's program, its bytes, and the time of all ranks together."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.job.options import JobOptions, build_job
from estimator.memory.reader import read_memory
from estimator.predict import lay_out, lay_out_stages, memory_of, predict, traffic_of
from estimator.schedule.events import Alloc, Collective, Compute, Free, Recv, Send, Sent, StepProgram, Update, Wait
from estimator.schedule.pipeline import bubble_share, n_in_flight, orders
from estimator.time.pipeline import time_of_pipeline
from estimator.time.profile import profile_for
from tests.runtime import tiny

FIELDS = ({"pp_schedule": "gpipe"}, {"pp_schedule": "1f1b"}, {"pp_schedule": "interleaved_1f1b", "virtual_pp": 2},
          {"pp_schedule": "zero_bubble"})  # fmt: skip


def job(
    spec: ModelSpec = tiny.LLAMA, *, n_layers: int = 4, dp: int = 1, n: int = 4, micro_batch: int = 2, **fields
) -> Job:
    strategy = Strategy(**{"pp": 2, "dtype": "bf16", **fields})
    world = dp * strategy.pp
    return tiny.job(replace(spec, n_layers=n_layers), strategy, world=world, n_micro_batches=n, micro_batch=micro_batch)


def events(program: StepProgram) -> list:
    return [e for s in program.step for _ in range(s.repeat) for e in s.events]


def test_one_rank_by_hand() -> None:
    """Two stages, two micro-batches, 1F1B: the first rank goes F0 F1 B0 B1, and receives one pass ahead."""
    blueprint = lay_out(job(n=2, grad_clip=0.0))
    words = []
    for e in events(blueprint.program):
        if isinstance(e, Compute):
            words.append(f"{e.phase[0]}{blueprint.layout.units[e.unit].name.removeprefix('blocks.')[0]}")
        elif isinstance(e, Send | Recv | Sent):
            words.append(f"{type(e).__name__.lower()} {e.what[0]}")
        elif isinstance(e, Wait):
            words.append(f"wait {e.tag[0]}")
    assert words == [
        "fe", "f0", "f1", "send a",
        "recv g", "fe", "f0", "f1", "wait send_activations", "sent a", "send a",
        "wait recv_gradients", "recv g", "b1", "b0", "be",
        "wait recv_gradients", "b1", "b0", "be",
        "wait send_activations", "sent a",
    ]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(FIELDS), st.sampled_from([2, 3, 4]), st.sampled_from([1, 2]), st.integers(0, 3), st.integers(1, 6),
    st.sampled_from([tiny.GPT, tiny.LLAMA]), st.sampled_from(["none", "optimizer", "optimizer,param"]),
)  # fmt: skip
def test_rules_of_every_program(fields, pp, dp, stage, n, spec, offload) -> None:
    """Nothing leaks; every unit runs once each way for each micro-batch; all messages find their receiver; the parameters and
    units of all stages are the model's."""
    if fields["pp_schedule"] == "zero_bubble":
        stage, offload = min(stage, 1), "none"
    n = n * pp if "virtual_pp" in fields else n
    made = job(spec, pp=pp, n_layers=2 * pp + 1, dp=dp, n=n, zero_stage=stage, offload=offload, **fields)
    sent, received = Counter(), Counter()
    names = []
    for place, blueprint in enumerate(lay_out_stages(made)):
        program, units = blueprint.program, blueprint.layout.units
        names += [f"{unit.name}.{p.name}" for unit in units for p in unit.params]
        live = {e.buffer for e in program.init if isinstance(e, Alloc)}
        start, messages, posted = set(live), Counter(), Counter()
        for e in events(program):
            if isinstance(e, Alloc):
                assert e.buffer not in live
                live.add(e.buffer)
            elif isinstance(e, Free):
                live.remove(e.buffer)
            elif isinstance(e, Send):
                messages[e.what] += 1
                assert messages[e.what] == 1
                sent[e.what, place, (place + e.offset // dp)] += 1
            elif isinstance(e, Sent):
                messages[e.what] -= 1
            elif isinstance(e, Recv):
                posted[e.what] += 1
                received[e.what, place + e.offset // dp, place] += 1
            elif isinstance(e, Wait) and e.tag[0].startswith("recv_"):
                posted[e.tag[0].removeprefix("recv_")] -= 1
        assert live == start and not any(messages.values()) and not any(posted.values())
        runs = Counter((e.unit, e.phase) for e in events(program) if isinstance(e, Compute))
        back = ("input_grad", "weight_grad") if fields["pp_schedule"] == "zero_bubble" else ("backward",)
        ahead = {i: "loss" if unit.name == "head" else "forward" for i, unit in enumerate(units)}
        assert runs == Counter({(i, way): n for i in range(len(units)) for way in (ahead[i], *back)})
        updated = Counter(e.group for e in events(program) if isinstance(e, Update))
        assert updated == Counter(group.number for group in blueprint.layout.groups)
    assert sent == received
    assert len(names) == len(set(names))
    report = predict(made)
    assert report.step_s is not None and sum(report.time_parts_s.values()) == pytest.approx(report.step_s)


def test_bytes_between_stages() -> None:
    """Each micro-batch's residual stream once forward and once backward over every boundary."""
    made = job(pp=2, n=6, n_layers=4, pp_schedule="interleaved_1f1b", virtual_pp=2)
    stream = 2 * 16 * 32 * 2
    first, last = (traffic_of(b.program) for b in lay_out_stages(made))
    assert first[1]["send"] == 6 * (2 + 1) and last[1]["send"] == 6 * (1 + 2)  # boundaries 0-1, 1-2, 2-3
    assert first[0]["send"] == stream * 18


def test_activations_are_those_of_the_micro_batches_in_flight() -> None:
    """Between 1F1B's ranks the peak of kept activations differs by one micro-batch each; GPipe keeps all."""
    kept = [memory_of(b).category_peak_bytes["activations"] for b in lay_out_stages(job(pp=4, n_layers=12, n=8))[1:3]]
    one = kept[0] - kept[1]
    for schedule in ("1f1b", "gpipe"):
        order = orders(schedule, 4, 1, 8)[1]  # type: ignore[arg-type]
        got = memory_of(lay_out(job(pp=4, n_layers=12, n=8, pp_schedule=schedule), 1)).category_peak_bytes[
            "activations"
        ]
        assert got == pytest.approx(n_in_flight(order) * one, rel=0.05)


def test_the_worst_stage_is_named() -> None:
    report = predict(job(pp=2, n=8, dp=2, n_layers=8))
    assert report.peak_where is not None and report.peak_where.startswith("stage 0 of 2: ") and report.rank == 0
    last = predict(job(replace(tiny.LLAMA, vocab_size=60_000), pp=2, n=2, dp=2))
    assert last.peak_where is not None and last.peak_where.startswith("stage 1 of 2: ") and last.rank == 2


def test_passes_read_one_by_one_or_as_a_whole_hold_the_same() -> None:
    for fields in FIELDS[:3]:
        for blueprint in lay_out_stages(job(tiny.GPT, pp=2, n=12, n_layers=5, zero_stage=3, dp=2, **fields)):
            program = blueprint.program
            flat = program._replace(
                step=tuple(s._replace(events=s.events * s.repeat, repeat=1, passes=()) for s in program.step)
            )
            assert read_memory(flat, blueprint.layout.units, blueprint.costs, blueprint.tables) == memory_of(blueprint)


# ---- time -----------------------------------------------------------------------------------------------------------

GPU = {"model": "llama-3.1-8b", "gpu": "h100-sxm", "gpus": 8, "pp": 4, "zero": 1, "recompute": "full"}


@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: f["pp_schedule"])
@pytest.mark.parametrize("cpu", [False, True])
def test_skipped_repeats_take_the_time_of_played_ones(fields, cpu) -> None:
    made = build_job(JobOptions(**{**GPU, "global_batch": 2 * 64}, **fields))
    stages, profile = [(b.program, b.costs) for b in lay_out_stages(made)], profile_for(made.cluster.gpu)[0]
    if cpu:  # one clock for arithmetic and copies
        made = replace(made, cluster=replace(made.cluster, gpu=replace(made.cluster.gpu, arch="cpu")))
    assert any(s.repeat > 4 for program, _ in stages for s in program.step)
    whole = [
        (p._replace(step=tuple(s._replace(repeat=1) for s in p.step for _ in range(s.repeat))), costs)
        for p, costs in stages
    ]
    got, want = time_of_pipeline(stages, made, profile), time_of_pipeline(whole, made, profile)
    assert got.parts == pytest.approx(want.parts, rel=1e-6)
    assert got.busy_s == pytest.approx(want.busy_s, rel=1e-6)
    assert sum(got.parts.values()) == pytest.approx(got.step_s)
    assert got.parts["pipeline_bubble"] > 0


def fast_network(made: Job) -> Job:
    """Without heads, embeddings or wires that take time, all stages are alike."""
    gpu = replace(made.cluster.gpu, link_bytes_per_s=1e18)
    return replace(made, cluster=replace(made.cluster, gpu=gpu, internode_bytes_per_s=1e18))


@pytest.mark.parametrize("fields", FIELDS[:3], ids=lambda f: f["pp_schedule"])
def test_bubbles_of_equal_stages_are_the_closed_form(fields) -> None:
    """A small vocabulary leaves the head next to nothing to do."""
    made = build_job(JobOptions(**{**GPU, "global_batch": 2 * 16}, **fields))
    report = predict(fast_network(replace(made, model=replace(made.model, vocab_size=128))))
    parts = report.time_parts_s
    work = parts["forward"] + parts["backward"] + parts["recompute"]
    want = bubble_share(made.strategy.pp_schedule, 4, made.strategy.virtual_pp, 16)
    assert parts["pipeline_bubble"] / work == pytest.approx(want, rel=0.05)


def test_more_chunks_and_more_micro_batches_make_smaller_bubbles() -> None:
    def bubble(n: int, **fields) -> float:
        report = predict(build_job(JobOptions(**{**GPU, "global_batch": 2 * n}, **fields)))
        assert report.step_s is not None
        return report.time_parts_s["pipeline_bubble"] / report.step_s

    assert bubble(64) < bubble(16) < bubble(4)
    assert bubble(16, **FIELDS[2]) < bubble(16) and bubble(16, **FIELDS[3]) < bubble(16)


def test_uneven_stages_wait_for_the_slowest() -> None:
    """Of 32 blocks: one stage with two more than the others takes all."""
    even = predict(build_job(JobOptions(**{**GPU, "global_batch": 128})))
    uneven = predict(build_job(JobOptions(**{**GPU, "global_batch": 128}, pp_layers="7,7,7,11")))
    assert even.step_s is not None and uneven.step_s is not None
    assert uneven.step_s > 1.2 * even.step_s


def test_many_micro_batches_are_forecast_as_quickly_as_some() -> None:
    """256 micro-batches of a 405B model on 16 x 2 chunks."""

    def seconds(n: int) -> float:
        made = build_job(
            JobOptions(
                model="llama-3.1-405b", gpu="h100-sxm", gpus=64, pp=16, zero=1, global_batch=4 * n, recompute="full",
                pp_schedule="interleaved_1f1b", virtual_pp=2,
            )
        )  # fmt: skip
        predict(made)
        start = time.process_time()
        predict(made)
        return time.process_time() - start

    assert min(seconds(2048), seconds(2048)) < 1.5 * min(seconds(256), seconds(256))


def test_stages_meet_for_the_gradient_norm_and_for_tied_embeddings() -> None:
    first, middle, last = lay_out_stages(job(tiny.GPT, pp=3, n=4, grad_clip=1.0))

    def joined(blueprint) -> list:
        return [(e.purpose, e.span) for e in events(blueprint.program) if isinstance(e, Collective)]

    assert joined(first) == joined(last) == [("grads", (2, 2)), ("grad_norm", None)]
    assert joined(middle) == [("grad_norm", None)]
    table = sum(e.n_bytes for e in events(first.program) if isinstance(e, Collective) and e.purpose == "grads")
    assert table == 61 * 32 * 2  # a multiple of eight elements, without positions


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pp_schedule": "1F1B"}, "pp_schedule is '1F1B'; allowed: 1f1b, gpipe"),
        ({"virtual_pp": 2}, "virtual_pp is 2 with pp_schedule '1f1b'"),
        ({"pp_schedule": "interleaved_1f1b"}, "with virtual_pp 1; allowed: virtual_pp of at least 2"),
        ({"pp_layers": (4,)}, "pp_layers has 1 numbers; allowed: 2 = pp"),
        ({"pp_layers": (1, 2)}, "pp_layers adds up to 3; allowed: to the 4 blocks"),
        ({"pp": 1, "pp_layers": (4,)}, "pp_layers is \\(4,\\) with pp 1"),
        ({"pp": 8}, "pp \\* virtual_pp is 8 \\* 1 = 8; allowed: at most the 4 blocks"),
        (
            {"grad_compression": "one_bit", "compression_warmup_steps": 4, "grad_clip": 0.0},
            "pp is 2 with compression_warmup_steps 4",
        ),
        ({"recompute": "full", "activation_offload": True}, "activation_offload is on with pp 2"),
        ({"offload": "optimizer", "delayed_update": True}, "pp is 2 with offload 'optimizer delayed'"),
        ({"pp_schedule": "zero_bubble", "zero_stage": 2}, "pp_schedule is 'zero_bubble' with zero 2"),
        (
            {"pp_schedule": "interleaved_1f1b", "virtual_pp": 2, "n": 3},
            "the step has 3 micro-batches .* the nearest is 4",
        ),
    ],
)
def test_what_is_refused(fields, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        job(**fields)


def test_old_jobs_keep_their_keys_and_new_ones_round_trip() -> None:
    from estimator.job.files import job_from_dict, job_to_dict

    plain = tiny.job(tiny.LLAMA, Strategy())
    assert plain.key == replace(plain, strategy=Strategy(pp_schedule="gpipe")).key  # without a pipeline it says nothing
    made = job(pp=2, n_layers=4, pp_layers=(1, 3))
    assert job_from_dict(job_to_dict(made)) == made and made.key != job(pp=2, n_layers=4).key
