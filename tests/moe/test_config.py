"""Every configuration that could not work is refused, with the names and values that clash."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from medarch.moe import MoEConfig

REFUSED = {
    "k above E": (
        {"num_experts": 3, "num_experts_per_tok": 5},
        "num_experts_per_tok=5 exceeds num_experts=3",
    ),
    "k of 0": ({"num_experts_per_tok": 0}, "num_experts_per_tok must be a whole number of at least 1, got 0"),
    "no experts": ({"num_experts": 0}, "num_experts must be .* got 0"),
    "hidden size": ({"hidden_size": -7}, "hidden_size must be .* got -7"),
    "intermediate size": ({"intermediate_size": 0}, "intermediate_size must be .* got 0"),
    "fraction": ({"intermediate_size": 2.5}, "intermediate_size must be .* got 2.5"),
    "truth value": ({"num_experts_per_tok": True}, "num_experts_per_tok must be .* got True"),
    "activation": ({"hidden_act": "relu"}, "hidden_act must be one of .*'silu', 'gelu'.* got 'relu'"),
    "order": ({"router_order": "topk"}, "router_order must be one of .* got 'topk'"),
    "spread": ({"initializer_range": 0.0}, "initializer_range must be positive and finite, got 0.0"),
    "endless spread": ({"initializer_range": float("inf")}, "initializer_range must be positive"),
    "one expert a token, renormalised": ({"num_experts_per_tok": 1}, "no gradient; set norm_topk_prob=False"),
    "one expert a token, softmax last": (
        {"num_experts_per_tok": 1, "router_order": "topk-then-softmax"},
        "no gradient; set norm_topk_prob=False and router_order='softmax-then-topk'",
    ),
    "softmax last, not renormalised": (
        {"router_order": "topk-then-softmax", "norm_topk_prob": False},
        "sums to 1 by construction",
    ),
}


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 7, "intermediate_size": 11, "num_experts": 5, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{**sizes, **change})


def test_defaults_are_mixtrals() -> None:
    config = MoEConfig(7, 11)
    assert (config.num_experts, config.num_experts_per_tok, config.hidden_act) == (8, 2, "silu")
    assert (config.router_order, config.norm_topk_prob) == ("softmax-then-topk", True)
    assert not config.router_bias


def test_one_expert_needs_no_choice_and_is_not_refused() -> None:
    assert MoEConfig(7, 11, 1, 1).num_experts == 1


def test_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig(7, 11).num_experts = 3  # type: ignore[misc]
