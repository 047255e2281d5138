"""Operators as other frameworks run them: bytes against the same code on tensors without data, operators and sizes by hand."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.job.framework import FRAMEWORKS, AttentionKernel
from estimator.ops.cost import UnitCost
from estimator.ops.layers import Shape, block_graph, head_graph, unit_costs
from estimator.ops.liveness import unit_cost
from estimator.ops.style import PLAIN, Style, compiled_recompute, style_of
from estimator.ops.tape import Ref, Tape
from estimator.ops.written_out import cross_entropy_in_place, gated_activation, rms_norm, rotary
from estimator.predict import flops_of, lay_out, predict
from estimator.sharding.units import Unit
from tests.runtime import experts, tiny

ROWS, WIDTH = 64, 128


class Live(TorchDispatchMode):
    """Bytes of storages that were made inside and are still there, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is None or storage._cdata in known or storage._cdata in self._seen:
                continue
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _gone(self, key: int, n_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= n_bytes


class Ran(NamedTuple):
    """Bytes beside the inputs: most in the forward pass, after it, and most in the backward pass beside these and the gradient
    that it begins with, which the caller holds to its end."""

    most: int
    after: int
    backward: int
    grad: int

    def check(self, cost: UnitCost) -> None:
        assert total(cost.forward_memory.peak) == self.most and total(cost.forward_memory.after) == self.after
        assert total(cost.backward_memory.peak) <= self.backward <= total(cost.backward_memory.peak) + self.grad


def run(code: Callable[..., Tensor], inputs: list[Tensor]) -> Ran:
    with Live() as live:
        out = code(*inputs)
        most, after = live.most, live.now
        live.most = 0
        torch.autograd.backward(out, torch.empty_like(out))
    grad_bytes = out.numel() * out.element_size()
    return Ran(most, after, live.most - after - grad_bytes, grad_bytes)


def tensors(n: int, width: int = WIDTH) -> list[Tensor]:
    made = [torch.empty(ROWS, width, dtype=torch.bfloat16, device="meta") for _ in range(n)]
    return [x.requires_grad_() for x in made]


def cost(record: Callable[..., Ref], n_inputs: int, *args: Any, width: int = WIDTH) -> UnitCost:
    """Of what ``record`` records of ``n_inputs`` inputs, all of which others hold."""
    tape = Tape("bf16", ROWS)
    held = [tape.activation(width) for _ in range(n_inputs)]
    tape.input = held[0]
    with tape.call(*held):
        tape.output = record(tape, *held, *args)
        for ref in held:
            tape.tensors[ref].last_use = 10**6
    for node in tape.nodes:
        node.param_grad_bytes = 0  # parameters stand still in ``run``
    return unit_cost(tape, "none")


def total(held: dict[str, int]) -> int:
    return sum(held.values())


def test_rms_norm_written_out() -> None:
    """Keeps an fp32 copy of what goes in and, for its weight's gradient, what is normalised."""
    weight = nn.Parameter(torch.empty(WIDTH, dtype=torch.bfloat16, device="meta"))

    def code(x: Tensor) -> Tensor:  # transformers' ``LlamaRMSNorm``
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * wide.to(x.dtype)

    ran, n = run(code, tensors(1)), ROWS * WIDTH
    assert ran.after == 4 * n + 2 * n + 2 * n + 4 * ROWS  # copy, normalised, result, root
    ran.check(cost(rms_norm, 1, ROWS, WIDTH))


def test_gated_activation_in_two_kernels() -> None:
    ran = run(lambda gate, up: nn.functional.silu(gate) * up, tensors(2))
    assert ran.after == 2 * 2 * ROWS * WIDTH  # the activation and the product
    ran.check(cost(gated_activation, 2, WIDTH, "silu"))
    kept = [
        unit_cost(block_graph(tiny.LLAMA, Shape(2, 16, "bf16", False, style=Style(fused_activation=on)), 0), "none")
        for on in (False, True)
    ]
    assert total(kept[0].forward_memory.after) - total(kept[1].forward_memory.after) == 2 * 32 * 84


def test_rotation_written_out_keeps_nothing() -> None:
    cos, sin = (torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="meta") for _ in range(2))

    def code(x: Tensor) -> Tensor:
        half = WIDTH // 2
        return x * cos + torch.cat((-x[:, half:], x[:, :half]), -1) * sin

    ran = run(code, tensors(1))
    assert ran.after == 2 * ROWS * WIDTH
    ran.check(cost(rotary, 1, WIDTH))


