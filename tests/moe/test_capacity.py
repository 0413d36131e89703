"""Who is served and who is dropped: by hand, against a loop that serves one slot after the other, and in time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medarch.moe import NO_EXPERT, MoEConfig, MoELayer, Routing, TopKRouter
from medarch.moe.capacity import Order, apply_capacity, drop_fraction, dropped_slots, expert_capacity


def routing_of(indices: list[list[int]], weights: list[list[float]], experts: int) -> Routing:
    probs = torch.full((len(indices), experts), 1 / experts)
    return Routing(torch.zeros_like(probs), probs, torch.tensor(indices), torch.tensor(weights))


# Three tokens with two slots each. Everybody wants expert 0, which has room for one.
CROWD = routing_of([[1, 0], [0, 1], [0, 2]], [[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]], 3)


@pytest.mark.parametrize(
    ("order", "kept"),
    [
        ("position", [[1, 0], [NO_EXPERT, NO_EXPERT], [NO_EXPERT, 2]]),
        ("rank", [[1, NO_EXPERT], [0, NO_EXPERT], [NO_EXPERT, 2]]),
        ("priority", [[1, NO_EXPERT], [0, NO_EXPERT], [NO_EXPERT, 2]]),
    ],
)
def test_the_orders_by_hand(order: Order, kept: list[list[int]]) -> None:
    limited = apply_capacity(CROWD, capacity=1, order=order)
    assert limited.indices.tolist() == kept
    torch.testing.assert_close(limited.weights, CROWD.weights * (limited.indices != NO_EXPERT))
    assert torch.equal(limited.probs, CROWD.probs)


def test_priority_is_by_weight_and_not_by_rank() -> None:
    """A second choice of weight 0.4 goes before another token's first choice of weight 0.35."""
    routing = routing_of([[0, 1], [1, 2]], [[0.5, 0.4], [0.35, 0.3]], 3)
    assert apply_capacity(routing, capacity=1, order="priority").indices.tolist() == [[0, 1], [NO_EXPERT, 2]]
    assert apply_capacity(routing, capacity=1, order="rank").indices.tolist() == [[0, NO_EXPERT], [1, 2]]


def served_one_by_one(routing: Routing, capacity: int, order: Order) -> list[list[int]]:
    """The specification: a queue of slots, and a counter at each expert's door."""
    indices, weights = routing.indices.tolist(), routing.weights.tolist()
    slots = [(token, rank) for token in range(len(indices)) for rank in range(len(indices[0]))]
    keys = {
        "position": lambda slot: slot,
        "rank": lambda slot: (slot[1], slot[0]),
        "priority": lambda slot: (-weights[slot[0]][slot[1]], slot),
    }
    count: dict[int, int] = {}
    kept = [list(row) for row in indices]
    for token, rank in sorted(slots, key=keys[order]):
        expert = indices[token][rank]
        if expert == NO_EXPERT:
            continue
        count[expert] = count.get(expert, 0) + 1
        if count[expert] > capacity:
            kept[token][rank] = NO_EXPERT
    return kept


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    capacity=st.integers(0, 7),
    order=st.sampled_from(["position", "rank", "priority"]),
    k=st.integers(1, 3),
)
def test_equals_a_queue_served_one_by_one(seed: int, capacity: int, order: Order, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = TopKRouter(MoEConfig(7, 11, 5, k, norm_topk_prob=k > 1, initializer_range=1.0), generator)
    tokens = torch.randn(3, 13, 7, generator=generator)
    mask = torch.rand(3, 13, generator=generator) < 0.8
    routing = router(tokens, mask)
    limited = apply_capacity(routing, capacity=capacity, order=order)
    for group in range(3):
        one = Routing(*(tensor[group] for tensor in routing))
        assert limited.indices[group].tolist() == served_one_by_one(one, capacity, order)
        assert limited.indices[group].flatten().sub(NO_EXPERT).bincount(minlength=6)[1:].max() <= capacity


def test_capacity_counts_real_tokens_alone() -> None:
    """Ten places, five of them padding: five tokens on two experts at factor 1 leave room for three each."""
    router = TopKRouter(MoEConfig(2, 3, 2, 1, norm_topk_prob=False), torch.Generator().manual_seed(0))
    tokens = torch.ones(10, 2)
    mask = torch.arange(10) < 5
    limited = apply_capacity(router(tokens, mask), 1.0)
    assert (limited.indices != NO_EXPERT).sum() == 3
    assert drop_fraction(router(tokens, mask), limited) == pytest.approx(2 / 5)


def test_a_factor_as_large_as_the_experts_drops_nothing() -> None:
    assert torch.equal(apply_capacity(CROWD, 3.0).indices, CROWD.indices)
    assert drop_fraction(CROWD, apply_capacity(CROWD, 3.0)) == 0


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "expected"),
    [(512, 8, 1, 1.25, 80), (13, 5, 2, 1.0, 6), (0, 5, 2, 1.0, 0), (7, 7, 1, 1.0, 1)],
)
def test_expert_capacity_by_hand(tokens: int, experts: int, k: int, factor: float, expected: int) -> None:
    assert expert_capacity(tokens, experts, k, factor) == expected


def test_a_token_without_experts_gets_zeros(generator: torch.Generator) -> None:
    layer = MoELayer(MoEConfig(7, 11, 5, 2, initializer_range=1.0), generator)
    tokens = torch.randn(13, 7, generator=generator)
    routing = layer.router(tokens)
    limited = apply_capacity(routing, capacity=1)
    gone = dropped_slots(routing, limited).all(dim=-1)
    assert gone.any()
    assert not gone.all()
    output = layer.experts(tokens, limited.indices, limited.weights)
    assert output[gone].abs().max() == 0
    assert output[~gone].abs().amax(dim=-1).min() > 0


def changes_the_past(order: Order) -> bool:
    """Whether, in some of twenty texts, a new last token changes who served an earlier one."""
    generator = torch.Generator().manual_seed(3)
    router = TopKRouter(MoEConfig(7, 11, 5, 2, initializer_range=1.0), generator)

    def decisions(tokens: Tensor) -> Tensor:
        return apply_capacity(router(tokens), 1.0, order=order).indices[:, :-1]

    texts = torch.randn(20, 13, 7, generator=generator)
    changed = texts.clone()
    changed[:, -1] = torch.randn(20, 7, generator=generator)
    return not torch.equal(decisions(texts), decisions(changed))


def test_serving_by_position_leaves_the_past_alone_and_the_other_orders_do_not() -> None:
    assert not changes_the_past("position")
    assert changes_the_past("rank")
    assert changes_the_past("priority")


def test_bad_limits_are_refused(annotations_off: None) -> None:
    with pytest.raises(ValueError, match="one of capacity_factor=None and capacity=None"):
        apply_capacity(CROWD)
    with pytest.raises(ValueError, match=r"capacity_factor=1\.0 and capacity=2"):
        apply_capacity(CROWD, 1.0, capacity=2)
    with pytest.raises(ValueError, match="order must be one of"):
        apply_capacity(CROWD, 1.0, order="chance")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity_factor must be positive"):
        apply_capacity(CROWD, math.nan)
    with pytest.raises(ValueError, match="must not be negative"):
        apply_capacity(CROWD, capacity=-1)
    with pytest.raises(ValueError, match="no group"):
        apply_capacity(Routing(*(tensor[0] for tensor in CROWD)), 1.0)
    with pytest.raises(ValueError, match="two states of one routing"):
        drop_fraction(CROWD, Routing(*(tensor[:2] for tensor in CROWD)))
