"""The router's weights and decisions, and the statistics drawn from them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medarch.moe import NO_EXPERT, MoEConfig, TopKRouter, router_statistics

seeds = st.integers(0, 10**6)
choices = st.integers(2, 11).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(2, experts)))


def make_router(config: MoEConfig, seed: int) -> tuple[TopKRouter, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    router = TopKRouter(config, generator).double()
    with torch.no_grad():
        router.weight.normal_(generator=generator)
    return router, torch.randn(13, 7, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, sizes=choices)
def test_renormalised_weights_sum_to_one(seed: int, sizes: tuple[int, int]) -> None:
    router, tokens = make_router(MoEConfig(7, 11, *sizes), seed)
    weights = router(tokens).weights
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(13, dtype=torch.float64))
    assert weights.min() > 0


@settings(max_examples=30, deadline=None)
@given(seed=seeds, sizes=choices)
def test_softmax_over_the_chosen_is_the_renormalised_softmax_over_all(seed: int, sizes: tuple[int, int]) -> None:
    first, tokens = make_router(MoEConfig(7, 11, *sizes), seed)
    second, _ = make_router(MoEConfig(7, 11, *sizes, router_order="topk-then-softmax"), seed)
    one, other = first(tokens), second(tokens)
    assert torch.equal(one.indices, other.indices)
    torch.testing.assert_close(one.weights, other.weights)
    torch.testing.assert_close(one.probs, other.probs)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, sizes=choices)
def test_without_renormalising_the_weights_are_the_largest_probabilities(seed: int, sizes: tuple[int, int]) -> None:
    router, tokens = make_router(MoEConfig(7, 11, *sizes, norm_topk_prob=False), seed)
    routing = router(tokens)
    torch.testing.assert_close(routing.probs, (tokens @ router.weight.T).softmax(dim=-1))
    descending = routing.probs.sort(dim=-1, descending=True).values[:, : sizes[1]]
    assert torch.equal(routing.weights, descending)
    assert torch.equal(routing.probs.gather(-1, routing.indices), routing.weights)


def test_one_expert_a_token_trains_the_router_where_the_probability_is_the_weight() -> None:
    """And not where it is divided by itself, which is why the configuration refuses that."""
    config = MoEConfig(7, 11, 5, 1, norm_topk_prob=False)
    router, tokens = make_router(config, seed=3)
    weights = router(tokens).weights
    (kept,) = torch.autograd.grad(weights.sum(), router.weight, retain_graph=True)
    (divided,) = torch.autograd.grad((weights / weights.sum(dim=-1, keepdim=True)).sum(), router.weight)
    assert kept.abs().max() > 1e-2
    assert divided.abs().max() < 1e-12


def test_logits_are_float32_for_half_precision_input() -> None:
    router, tokens = make_router(MoEConfig(7, 11, 5), seed=3)
    router = router.bfloat16()
    routing = router(tokens.bfloat16())
    exact = tokens.bfloat16().double() @ router.weight.double().T
    assert routing.logits.dtype == torch.float32
    # Products of bfloat16 numbers are exact in float32, so only the sum is rounded.
    torch.testing.assert_close(routing.logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.equal(routing.logits.bfloat16().double(), exact)


def test_bias_moves_the_choice() -> None:
    router, tokens = make_router(MoEConfig(7, 11, 5, router_bias=True), seed=3)
    with torch.no_grad():
        router.bias[4] = 100.0
    assert router(tokens).indices[:, 0].eq(4).all()


def test_statistics_worked_out_by_hand() -> None:
    """Three tokens of two slots over four experts; the fourth token is padding."""
    indices = torch.tensor([[0, 1], [0, 2], [0, 1], [NO_EXPERT, NO_EXPERT]])
    probs = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0.25, 0.25, 0], [0, 0, 0, 0]])
    statistics = router_statistics(probs, indices)
    assert statistics.tokens == 3
    assert statistics.counts.tolist() == [3, 2, 1, 0]
    torch.testing.assert_close(statistics.load, torch.tensor([3, 2, 1, 0]) / 6)
    torch.testing.assert_close(statistics.mean_probability, torch.tensor([0.5, 0.25, 0.25, 0]))
    assert statistics.max_over_mean_load == pytest.approx(2.0)
    entropy = -(1 / 2 * math.log(1 / 2) + 1 / 3 * math.log(1 / 3) + 1 / 6 * math.log(1 / 6))
    assert statistics.entropy == pytest.approx(entropy / math.log(4))


@pytest.mark.parametrize(
    ("indices", "entropy", "busiest"),
    [([[0], [1], [2], [3], [4]], 1.0, 1.0), ([[2], [2], [2], [2], [2]], 0.0, 5.0)],
    ids=["even", "one does everything"],
)
def test_the_ends_of_the_scales(indices: list[list[int]], entropy: float, busiest: float) -> None:
    statistics = router_statistics(torch.full((5, 5), 0.2), torch.tensor(indices))
    assert statistics.entropy == pytest.approx(entropy, abs=1e-6)
    assert statistics.max_over_mean_load == pytest.approx(busiest)


def test_one_expert_is_even_by_definition() -> None:
    statistics = router_statistics(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64))
    assert (statistics.entropy, statistics.max_over_mean_load) == (1.0, 1.0)


def test_statistics_carry_no_gradient() -> None:
    router, tokens = make_router(MoEConfig(7, 11, 5), seed=3)
    assert not router(tokens).statistics.mean_probability.requires_grad