class VocabParallel(torch.autograd.Function):
    """Megatron-LM's ``_VocabParallelCrossEntropy`` on one rank (megatron/core/tensor_parallel/cross_entropy.py)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        logits_max = torch.max(logits, dim=-1)[0]
        logits -= logits_max.unsqueeze(-1)
        mask = (target < 0) | (target >= logits.shape[-1])
        place = target.clone() - 0
        rows = torch.arange(0, logits.shape[0], device=logits.device)
        predicted = logits[rows, place].clone().contiguous()
        torch.exp(logits, out=logits)
        sums = logits.sum(dim=-1)
        loss = torch.log(sums) - predicted
        logits.div_(sums.unsqueeze(-1))
        ctx.save_for_backward(logits, mask, place)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        softmax, _, _ = ctx.saved_tensors
        return softmax.mul_(grads[0].unsqueeze(-1)), None


def test_cross_entropy_in_place_of_an_fp32_copy() -> None:
    """61 logits of 64 tokens: bf16 (2 B) and, kept, fp32 (4 B); backward makes a bf16 gradient beside that."""
    target = torch.empty(ROWS, dtype=torch.int64, device="meta")
    ran, n = run(lambda x: VocabParallel.apply(x.float(), target), tensors(1, 61)), ROWS * 61
    assert ran.after == 4 * n + 9 * ROWS + 4 * ROWS  # softmax; masks and places; losses
    ran.check(cost(cross_entropy_in_place, 1, 61, width=61))


def block(style: Style = PLAIN, recompute: str = "none", *, spec: Any = tiny.LLAMA, n_tensor: int = 1) -> UnitCost:
    shape = Shape(2, 16, "bf16", False, style=style, n_tensor=n_tensor, splits_tokens=n_tensor > 1)
    return unit_cost(block_graph(spec, shape, window=0), recompute)


def test_megatrons_unfused_attention() -> None:
    """``5 a s^2 b`` bytes of Korthikanti et al. 2022 (section 4.1): the softmax's result (2), what of it is dropped (1) and what is
    left (2); with recomputation of the core none. And a byte for everything added to the residual stream, twice."""
    style = style_of(Strategy(framework="megatron", attention="eager"))
    scores, masks = 5 * (2 * 4 * 16 * 16), 2 * 32 * 32
    flash = block(style_of(Strategy(framework="megatron")))
    kept = [total(c.forward_memory.after) for c in (block(style), block(style, "core_attention"), flash)]
    repeats = 2 * (32 - 16) * 32 * 2  # key and value heads for every query head
    assert kept[0] - kept[1] == scores + repeats
    lse = 4 * 2 * 4 * 16
    assert kept[0] - kept[2] == scores + masks + repeats - lse
    again = [op.name for op in block(style, "core_attention").recompute]
    assert again == ["repeat_heads", "repeat_heads", "scores", "scale_mask_softmax", "dropout", "context", "heads_last"]
    ops = {op.name: op for op in block(style).forward}
    assert ops["scores"].shape == (8, 16, 16, 8) and ops["scores"].flops == 2 * 2 * 4 * 16 * 16 * 8
    assert ops["scores"].useful == pytest.approx(17 / 32)  # half of the square and the diagonal


@pytest.mark.parametrize(
    "recompute, sequence_parallel, in_sbh",
    [("none", False, 10 + 24 / 8), ("none", True, 34 / 8), ("core_attention", True, 34 / 8), ("full", False, 2)],
)
def test_bytes_per_layer_of_korthikanti(recompute: str, sequence_parallel: bool, in_sbh: float) -> None:
    """Korthikanti et al. 2022, table 2, its 22B model with t = 8: ``sbh (10 + 24 / t + 5 a s / (h t))`` and so on."""
    a, h, s, b, t = 64, 6144, 2048, 4, 8
    spec = replace(
        tiny.GPT, name="22b", d_model=h, n_heads=a, n_kv_heads=a, head_dim=h // a, d_ff=4 * h, max_positions=s,
        position_rows=s,
    )  # fmt: skip
    style = style_of(Strategy(framework="megatron", attention="eager"))
    shape = Shape(b, s, "fp16", False, style=style, n_tensor=t, splits_tokens=sequence_parallel)
    kept = total(unit_cost(block_graph(spec, shape, window=0), recompute).forward_memory.after)
    scores = 5 * a * s * s * b // t if recompute == "none" else 0
    statistics = 2 * 2 * 4 * s * b  # mean and root of two norms' rows, which the paper leaves out
    assert 0 <= kept - (in_sbh * s * b * h + scores) <= statistics


def test_what_recomputes_runs_to_its_end() -> None:
    """Megatron-LM's and DeepSpeed's own checkpoints do; torch's ends before the last product."""
    ends = block(style_of(Strategy(framework="megatron")), "full").recompute[-1]
    assert ends.name == "add" and block(recompute="full").recompute[-1].name != "add"


