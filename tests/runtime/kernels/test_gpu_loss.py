"""The kernels of the loss and of compression on a GPU: against fp64, against the CPU's bits, deterministic, captured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.adacomp import adacomp_add, adacomp_pack
from runtime.kernels.cross_entropy import LossOptions, cross_entropy
from runtime.kernels.linear_cross_entropy import linear_cross_entropy
from runtime.kernels.one_bit import one_bit_pack, one_bit_sum
from runtime.kernels.quantize import FORMATS, dequantize_sum, quantize
from tests.runtime.kernels.checks import DTYPES, assert_close, at_offset
from tests.runtime.kernels.test_cross_entropy import case, run, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

GPU = "cuda"
OPTIONS = (LossOptions(), LossOptions(label_smoothing=0.1, z_loss=1e-2, reduction="none"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "everything"])
@pytest.mark.parametrize("early", [False, True])
def test_cross_entropy(dtype: torch.dtype, options: LossOptions, early: bool) -> None:
    if early:
        options = LossOptions(label_smoothing=options.label_smoothing, reduction="sum")
    for rows, vocab, offset in ((1, 1, 0), (300, 257, 1), (33, 50_257, 0), (16, 128_256, 3)):
        logits, labels = case(dtype, rows, vocab)
        loss64, grad64 = run(lambda x: truth(x, labels, options), logits.double())  # noqa: B023
        on_gpu, there = at_offset(logits.to(GPU), offset), labels.to(GPU)
        leaf = on_gpu.requires_grad_()
        loss = cross_entropy(leaf, there, options, early_gradient=early)
        # In the forward pass 16-bit gradients would be rounded once more: by a factor of 1 they are not.
        weights = torch.ones_like(loss) if early else None
        if weights is None:
            weights = (
                torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape).to(loss) if loss.ndim else loss.detach() * 0 + 3
            )
        (grad,) = torch.autograd.grad(loss, leaf, weights)
        size = float(logits.double().abs().max()) + 1
        assert_close(loss.cpu(), loss64, "loss", size * rows)
        assert_close(grad.cpu(), grad64 / 3 if early else grad64, "gradient", 3.0)


def test_same_bits_every_time() -> None:
    logits, labels = (t.to(GPU) for t in case(torch.bfloat16, 1000, 50_257))
    first = run(lambda x: cross_entropy(x, labels, OPTIONS[1]), logits.clone())
    for _ in range(3):
        again = run(lambda x: cross_entropy(x, labels, OPTIONS[1]), logits.clone())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_captured_in_a_graph() -> None:
    logits, labels = (t.to(GPU) for t in case(torch.bfloat16, 64, 1003))
    buffer = logits.clone()

    def step() -> tuple[Tensor, Tensor]:
        buffer.copy_(logits)
        leaf = buffer.detach().requires_grad_()
        loss = cross_entropy(leaf, labels)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = tuple(t.clone() for t in step())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_logits_of_more_than_2_31_elements() -> None:
    rows, vocab = 2**31 // 128_256 + 3, 128_256
    if torch.cuda.mem_get_info()[0] < 12 * 10**9:
        pytest.skip("needs 12 GB of free GPU memory")
    logits = torch.zeros(rows, vocab, device=GPU, dtype=torch.bfloat16)
    logits[-3:] = torch.randn(3, vocab, device=GPU)
    few, labels = logits[-3:].cpu().double(), torch.full((rows,), 7, device=GPU)
    loss64, grad64 = run(lambda x: truth(x, labels[-3:].cpu(), LossOptions(reduction="sum")), few)
    leaf = logits.requires_grad_()
    losses = cross_entropy(leaf, labels, LossOptions(reduction="none"))
    (grad,) = torch.autograd.grad(losses, leaf, torch.full_like(losses, 3.0))
    assert_close(losses[-3:].sum().cpu(), loss64, "loss", 50.0)
    assert_close(grad[-3:].cpu(), grad64, "gradient", 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5003, 8192])
def test_linear_cross_entropy(dtype: torch.dtype, vocab: int) -> None:
    """No further from fp64 than four times what torch's own, with all logits, is: gradients are rounded again when they are
    scaled and with every chunk."""
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(*s, generator=generator) / 8 for s in ((700, 256), (vocab, 256)))
    labels = torch.randint(0, vocab, (700,), generator=generator)
    results = []
    for kind, device in ((torch.float64, "cpu"), (dtype, GPU), (dtype, GPU)):
        leaves = [t.to(dtype).to(device, kind).requires_grad_() for t in (h, weight)]
        there = labels.to(device)
        if len(results) == 2:
            loss = linear_cross_entropy(leaves[0], leaves[1], None, there, chunk_rows=256)
        else:
            loss = F.cross_entropy(F.linear(*leaves).to(torch.promote_types(kind, torch.float32)), there)
        scale = 1024.0 if dtype == torch.float16 else 1.0
        results.append([loss.detach(), *torch.autograd.grad(loss * scale, leaves)])
    for right, torchs, ours in zip(*results, strict=True):
        error, theirs = ((t.cpu().double() - right).abs().max() for t in (ours, torchs))
        assert error <= 4 * theirs + 1e-6 * right.abs().max()


def test_linear_cross_entropy_halves_the_peak() -> None:
    h = torch.randn(8192, 512, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50_257, 512, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 50_257, (8192,), device=GPU)

    def peak(loss_of: object) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss_of(), (h, weight))  # type: ignore[operator]
        return torch.cuda.max_memory_allocated() - before

    whole = peak(lambda: F.cross_entropy(F.linear(h, weight).float(), labels))
    in_place = peak(lambda: cross_entropy(F.linear(h, weight), labels))
    chunked = peak(lambda: linear_cross_entropy(h, weight, None, labels))
    assert in_place < whole / 2 and chunked < whole / 4


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_are_those_of_the_cpu(format: str, stochastic: bool) -> None:
    seed = torch.tensor([12345]) if stochastic else None
    for dtype in DTYPES:
        for numel, block, offset in ((1_000_001, 256, 0), (5000, 64, 1), (1, 2048, 0)):
            x = torch.randn(numel).to(dtype)
            right = quantize(x, format, block, seed)
            got = quantize(at_offset(x.to(GPU), offset), format, block, None if seed is None else seed.to(GPU))
            assert torch.equal(got.codes.cpu(), right.codes) and torch.equal(got.scales.cpu(), right.scales)
            assert torch.equal(dequantize_sum(got, dtype).cpu(), dequantize_sum(right, dtype))


def test_messages_are_those_of_the_cpu() -> None:
    for dtype in DTYPES:
        for numel, bin in ((100_003, 500), (40, 7)):
            grad, residual = torch.randn(numel).to(dtype), torch.randn(numel) * 0.5
            there = residual.to(GPU, copy=True)
            right, got = adacomp_pack(grad, residual, bin), adacomp_pack(grad.to(GPU), there, bin)
            n_sent = int(right.counts.sum())
            assert torch.equal(got.counts.cpu(), right.counts)
            assert torch.equal(got.entries[:n_sent].cpu(), right.entries[:n_sent])
            # The scale is a mean over bins, summed in another order.
            torch.testing.assert_close(got.scale.cpu(), right.scale)
            torch.testing.assert_close(there.cpu(), residual)
            dense = adacomp_add(got, torch.zeros(numel, device=GPU))
            torch.testing.assert_close(dense.cpu(), adacomp_add(right, torch.zeros(numel)))


def test_signs_are_those_of_the_cpu() -> None:
    for dtype in DTYPES:
        x, error = torch.randn(100_003).to(dtype), torch.randn(100_003) * 0.5
        there = error.to(GPU, copy=True)
        right, got = one_bit_pack(x, error, 512), one_bit_pack(x.to(GPU), there, 512)
        assert torch.equal(got.bits.cpu(), right.bits)
        torch.testing.assert_close(there.cpu(), error)
        torch.testing.assert_close(one_bit_sum(got).cpu(), one_bit_sum(right))
