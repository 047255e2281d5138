"""Head and cross-entropy in chunks, on the CPU shim against all logits at once in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.linear_cross_entropy import cost
from runtime.context import logits_memory, metered_by
from runtime.kernels import registry
from runtime.kernels.cross_entropy import LossOptions, cross_entropy
from runtime.kernels.linear_cross_entropy import (
    _chunk_buffer,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from runtime.ledger import Ledger
from tests.runtime.kernels.checks import DTYPES, needs_shim, on_shim

pytestmark = needs_shim

STEP = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def case(
    dtype: torch.dtype, rows: int = 23, width: int = 16, vocab: int = 101
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    h, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, width), (vocab, width), (vocab,))
    )
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[1::4] = -100
    return h, weight, bias, labels


def truth(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions) -> Tensor:
    logits = F.linear(h, weight, bias)
    loss = F.cross_entropy(
        logits, labels, reduction=options.reduction, ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
    )  # fmt: skip
    z = torch.where(labels != options.ignore_index, logits.logsumexp(-1), 0).square().sum() * options.z_loss
    return loss + (z / (labels != options.ignore_index).sum() if options.reduction == "mean" else z)


def near(got: Tensor, right: Tensor, dtype: torch.dtype, what: str) -> None:
    """Within a few roundings of ``dtype``, of the largest: products in between are torch's and round too."""
    error = (got.double() - right).abs().max() / right.abs().max()
    assert got.shape == right.shape and error <= 4 * STEP[dtype], f"{what}: {error}"