def test_joined_projections_are_one_product() -> None:
    ops = [op for op in block(style_of(Strategy(framework="megatron"))).forward if op.kind == "matmul"]
    assert [op.shape for op in ops] == [(1, 32, 64, 32), (1, 32, 32, 32), (1, 32, 168, 32), (1, 32, 32, 84)]
    apart = [op for op in block().forward if op.kind == "matmul"]
    assert sum(op.flops for op in ops) == sum(op.flops for op in apart)


def test_a_gradient_that_a_product_adds_itself() -> None:
    """Reads and writes the buffer in place of writing, reading and adding: per element 4 bytes of 6 + 2 (all bf16)."""
    fused, apart = block(Style(fused_wgrad=True)), block()
    moved = [sum(op.n_bytes for op in c.backward) for c in (fused, apart)]
    weights = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 84
    assert moved[1] - moved[0] == (6 - 2) * weights
    assert not any(op.name == "accumulate_grad" for op in fused.backward)


# ---- fp8 ------------------------------------------------------------------------------------------------------------

WIDE = replace(tiny.LLAMA, d_ff=96)


def test_fp8_products_read_half_and_their_operands_are_cast() -> None:
    eager, compiled = block(Style(fp8="torchao"), spec=WIDE), block(Style(fp8="torchao", compiled=True), spec=WIDE)
    plain = block(spec=WIDE)
    matmuls = [[op for op in c.forward if op.kind == "matmul"] for c in (eager, plain)]
    assert {op.dtype for op in matmuls[0]} == {"fp8"}
    assert [op.flops for op in matmuls[0]] == [op.flops for op in matmuls[1]]
    assert matmuls[0][0].n_bytes == 32 * 32 + 32 * 32 + 2 * 32 * 32
    casts = [op for op in (*compiled.forward, *compiled.backward) if op.name.startswith("cast_")]
    # q, k, v share one cast input, gate and up another; out and down have their own
    assert [op.name for op in casts].count("cast_input") == 4 and [op.name for op in casts].count("cast_weight") == 7
    weight = next(op for op in casts if op.name == "cast_weight")
    assert weight.n_bytes == (2 + 2 + 1) * 32 * 32  # magnitudes, then read and written
    assert sum(op.n_bytes for op in eager.forward) > sum(op.n_bytes for op in compiled.forward)
    # torchao keeps operands as they were
    assert eager.forward_memory.after == plain.forward_memory.after


