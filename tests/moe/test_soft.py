"""Soft routing against einsum oracles; what is smooth, what leaks, what it costs."""

from __future__ import annotations

import math

import pytest
import torch

from medarch.bench import count_flops
from medarch.moe import MoEConfig, MoELayer
from medarch.moe.accounting import flops_per_token
from medarch.moe.dense import feed_forward
from medarch.moe.fixed import HashRouter, RandomRouter
from medarch.moe.soft import DenseRouter, SoftMoE

CONFIG = MoEConfig(7, 11, 5, 2, initializer_range=0.6)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("normalise", [True, False])
def test_soft_moe_equals_the_paper_s_equations(normalise: bool, generator: torch.Generator) -> None:
    layer = SoftMoE(CONFIG, 3, generator, normalise=normalise).double()
    with torch.no_grad():
        layer.scale.fill_(1.7)
    x = randn(2, 13, 7)
    phi = layer.phi
    left, right = x, phi
    if normalise:
        left = x / x.square().sum(-1, keepdim=True).sqrt()
        right = 1.7 * phi / phi.square().sum(0, keepdim=True).sqrt()
    logits = torch.einsum("bmd,ds->bms", left, right)
    dispatch = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    combine = logits.exp() / logits.exp().sum(dim=2, keepdim=True)
    slots = torch.einsum("bmd,bms->bsd", x, dispatch).view(2, 5, 3, 7)
    answers = torch.stack(
        [feed_forward(slots[:, expert], *pair, "silu") for expert, pair in enumerate(layer.experts.weights())], dim=1
    ).view(2, 15, 7)
    expected = torch.einsum("bsd,bms->bmd", answers, combine)
    output, routing = layer(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(routing.dispatch, dispatch)
    torch.testing.assert_close(routing.combine, combine)
    assert output.abs().max() > 0.01


def test_soft_moe_leaves_padding_out(generator: torch.Generator) -> None:
    layer = SoftMoE(CONFIG, 2, generator).double()
    x = randn(1, 13, 7)
    padded = torch.cat([x, torch.full((1, 4, 7), math.nan, dtype=torch.float64)], dim=1)
    mask = (torch.arange(17) < 13)[None]
    output, routing = layer(padded, mask)
    torch.testing.assert_close(output[:, :13], layer(x)[0])
    assert output[:, 13:].abs().max() == 0
    torch.testing.assert_close(routing.dispatch.sum(dim=1), torch.ones(1, 10, dtype=torch.float64))
    assert layer(padded, torch.zeros_like(mask))[0].abs().max() == 0


def test_soft_moe_looks_at_the_future(generator: torch.Generator) -> None:
    layer = SoftMoE(CONFIG, 2, generator).double()
    x, changed = randn(1, 13, 7), randn(1, 13, 7)
    changed[:, -1] += 1
    assert (layer(x)[0] - layer(changed)[0])[:, :-1].abs().amax(dim=-1).min() > 1e-6


def test_soft_moe_costs_by_its_slots_and_not_by_its_experts(generator: torch.Generator) -> None:
    """Ten slots for 13 tokens: scores, mixing in and mixing out, and one expert for each slot."""
    expected = 3 * 2 * 13 * 7 * 10 + 10 * 2 * 3 * 7 * 11
    few, many = MoEConfig(7, 11, 5), MoEConfig(7, 11, 10)
    for layer in (SoftMoE(few, 2, generator), SoftMoE(many, 1, generator)):
        assert count_flops(layer, torch.randn(1, 13, 7)) == expected


def test_the_dense_gate_is_the_weighted_sum_of_all_experts(generator: torch.Generator) -> None:
    layer = MoELayer(CONFIG, generator, router=DenseRouter(CONFIG, generator)).double()
    x = randn(13, 7)
    answers = torch.stack([feed_forward(x, *pair, "silu") for pair in layer.experts.weights()])
    gate = (x @ layer.router.weight.T).softmax(dim=-1)
    torch.testing.assert_close(layer(x)[0], torch.einsum("te,etd->td", gate, answers))


def test_the_dense_gate_costs_all_experts(generator: torch.Generator) -> None:
    layer = MoELayer(CONFIG, generator, router=DenseRouter(CONFIG, generator))
    counted = count_flops(layer, torch.randn(13, 7)) / 13
    sparse = flops_per_token(CONFIG)
    assert counted == sparse.router + sparse.experts * 5 / 2


def test_soft_refusals(annotations_off: None) -> None:
    with pytest.raises(ValueError, match="slots_per_expert"):
        SoftMoE(CONFIG, 0)
    layer = SoftMoE(CONFIG, 1)
    with pytest.raises(ValueError, match="hidden_size=7"):
        layer(torch.zeros(2, 13, 5))
    with pytest.raises(ValueError, match="no group"):
        layer(torch.zeros(7))
    with pytest.raises(ValueError, match="NaN"):
        layer(torch.full((1, 3, 7), math.nan))


def test_the_hash_is_a_function_of_the_vector_and_never_learns(generator: torch.Generator) -> None:
    layer = MoELayer(CONFIG, generator, router=HashRouter(CONFIG, generator)).double()
    x = randn(13, 7)
    output, routing = layer(x)
    assert torch.equal(routing.indices, layer(x)[1].indices)
    assert len(routing.indices.unique()) > 2
    torch.testing.assert_close(routing.weights, torch.full((13, 2), 0.5, dtype=torch.float64))
    output.sum().backward()
    assert layer.router.weight.grad is None
    assert not layer.router.weight.requires_grad
    assert layer.experts.down_proj.grad.abs().max() > 0


def test_random_routing_ignores_the_token_and_is_even(generator: torch.Generator) -> None:
    router = RandomRouter(CONFIG, generator)
    routing = router(torch.ones(3000, 7))
    assert (routing.indices[:, 0] != routing.indices[:, 1]).all()
    assert (routing.statistics.load - 0.2).abs().max() < 4 * math.sqrt(0.2 * 0.8 / 6000)
    masked = router(torch.ones(4, 7), torch.tensor([True, True, False, True]))
    assert masked.weights[2].tolist() == [0, 0]
    assert masked.weights[0].tolist() == [0.5, 0.5]