def in_torch(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """As one would write it: ``h`` ``[B, S, D]``."""
    with logits_memory():
        logits = F.linear(h, weight, bias).flatten(0, 1).float()
        return F.cross_entropy(logits, labels.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(dtype: torch.dtype, reduction: str, bias: bool) -> None:
    options = LossOptions(label_smoothing=0.1, z_loss=1e-3, reduction=reduction)  # type: ignore[arg-type]
    h, weight, b, labels = case(dtype)
    leaves = [t.requires_grad_() for t in ((h, weight, b) if bias else (h, weight))]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    loss64 = truth(wide[0], wide[1], wide[2] if bias else None, labels, options)
    right = torch.autograd.grad(loss64 * 3, wide)
    for chunk in (1, 8, 23, 100):
        with on_shim() as record:
            loss = linear_cross_entropy(h, weight, b if bias else None, labels, options, chunk)
            grads = torch.autograd.grad(loss * 3, leaves)
        near(loss, loss64, dtype, "loss")
        for what, got, expected in zip(("h", "weight", "bias"), grads, right, strict=False):
            near(got, expected, dtype, what)
        used = [kernel.name for kernel, _ in record.launches]
        assert used.count("row_losses_and_gradients") == -(-23 // chunk)


@pytest.mark.parametrize("off", [(), ("linear_cross_entropy",), ("linear_cross_entropy", "cross_entropy")])
def test_whoever_does_it(off: tuple[str, ...]) -> None:
    """In chunks, by ``cross_entropy`` on all logits, or in torch: same arguments, same result."""
    h, weight, bias, labels = case(torch.float32, rows=24)
    labels = labels.clamp(min=0).view(2, 12)
    leaves = [t.requires_grad_() for t in (h.view(2, 12, 16), weight, bias)]
    right = in_torch(*leaves, labels)
    with on_shim() as record, registry.switched_off(*off):
        loss = linear_cross_entropy(*leaves, labels)
        grads = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(grads, torch.autograd.grad(right, leaves))
    used = {kernel.name for kernel, _ in record.launches}
    own = [
        {"count_rows", "row_losses_and_gradients", "sum_rows", "scale_in_place"},
        {"count_rows", "row_losses", "sum_rows", "row_gradients"},
        set(),
    ]
    assert used == own[len(off)]


def metered(
    loss: Callable[..., Tensor], dtype: torch.dtype, bias: bool
) -> list[tuple[int, str, int] | tuple[str, str]]:
    """Every allocation (bytes, category, bytes) and its end (bytes, category, minus bytes) of forward and backward."""
    shapes = ((2, 1500, 8), (1003, 8)) + ((1003,),) * bias
    leaves = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
    labels = torch.zeros(2, 1500, dtype=torch.int64, device="meta")
    with metered_by(ledger := Ledger()):
        for leaf in (*leaves, labels):
            ledger.adopt(leaf, "activations")
        ledger.enter("forward", "head")
        ledger.open_scope()
        value = loss(leaves[0], leaves[1], leaves[2] if bias else None, labels)
        ledger.close_scope()
        ledger.enter("backward", "head")
        value.backward()
    events = [e if isinstance(e[0], str) else (e[0].n_bytes, e[0].category, e[1]) for e in ledger._log.entries]
    return events[2 + len(leaves) :]  # after adoption and "forward"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_reference_allocates_what_torch_does(dtype: torch.dtype, bias: bool) -> None:
    assert metered(linear_cross_entropy_reference, dtype, bias) == metered(in_torch, dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_allocations_in_chunks(dtype: torch.dtype, bias: bool) -> None:
    """3,000 rows in chunks of 1,024; what lives on are the gradients and the loss; nothing else is ever allocated."""
    size = dtype.itemsize
    events = metered(linear_cross_entropy, dtype, bias)
    backward = events.index(("backward", "head"))
    born = [n for n, _, delta in events[:backward] if delta > 0]  # type: ignore[misc]
    chunk, gradients = 1024 * 1024 * (2 if size == 2 else 4), [3000 * 8 * size, 1003 * 8 * size]
    sums = [4 * 1003] if bias else []
    assert born == [*gradients, *sums, chunk, 4 * 3000, 8, *sums * 2, 4]
    assert {e[1] for e in events[:backward]} == {"logits_loss"}
    kept = [*gradients, *sums, 4] + [8] * (dtype == torch.float16)
    assert sum(e[2] for e in events[:backward]) == sum(kept)  # type: ignore[misc]
    first = [e for e in events[backward + 1 :] if e[2] > 0]  # type: ignore[misc]
    seed, rounded = (4, "temporaries", 4), (1003 * 2, "logits_loss", 1003 * 2)
    factors = [(4, "logits_loss", 4)] * 2 if dtype == torch.float16 else []
    assert first == [seed, *factors, *([rounded] if bias and size == 2 else [])]


def test_allocations_of_the_loss_kernel_alone() -> None:
    with registry.switched_off("linear_cross_entropy"):
        events = metered(linear_cross_entropy, torch.bfloat16, False)
    backward, logits, row = events.index(("backward", "head")), 3000 * 1003 * 2, 4 * 3000
    assert [e[0] for e in events[:backward]] == [logits, row, 8, row, row, 4, row]  # the last one: losses, gone
    assert {e[1] for e in events[:backward]} == {"logits_loss"}
    products = [e[0] for e in events[backward + 1 :] if e[2] > 0]  # type: ignore[misc]
    assert products == [4, 1003 * 8 * 2, 3000 * 8 * 2]  # the logits' gradient is where the logits were


def test_fp16_survives_a_loss_scale() -> None:
    """Gradients of a mean over many rows would vanish in fp16 before the loss scale reaches them."""
    h, weight, _, labels = case(torch.float16, rows=512, vocab=2003)
    leaves = [h.requires_grad_(), weight.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    right = torch.autograd.grad(truth(*wide, None, labels, LossOptions()) * 1024, wide)
    with on_shim():
        loss = linear_cross_entropy(h, weight, None, labels, chunk_rows=256)
        grads = torch.autograd.grad(loss * 1024, leaves)
    near(grads[0], right[0], torch.float16, "h")
    never = torch.ones(2003, dtype=torch.bool)
    never[labels[labels >= 0]] = False  # tokens whose gradients are sums of small probabilities only
    near(grads[1][never], right[1][never], torch.float16, "weight")


def test_only_what_is_wanted_is_computed() -> None:
    h, weight, bias, labels = case(torch.bfloat16)
    with on_shim() as record, torch.no_grad():
        loss = linear_cross_entropy(h.requires_grad_(), weight, bias, labels, chunk_rows=16)
    assert {kernel.name for kernel, _ in record.launches} == {"count_rows", "row_losses", "sum_rows"}
    near(loss, truth(h.double(), weight.double(), bias.double(), labels, LossOptions()), torch.bfloat16, "loss")
    with on_shim() as record:  # a frozen head
        linear_cross_entropy(h, weight, bias, labels).backward()
    assert [kernel.name for kernel, _ in record.launches].count("scale_in_place") == 1
    assert weight.grad is None and h.grad is not None


def test_second_backward_pass_fails() -> None:
    h, weight, _, labels = case(torch.float32)
    with on_shim():
        loss = linear_cross_entropy(h.requires_grad_(), weight, None, labels)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_no_rows_and_no_rows_that_count() -> None:
    for rows in (0, 5):
        h, weight, bias, _ = case(torch.bfloat16, rows=rows)
        leaves = [t.requires_grad_() for t in (h, weight, bias)]
        with on_shim():
            loss = linear_cross_entropy(h, weight, bias, torch.full((rows,), -100))
            grads = torch.autograd.grad(loss, leaves)
        assert loss.isnan(), "as in torch, the mean of nothing"
        assert all(torch.equal(g, torch.zeros_like(leaf)) for g, leaf in zip(grads, leaves, strict=True))


def test_rows_of_an_odd_vocabulary_start_at_cache_lines() -> None:
    buffer = _chunk_buffer(5, 50_257, torch.empty(0, dtype=torch.bfloat16))
    assert buffer.shape == (5, 50_257) and buffer.stride() == (50_304, 1)


def test_memory_on_a_gpu() -> None:
    """``meta`` stands for it: what is kept is the gradients, and logits are a chunk."""
    h = torch.empty(8192, 512, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(50_257, 512, dtype=torch.bfloat16, device="meta", requires_grad=True)
    loss = linear_cross_entropy(h, weight, None, torch.zeros(8192, dtype=torch.int64, device="meta"))
    kept = [t for t in loss.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert sorted(t.shape for t in kept) == sorted((h.shape, weight.shape))
    loss.backward()
    assert h.grad is not None and weight.grad is not None


def test_peak_memory() -> None:
    """Live bytes of loss and gradients, without weight and hidden states. With N rows of V logits and bf16, torch's own holds
    logits, their fp32 copy and two more of it; in place it is the logits alone, in chunks a sixteenth of them here."""
    n_rows, width, vocab = 16_384, 64, 8_192

    def peak(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
        h, weight = (torch.empty(n, width, dtype=torch.bfloat16, device="meta") for n in (n_rows, vocab))
        labels = torch.zeros(n_rows, dtype=torch.int64, device="meta")
        with (ledger := Ledger()):
            torch.autograd.grad(loss(h.requires_grad_(), weight.requires_grad_(), labels), (h, weight))
            report = ledger.report()
        return report.peak_bytes - (h.numel() + weight.numel()) * 2

    logits, grads = n_rows * vocab * 2, (n_rows + vocab) * width * 2
    row_bytes = 64 * n_rows  # labels, losses, statistics
    whole = peak(lambda h, w, y: linear_cross_entropy_reference(h, w, None, y))
    in_place = peak(lambda h, w, y: cross_entropy(F.linear(h, w), y))
    chunked = peak(lambda h, w, y: linear_cross_entropy(h, w, None, y, chunk_rows=1024))
    assert 5 * logits <= whole
    assert logits < in_place <= logits + grads + row_bytes
    assert logits / 16 < chunked <= logits / 16 + grads + row_bytes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_cost_is_what_launches_touch(bias: bool, factor: float) -> None:
    h, weight, b, labels = case(torch.bfloat16, rows=24, vocab=128)
    labels = labels.clamp(min=0)
    forward, backward = cost((24, 16, 128), "bf16", 2, bias=bias, chunk_rows=16, factor_is_one=factor == 1)
    leaves = [t.requires_grad_() for t in (h, weight, b)]
    with on_shim() as record:
        loss = linear_cross_entropy(h, weight, b if bias else None, labels, chunk_rows=16)
        touched, n_forward = sum_of_launches(record), len(record.launches)
        torch.autograd.backward(loss, torch.tensor(factor), inputs=leaves[: 3 if bias else 2])
    losses = [op for op in forward if op.kind == "loss"]
    assert touched == sum(op.n_bytes for op in losses)
    assert n_forward == sum(op.launches for op in losses)
    assert len(record.launches) - n_forward == backward[0].launches
    scaled = record.launches[n_forward:]
    assert backward[0].n_bytes == sum(4 + (0 if factor == 1 else 2 * x.numel() * x.itemsize) for _, (x, *_) in scaled)
    assert backward[0].flops == (0 if factor == 1 else sum(x.numel() for _, (x, *_) in scaled))
    matmuls = [op for op in forward if op.kind == "matmul"]
    assert sum(op.flops for op in matmuls) == 3 * 2 * 24 * 16 * 128
    assert [op.shape for op in matmuls[:3]] == [(1, 16, 128, 16), (1, 16, 16, 128), (1, 128, 16, 16)]


def sum_of_launches(record: object) -> int:
    """Bytes that the loss's own kernels touch: of slices only their rows, of in-place logits both ways."""
    total = 0
    for kernel, given in record.launches:  # type: ignore[attr-defined]
        tensors = [a for a in given if isinstance(a, Tensor)]
        if kernel.name == "row_losses_and_gradients":
            logits, labels, normaliser, _losses = tensors
            total += 2 * logits.numel() * 2 + labels.numel() * (8 + 4) + normaliser.numel() * 4
        elif kernel.name == "sum_rows":
            total += tensors[0].numel() * 4 + 4 + 4
        else:
            total += sum(t.numel() * t.itemsize for t in tensors)
    return total


def test_input_errors() -> None:
    h, weight, _, labels = case(torch.float32)
    with pytest.raises(InputError, match="shapes of h, weight, labels"):
        linear_cross_entropy(h, weight[:, :3], None, labels)
    with pytest.raises(InputError, match="mean or sum"):
        linear_cross_entropy(h, weight, None, labels, LossOptions(reduction="none"))
    with pytest.raises(InputError, match="chunk_rows is 0"):
        linear_cross_entropy(h, weight, None, labels, chunk_rows=0)
    with on_shim(), pytest.raises(InputError, match="dtype of weight, bias"):
        linear_cross_entropy(h, weight.bfloat16(), None, labels)
