"""Noisy top-k gating against the paper's equations, and the smooth load against counting."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medarch.moe import MoEConfig, MoELayer
from medarch.moe.noisy import NoisyScores, NoisyTopKRouter, importance, smooth_load, squared_variation

CONFIG = MoEConfig(7, 11, 5, 2, router_order="topk-then-softmax", initializer_range=0.5)


def make_router(**options: bool) -> NoisyTopKRouter:
    generator = torch.Generator().manual_seed(1)
    noise = torch.Generator().manual_seed(2)
    return NoisyTopKRouter(CONFIG, generator, noise_generator=noise, **options).double()


def test_equations_3_to_5(generator: torch.Generator) -> None:
    router = make_router(zero_init=False)
    tokens = torch.randn(13, 7, generator=generator, dtype=torch.float64)
    routing = router.train()(tokens)
    noise = torch.empty(13, 5, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(2))
    h = tokens @ router.weight.T + noise * (1 + (tokens @ router.noise_weight.T).exp()).log()
    kept = torch.full_like(h, -math.inf).scatter(-1, h.topk(2).indices, h.topk(2).values).softmax(dim=-1)
    torch.testing.assert_close(routing.logits, h)
    torch.testing.assert_close(torch.zeros_like(h).scatter(-1, routing.indices, routing.weights), kept)


def test_no_noise_in_evaluation(generator: torch.Generator) -> None:
    router = make_router(zero_init=False).eval()
    tokens = torch.randn(13, 7, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(router(tokens).logits, tokens @ router.weight.T)


def test_a_fresh_router_leaves_the_choice_to_the_noise() -> None:
    """Both matrices zero: every expert gets its share of many tokens, and twice the same token differs."""
    router = make_router()
    routing = router(torch.ones(2000, 7, dtype=torch.float64))
    load = routing.statistics.load
    assert (load - 0.2).abs().max() < 4 * math.sqrt(0.2 * 0.8 / 2000)
    assert (routing.indices[0] != routing.indices).any()


def test_the_noise_matrix_gets_a_gradient(generator: torch.Generator) -> None:
    router = make_router(zero_init=False)
    layer = MoELayer(CONFIG, generator, router=router).double()
    layer(torch.randn(13, 7, generator=generator, dtype=torch.float64))[0].square().sum().backward()
    assert router.noise_weight.grad.abs().max() > 0


def test_smooth_load_is_the_frequency_of_being_chosen_when_one_noise_is_drawn_again(
    generator: torch.Generator,
) -> None:
    """For each expert its own noise is drawn 20,000 times while the others' stays."""
    clean = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    scale = torch.rand(1, 5, generator=generator, dtype=torch.float64) + 0.3
    noisy = clean + scale * torch.randn(1, 5, generator=generator, dtype=torch.float64)
    expected = smooth_load(NoisyScores(clean, scale, noisy), 2)
    draws = 20_000
    for expert in range(5):
        again = noisy.expand(draws, 5).clone()
        fresh = torch.randn(draws, generator=generator, dtype=torch.float64)
        again[:, expert] = clean[0, expert] + scale[0, expert] * fresh
        frequency = float((again.topk(2).indices == expert).any(dim=-1).double().mean())
        assert frequency == pytest.approx(float(expected[expert]), abs=4 * 0.5 / math.sqrt(draws))


def test_smooth_load_leaves_padding_out_and_carries_a_gradient(generator: torch.Generator) -> None:
    router = make_router(zero_init=False)
    tokens = torch.randn(13, 7, generator=generator, dtype=torch.float64)
    scores = router.scores(tokens)
    mask = torch.arange(13) < 6
    part = smooth_load(NoisyScores(*(tensor[:6] for tensor in scores)), 2)
    torch.testing.assert_close(smooth_load(scores, 2, mask), part)
    squared_variation(part).backward()
    assert router.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="below the number of experts"):
        smooth_load(scores, 5)


def test_importance_and_variation_by_hand() -> None:
    router = make_router().eval()
    routing = router(torch.zeros(2, 7, dtype=torch.float64))
    routing = routing._replace(indices=torch.tensor([[0, 1], [0, -1]]),
                               weights=torch.tensor([[0.75, 0.25], [0.5, 0.0]], dtype=torch.float64))  # fmt: skip
    assert importance(routing).tolist() == [1.25, 0.25, 0, 0, 0]
    assert float(squared_variation(torch.tensor([3.0, 1.0]))) == pytest.approx(0.25)
    assert float(squared_variation(F.one_hot(torch.tensor(2), 5).double())) == pytest.approx(4)
