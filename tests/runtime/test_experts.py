"""Experts and latent attention against the naive reference, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job import ModelSpec
from estimator.job.experts import Experts
from estimator.sharding.units import model_units
from runtime.models import Decoder
from runtime.models.experts import ExpertMlp
from runtime.models.grouped import grouped_linear
from runtime.models.routing import LossGradient, choose, dispatch, loads_of, plan_of
from runtime.units import find_units
from tests.runtime.experts import ALL, DEEPSEEK_V2, DEEPSEEK_V3, MIXTRAL, experts_by_token, latent_attention_by_head


def decoder(spec: ModelSpec) -> Decoder:
    model = Decoder(spec)
    model.reset_parameters(3, std=0.3)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias"):
            tensor.data.normal_(std=0.3, generator=generator)
    return model


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | {k: b for k, b in module.named_buffers() if k != "cos" and k != "sin"}


@pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)
@pytest.mark.parametrize("capacity_factor", [0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_a_layer_is_what_its_tokens_make_one_by_one(spec: ModelSpec, capacity_factor: float, factor: float) -> None:
    """Outputs, and gradients of everything: of the loss itself and, beside it, of the load-balance loss, both times a factor."""
    assert spec.experts is not None
    spec = replace(spec, experts=replace(spec.experts, capacity_factor=capacity_factor))
    layer = next(block.mlp for block in decoder(spec).blocks if isinstance(block.mlp, ExpertMlp))
    layer.loss_gradient = LossGradient()
    h = torch.randn(2, 7, spec.d_model, generator=torch.Generator().manual_seed(1), requires_grad=True)
    target = torch.randn(2, 7, spec.d_model, generator=torch.Generator().manual_seed(2))
    inputs = [h, *layer.parameters()]

    y = layer(h)
    loss = layer.loss_gradient.of((y * target).sum())
    got = torch.autograd.grad(loss * factor, inputs)

    rows, balance = experts_by_token(h.flatten(0, 1), values_of(layer), layer.spec, spec.activation)
    plain = (rows.view_as(h) * target).sum()
    want = torch.autograd.grad((plain + balance) * factor, inputs, allow_unused=True)

    torch.testing.assert_close(y, rows.view_as(h), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-4)  # without the balance
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=2e-4, atol=2e-5)


def test_the_balance_changes_gradients_at_all() -> None:
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))
    grads = []
    for coefficient in (0.0, 0.02):
        model = decoder(replace(MIXTRAL, experts=replace(MIXTRAL.experts, balance_loss=coefficient)))
        loss = model(ids, ids)
        loss.backward()
        router = model.blocks[0].mlp.router.weight.grad
        grads.append((loss.item(), router))
    assert grads[0][0] == grads[1][0]
    assert not torch.allclose(grads[0][1], grads[1][1])


@pytest.mark.parametrize("spec", [DEEPSEEK_V2, DEEPSEEK_V3], ids=lambda s: s.name)
def test_latent_attention_is_what_its_heads_make_one_by_one(spec: ModelSpec) -> None:
    model = decoder(spec)
    attention = model.blocks[0].attn
    h = torch.randn(2, 6, spec.d_model, generator=torch.Generator().manual_seed(1), requires_grad=True)
    target = torch.randn(h.shape, generator=torch.Generator().manual_seed(2))
    inputs = [h, *attention.parameters()]
    y = attention(h, model.cos[:6], model.sin[:6])
    want = torch.stack([latent_attention_by_head(one, values_of(attention), spec) for one in h])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    got, naive = (torch.autograd.grad((out * target).sum(), inputs) for out in (y, want))
    for mine, theirs in zip(got, naive, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)
def test_units_are_the_live_modules(spec: ModelSpec) -> None:
    got = [(live.unit.name, live.unit.params) for live in find_units(Decoder(spec))]
    assert got == [(unit.name, unit.params) for unit in model_units(spec)]


# ---- slots ------------------------------------------------------------------------------------------------------------


def test_slots_of_choices_dropless() -> None:
    """Two tokens' first choices, then their second ones: 1, 0 and 0, 2 of three experts."""
    plan = plan_of(torch.tensor([[1, 0], [0, 2]]), Experts(n_experts=3, per_token=2, d_ff=1))
    assert plan.slot.tolist() == [[2, 0], [1, 3]]  # [choice][token]
    assert plan.ends is not None and plan.ends.tolist() == [2, 3, 4]
    assert dispatch(torch.tensor([[1.0], [2.0]]), plan).tolist() == [[2.0], [1.0], [1.0], [2.0]]


def test_who_comes_too_late_is_dropped() -> None:
    """One slot for each of three experts; expert 0 is chosen by both tokens, first by the second one."""
    experts = Experts(n_experts=3, per_token=2, d_ff=1, capacity_factor=0.75)
    assert experts.capacity(2) == 1 and experts.slots(2) == 4
    plan = plan_of(torch.tensor([[1, 0], [0, 2]]), experts)
    assert plan.slot.tolist() == [[1, 0], [3, 2]] and plan.ends is None
    assert dispatch(torch.tensor([[1.0], [2.0]]), plan).tolist() == [[2.0], [1.0], [2.0], [0.0]]


def test_choosing_in_groups() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.2, 0.3]])
    grouped = Experts(n_experts=6, per_token=2, d_ff=1, n_groups=3, groups_per_token=1)
    assert choose(scores, replace(grouped, n_groups=1)).tolist() == [[0, 2]]
    assert choose(scores, grouped).tolist() == [[0, 1]], "the group of the best expert"
    biased = replace(grouped, selection_bias=True)
    assert choose(scores, biased, torch.zeros(6)).tolist() == [[2, 3]], (
        "the group whose two best are best: 1.1 against 1.0"
    )
    assert choose(scores, biased, torch.tensor([0.0, 0, 0, 0, 1, 2])).tolist() == [[5, 4]]


def test_loads_are_shares_of_choices() -> None:
    assert loads_of(torch.tensor([[0, 1], [0, 3]]), 4).tolist() == [0.5, 0.25, 0.0, 0.25]


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    weight = torch.ones(3, 2, 2, requires_grad=True)
    x = torch.ones(2, 2)
    (grad,) = torch.autograd.grad(grouped_linear(x, weight, None, [0, 1, 1, 2]).sum(), weight)
    assert grad.tolist() == [[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"per_token": 5}, "at most 4, the experts within reach"),
        ({"n_groups": 3}, "a divisor of n_experts = 4"),
        ({"n_groups": 2, "groups_per_token": 3}, "at most n_groups = 2"),
        ({"n_groups": 4, "per_token": 2}, "at most 1, the experts within reach"),
        ({"shared_gate": True}, "needs a shared expert"),
        ({"capacity_factor": float("inf")}, "capacity_factor is inf"),
        ({"scoring": "softmx"}, "did you mean 'softmax'"),
        ({"every": 0}, "a whole number >= 1"),
    ],
)
def test_experts_refuse(fields: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(MIXTRAL.experts, **fields)
