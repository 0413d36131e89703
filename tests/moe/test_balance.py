"""Balancing losses and measures of evenness: hand-computed values, transformers' own function, properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medarch.moe import NO_EXPERT, MoEConfig, Routing, TopKRouter
from medarch.moe.balance import (
    Evenness,
    evenness,
    load_balancing_loss,
    pooled_load_balancing_loss,
    router_z_loss,
)


def routing_of(logits, k=2, mask=None):
    probs = logits.softmax(-1)
    weights, indices = probs.topk(k, dim=-1)
    if mask is not None:
        probs, weights = probs * mask[..., None], weights * mask[..., None]
        indices = indices.masked_fill(~mask[..., None], NO_EXPERT)
    return Routing(logits, probs, indices, weights)


def test_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.1, 0.2]])
    indices = torch.tensor([[0], [0]])
    # f = (1, 0, 0), P = (0.6, 0.2, 0.2), E = 3.
    assert float(load_balancing_loss(probs, indices)) == pytest.approx(3 * 1 * 0.6)
    both = torch.tensor([[0, 1], [0, 2]])
    # f = (1, 1/2, 1/2): 3 * (0.6 + 0.1 + 0.1).
    assert float(load_balancing_loss(probs, both)) == pytest.approx(2.4)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_is_k_at_balance_and_e_at_collapse(k):
    experts = 5
    indices = (torch.arange(experts)[:, None] + torch.arange(k)) % experts
    even = torch.full((experts, experts), 1 / experts)
    assert float(load_balancing_loss(even, indices)) == pytest.approx(k)
    skewed = torch.zeros(experts, experts)
    skewed[:, :k] = 1 / k
    collapsed = torch.arange(k).expand(experts, k)
    assert float(load_balancing_loss(skewed, collapsed)) == pytest.approx(experts)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_equal_to_transformers_for_one_layer(k, padded):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(3, 11, 7, generator=torch.Generator().manual_seed(k), requires_grad=True)
    theirs_input = logits.detach().clone().requires_grad_()
    mask = torch.arange(11) < torch.tensor([11, 4, 7])[:, None] if padded else None
    routing = routing_of(logits, k, mask)
    ours = load_balancing_loss(routing.probs, routing.indices)
    theirs = load_balancing_loss_func((theirs_input.flatten(0, 1),), 7, k, None if mask is None else mask.long())
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(logits.grad, theirs_input.grad)


def test_pooled_equals_transformers_for_several_layers_and_differs_from_the_mean():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    # The second layer prefers what the first neglects.
    lean = torch.tensor([3.0, 1.0, 0.0, -1.0, -3.0])
    noise = torch.randn(2, 17, 5, generator=torch.Generator().manual_seed(2))
    layers = (noise[0] + lean, noise[1] + lean.flip(0))
    routings = [routing_of(logits) for logits in layers]
    pooled = pooled_load_balancing_loss(routings)
    torch.testing.assert_close(pooled, load_balancing_loss_func(layers, 5, 2))
    mean = torch.stack([load_balancing_loss(routing.probs, routing.indices) for routing in routings]).mean()
    assert float(mean) > 1.4 * float(pooled)
    torch.testing.assert_close(
        pooled_load_balancing_loss(routings[:1]), load_balancing_loss(routings[0].probs, routings[0].indices)
    )


def test_the_gradient_pushes_the_overfull_expert_down():
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(7, 1).requires_grad_()
    routing = routing_of(logits, 1)
    load_balancing_loss(routing.probs, routing.indices).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_nothing_routed_is_a_zero_in_the_graph(shape):
    probs = torch.zeros(shape, requires_grad=True)
    loss = load_balancing_loss(probs, torch.empty(*shape[:-1], 2, dtype=torch.long))
    z = router_z_loss(probs)
    assert loss.item() == 0
    assert z.item() == 0
    (loss + z).backward()
    assert probs.grad is not None


def test_padding_changes_neither_value_nor_gradient():
    generator = torch.Generator().manual_seed(0)
    router = TopKRouter(MoEConfig(6, 4, 5, 2, initializer_range=1.0), generator)
    tokens = torch.randn(1, 9, 6, generator=generator)
    padded = torch.cat([tokens, torch.full((1, 4, 6), math.nan)], dim=1)
    mask = (torch.arange(13) < 9)[None]
    results = []
    for routing, kept in ((router(tokens), None), (router(padded, mask), mask)):
        router.zero_grad()
        loss = load_balancing_loss(routing.probs, routing.indices) + router_z_loss(routing.logits, kept)
        loss.backward()
        results.append((loss.detach(), router.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_the_loss_has_its_greatest_value_at_one_set_of_experts_and_no_least_one_at_balance():
    # All slots at the same two of five experts: f = 1 and P = 1/2 for each, so the loss is E.
    probs = torch.tensor([[0.5, 0.5, 0, 0, 0]]).repeat(3, 1)
    assert float(load_balancing_loss(probs, torch.tensor([[0, 1]]).repeat(3, 1))) == pytest.approx(5)
    # Three tokens barely prefer the first expert, one is sure of the second: uneven, and yet below k = 1.
    probs = torch.tensor([[0.51, 0.49]] * 3 + [[0.01, 0.99]])
    assert float(load_balancing_loss(probs, probs.argmax(-1, keepdim=True))) == pytest.approx(0.885)


def test_z_loss_by_hand_and_at_its_least():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert float(router_z_loss(logits)) == pytest.approx(expected)
    assert float(router_z_loss(logits, torch.tensor([False, True]))) == pytest.approx(math.log(4) ** 2)
    # Log-probabilities have a log-sum-exp of zero: the loss does not ask for equal logits.
    assert float(router_z_loss(torch.tensor([[5.0, 1.0, -2.0]]).log_softmax(-1))) == pytest.approx(0, abs=1e-10)


@pytest.mark.usefixtures("annotations_off")
def test_faults_are_refused_by_name():
    probs = torch.full((3, 4), 0.25)
    with pytest.raises(ValueError, match="do not fit probs"):
        load_balancing_loss(probs, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="between -1"):
        load_balancing_loss(probs, torch.full((3, 1), 4))
    with pytest.raises(ValueError, match="does not fit logits"):
        router_z_loss(probs, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no layer"):
        pooled_load_balancing_loss([])
    with pytest.raises(ValueError, match="cannot be pooled"):
        pooled_load_balancing_loss([routing_of(torch.zeros(2, 3)), routing_of(torch.zeros(2, 4))])
    with pytest.raises(ValueError, match="at least two experts"):
        evenness([3])
    with pytest.raises(ValueError, match="must not be negative"):
        evenness([3, -1])
    with pytest.raises(ValueError, match="must not be negative"):
        evenness([0, 0])


@pytest.mark.usefixtures("annotations_off")
def test_evenness_by_hand():
    assert evenness([7, 7, 7]) == Evenness(pytest.approx(1.0), 1.0, 0.0, pytest.approx(3.0), 0)
    one = evenness([0, 0, 0, 0, 11])
    assert one == Evenness(0.0, 5.0, pytest.approx(2.0), 1.0, 4)  # sqrt(E - 1) = 2
    # Mean 4, population variance (4 + 0 + 4) / 3.
    found = evenness(torch.tensor([2, 4, 6]))
    assert found.variation == pytest.approx((8 / 3) ** 0.5 / 4)
    assert found.max_over_mean == pytest.approx(1.5)
    shares = [1 / 6, 1 / 3, 1 / 2]
    assert found.entropy == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(3))


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=13).filter(any))
def test_evenness_stays_in_its_bounds(counts):
    found = evenness(counts)
    experts = len(counts)
    assert -1e-12 <= found.entropy <= 1 + 1e-12
    assert 1 - 1e-12 <= found.max_over_mean <= experts + 1e-12
    assert -1e-12 <= found.variation <= (experts - 1) ** 0.5 + 1e-9
    assert 1 - 1e-9 <= found.effective <= experts + 1e-9
    assert found.idle == counts.count(0)


def test_probabilities_in_the_padding_do_not_count():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    indices = torch.tensor([[0], [NO_EXPERT]])
    assert float(load_balancing_loss(probs, indices)) == pytest.approx(3 * 1 * 0.5)
