"""A GPU's profile is of the runtime's own kernels, and a forecast finds each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from estimator import catalog  # noqa: E402
from estimator.job.options import JobOptions, build_job  # noqa: E402
from estimator.ops.operator import Op  # noqa: E402
from estimator.predict import predict  # noqa: E402
from estimator.time.operators import OperatorTimer  # noqa: E402
from estimator.time.profile import HardwareProfile  # noqa: E402
from validator import calibrate  # noqa: E402
from validator.calibrate import measure  # noqa: E402
from validator.calibrate.build import build_profile  # noqa: E402
from validator.calibrate.tasks import Task, tasks_for  # noqa: E402
from validator.kernels.calls import Prepared  # noqa: E402
from validator.kernels.implementation import FAMILIES  # noqa: E402
from validator.kernels.table import kernel  # noqa: E402

GPU = catalog.gpu("h200")
DTYPES = ("bf16", "fp16", "fp32")
FAMILY = {
    "rms_norm": "rms_norm", "layer_norm": "layer_norm", "add_rms_norm": "add_rms_norm", "add_layer_norm": "add_layer_norm",
    "rotary": "rotary", "activation": "gelu", "gated_activation": "swiglu", "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "cross_entropy", "embedding": "embedding", "grad_norm": "grad_norm", "adam_step": "optimizer_step",
    "sgd_step": "sgd", "accumulate_grad": "accumulate_grad", "logits_to_fp32": "cross_entropy",
    "logits_grad_from_fp32": "cross_entropy", "log_softmax": "cross_entropy", "nll_loss": "cross_entropy",
    "scale": "cross_entropy", "tanh": "cross_entropy",
}  # fmt: skip
"""Operators of forecasts and the kernel of the table whose points are theirs; sums, copies and the like are ``add``'s."""
PLAIN = {"traffic", "add", "add_grads", "bias_grad", "head_grad_bias", "sum_over_batch", "repeat_heads"}


def faked() -> tuple[HardwareProfile, dict[float, tuple[str, bool]]]:
    """A profile in which every kernel and direction of the table has a bandwidth of its own, and which has which."""
    rates: dict[tuple[str, bool], float] = {}
    done: dict[str, dict[str, Any]] = {}
    for task in tasks_for("cuda", 1, DTYPES, "full"):
        work = 1e9
        seconds = 1e-3
        if task.kind == "bandwidth":
            entry = kernel(task.name, task.backward)
            which = "cuda" if task.name in FAMILIES else "torch"
            work = entry.n_bytes(entry.shape_for(task.sizes[0], task.dtype), task.dtype, which)
            seconds = work / rates.setdefault((task.name, task.backward), 1e12 + 1e10 * len(rates))
        done[task.key(1)] = {"work": work, "seconds": [seconds] * 3}
    return build_profile(done, 8, GPU), {round(rate, -6): of for of, rate in rates.items()}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Op, float]]:
    """Bandwidth of the points that forecasts took for each memory-bound operator."""
    found: dict[Op, float] = {}
    real = OperatorTimer._bandwidth_points

    def spy(timer: OperatorTimer, op: Op) -> list[tuple[float, float]]:
        curve = real(timer, op)
        n_bytes, seconds = curve[-1]
        found[op] = round(n_bytes / seconds, -6)
        return curve

    monkeypatch.setattr(OperatorTimer, "_bandwidth_points", spy)
    yield found


def test_every_memory_bound_operator_finds_points_of_its_own_family(asked: dict[Op, float]) -> None:
    profile, rates = faked()
    models, optimizers = ("llama-3.1-8b", "gpt2-xl", "qwen3-8b", "gemma-2-9b"), ("adamw", "sgd")
    for model, dtype, optimizer in itertools.product(models, DTYPES, optimizers):
        options = JobOptions(
            model=model,
            gpu="h200",
            dtype=dtype,
            optimizer=optimizer,
            zero=2,
            recompute="full",
            seq_len=512,
            micro_batch=2,
        )
        predict(build_job(options), profile=profile)
    names = {op.name.removesuffix("_backward") for op in asked}
    assert names >= set(FAMILY) - {
        "logits_to_fp32",
        "logits_grad_from_fp32",
        "log_softmax",
        "nll_loss",
        "cross_entropy_backward",
    }
    assert names <= set(FAMILY) | PLAIN, names - set(FAMILY) - PLAIN
    for op, rate in asked.items():
        name = op.name.removesuffix("_backward")
        table_name, backward = rates[rate]
        assert table_name == FAMILY.get(name, "add"), op
        if name in FAMILY and name not in ("linear_cross_entropy",):
            assert backward == (op.backward and name != "accumulate_grad"), op


def test_without_kernels_plain_torch_finds_points_too(asked: dict[Op, float]) -> None:
    profile, rates = faked()
    predict(build_job(JobOptions(model="llama-3.1-8b", gpu="h200", kernels_off="all", seq_len=512)), profile=profile)
    names = {op.name.removesuffix("_backward") for op in asked}
    assert names >= {"log_softmax", "nll_loss", "rms_norm", "traffic"} and "adam_step" not in names
    assert all(rates[rate][0] == FAMILY.get(op.name.removesuffix("_backward"), "add") for op, rate in asked.items())


@pytest.mark.parametrize(
    ("name", "device", "off", "expected"),
    [
        ("rms_norm", "cuda", "", "cuda"),
        ("rms_norm", "cuda:1", "", "cuda"),
        ("add", "cuda", "", "torch"),
        ("rms_norm", "cuda", "rms_norm,adam", "torch"),
        ("optimizer_step", "cuda", "all", "torch"),
        ("rms_norm", "cpu", "", "torch"),
    ],
)
def test_what_is_timed_is_what_the_runtime_runs(
    name: str, device: str, off: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROCAST_KERNELS_OFF", off)
    prepared: list[Any] = []
    checked: list[Any] = []

    class Entry:
        def prepare(self, *arguments: Any) -> Prepared:
            prepared.append(arguments)
            return Prepared(
                call=lambda: None, shape=(1, 1), ops=(), least_bytes=1, before=lambda: checked.append("before")
            )

    monkeypatch.setattr(measure, "kernel", lambda *_: Entry())
    monkeypatch.setattr(measure, "check", lambda name, which, call: checked.append((name, which)))
    found = measure._bandwidth(Task("bandwidth", name, "fp32", (4096,)), device)
    assert prepared == [(4096, "fp32", device, expected)] and found.before is not None
    assert checked == ([] if device == "cpu" else ["before", (name, expected)])


def test_a_profile_says_which_kernels_were_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate._kernels_off() == ""
    monkeypatch.setenv("ZEROCAST_KERNELS_OFF", "rotary,adam")
    assert calibrate._kernels_off() == "rotary, adam"
