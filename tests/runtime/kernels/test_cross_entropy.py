"""Cross-entropy kernels on the CPU shim against torch's own in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.cross_entropy import cost
from runtime.kernels import registry
from runtime.kernels.cross_entropy import (
    LossOptions,
    VocabShard,
    cross_entropy,
    cross_entropy_reference,
    vocab_parallel_cross_entropy,
)
from tests.runtime.kernels.checks import DTYPES, assert_close, at_offset, needs_shim, on_shim
from tests.runtime.kernels.shim import guarded, intact

pytestmark = needs_shim

ALL_ON = LossOptions(label_smoothing=0.1, z_loss=1e-2)
PLAIN = LossOptions()
Reduction = Literal["mean", "sum", "none"]


def case(dtype: torch.dtype, rows: int, vocab: int, seed: int = 0, offset: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = at_offset((torch.randn(rows, vocab, generator=generator) * 4).to(dtype), offset)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[1::3] = -100
    return logits, labels


def truth(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """The definition, by torch's cross-entropy in fp64 and the formula of the z-loss."""
    kinds = {"ignore_index": options.ignore_index, "label_smoothing": options.label_smoothing}
    loss = F.cross_entropy(logits, labels, reduction=options.reduction, **kinds)  # type: ignore[arg-type]
    if not options.z_loss:
        return loss
    counted = labels != options.ignore_index
    z = options.z_loss * torch.where(counted, torch.logsumexp(logits, -1), 0) ** 2
    return loss + {"mean": z.sum() / counted.sum(), "sum": z.sum(), "none": z}[options.reduction]


def weights_for(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape) if loss.ndim else torch.tensor(3.0)


