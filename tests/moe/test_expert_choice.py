"""Expert choice against an oracle in numpy: even by construction, and not causal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medarch.moe import NO_EXPERT, MoEConfig, MoELayer
from medarch.moe.dense import feed_forward
from medarch.moe.expert_choice import ExpertChoiceRouter, experts_per_token

CONFIG = MoEConfig(7, 11, 5, 2, initializer_range=0.8)


def make_layer(seed: int, factor: float | None = None) -> tuple[MoELayer, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    router = ExpertChoiceRouter(CONFIG, generator, capacity_factor=factor)
    return MoELayer(CONFIG, generator, router=router).double(), generator


def oracle(layer: MoELayer, tokens: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Section 3.2 of the paper: S = softmax(X W), then each expert's top-k of its column, then the sum."""
    scores = tokens @ layer.router.weight.detach().numpy().T
    scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    quota = min(max(1, math.floor(factor * len(tokens) / 5 + 0.5)), len(tokens))
    output, taken = np.zeros_like(tokens), np.zeros((len(tokens), 5), dtype=bool)
    for expert, matrices in enumerate(layer.experts.weights()):
        for token in np.argsort(-scores[:, expert], kind="stable")[:quota]:
            taken[token, expert] = True
            answer = feed_forward(torch.tensor(tokens[token]), *(m.detach() for m in matrices), "silu")
            output[token] += scores[token, expert] * answer.numpy()
    return output, taken


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 17), factor=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_equals_the_oracle(seed: int, length: int, factor: float) -> None:
    layer, generator = make_layer(seed, factor)
    tokens = torch.randn(2, length, 7, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        output, routing = layer(tokens)
    for group in range(2):
        expected, taken = oracle(layer, tokens[group].numpy(), factor)
        np.testing.assert_allclose(output[group].numpy(), expected, atol=1e-12)
        for token in range(length):
            chosen = [expert for expert in routing.indices[group, token].tolist() if expert != NO_EXPERT]
            assert sorted(chosen) == np.flatnonzero(taken[token]).tolist()
            strengths = routing.probs[group, token, chosen].tolist()
            assert strengths == sorted(strengths, reverse=True)


def test_every_expert_has_the_same_load_and_some_tokens_have_no_expert() -> None:
    layer, generator = make_layer(4, 1.0)
    routing = layer(torch.randn(4, 25, 7, generator=generator, dtype=torch.float64))[1]
    assert routing.statistics.counts.tolist() == [20] * 5
    number = experts_per_token(routing)
    assert number.double().mean() == 1
    assert number.min() == 0
    assert number.max() > 1


def test_padding_is_taken_by_nobody_and_changes_nothing() -> None:
    layer, generator = make_layer(5)
    tokens = torch.randn(1, 13, 7, generator=generator, dtype=torch.float64)
    padded = torch.cat([tokens, torch.full((1, 6, 7), math.nan, dtype=torch.float64)], dim=1)
    mask = (torch.arange(19) < 13)[None]
    # The experts are fed only what the router sends them, so that NaN in the padding goes nowhere.
    output, routing = layer(padded, mask)
    torch.testing.assert_close(output[:, :13], layer(tokens)[0])
    assert output[:, 13:].abs().max() == 0
    assert (routing.indices[:, 13:] == NO_EXPERT).all()
    assert layer(padded, torch.zeros(1, 19, dtype=torch.bool))[0].abs().max() == 0


def test_a_real_score_of_zero_goes_before_padding() -> None:
    """An underflown probability is still a token's, and padding in front of it must not take its place."""
    probs = torch.tensor([[0.9, 0.0], [1.0, 0.0], [1.0, 0.0]])
    taken = ExpertChoiceRouter(MoEConfig(7, 11, 2, 1, norm_topk_prob=False)).choose(
        probs, torch.tensor([False, True, True])
    )
    assert taken.tolist() == [[False, False], [True, True], [False, False]]


def test_a_later_token_changes_an_earlier_ones_output() -> None:
    """In expert choice, and not in token choice with the same weights."""
    layer, generator = make_layer(6)
    tokens = torch.randn(20, 13, 7, generator=generator, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, -1] = torch.randn(20, 7, generator=generator, dtype=torch.float64)

    def moved(layer: MoELayer) -> float:
        return float((layer(tokens)[0] - layer(changed)[0])[:, :-1].detach().abs().max())

    by_token = MoELayer(CONFIG).double()
    by_token.load_state_dict(layer.state_dict())
    assert moved(layer) > 1e-3
    assert moved(by_token) < 1e-12


def test_router_and_experts_get_gradients() -> None:
    layer, generator = make_layer(7)
    layer(torch.randn(13, 7, generator=generator, dtype=torch.float64))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().amax(dim=-1).min() > 0
    assert layer.experts.down_proj.grad.abs().amax(dim=(1, 2)).min() > 0


def test_refusals(annotations_off: None) -> None:
    for factor in (0.0, 6.0, math.nan):
        with pytest.raises(ValueError, match="capacity_factor"):
            ExpertChoiceRouter(CONFIG, capacity_factor=factor)
    with pytest.raises(ValueError, match="no group"):
        ExpertChoiceRouter(CONFIG)(torch.zeros(7))
    with pytest.raises(ValueError, match="NaN"):
        ExpertChoiceRouter(CONFIG)(torch.full((3, 7), math.nan))
