"""Live bytes of small graphs, added up by hand."""

from __future__ import annotations

from estimator.job.kernels import kernels_in_use
from estimator.ops.graph import Graph
from estimator.ops.layers import Shape, block_graph, head_graph
from estimator.ops.liveness import unit_cost
from estimator.predict import flops_of
from tests.runtime import tiny


def mlp(activation: str = "gelu") -> Graph:
    """x[4, 8] -> linear 16 -> GELU -> linear 8, fp32: x and y are 128 B, h and a 256 B, weights 512 B each."""
    g = Graph("fp32", rows=4)
    g.input = g.activation(8)
    with g.call(g.input):
        h = g.linear(g.input, 8, 16, bias=False)
        g.output = g.linear(g.activate(h, 16, activation), 16, 8, bias=False)
    return g


def test_forward_keeps_what_backward_reads() -> None:
    cost = unit_cost(mlp(), "none")
    # kept: x (already there), h, a; y goes to the next unit
    assert cost.forward_memory.after == {"activations": 256 + 256 + 128}
    assert cost.forward_memory.peak == {"activations": 640}


def test_torchs_relu_keeps_its_output() -> None:
    """Which the product after it keeps in any case: h dies."""
    cost = unit_cost(mlp("relu"), "none")
    assert cost.forward_memory.after == {"activations": 256 + 128}
    assert cost.forward_memory.peak == {"temporaries": 256, "activations": 256}


def test_backward_by_hand() -> None:
    """grad y (128, already there) -> grad a (256) and grad W2 (512) -> grad h (256) -> grad x (128) and grad W1 (512)."""
    memory = unit_cost(mlp(), "none").backward_memory
    # first node: + grad a 256 + grad W2 512; nothing is dropped yet
    assert memory.peak == {"temporaries": 256 + 512}
    # left behind: minus x, h, a; grad x has taken the place of grad y
    assert memory.after == {"activations": -(128 + 256 + 256)}


def test_full_recomputation_keeps_the_input() -> None:
    cost = unit_cost(mlp(), "full")
    assert cost.forward_memory.after == {"activations": 128}
    # h and a are temporaries: at the last product h is gone (its last use was the GELU), a and y are there
    assert cost.forward_memory.peak == {"temporaries": 512}
    # replay makes h and a again (the last product only packs), then the first backward node adds 256 + 512
    assert cost.backward_memory.peak == {"activations": 512, "temporaries": 768}
    assert cost.backward_memory.after == {"activations": -128}
    assert [op.name for op in cost.recompute] == ["linear", "activation"]


def test_matmul_flops_of_a_llama_block() -> None:
    """2 x tokens x weights for every matrix, and half of the square for causal attention."""
    spec = tiny.LLAMA  # d 32, 4 heads of 8, 2 kv heads, F 84
    cost = unit_cost(block_graph(spec, Shape(2, 16, "bf16", False), window=0), "none")
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 84
    matmuls = [op for op in cost.forward if op.kind == "matmul"]
    assert sum(op.flops for op in matmuls) == 2 * 32 * weights
    (attention,) = [op for op in cost.forward if op.kind == "attention"]
    assert attention.flops == 4 * 2 * 4 * 8 * (16 * 17 / 2)
    backward = [op for op in cost.backward if op.kind == "matmul"]
    assert sum(op.flops for op in backward) == 2 * sum(op.flops for op in matmuls)


def test_sliding_window_counts_pairs_inside_it() -> None:
    spec = tiny.LLAMA
    cost = unit_cost(block_graph(spec, Shape(1, 16, "bf16", False), window=4), "none")
    (attention,) = [op for op in cost.forward if op.kind == "attention"]
    pairs = 1 + 2 + 3 + 4 * 13
    assert attention.flops == 4 * 4 * 8 * pairs


