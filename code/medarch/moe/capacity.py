"""Capacity: the most slots that one expert may fill, and what happens to those that find it full."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from medarch.moe.router import NO_EXPERT, Routing

Order = Literal["position", "rank", "priority"]


def expert_capacity(tokens: int, num_experts: int, num_experts_per_tok: int, capacity_factor: float) -> int:
    """The slots of one expert: ``capacity_factor`` times the even share, rounded up.

    With one expert a token this is equation 3 of Fedus et al. 2021 (arXiv:2101.03961).

    Args:
        tokens: Tokens that are routed together.
        num_experts: Experts that share them.
        num_experts_per_tok: Slots of one token.
        capacity_factor: 1 leaves room for an even load and for no other.

    Raises:
        ValueError: If the factor is not a positive finite number, or a count is out of range.
    """
    if not (math.isfinite(capacity_factor) and capacity_factor > 0):
        raise ValueError(f"capacity_factor must be positive and finite, got {capacity_factor!r}")
    if tokens < 0 or num_experts < 1 or num_experts_per_tok < 1:
        raise ValueError(
            f"tokens={tokens}, num_experts={num_experts}, num_experts_per_tok={num_experts_per_tok}: "
            "there must be at least one expert and one slot a token, and no fewer than 0 tokens"
        )
    return math.ceil(capacity_factor * tokens * num_experts_per_tok / num_experts)


def apply_capacity(
    routing: Routing,
    capacity_factor: float | None = None,
    *,
    capacity: int | None = None,
    order: Order = "position",
) -> Routing:
    """Takes the slots away from which an expert is already full.

    The last batch dimension is a group of tokens that compete for the experts, and each leading index is a
    group of its own, as in transformers, where every sequence is one. Flatten the leading dimensions to let
    a whole batch compete.

    A dropped slot gets ``NO_EXPERT`` and weight 0; the other weights of its token stay as they are, so that
    a token without any expert gets zeros from the layer and passes on through the residual connection alone
    (Fedus et al. 2021, section 2.2).

    Args:
        routing: Decisions without a limit.
        capacity_factor: Over the even share of the group's real tokens; see ``expert_capacity``.
        capacity: The limit itself, where ``capacity_factor`` is not given.
        order: Who comes first. ``"position"``: token by token, each with its slots from the strongest
            down; no token then depends on a later one. ``"rank"``: all first choices, then all second ones,
            each by position (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1). ``"priority"``: the slot
            of the largest weight first (Riquelme et al. 2021, arXiv:2106.05974, section 4.1, there for
            the tokens' largest weights).

    Returns:
        The same logits and probabilities with thinned slots.

    Raises:
        ValueError: If not exactly one of the two limits is given, a limit is out of range, or the order
            is unknown.
    """
    if (capacity_factor is None) == (capacity is None):
        raise ValueError(f"give one of capacity_factor={capacity_factor} and capacity={capacity}, and not both")
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must not be negative, got {capacity}")
    if routing.indices.dim() < 2:
        raise ValueError(f"indices of shape {tuple(routing.indices.shape)} hold no group of tokens to limit")
    num_experts, (length, k) = routing.probs.shape[-1], routing.indices.shape[-2:]
    slots = routing.indices.reshape(-1, length * k)
    if capacity is not None:
        counts = [capacity] * len(slots)
    else:
        assert capacity_factor is not None
        real = (routing.indices != NO_EXPERT).any(dim=-1).reshape(-1, length).sum(dim=-1)
        counts = [expert_capacity(tokens, num_experts, k, capacity_factor) for tokens in real.tolist()]
    limit = torch.tensor(counts, device=slots.device).view(-1, 1)
    queue = _queue(routing, order)
    place = _place_in_queue(slots.gather(-1, queue), num_experts)
    kept = torch.empty_like(slots, dtype=torch.bool).scatter(-1, queue, place <= limit).view(routing.indices.shape)
    return routing._replace(
        indices=routing.indices.masked_fill(~kept, NO_EXPERT), weights=routing.weights.masked_fill(~kept, 0)
    )


def _queue(routing: Routing, order: Order) -> Int[Tensor, "groups slots"]:
    """For each group its slots, numbered token by token, in the order in which they are served."""
    length, k = routing.indices.shape[-2:]
    by_token = torch.arange(length * k, device=routing.indices.device)
    if order == "priority":
        weights = routing.weights.detach().reshape(-1, length * k)
        return weights.argsort(dim=-1, descending=True, stable=True)
    if order == "rank":
        by_token = by_token.view(length, k).T.reshape(-1)
    groups = math.prod(routing.indices.shape[:-2])
    return by_token.expand(groups, length * k)


def _place_in_queue(slots: Int[Tensor, "groups slots"], num_experts: int) -> Int[Tensor, "groups slots"]:
    """Each slot's place, from 1, among the slots of its expert; 1 for a slot without an expert."""
    asked = F.one_hot(slots - NO_EXPERT, num_experts + 1)[..., 1:]
    place = asked.cumsum(dim=-2).gather(-1, slots.clamp(min=0)[..., None])[..., 0]
    return torch.where(slots == NO_EXPERT, 1, place)


def dropped_slots(before: Routing, after: Routing) -> Bool[Tensor, "*batch k"]:
    """Which slots had an expert before the limit and have none after it."""
    return (before.indices != NO_EXPERT) & (after.indices == NO_EXPERT)


def drop_fraction(before: Routing, after: Routing) -> float:
    """Dropped slots over assigned ones; NaN where none was assigned.

    Raises:
        ValueError: If the two routings are not of the same tokens and slots.
    """
    if before.indices.shape != after.indices.shape:
        raise ValueError(
            f"indices of shapes {tuple(before.indices.shape)} and {tuple(after.indices.shape)} are not two "
            "states of one routing"
        )
    assigned = int((before.indices != NO_EXPERT).sum())
    return int(dropped_slots(before, after).sum()) / assigned if assigned else math.nan
