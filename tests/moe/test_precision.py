"""Rounded routers: hand-computed cases, and that the float32 router is what the name says."""

import pytest
import torch

from medarch.moe import MoEConfig
from medarch.moe.precision import BFloat16Router, rounding
from medarch.moe.router import TopKRouter

CONFIG = MoEConfig(11, 13, 5, 2, initializer_range=1.0)


def test_rounding_by_hand():
    # Between 128 and 256 bfloat16 has whole numbers alone: 130.4 becomes 130, 129.6 becomes 130 (ties upwards).
    logits = torch.tensor([[130.4, 129.6, 0.0], [0.5, 0.25, 0.0]], dtype=torch.float64)
    assert logits.to(torch.bfloat16)[0].tolist() == [130.0, 130.0, 0.0]
    found = rounding(logits, 1)
    assert found.largest_logit == pytest.approx(130.4)
    # The softmax of a gap of 0.8 is 0.69 to 0.31, and of no gap 0.5 to 0.5.
    assert found.probability_error == pytest.approx(1 / (1 + 2.718281828**-0.8) - 0.5, abs=1e-6)
    assert found.changed == 0
    # The order is lost: what was second is now first, being the first of two equals.
    assert rounding(logits[:1].flip(-1), 1).changed == 1
    # Of k experts all count: here the first stays and the second is lost.
    three = torch.tensor([[129.6, 130.4, 200.0]], dtype=torch.float64)
    assert (rounding(three, 1).changed, rounding(three, 2).changed, rounding(three, 3).changed) == (0, 1, 0)


def test_exact_logits_lose_nothing():
    found = rounding(torch.tensor([[[1.0, 0.5, -2.0]]]), 2)
    assert (found.probability_error, found.changed) == (0, 0)


def test_larger_logits_lose_more():
    logits = torch.randn(997, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = [rounding(scale * logits, 2).probability_error for scale in (1, 10, 100)]
    assert errors[0] < errors[1] < errors[2]


def test_rounding_refuses():
    with pytest.raises(ValueError, match="k=4"):
        rounding(torch.zeros(2, 3), 4)
    with pytest.raises(ValueError, match="at least one token"):
        rounding(torch.zeros(0, 3), 1)


def test_the_rounded_router_rounds_and_the_other_does_not():
    generator = torch.Generator().manual_seed(0)
    exact = TopKRouter(CONFIG, generator)
    rough = BFloat16Router(CONFIG)
    rough.load_state_dict(exact.state_dict())
    tokens = torch.randn(301, 11, generator=generator)
    fine, coarse = exact(tokens), rough(tokens)
    expected = (tokens.double() @ exact.weight.double().T).softmax(-1)
    assert (fine.probs - expected).abs().max() < 1e-6
    assert 1e-3 < (coarse.probs - expected).abs().max() < 0.1
    assert all(tensor.dtype == torch.float32 for tensor in (coarse.logits, coarse.probs, coarse.weights))
    assert torch.equal(coarse.logits, coarse.logits.bfloat16().float())
    coarse.weights.square().sum().backward()
    assert rough.weight.grad.abs().max() > 0


def test_the_rounded_router_refuses_nan():
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 tokens"):
        BFloat16Router(CONFIG)(torch.zeros(3, 11).index_fill_(0, torch.tensor([1]), float("nan")))