def test_logits_of_the_head() -> None:
    """bf16 logits (2 B), their fp32 copy (4 B), log-probabilities (4 B, kept): 61 words, 32 tokens."""
    cost = unit_cost(head_graph(tiny.LLAMA, Shape(2, 16, "bf16", False)), "none")
    n = 32 * 61
    assert cost.forward_memory.category_peak["logits_loss"] == 4 * n + 4 * n + 4  # and the loss itself
    assert cost.forward_memory.after["logits_loss"] == 4 * n + 4
    # backward: log-probabilities, their gradient and the logits' gradient, all fp32
    # (the first is there already; the loss itself is dropped before the second gradient is made)
    assert cost.backward_memory.category_peak["logits_loss"] == 4 * n + 4 * n - 4


def test_a_tied_head_leaves_its_weight_gradient_waiting() -> None:
    tied = unit_cost(head_graph(tiny.GPT, Shape(2, 16, "fp32", False)), "none").backward_memory
    assert tied.after["temporaries"] == 4 * (61 * 32 + 2 * 16 * 32)  # the table's gradient and grad x


ALL = kernels_in_use("hopper")


def test_norm_after_an_addition_as_one_kernel() -> None:
    """x and residual [4, 64] bf16 are 512 B each; 4 rows fill one block, so there is one fp32 partial row (256 B)."""
    g = Graph("bf16", rows=4, kernels=ALL)
    x = g.activation(64)
    g.input = g.activation(64)
    with g.call(x, g.input):
        y, total = g.add_norm(x, g.input, 64, rms=True, bias=False)
    g.output = g.add(total, y, 64)
    cost = unit_cost(g, "none")
    # both operands die (x is nobody's activation), the sum and an inverse root per row are kept, y dies, out goes on
    assert cost.forward_memory.after == {"temporaries": -512, "activations": 512 + 16 + 512 - 512}
    assert [op.name for op in cost.forward] == ["add_rms_norm", "add"]
    # the addition hands its one gradient to both; the norm makes one for x and residual together, beside the partial row
    # and the weight's gradient (128 B)
    assert cost.backward_memory.peak == {"temporaries": 512 + 256 + 128}
    # the sum and the inverse roots are gone, and so is the incoming gradient, whose bytes the new one has taken
    assert cost.backward_memory.after == {"activations": -(512 + 16)}


def test_the_loss_in_chunks_makes_all_gradients_in_the_forward_pass() -> None:
    """32 tokens, D 32, V 61, bf16: hidden states' gradient 2048 B, weight's 3904 B, logits in rows of 64."""
    shape = Shape(2, 16, "bf16", False, kernels=ALL)
    cost = unit_cost(head_graph(tiny.LLAMA, shape), "none")
    kept, logits, losses = 2048 + 3904, 32 * 64 * 2, 32 * 4
    assert cost.forward_memory.category_peak["logits_loss"] == kept + logits + losses + 4
    assert cost.forward_memory.after["logits_loss"] == kept + 4
    assert "logits_loss" not in cost.backward_memory.category_peak  # nothing new: what was kept is the gradients
    assert cost.backward_memory.after["logits_loss"] == -kept - 4
    assert [op.name for op in cost.forward] == [
        "rms_norm", "linear_cross_entropy", "head", "cross_entropy", "head_grad_input", "head_grad_weight",
    ]  # fmt: skip


def test_logits_that_become_their_gradient() -> None:
    """Without the chunked kernel the logits (61 x 2 B) are kept and overwritten; two fp32 per token beside them."""
    shape = Shape(2, 16, "bf16", False, kernels=ALL - {"linear_cross_entropy"})
    memory = unit_cost(head_graph(tiny.LLAMA, shape), "none")
    logits = 32 * 61 * 2
    assert memory.forward_memory.category_peak["logits_loss"] == logits + 2 * 32 * 4 + 32 * 4 + 4
    assert memory.forward_memory.after["logits_loss"] == logits + 2 * 32 * 4 + 4
    assert memory.backward_memory.category_peak.get("logits_loss", 0) == 0


def test_model_flops_are_the_same_whoever_computes_the_loss() -> None:
    fused, plain = (
        unit_cost(head_graph(tiny.LLAMA, Shape(2, 16, "bf16", False, kernels=k)), "none") for k in (ALL, frozenset())
    )
    assert flops_of([fused]) == flops_of([plain]) == (3 * 2 * 32 * 32 * 61, 0)
