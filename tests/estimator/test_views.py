"""Memory over the step, the trace, the waterfall and the roofline: by hand on a job of two units, and held against the forecast on others."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from estimator.errors import InputError
from estimator.job import Cluster, Gpu, Host, Job, ModelSpec, Strategy, Workload
from estimator.job.options import JobOptions, build_job
from estimator.ops.cost import PassMemory, UnitCost
from estimator.ops.operator import Op
from estimator.predict import Blueprint, predict
from estimator.report import StepReport
from estimator.schedule.events import Alloc, Buffer, Collective, Compute, Free, Section, StepProgram, Wait
from estimator.sharding.layout import make_layout
from estimator.sharding.units import model_units
from estimator.time.profile import profile_for
from estimator.time.recorder import Place, record_step
from estimator.time.stack import LONE, Stack
from estimator.views.memory import memory_csv_rows, memory_over_step
from estimator.views.roofline import roof_of, roofline
from estimator.views.step import StepView, view_step
from estimator.views.trace import chrome_trace
from estimator.views.waterfall import waterfall
from estimator.views.words import peak_words, time_words

TREE = Path(__file__).resolve().parents[2]
BASE = JobOptions(model="gpt2", gpu="h100-sxm", gpus=8, seq_len=512)
JOBS = {
    "zero 3": BASE,
    "zero 2, many micro-batches": replace(BASE, zero=2, global_batch=256, recompute="selective"),
    "offload": replace(BASE, zero=3, offload="optimizer,param", global_batch=32),
    "a late update": replace(BASE, zero=2, offload="optimizer", delayed_update=True, global_batch=64),
    "hybrid shard": replace(BASE, gpus=32, shard_size=8, zero=2, global_batch=64),
    "parameter servers": replace(BASE, zero=0, sync="parameter_server", n_servers=2, staleness=2, global_batch=32),
    "activation offload": replace(BASE, recompute="full", activation_offload=True),
    "tensor parallel": replace(BASE, model="llama-3-8b", zero=1, tp=4, global_batch=16),
    "1f1b": replace(BASE, zero=1, pp=4, global_batch=128),
    "gpipe": replace(BASE, zero=1, pp=2, pp_schedule="gpipe", global_batch=64),
    "interleaved": replace(BASE, zero=1, pp=2, virtual_pp=2, pp_schedule="interleaved_1f1b", global_batch=64),
    "zero bubble": replace(BASE, zero=0, pp=4, pp_schedule="zero_bubble", global_batch=128),
    "fsdp2": replace(BASE, framework="fsdp2", global_batch=32),
}


@pytest.fixture(scope="module", params=JOBS)
def view(request) -> StepView:
    return view_step(build_job(JOBS[request.param]))


# ---- against the forecast ---------------------------------------------------------------------------------------------


def test_a_record_is_of_the_very_step_that_is_forecast(view: StepView) -> None:
    report = predict(view.job)
    assert view.report == report
    assert view.record.time.step_s == pytest.approx(report.step_s, rel=1e-12)
    for part, seconds in report.time_parts_s.items():
        assert view.record.time.parts[part] == pytest.approx(seconds, rel=1e-9, abs=1e-9 * report.step_s), part


def test_a_whole_record_fills_the_compute_stream_and_is_as_busy_as_the_forecast_says(view: StepView) -> None:
    """Work and waiting follow each other without gaps, and so they do on no other stream."""
    whole = view_step(view.job, kept_turns=1 << 20)
    for record in whole.record.ranks:
        compute = sorted((s for s in record.spells if s.stream == "compute"), key=lambda s: (s.start_s, s.end_s))
        assert math.fsum(s.end_s - s.start_s for s in compute) == pytest.approx(record.end_s, rel=1e-9)
        for before, after in pairwise(compute):
            assert after.start_s == pytest.approx(before.end_s, abs=1e-9 * record.end_s)
        for stream in ("gather", "reduce", "h2d", "d2h", "host", "worker"):
            own = math.fsum(s.end_s - s.start_s for s in record.spells if s.stream == stream and not s.is_wait)
            assert own == pytest.approx(record.busy_s[stream], rel=1e-9, abs=1e-15), stream


def live(by_category: dict[str, int]) -> dict[str, int]:
    """Without what the device holds beside tensors."""
    outside = ("cuda_context", "comm_buffers", "fragmentation")
    return {name: n_bytes for name, n_bytes in by_category.items() if name not in outside}


def test_memory_over_the_step_reaches_the_peak_that_is_forecast(view: StepView) -> None:
    curve = memory_over_step(view)
    report = view.report
    assert curve.peak.total_bytes == report.peak_allocated_bytes
    assert curve.peak.live == live(report.category_bytes_at_peak)
    for category, n_bytes in live(report.category_peak_bytes).items():
        assert max(sample.live.get(category, 0) for sample in curve.samples) <= n_bytes
    assert curve.samples[0].live == live(report.phase_category_bytes["init"]) == curve.samples[-1].live
    assert max(s.host_bytes for s in curve.samples) == report.host_bytes
    times = [sample.time_s for sample in curve.samples]
    assert times == sorted(times) and times[0] == 0.0
    assert times[-1] == pytest.approx(view.record.ranks[curve.rank].end_s)


def test_every_pipeline_rank_has_a_curve(view: StepView) -> None:
    peaks = [memory_over_step(view, rank).peak.total_bytes for rank in range(len(view.blueprints))]
    assert max(peaks) == view.report.peak_allocated_bytes
    per_rank = view.job.cluster.n_gpus // view.job.strategy.pp
    assert peaks == [predict(view.job, rank=r * per_rank).peak_allocated_bytes for r in range(len(peaks))]


def test_terms_of_the_waterfall_add_up_to_the_step(view: StepView) -> None:
    terms = waterfall(view)
    assert math.fsum(t.seconds for t in terms) == pytest.approx(view.report.step_s, rel=1e-12)
    assert terms[0].name == "ideal" and terms[0].seconds == pytest.approx(view.report.mfu * view.report.step_s)
    assert len({t.name for t in terms}) == len(terms)
    assert all(t.seconds > -1e-9 * view.report.step_s for t in terms if t.name not in ("uneven",)), terms
    shown = {t.name: t.seconds for t in terms}
    for part in ("exposed_gather", "exposed_reduce", "optimizer", "offload", "pipeline_bubble"):
        assert shown.get(part, 0.0) == pytest.approx(view.report.time_parts_s[part], rel=1e-9, abs=1e-12), part


def test_the_trace_is_one_that_perfetto_reads(view: StepView) -> None:
    trace = json.loads(json.dumps(chrome_trace(view), allow_nan=False))
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"} and trace["displayTimeUnit"] in ("ms", "ns")
    named: set[tuple[int, int]] = set()
    ends: dict[tuple[int, int], float] = {}
    for event in trace["traceEvents"]:
        track = event["pid"], event["tid"]
        assert event["ph"] in "XCM" and isinstance(event["name"], str) and event["name"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            named |= {track} if event["name"] == "thread_name" else set()
            continue
        assert event["ts"] >= 0
        if event["ph"] == "C":
            assert event["args"] and all(type(v) is int and v >= 0 for v in event["args"].values())
            continue
        assert track in named and event["dur"] >= 0
        assert event["ts"] >= ends.get(track, 0.0) - 1e-6, "events of a track do not overlap"
        ends[track] = event["ts"] + event["dur"]
    assert {pid for pid, _ in ends} == set(range(view.job.strategy.pp))
    outside = max(track for track in ends if track[0] == view.record.last)
    assert ends[outside] == pytest.approx(view.report.step_s * 1e6, rel=1e-6)
    totals = [e["args"]["bytes"] for e in trace["traceEvents"] if e["name"] == "device memory (bytes)"]
    assert max(totals) == view.report.peak_allocated_bytes


def test_sentences_name_the_numbers(view: StepView) -> None:
    from estimator.units import format_bytes, format_seconds

    words = " ".join([*peak_words(view, memory_over_step(view)), *time_words(view, waterfall(view))])
    assert format_bytes(view.report.peak_allocated_bytes) in words and view.report.peak_where in words
    assert format_seconds(view.report.step_s) in words
    largest = max(live(view.report.category_bytes_at_peak).values())
    assert format_bytes(largest) in words


def test_a_cpu_has_one_clock_and_its_views_add_up_too() -> None:
    from estimator.time.profile_file import load_profile

    profile = load_profile(next((TREE / "validator" / "records").glob("cpu*.profile.json")))
    options = JobOptions(
        model="gpt-30m", gpu="cpu", gpus=2, zero=3, dtype="fp32", seq_len=128, offload="optimizer", global_batch=6
    )
    view = view_step(build_job(options, local_gpu=profile.gpu, local_host=profile.host), profile)
    record = view.record.ranks[0]
    assert view.record.time.step_s == view.report.step_s == pytest.approx(record.end_s)
    assert {s.stream for s in record.spells} == {"compute", "gather", "reduce", "h2d", "d2h", "host"}
    assert math.fsum(t.seconds for t in waterfall(view)) == pytest.approx(view.report.step_s, rel=1e-12)
    assert memory_over_step(view).peak.total_bytes == view.report.peak_allocated_bytes


# ---- what is kept -----------------------------------------------------------------------------------------------------


def test_micro_batches_that_are_alike_are_cut_and_numbered() -> None:
    job = build_job(replace(BASE, zero=2, global_batch=8 * 12))
    view = view_step(job, kept_turns=3)
    trace = chrome_trace(view)
    numbers = [e["args"]["micro_batch"] for e in trace["traceEvents"] if e["name"] == "forward blocks.0"]
    assert numbers == [0, 1, 2, 3, 11]  # the first, and of the eleven others, which are alike, three and the last
    assert trace["otherData"]["repeats_left_out"] == sum(gap.repeats for gap in memory_over_step(view).gaps)
    assert any("left out" in note for note in trace["otherData"]["notes"])
    whole = chrome_trace(view_step(job, kept_turns=12))
    numbers = [e["args"]["micro_batch"] for e in whole["traceEvents"] if e["name"] == "backward blocks.0"]
    assert numbers == list(range(12)) and whole["otherData"]["repeats_left_out"] == 0


def test_passes_of_a_pipeline_are_numbered_by_micro_batch() -> None:
    trace = chrome_trace(view_step(build_job(JOBS["interleaved"]), kept_turns=100))
    numbers = [e["args"]["micro_batch"] for e in trace["traceEvents"] if e["name"] == "backward blocks.0"]
    assert numbers == list(range(16))


def test_a_trace_may_be_of_some_stages() -> None:
    view = view_step(build_job(JOBS["1f1b"]))
    assert {e["pid"] for e in chrome_trace(view, (3, 1))["traceEvents"]} == {1, 3}
    with pytest.raises(InputError, match="stage is 4; allowed: a whole number from 0 to 3"):
        chrome_trace(view, (4,))


def test_no_micro_batch_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="kept_turns is 0"):
        view_step(build_job(BASE), kept_turns=0)


# ---- by hand ----------------------------------------------------------------------------------------------------------

GPU = Gpu(
    name="h100-sxm", arch="hopper", memory_bytes=80 << 30, memory_bytes_per_s=3.35e12,
    peak_flops={"fp32": 6.69e13, "bf16": 9.894e14, "fp16": 9.894e14}, n_sms=132, l2_bytes=50 << 20,
    link_bytes_per_s=4.5e11, host_link_bytes_per_s=6.4e10,
)  # fmt: skip
CLUSTER = Cluster(
    gpu=GPU, n_gpus=8, gpus_per_node=8, internode_bytes_per_s=5e10,
    host=Host(memory_bytes=1 << 40, n_cores=96, memory_bytes_per_s=3e11),
)  # fmt: skip
MODEL = ModelSpec(
    name="tiny", family="custom", n_layers=1, d_model=64, n_heads=1, n_kv_heads=1, head_dim=64, d_ff=64,
    vocab_size=64, max_positions=64,
)  # fmt: skip
JOB = Job(
    model=MODEL, workload=Workload(seq_len=64, micro_batch_size=1, global_batch_size=16), strategy=Strategy(zero_stage=3),
    cluster=CLUSTER,
)  # fmt: skip
N = 4096
PRODUCT = Op("mm", "matmul", False, "bf16", 2.0 * N**3, 6 * N * N, (1, N, N, N))
POINTWISE = Op("gelu", "elementwise", False, "bf16", 8.0 * N * N, 4 * N * N)
MEMORY = (
    PassMemory({"activations": 10, "temporaries": 30}, {"activations": 10}, {"activations": 10, "temporaries": 30}),
    PassMemory({"temporaries": 50}, {"activations": -10}, {"temporaries": 50}),
)
COST = UnitCost((PRODUCT, POINTWISE), (PRODUCT, PRODUCT), (POINTWISE,), *MEMORY)
WEIGHTS, STATES, GATHERED = (
    Buffer("shard", 0, "params", 100), Buffer("master", 0, "master_params", 400), Buffer("full_params", 0, "gathered_params", 800),
)  # fmt: skip
GATHER = Collective("all_gather", "params", 0, 1 << 30, "gather", ("gather", 0))
MICRO_BATCH = (
    Alloc(GATHERED), GATHER, Wait("compute", ("gather", 0)), Compute(1, "forward"), Compute(1, "backward"), Free(GATHERED),
)  # fmt: skip


def by_hand(stack: Stack = LONE, repeat: int = 2) -> StepView:
    program = StepProgram((Alloc(WEIGHTS), Alloc(STATES)), (Section("micro_batch", MICRO_BATCH, repeat),))
    profile, _ = profile_for(GPU)
    at_once = profile.host_points[0]._replace(op_s=0.0)  # a host that issues in no time
    profile = replace(profile, host_points=(at_once,))
    units = model_units(MODEL)
    blueprint = Blueprint(
        layout=make_layout(units, JOB.strategy, 3, 8), program=program, costs=[COST] * len(units), tables=()
    )
    record = record_step([(program, blueprint.costs)], JOB, profile, stack)
    time = record.time
    flops = 3 * PRODUCT.flops * repeat
    mfu = flops / (time.step_s * GPU.peak_flops["bf16"])
    report = StepReport(
        origin="predicted", job_key=JOB.key, step_s=time.step_s, time_parts_s=time.parts, mfu=mfu, peak_where="backward"
    )
    return StepView(job=JOB, report=report, blueprints=(blueprint,), record=record)


def seconds_by_hand() -> tuple[float, float, float]:
    """Of a product, a pointwise operator and the gather."""
    d = by_hand().record.durations
    return d.ops.seconds(PRODUCT), d.ops.seconds(POINTWISE), d.collective("all_gather", 1 << 30)


def test_samples_by_hand() -> None:
    product_s, pointwise_s, gather_s = seconds_by_hand()
    forward_s, backward_s = product_s + pointwise_s, 2 * product_s + pointwise_s
    turn_s = gather_s + forward_s + backward_s
    curve = memory_over_step(by_hand())
    expected = [(0.0, 500, False)]
    for at in (0.0, turn_s):
        expected += [
            (at, 1300, False),  # 800 more are gathered
            (at + gather_s + forward_s / 2, 1340, True),  # 10 of activations, 30 of temporaries
            (at + gather_s + forward_s, 1310, False),
            (at + gather_s + forward_s + backward_s / 2, 1360, True),  # 10 are still there, 50 more for a moment
            (at + turn_s, 1300, False),
            (at + turn_s, 500, False),
        ]
    expected.append((2 * turn_s, 500, False))
    assert [(s.total_bytes, s.within) for s in curve.samples] == [(total, within) for _, total, within in expected]
    assert [s.time_s for s in curve.samples] == pytest.approx([time_s for time_s, _, _ in expected], abs=1e-12)
    assert curve.peak.live == {
        "params": 100, "master_params": 400, "gathered_params": 800, "activations": 10, "temporaries": 50
    }  # fmt: skip
    heading, *lines = memory_csv_rows(curve)
    assert heading[:4] == ["time_s", "event", "within_pass", "total_bytes"] and heading[-1] == "host_bytes"
    assert [int(line[3]) for line in lines] == [total for _, total, _ in expected]
    assert all(sum(map(int, line[4:-1])) == int(line[3]) for line in lines)


def test_spells_by_hand() -> None:
    product_s, pointwise_s, gather_s = seconds_by_hand()
    record = by_hand(repeat=1).record.ranks[0]
    ends = [gather_s, gather_s + product_s + pointwise_s]
    ends += [ends[1] + pointwise_s, ends[1] + pointwise_s + 2 * product_s]
    assert [(s.stream, s.part, s.is_wait, s.place) for s in record.spells] == [
        ("gather", "exposed_gather", False, Place(0, 0, 1)),
        ("compute", "exposed_gather", True, Place(0, 0, 2)),
        ("compute", "forward", False, Place(0, 0, 3)),
        ("compute", "recompute", False, Place(0, 0, 4)),
        ("compute", "backward", False, Place(0, 0, 4)),
    ]
    assert [s.end_s for s in record.spells] == pytest.approx([gather_s, *ends], rel=1e-12)


def test_waterfall_by_hand() -> None:
    product_s, pointwise_s, gather_s = seconds_by_hand()
    ideal_s = 2 * 3 * PRODUCT.flops / GPU.peak_flops["bf16"]
    expected = {
        "ideal": ideal_s, "matmul": 2 * 3 * product_s - ideal_s, "memory_bound": 2 * pointwise_s, "recompute": 2 * pointwise_s,
        "exposed_gather": 2 * gather_s,
    }  # fmt: skip
    assert {t.name: t.seconds for t in waterfall(by_hand())} == pytest.approx(expected, rel=1e-9)
    surrounded = by_hand(Stack(straggling=0.01, step_s=0.005))
    more = {t.name: t.seconds for t in waterfall(surrounded)}
    assert more.pop("the framework's own time") == pytest.approx(0.005)
    slowest_s = more.pop("waiting for the slowest rank")
    assert slowest_s > 0 and more == pytest.approx(expected, rel=1e-9)
    assert math.fsum([*more.values(), slowest_s, 0.005]) == pytest.approx(surrounded.report.step_s, rel=1e-12)


def test_trace_by_hand() -> None:
    product_s, pointwise_s, gather_s = seconds_by_hand()
    events = chrome_trace(by_hand(Stack(step_s=0.005), repeat=1))["traceEvents"]
    shown = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    block, us = model_units(MODEL)[1].name, 1e6
    starts = [0.0, gather_s, gather_s + product_s + pointwise_s, gather_s + product_s + 2 * pointwise_s]
    assert sorted(name for name, _, _ in shown[:2]) == ["all-gather parameters embed", "wait for gather embed"]
    assert [name for name, _, _ in shown[2:]] == [
        f"forward {block}", f"recompute {block}", f"backward {block}", "the framework's own time"
    ]  # fmt: skip
    assert [at for _, at, _ in shown[2:5]] == pytest.approx([s * us for s in starts[1:]], abs=2e-3)
    assert shown[-1][2] == pytest.approx(5000.0)


def test_roofline_by_hand() -> None:
    product_s, pointwise_s, _ = seconds_by_hand()
    view = by_hand()
    roof, points = roof_of(view), {(p.name, p.part): p for p in roofline(view)}
    assert roof.ridge == pytest.approx(9.894e14 / 3.35e12) and roof.reachable(1.0) == 3.35e12
    forward, backward = points["mm", "forward"], points["mm", "backward"]
    assert (forward.runs, backward.runs) == (2, 4)
    assert forward.flops_per_byte == pytest.approx(2 * N / 6)
    assert forward.flops_per_s == pytest.approx(PRODUCT.flops / product_s) and forward.seconds == 2 * product_s
    assert forward.roof == "compute" and forward.of_roof == pytest.approx(PRODUCT.flops / 9.894e14 / product_s)
    gelu = points["gelu", "recompute"]
    assert gelu.roof == "memory" and gelu.of_roof == pytest.approx(4 * N * N / 3.35e12 / pointwise_s)


def test_no_operator_of_a_gpu_is_above_its_roof(view: StepView) -> None:
    points = roofline(view)
    assert points and all(0 <= p.of_roof <= 1.3 for p in points)
    assert [p.seconds for p in points] == sorted((p.seconds for p in points), reverse=True)