def test_transformer_engine_keeps_inputs_in_fp8() -> None:
    te, plain = block(Style(fp8="te"), spec=WIDE), block(spec=WIDE)
    # of q, k, v's (three copies), out's, gate's and up's (two) and down's inputs 1 B each; of bf16 inputs, 2 B, those are gone that nobody
    # else keeps: two norms' results and the MLP's inner one
    fp8 = 32 * (3 * 32 + 32 + 2 * 32 + 96)
    assert total(te.forward_memory.after) - total(plain.forward_memory.after) == fp8 - 2 * 32 * (2 * 32 + 96)
    joined = block(Style(fp8="te", joined_columns=True), spec=WIDE)
    assert total(te.forward_memory.after) - total(joined.forward_memory.after) == 32 * (2 * 32 + 32)


def test_transformer_engines_experts_multiply_in_fp8() -> None:
    """Of gate's and up's rows one fp8 copy is kept, of down's another, in place of 2 B each."""
    spec = replace(experts.MIXTRAL, experts=replace(experts.MIXTRAL.experts, d_ff=48), d_ff=48)  # type: ignore[type-var]
    graphs = [
        block_graph(spec, Shape(2, 16, "bf16", False, style=Style(fp8=fp8, joined_columns=True)), 0, spec.experts)
        for fp8 in ("te", "torchao", None)
    ]
    grouped = [[op for node in g.nodes for op in node.forward if op.name == "grouped"] for g in graphs]
    assert [{op.dtype for op in ops} for ops in grouped] == [{"fp8"}, {"bf16"}, {"bf16"}]
    slots, weight = 64, 4 * 32 * 48
    assert grouped[0][0].n_bytes == slots * 32 + weight + 2 * slots * 48
    kept = [
        sum(g.tensors[ref].n_bytes for n in g.nodes if n.forward[-1].name == "grouped" for ref in n.aux) for g in graphs
    ]
    assert kept == [slots * 32 + slots * 48, 0, 0]


def test_weights_are_cast_once_in_all_micro_batches_and_their_copies_stay() -> None:
    def job(matmul_dtype: str, n_micro_batches: int, gpu: str = "hopper") -> Job:
        strategy = Strategy(framework="megatron", matmul_dtype=matmul_dtype)  # type: ignore[arg-type]
        made = tiny.job(WIDE, Strategy(), n_micro_batches=n_micro_batches)
        chip = replace(made.cluster.gpu, arch=gpu, peak_flops={**made.cluster.gpu.peak_flops, "fp8": 2e15})
        return replace(made, strategy=strategy, cluster=replace(made.cluster, gpu=chip))

    one, four = (lay_out(job("fp8", n)).costs[1] for n in (1, 4))
    casts = [sum(op.n_bytes for op in c.forward if op.name == "cast_weight") for c in (one, four)]
    assert casts[0] == pytest.approx(4 * casts[1], abs=16)
    weights = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 96)  # of two blocks
    for gpu, copies in (("hopper", 2), ("blackwell", 1)):
        held = [sum(b.n_bytes for b in lay_out(job(d, 1, gpu)).tables) for d in ("fp8", "model")]
        assert held[0] - held[1] == copies * weights


def test_fp8_is_refused_where_it_is_not() -> None:
    with pytest.raises(InputError, match="matmul_dtype is 'fp8', for which test-ampere has no fast path"):
        tiny.job(tiny.LLAMA, Strategy(matmul_dtype="fp8", framework="fsdp2"), arch="ampere")


def test_layers_of_odd_widths_and_heads_stay_as_they_are() -> None:
    ops = [op for op in block(Style(fp8="torchao")).forward if op.kind == "matmul"]  # d_ff 84
    assert [op.dtype for op in ops] == ["fp8"] * 4 + ["bf16"] * 3
    head = unit_cost(head_graph(WIDE, Shape(2, 16, "bf16", False, style=Style(fp8="torchao"))), "none")
    assert "fp8" not in {op.dtype for op in head.forward}