def run(call: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of ``call``, with a gradient of the loss that is not 1."""
    leaf = logits.detach().requires_grad_()
    loss = call(leaf)
    weights = weights_for(loss).to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, leaf, weights)
    return loss.detach(), grad


def against_truth(logits: Tensor, labels: Tensor, options: LossOptions, early: bool = False) -> None:
    loss64, grad64 = run(lambda x: truth(x, labels, options), logits.double())
    before = logits.clone()
    with on_shim():
        loss, grad = run(lambda x: cross_entropy(x, labels, options, early_gradient=early), logits)
    assert grad.data_ptr() == logits.data_ptr(), "the gradient is written over the logits"
    size = float(before.double().abs().max()) + 1 if before.numel() else 1.0
    assert_close(loss, loss64, "loss", size * (len(labels) if options.reduction == "sum" else 1))
    rel = 1e-6
    if early and before.dtype != torch.float32:  # rounded before and after the loss's own gradient is known
        rel = 2.0**-8 if before.dtype == torch.bfloat16 else 2.0**-11
    factor = 3.0 / max(1, int((labels != options.ignore_index).sum())) if options.reduction == "mean" else 3.0
    # In the forward pass small fp16 gradients are denormals: an absolute step of 2^-24.
    floor = 2.0**-22 / rel if early and before.dtype == torch.float16 else 0.0
    assert_close(grad, grad64, "gradient", factor * (1 + floor), rel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [PLAIN, ALL_ON], ids=["plain", "smoothing and z-loss"])
def test_values_and_gradients(dtype: torch.dtype, reduction: Reduction, options: LossOptions) -> None:
    """Vocabularies of one thread, one warp, and more than one pass of the whole block; odd ones start anywhere."""
    options = LossOptions(label_smoothing=options.label_smoothing, z_loss=options.z_loss, reduction=reduction)
    for rows, vocab in ((5, 1), (4, 5), (7, 257), (2, 17_003)):
        logits, labels = case(dtype, rows, vocab)
        against_truth(logits, labels, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_in_the_forward_pass(dtype: torch.dtype, reduction: Reduction) -> None:
    for rows, vocab in ((4, 5), (7, 257)):
        logits, labels = case(dtype, rows, vocab)
        against_truth(logits, labels, LossOptions(label_smoothing=0.1, z_loss=1e-2, reduction=reduction), early=True)


@pytest.mark.parametrize("early", [False, True])
def test_vocabulary_of_the_widest_blocks(early: bool) -> None:
    logits, labels = case(torch.bfloat16, 2, 70_001)
    with on_shim() as record:
        cross_entropy(logits, labels)
    assert dict(record.launches[1][0].defines)["THREADS"] == 1024
    against_truth(logits, labels, LossOptions(reduction="sum"), early)


def test_reference_is_the_definition() -> None:
    for options in (PLAIN, ALL_ON, LossOptions(reduction="none", z_loss=0.1), LossOptions(reduction="sum")):
        logits, labels = case(torch.float64, 7, 33)
        torch.testing.assert_close(cross_entropy_reference(logits, labels, options), truth(logits, labels, options))


def test_by_hand() -> None:
    """Two tokens with logits 0 and log 3: probabilities 1/4 and 3/4; loss log 4."""
    logits = torch.tensor([[0.0, 1.0986123]])
    with on_shim():
        loss, grad = run(lambda x: cross_entropy(x, torch.tensor([0])), logits)
    assert loss.item() == pytest.approx(1.3862944)
    assert grad.flatten().tolist() == pytest.approx([3 * -0.75, 3 * 0.75])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5), vocab=st.integers(1, 2000), offset=st.integers(0, 7), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_any_size_and_alignment(rows: int, vocab: int, offset: int, seed: int, dtype: torch.dtype) -> None:
    logits, labels = case(dtype, rows, vocab, seed, offset % (16 // dtype.itemsize))
    against_truth(logits, labels, LossOptions(reduction="none"))


@pytest.mark.parametrize("early", [False, True])
def test_nothing_is_written_outside(early: bool) -> None:
    for offset in (0, 1, 3, 7):
        x, labels = case(torch.bfloat16, 5, 123)
        logits, whole = guarded((5, 123), torch.bfloat16, offset)
        logits.copy_(x)
        with on_shim():
            run(lambda t: cross_entropy(t, labels, early_gradient=early), logits)  # noqa: B023
        assert intact(logits, whole)


def test_rows_further_apart_than_they_are_long() -> None:
    logits, labels = case(torch.bfloat16, 5, 128)
    labels = labels.clamp(max=100)
    loss64, grad64 = run(lambda x: truth(x, labels, PLAIN), logits[:, :101].double())
    beyond = logits[:, 101:].clone()
    with on_shim():
        loss, grad = run(lambda x: cross_entropy(x, labels), logits[:, :101])
    assert_close(loss, loss64, "loss", 10.0)
    assert_close(grad, grad64, "gradient", 1.0)
    assert torch.equal(logits[:, 101:], beyond)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_numbers(dtype: torch.dtype) -> None:
    """Masked tokens, rows that are not numbers, numbers too large for exp, denormals."""
    largest = float(torch.finfo(dtype).max)
    logits = torch.zeros(7, 9, dtype=dtype)
    logits[0, 3:] = -torch.inf
    logits[1, 4] = torch.nan
    logits[2] = -torch.inf
    logits[3, 2] = torch.inf
    logits[4, 1], logits[4, 2] = largest, -largest
    logits[5] = 1e-40
    logits[6, 5] = 300.0
    labels = torch.tensor([1, 0, 0, 0, 1, 8, 5])
    options = LossOptions(reduction="none")
    loss64, grad64 = run(lambda x: truth(x, labels, options), logits.double())
    with on_shim():
        loss, grad = run(lambda x: cross_entropy(x, labels, options), logits)
    assert_close(loss, loss64, "loss", 1.0)
    assert_close(grad, grad64, "gradient", 2.0)


def test_same_bits_in_any_order() -> None:
    logits, labels = case(torch.float32, 70, 5001)
    results = []
    for order in (0, 1):
        with on_shim(order):
            results.append(run(lambda x: cross_entropy(x, labels, ALL_ON), logits.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_all_rows_ignored() -> None:
    logits, _ = case(torch.bfloat16, 3, 17)
    with on_shim():
        loss, grad = run(lambda x: cross_entropy(x, torch.full((3,), -100)), logits)
    assert loss.isnan(), "as in torch, the mean of nothing"
    assert torch.equal(grad, torch.zeros_like(grad))


def test_ignored_token_of_the_vocabulary() -> None:
    logits, _ = case(torch.float32, 4, 17)
    against_truth(logits, torch.tensor([0, 3, 0, 16]), LossOptions(ignore_index=0, label_smoothing=0.2))


@pytest.mark.parametrize("label", [17, -1, 2**40])
def test_label_outside_the_vocabulary_is_loud(label: int) -> None:
    logits, _ = case(torch.bfloat16, 2, 17)
    with on_shim():
        loss, grad = run(lambda x: cross_entropy(x, torch.tensor([3, label]), LossOptions(reduction="none")), logits)
    assert loss.isnan().tolist() == [False, True]
    assert grad.isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("early", [False, True])
def test_who_reads_gradients_for_logits_fails(early: bool) -> None:
    logits, labels = case(torch.float32, 3, 17)
    leaf = logits.requires_grad_()
    with on_shim():
        others = leaf.exp().sum() if early else leaf.square().sum()  # exp keeps its result, square its input
        loss = cross_entropy(leaf, labels, early_gradient=early)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        if not early:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                others.backward()


def test_without_gradients_only_losses_are_computed() -> None:
    logits, labels = case(torch.bfloat16, 3, 33)
    before = logits.clone()
    with on_shim() as record, torch.no_grad():
        cross_entropy(logits, labels, early_gradient=True)
    assert [kernel.name for kernel, _ in record.launches] == ["count_rows", "row_losses", "sum_rows"]
    assert torch.equal(logits, before)


# ---- split over a group ---------------------------------------------------------------------------------------------


class Group:
    """Ranks that run one after the other: what each put in is kept, and after as many rounds as there are collectives
    plus one, everybody has seen everything."""

    def __init__(self) -> None:
        self.given: dict[str, dict[int, Tensor]] = {"max": {}, "sum": {}}

    def all_reduce(self, rank: int) -> Callable[[Tensor, Literal["max", "sum"]], None]:
        def reduce(tensor: Tensor, op: Literal["max", "sum"]) -> None:
            self.given[op][rank] = tensor.clone()
            parts = torch.stack(list(self.given[op].values()))
            tensor.copy_(parts.amax(0) if op == "max" else parts.sum(0))

        return reduce


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shim", [True, False], ids=["kernel", "reference"])
def test_vocabulary_split_over_ranks(dtype: torch.dtype, reduction: Reduction, shim: bool) -> None:
    options = LossOptions(label_smoothing=0.1, z_loss=1e-2, reduction=reduction)
    logits, labels = case(dtype, 7, 301)
    logits[0, :100] = -torch.inf if not options.label_smoothing else -40.0
    loss64, grad64 = run(lambda x: truth(x, labels, options), logits.double())
    group, bounds = Group(), (0, 100, 201, 301)
    for last_round in (False, False, True):
        for rank in range(3):
            shard = VocabShard(bounds[rank], 301, group.all_reduce(rank))
            part = logits[:, bounds[rank] : bounds[rank + 1]].contiguous()

            def call(x: Tensor, shard: VocabShard = shard) -> Tensor:
                return vocab_parallel_cross_entropy(x, labels, shard, options)

            with on_shim() if shim else registry.switched_off("all"):
                loss, grad = run(call, part)
            if last_round:
                assert_close(loss, loss64, "loss", 50.0 * (len(labels) if reduction == "sum" else 1))
                assert_close(grad, grad64[:, bounds[rank] : bounds[rank + 1]], "gradient", 3.0)


def test_rank_with_only_masked_tokens() -> None:
    logits, labels = case(torch.float32, 3, 64)
    logits[:, :32] = -torch.inf
    labels = labels.clamp(min=32)
    loss64, grad64 = run(lambda x: truth(x, labels, PLAIN), logits.double())
    group = Group()
    for last_round in (False, False, True):
        for rank in range(2):
            shard = VocabShard(32 * rank, 64, group.all_reduce(rank))
            part = logits[:, 32 * rank : 32 * rank + 32].contiguous()
            with on_shim():
                loss, grad = run(lambda x: vocab_parallel_cross_entropy(x, labels, shard), part)  # noqa: B023
            if rank == 0 and last_round:
                assert torch.equal(grad, torch.zeros_like(grad))
    assert_close(loss, loss64, "loss", 10.0)
    assert_close(grad, grad64[:, 32:], "gradient", 1.0)


# ---- cost and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("early", "factor"), [(False, 1.0), (False, 3.0), (True, 1.0), (True, 3.0)])
def test_cost_is_what_launches_touch(reduction: Reduction, early: bool, factor: float) -> None:
    if early and reduction == "none":
        return
    logits, labels = case(torch.bfloat16, 6, 128)
    labels[:] = 3
    forward, backward = cost(
        6, 128, "bf16", 2, reduction=reduction, early_gradient=early, factor_is_one=factor == 1
    )  # fmt: skip
    leaf = logits.requires_grad_()
    with on_shim() as record:
        loss = cross_entropy(leaf, labels, LossOptions(reduction=reduction), early_gradient=early)
        touched = record.n_bytes
        n_forward = len(record.launches)
        loss.backward(torch.full_like(loss, factor))
    unread = 4 if reduction == "mean" else 0  # of the normaliser's two numbers the sum reads one
    written_back = 6 * 128 * 2  # over the logits that were read
    assert touched - unread + early * written_back == forward.n_bytes
    assert n_forward == forward.launches
    if early and factor == 1:
        assert record.n_bytes - touched - written_back == backward.n_bytes == 4  # the factor: logits are not touched
    else:
        assert record.n_bytes - touched + written_back == backward.n_bytes
    assert len(record.launches) - n_forward == backward.launches == 1


def test_memory_on_a_gpu() -> None:
    """``meta`` stands for it: beside the logits a few numbers per row."""
    logits = torch.empty(1024, 50_257, dtype=torch.bfloat16, device="meta", requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(1024, dtype=torch.int64, device="meta"))
    kept = [t for t in loss.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert sum(t.numel() * t.itemsize for t in kept) == logits.numel() * 2 + 1024 * (8 + 4 + 4) + 4
    loss.backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_input_errors() -> None:
    logits, labels = case(torch.float32, 3, 5)
    for options in ({"label_smoothing": 1.0}, {"z_loss": -1.0}, {"reduction": "men"}):
        with pytest.raises(InputError, match=next(iter(options))):
            LossOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shape of labels"):
        cross_entropy(logits, labels[:2])
    with pytest.raises(InputError, match=r"allowed: torch\.int64"):
        cross_entropy(logits, labels.int())
    with pytest.raises(InputError, match="mean or sum"):
        cross_entropy(logits, labels, LossOptions(reduction="none"), early_gradient=True)
    with pytest.raises(InputError, match="first token of the shard"):
        vocab_parallel_cross_entropy(logits, labels, VocabShard(3, 7, lambda t, op: None))
