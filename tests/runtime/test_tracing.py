"""What is forecast from a trace is what the runtime holds in training the same module; tracing the reference decoder says what its
own operators say."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.memory.reader import StepMemory
from estimator.ops.traced import traced_costs
from estimator.predict import lay_out, memory_of, predict
from estimator.time.operators import OperatorTimer
from estimator.time.profile import profile_for
from runtime import initialize
from runtime.context import input_memory, metered_by
from runtime.ledger import Ledger
from runtime.models import build
from runtime.storage import TORCH_DTYPES
from runtime.tracing import trace
from runtime.tracing.as_gpu import as_gpu
from tests.runtime import tiny
from tests.runtime.memory import MODELS
from tests.runtime.traced import CASES, Case, job, live_bytes, mlp, traced, words


def assert_same(got: StepMemory, want: StepMemory, rel: float = 1e-3) -> None:
    assert got.peak_bytes == pytest.approx(want.peak_bytes, rel=rel)
    assert got.peak_where == want.peak_where
    for category in got.category_peak_bytes.keys() | want.category_peak_bytes.keys():
        held = got.category_peak_bytes.get(category, 0)
        assert held == pytest.approx(want.category_peak_bytes.get(category, 0), rel=rel, abs=64), category
    for phase, n_bytes in want.phase_peak_bytes.items():
        assert got.phase_peak_bytes[phase] == pytest.approx(n_bytes, rel=rel, abs=64), phase


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_forecast_is_what_the_runtime_holds(name: str, stage: int) -> None:
    """One trace, several programs: ranks, offload, prefetch, accumulation."""
    case = CASES[name]()
    base = Strategy(zero_stage=stage, dtype=("bf16", "fp32", "fp16")[stage % 3], bucket_bytes=100_000)  # type: ignore[arg-type]
    model = traced(case, base)
    for strategy, world, n_micro in (
        (base, 4, 2),
        (replace(base, offload="optimizer", prefetch_depth=2), 2, 1),
        (replace(base, persistent_numel=100, optimizer="sgd"), 64, 3),
    ):
        one = job(model, strategy, world, n_micro)
        assert_same(memory_of(lay_out(one)), live_bytes(case, one))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_recomputation(name: str, recompute: str) -> None:
    case = CASES[name]()
    strategy = Strategy(zero_stage=3, recompute=recompute, recompute_every=2, grad_dtype="fp32")
    one = job(traced(case, strategy), strategy, 4, 1)
    assert_same(memory_of(lay_out(one)), live_bytes(case, one))
    kept = one.model.traced and traced_costs(one.model.traced)
    assert kept and any(cost.recompute for cost in kept) and not all(cost.recompute for cost in kept)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_on_a_cpu_it_is_what_training_with_data_holds(name: str) -> None:
    """What oneDNN keeps for recurrent layers is not known, which the forecast says."""
    case, strategy = CASES[name](), Strategy(zero_stage=0, dtype="fp32", recompute="full", optimizer="adamw")
    one = job(traced(case, strategy, tiny.gpu("cpu")), strategy, 1, 2, "cpu")
    if name == "lstm":
        assert any("oneDNN" in note for note in predict_notes(one))
        return
    assert_same(memory_of(lay_out(one)), _trained(case, one))


def predict_notes(one: Job) -> tuple[str, ...]:
    assert one.model.traced is not None
    return one.model.traced.notes


def _trained(case: Case, one: Job) -> StepMemory:
    """Live bytes of a real training step on this machine."""
    strategy = one.strategy
    engine = initialize(
        model=copy.deepcopy(case.module).train(), strategy=strategy, n_micro_batches=one.n_micro_batches
    )

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=TORCH_DTYPES[strategy.dtype] if x.is_floating_point() else x.dtype)

    def step() -> None:
        for _ in range(engine.n_micro_batches):
            with input_memory():
                batch = tree_map(zeros, case.batch)
            loss = case.loss(engine(batch[0]), batch[1]) if case.loss else engine(*batch)
            engine.backward(loss)
            del batch
            engine.step()

    step()
    ledger = Ledger()
    with metered_by(ledger):
        for storage in engine.storages:
            storage.meter_all()
        engine.meter_tables(ledger)
        ledger.enter("forward", "start of the step")
        ledger.start_step()
        step()
        return ledger.report()


@pytest.mark.parametrize("kernels_off", [(), ("all",)])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["gpt", "llama", "gemma2"])
def test_the_reference_decoder_traced(name: str, recompute: str, kernels_off: tuple[str, ...]) -> None:
    """Peak, categories and model FLOPs are those of the analytic operators."""
    spec = MODELS[name]
    strategy = Strategy(
        zero_stage=len(recompute) % 4, recompute=recompute, kernels_off=kernels_off, bucket_bytes=300_000
    )
    want = tiny.job(spec, strategy, world=4, micro_batch=4, seq_len=64)
    with torch.device("meta"):
        decoder = build(spec, 64)
    got = job(traced(Case(decoder, words(4, 64)), strategy), strategy, 4, 1)
    assert got.workload == want.workload
    assert_same(memory_of(lay_out(got)), memory_of(lay_out(want)))
    if kernels_off:  # the runtime's loss kernel multiplies for the gradient in the forward pass
        ours, theirs = predict(got), predict(want)
        assert ours.model_flops == pytest.approx(theirs.model_flops, rel=1e-6)
        assert ours.hfu == pytest.approx(theirs.hfu * theirs.step_s / ours.step_s, rel=1e-6)  # type: ignore[operator]
        assert ours.collective_bytes == theirs.collective_bytes


class Heads(nn.Module):
    """Attention as a user writes it, with dropout and RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.qkv = nn.Linear(64, 192, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return F.dropout(y, 0.5).sum()


@pytest.mark.parametrize(
    ("attention", "mask", "op", "kept_per_row"),
    [
        ("flash", False, "scaled_dot_product_flash_attention", 4),
        ("efficient", False, "scaled_dot_product_efficient_attention", 4),
        ("flash", True, "scaled_dot_product_efficient_attention", 4),
        ("math", False, "_safe_softmax", None),
    ],
)
def test_attention_is_the_kernel_that_cuda_takes(attention: Any, mask: bool, op: str, kept_per_row: int | None) -> None:
    """Kept, bf16, 2 x 32 rows of 64: input, norm's result and statistic, queries to values, attention's result and its log-sum-exp
    (four heads), dropout's mask of a byte each. Written out attention keeps scores as well."""
    batch: dict[str, Tensor] = {"x": torch.empty(2, 32, 64)}
    if mask:
        batch["mask"] = torch.ones(2, 4, 32, 32, dtype=torch.bool)
    strategy = Strategy(attention=attention)
    module = nn.Sequential()
    module.add_module("heads", Heads())
    model = trace(_Named(module.heads), batch, strategy=strategy, gpu=tiny.gpu())
    assert model.traced is not None
    (cost,) = traced_costs(model.traced)
    assert op in {o.name for o in cost.forward}
    kept = cost.forward_memory.after["activations"]
    rows = 2 * 32
    expected = rows * (64 * 2 + 64 * 2 + 4 + 192 * 2 + 64 * 2 + 64)
    if kept_per_row is None:
        assert kept > expected + 2 * 4 * 32 * 32 * 2
        return
    expected += rows * 4 * kept_per_row
    if mask:  # the batch's own and what is added to scores
        expected += 2 * 4 * 32 * 32 * (1 + 2)
    assert kept == pytest.approx(expected, abs=64)


class _Named(nn.Module):
    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, **batch: Tensor) -> Tensor:
        return self.heads(**batch)


