"""Plain records of a traced module: what is read from them, and how they travel."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.job.files import job_from_dict, job_to_dict
from estimator.job.model import traced_spec
from estimator.job.options import assemble_job
from estimator.job.traced import Held, Traced, TracedCost, TracedOp, TracedParam, TracedPass, TracedUnit
from estimator.predict import lay_out, memory_of, predict
from estimator.report import StepReport
from tests.runtime import tiny

OP = TracedOp("addmm", "matmul", False, "bf16", 2.0 * 64 * 32 * 16, 4096, (1, 64, 16, 32))
KEPT, GONE = (Held("activations", 4000),), (Held("activations", -4000),)
COST = TracedCost(
    TracedPass((OP,), (Held("activations", 4000), Held("temporaries", 500)), KEPT, (Held("activations", 4000), Held("temporaries", 600))),
    TracedPass((OP._replace(backward=True),) * 2, (Held("temporaries", 1000),), GONE, (Held("temporaries", 1000),)),
    (),
)  # fmt: skip
UNITS = tuple(
    TracedUnit(f"blocks.{i}", (TracedParam("weight", (16, 32)), TracedParam("bias", (16,), i > 0)), (), True, 0)
    for i in range(3)
)
TRACED = Traced(
    units=UNITS, costs=(COST,), buffer_bytes=128, micro_batch_size=4, seq_len=16, is_cpu=False, dtype="bf16",
    grad_dtype="model", recompute="none", recompute_every=1, attention="flash", kernels_off=(), notes=("a guess",),
)  # fmt: skip


def job(traced: Traced = TRACED, strategy: Strategy | None = None, world: int = 1, **sizes: int) -> Job:
    cluster = tiny.job(tiny.LLAMA, Strategy(), world=world).cluster
    return assemble_job(traced_spec("mine", traced), cluster, strategy or Strategy(), dict(sizes))


def test_memory_by_hand() -> None:
    """Stage 0, one rank. Kept for three units 3 x 4,000; the peak is in the last one's forward pass, or in its backward pass once
    gradients are there. Buffers are workspace, the frozen bias has neither gradient nor state."""
    memory = memory_of(lay_out(job(strategy=Strategy(optimizer="sgd", bucket_bytes=1 << 20))))
    trained, frozen = 3 * 512 + 2 * 16, 16
    assert memory.category_peak_bytes == {
        "params": 2 * (trained + frozen), "grads": 2 * trained, "master_params": 4 * trained,
        "optimizer_state": 4 * trained, "activations": 12_000, "temporaries": 1000, "workspace": 128,
    }  # fmt: skip
    states = 2 * (trained + frozen) + 8 * trained
    assert (
        memory.phase_peak_bytes["loss"] == states + 128 + 12_000 + 2 * trained
    )  # gradients are there before backward begins
    assert memory.phase_peak_bytes["backward"] == states + 2 * trained + 128 + 12_000 + 1000


def test_report() -> None:
    report = predict(job(world=2))
    assert report.model_flops == 3 * 2 * 3 * OP.flops  # three units, two ranks, forward and twice that backward
    assert report.tokens_per_s == pytest.approx(2 * 4 * 16 / report.step_s)  # type: ignore[operator]
    assert "a guess" in report.notes
    assert StepReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_round_trip() -> None:
    one = job(world=2, strategy=Strategy(zero_stage=3))
    again = job_from_dict(json.loads(json.dumps(job_to_dict(one))))
    assert again == one and again.key == one.key
    other = replace(TRACED, costs=(COST._replace(recompute=(OP,)),))
    assert job(other, world=2, strategy=Strategy(zero_stage=3)).key != one.key
    assert lay_out(again).costs == lay_out(one).costs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["units"][0].pop(), "model.traced.units is .* list of name, params, borrows, backward_reads, cost"),
        (lambda t: t["units"][0].__setitem__(4, 1), "model.traced.units.0.cost is 1; allowed: 0 to 0"),
        (
            lambda t: t["units"][0].__setitem__(2, [0]),
            "model.traced.units.0.borrows names a unit that is not before it",
        ),
        (lambda t: t["costs"][0].__setitem__(0, 3), "model.traced.costs.forward is 3; allowed: a list of ops"),
        (lambda t: t.update(micro_batch_size=0), "model.traced.micro_batch_size is 0"),
        (lambda t: t.pop("dtype"), "model.traced has no 'dtype'"),
        (lambda t: t.update(colour=1), "model.traced has the unknown key 'colour'"),
        (lambda t: t.update(units=[]), "model.traced has no unit with a trained parameter"),
    ],
)
def test_records_that_are_wrong(change: Any, said: str) -> None:
    data = json.loads(json.dumps(job_to_dict(job())))
    change(data["model"]["traced"])
    with pytest.raises(InputError, match=said):
        job_from_dict(data)


@pytest.mark.parametrize(
    ("strategy", "sizes", "said"),
    [
        (
            Strategy(dtype="fp32"),
            {},
            "dtype is 'fp32', but mine was traced with 'bf16'; allowed: that, or another trace",
        ),
        (Strategy(recompute="full"), {}, "recompute is 'full', but mine was traced with 'none'"),
        (Strategy(grad_dtype="fp32"), {}, "grad_dtype is 'fp32'"),
        (Strategy(kernels_off=("adam",)), {}, "kernels_off is"),
        (Strategy(tp=2), {}, "tp is 2, but mine is a traced module, which only data parallelism spreads"),
        (Strategy(pp=2), {}, "pp is 2"),
        (Strategy(sparse_embeddings=True), {}, "sparse_embeddings is on, but mine is a traced module"),
        (Strategy(), {"micro_batch": 2}, "micro_batch is 2, but the example batch that mine was traced with has 4"),
        (Strategy(), {"seq_len": 8}, "seq_len is 8, but mine was traced with 16"),
    ],
)
def test_jobs_that_were_not_traced(strategy: Strategy, sizes: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        job(strategy=strategy, world=2, **sizes)
    cpu = tiny.job(tiny.LLAMA, Strategy(dtype="fp32"), arch="cpu").cluster
    with pytest.raises(InputError, match="mine was traced with a GPU's operators, the job's device is a CPU"):
        assemble_job(traced_spec("mine", TRACED), cpu, Strategy(), {})