# ---- torch.compile --------------------------------------------------------------------------------------------------


def test_a_compiled_block_keeps_what_products_make() -> None:
    """Of a Llama block: input, sum after attention, q, k, v, attention's result, gate and up, and rows' statistics."""
    job = tiny.job(tiny.LLAMA, Strategy(framework="fsdp2", compile=True))
    cost = lay_out(job).costs[1]
    rows = 32
    kept = 2 * rows * (32 + 32 + 32 + 16 + 16 + 32 + 84 + 84)
    statistics = 4 * rows * 2 + 4 * rows * 4  # norms', and attention's for every head
    # the block's output is there in place of a kept sum's
    assert cost.forward_memory.after["activations"] == kept + statistics
    eager = lay_out(replace(job, strategy=replace(job.strategy, compile=False))).costs[1]
    assert total(cost.forward_memory.after) < total(eager.forward_memory.after)
    for one, other in ((cost.forward, eager.forward), (cost.backward, eager.backward)):
        assert sum(op.launches for op in one) < sum(op.launches for op in other)
        assert sum(op.n_bytes for op in one) < sum(op.n_bytes for op in other)
    assert not cost.recompute  # one graph makes again what it does not keep
    assert predict(job).step_s < predict(replace(job, strategy=replace(job.strategy, compile=False))).step_s


def test_what_compiled_blocks_recompute() -> None:
    assert compiled_recompute("none") == "activation,norms"
    assert compiled_recompute("mlp") == "mlp,norms"
    assert compiled_recompute("full") == "full" and compiled_recompute("selective") == "selective"


def test_parts_that_a_framework_does_not_have() -> None:
    job = tiny.job(tiny.LLAMA, Strategy(framework="fsdp2"))
    with pytest.raises(
        InputError, match="recompute is 'norms' with framework fsdp2, where norms are several operators"
    ):
        replace(job, strategy=Strategy(framework="fsdp2", recompute="norms"))
    assert replace(job, strategy=Strategy(framework="fsdp2", recompute="norms", compile=True))
    assert replace(job, strategy=Strategy(framework="megatron", recompute="norms"))


@pytest.mark.parametrize("framework", list(FRAMEWORKS))
def test_what_is_never_more(framework: str) -> None:
    """Recomputation and compilation never keep more, kernels that make all scores never less, and FLOPs are the model's throughout."""
    unit = Unit("blocks.0", "block", ())
    for spec, attention in itertools.product(tiny.ALL, get_args(AttentionKernel)):
        strategy = Strategy(framework=framework, attention=attention)  # type: ignore[arg-type]
        shape = Shape(2, 16, "bf16", False, style=style_of(strategy))

        def cost(recompute: str, shape: Shape = shape, spec: Any = spec) -> UnitCost:
            return unit_costs(spec, (unit,), shape, recompute)[0]

        kept = {
            recompute: total(cost(recompute).forward_memory.after)
            for recompute in ("none", "core_attention", "attention", "core_attention,mlp", "attention,mlp", "full")
        }
        by_bytes = [kept[name] for name in ("full", "attention,mlp", "core_attention,mlp", "none")]
        assert by_bytes == sorted(by_bytes), (spec.name, attention, kept)
        assert kept["attention"] <= kept["none"] and kept["core_attention"] <= kept["none"]
        flash = shape._replace(style=shape.style._replace(attention="flash"))
        assert total(cost("none", flash).forward_memory.after) <= kept["none"]
        assert flops_of([cost("none", flash)])[0] == pytest.approx(flops_of([cost("none")])[0])
        if framework == "zerocast":
            continue
        compiled = shape._replace(style=shape.style._replace(compiled=True))
        for recompute, n_bytes in kept.items():
            assert total(cost(recompute, compiled).forward_memory.after) <= n_bytes, (spec.name, attention, recompute)