def test_an_lstm_keeps_what_cudnn_does() -> None:
    """One cell, fp32, 5 steps of 2 rows: input 8 and result 16 wide, states, and six hidden sizes a step; weights are no copies.
    FLOPs: two products of 4 x 16 rows a step."""
    module = _First(nn.LSTM(8, 16))
    model = trace(module, torch.empty(5, 2, 8), strategy=Strategy(dtype="fp32"), gpu=tiny.gpu(), samples=2)
    assert model.traced is not None and model.traced.micro_batch_size == 2
    (cost,) = traced_costs(model.traced)
    rows, states = 5 * 2, 2 * 16
    kept = rows * (8 + 16 + 6 * 16) + 2 * states
    assert cost.forward_memory.after["activations"] == pytest.approx(4 * kept, abs=300)
    assert sum(op.flops for op in cost.forward if op.kind == "matmul") == 2 * rows * 64 * (8 + 16)
    assert any("cuDNN" in note for note in model.traced.notes)


class _First(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0].sum()


class _Into(nn.Module):
    """Looks rows up and multiplies them into a place that is there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        with torch.no_grad():
            torch.mm(x.T, x, out=x.new_empty(8, 8))
        return x.sum()


def test_bytes_of_a_look_up_and_flops_into_a_place() -> None:
    """fp32, 6 rows of 8: read and written, with 6 numbers of 8 bytes; a product of 8 x 6 by 6 x 8."""
    model = trace(_Into(), torch.zeros(6, dtype=torch.int64), strategy=Strategy(dtype="fp32"), gpu=tiny.gpu())
    assert model.traced is not None
    ops = {op.name: op for op in traced_costs(model.traced)[0].forward}
    assert ops["embedding"].n_bytes == 2 * 6 * 8 * 4 + 6 * 8
    assert ops["mm"].shape == (1, 8, 8, 6) and ops["mm"].flops == 2 * 8 * 8 * 6


def test_flops_of_convolutions() -> None:
    """3 to 8 channels, 3 x 3, 16 x 16 places, 2 images: 2 * 2 * 256 * 8 * 27; backward only for the weights of the first."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    images = torch.empty(2, 3, 16, 16), torch.empty(())
    strategy = Strategy(dtype="fp32")
    model = trace(module, images, lambda y, _: y.sum(), strategy=strategy, gpu=tiny.gpu())
    assert model.traced is not None
    first, second = traced_costs(model.traced)
    flops = 2.0 * 2 * 256 * 8 * 27
    assert [(op.kind, op.flops) for op in first.forward if "conv" in op.name] == [("matmul", flops)]
    assert [op.flops for op in first.backward if op.kind == "matmul"] == [flops]
    assert [op.kind for op in second.forward if "conv" in op.name] == ["elementwise"]  # one channel for each group
    assert len([op for op in second.backward if "convolution_grad" in op.name]) == 2


def test_the_users_module_is_left_alone() -> None:
    module = mlp()
    before = {name: (p.data_ptr(), p.dtype, p.grad) for name, p in module.named_parameters()}
    traced(CASES["mlp"]()._replace(module=module), Strategy())
    assert before == {name: (p.data_ptr(), p.dtype, p.grad) for name, p in module.named_parameters()}
    assert not module[0]._forward_hooks
    with as_gpu("flash"):
        pass
    x = torch.ones(2, 2, 4, 8, device="meta")
    assert F.scaled_dot_product_attention(x, x, x).is_meta  # torch's own again


def test_one_layer_alone_is_one_unit() -> None:
    model = trace(nn.Linear(8, 4), (torch.empty(3, 8), torch.zeros(3, dtype=torch.int64)), F.cross_entropy)
    assert model.traced is not None
    assert [unit.name for unit in model.traced.units] == ["module"]


class Reads(nn.Module):
    """Asks a tensor for its value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).sum()
        return y if y.item() > 0 else -y


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum()


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(x)).sum()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((Reads(), torch.empty(2, 8)), r"module Reads cannot be traced without data: .*item"),
        ((Frozen(), torch.empty(2, 8)), "no parameter of the model requires a gradient"),
        ((Backwards(), torch.empty(2, 8)), r"the model ran loss of b where its program has forward of a"),
        ((mlp(), torch.empty(2, 64)), r"loss is a tensor of shape \[2, 10\]; allowed: a scalar"),
        (
            (mlp(), torch.empty(2, 64), F.cross_entropy),
            r"batch is not a pair with a loss; allowed: \(inputs, targets\)",
        ),
        ((mlp(), (torch.empty(2, 63), torch.zeros(2)), F.cross_entropy), "cannot be traced without data: .*"),
        ((Reads(), ()), "cannot be traced without data: .*missing 1 required positional argument"),
    ],
)
def test_mistakes(arguments: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        trace(*arguments)
    assert "\n" not in str(error.value)


def test_strategies_that_traces_are_not_made_for() -> None:
    case = CASES["mlp"]()
    with pytest.raises(InputError, match="recompute is 'norms' for a traced module"):
        traced(case, Strategy(recompute="norms"))
    with pytest.raises(InputError, match="attention is 'eager' for a traced module"):
        traced(case, Strategy(attention="eager"))


def test_a_hugging_face_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=1000)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    case, strategy = Case(model, {"input_ids": ids, "labels": ids}), Strategy(zero_stage=3)
    one = job(traced(case, strategy), strategy, 4, 1)
    assert_same(memory_of(lay_out(one)), live_bytes(case, one))
    assert [unit.name for unit in lay_out(one).layout.units][:3] == [
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.0",
    ]


def test_time_is_that_of_analytic_operators() -> None:
    """Of a decoder in plain torch, large enough for operators to take longer than launching them: products and attention exactly. Of all
    else torch has more operators, which move more bytes, than the functions that the analytic ones stand for."""
    spec = replace(MODELS["llama"], d_model=2048, n_heads=16, n_kv_heads=4, head_dim=128, d_ff=5632, vocab_size=32000)
    spec = replace(spec, max_positions=2048)
    strategy = Strategy(zero_stage=2, kernels_off=("all",), recompute="full")
    want = tiny.job(spec, strategy, world=8, micro_batch=2, seq_len=2048)
    with torch.device("meta"):
        decoder = build(spec, 2048)
    got = job(traced(Case(decoder, words(2, 2048)), strategy), strategy, 8, 1)
    timer = OperatorTimer(want.cluster.gpu, profile_for(want.cluster.gpu, None)[0])
    for phase in ("forward", "backward"):
        ours, theirs = (
            sum(
                timer.seconds(op)
                for cost in lay_out(one).costs
                for op in cost.ops_of(phase)
                if op.kind in ("matmul", "attention")
            )
            for one in (got, want)
        )
        assert ours == pytest.approx(theirs, rel=0.01), phase
        assert 1.0 <= predict(got).time_parts_s[phase] / predict(want).time_parts_s[phase] <= 1.5
