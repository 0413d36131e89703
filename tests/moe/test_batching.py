"""How many experts a batch touches: by the formula, by simulation, and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medarch.moe.accounting import expected_distinct_experts
from medarch.moe.batching import (
    bytes_touched,
    distinct_experts,
    expected_distinct_by_load,
    mean_distinct_experts,
    random_routing,
)
from medarch.moe.config import MoEConfig
from medarch.moe.router import NO_EXPERT


def test_by_hand() -> None:
    indices = torch.tensor([[0, 4], [4, 2], [NO_EXPERT, NO_EXPERT], [2, 0]])
    assert distinct_experts(indices) == 3
    assert distinct_experts(indices[2:3]) == 0


def test_random_routing_is_without_repetition_and_even() -> None:
    config = MoEConfig(3, 5, 7, 3)
    indices = random_routing(config, 7000, torch.Generator().manual_seed(0))
    assert indices.shape == (7000, 3)
    assert all(len(set(row)) == 3 for row in indices[:200].tolist())
    share = torch.bincount(indices.flatten(), minlength=7) / 7000
    assert (share - 3 / 7).abs().max() < 0.02


@pytest.mark.parametrize("batch_size", [1, 2, 5, 11])
def test_the_formula_is_what_a_simulation_gives(batch_size: int) -> None:
    config = MoEConfig(3, 5, 7, 2)
    generator = torch.Generator().manual_seed(1)
    indices = random_routing(config, 4000, generator)
    found = mean_distinct_experts(indices, batch_size, generator, trials=3000)
    assert found == pytest.approx(expected_distinct_experts(config, batch_size), abs=0.06)


def test_words_that_follow_one_another_touch_fewer() -> None:
    # The text stays with its experts for ten tokens on end.
    runs = random_routing(MoEConfig(3, 5, 8, 2), 200, torch.Generator().manual_seed(2)).repeat_interleave(10, dim=0)
    generator = torch.Generator().manual_seed(3)
    together = mean_distinct_experts(runs, 8, generator, consecutive=True)
    apart = mean_distinct_experts(runs, 8, generator)
    assert together < 4.5
    assert apart > 6.8
    assert mean_distinct_experts(runs, 2000, generator, consecutive=True, trials=1) == 8


@given(experts=st.integers(2, 9), chosen=st.integers(1, 9), batch_size=st.integers(1, 40), tilt=st.floats(0.0, 0.9))
@settings(max_examples=60, deadline=None)
def test_even_loads_touch_the_most(experts: int, chosen: int, batch_size: int, tilt: float) -> None:
    chosen = min(chosen, experts - 1)
    config = MoEConfig(3, 5, experts, chosen, norm_topk_prob=chosen > 1)
    even = torch.full((experts,), chosen / experts)
    expected = expected_distinct_experts(config, batch_size)
    assert expected_distinct_by_load(even, batch_size) == pytest.approx(expected, abs=1e-4)
    # Moving chance from one expert to another keeps the sum, and each stays a probability.
    moved = tilt * float(torch.minimum(even[0], 1 - even[0]))
    uneven = even.clone()
    uneven[0] -= moved
    uneven[1] += moved
    assert expected_distinct_by_load(uneven, batch_size) <= expected + 1e-4


def test_bytes() -> None:
    config = MoEConfig(3, 5, 7, 2)  # router 7 x 3, an expert 3 matrices of 3 x 5
    assert bytes_touched(config, 2) == (21 + 2 * 45) * 4
    assert bytes_touched(config, 6.5, torch.bfloat16) == (21 + 6.5 * 45) * 2


@pytest.mark.parametrize(("batch_size", "trials"), [(0, 1), (4, 1), (2, 0)])
def test_impossible_batches_are_refused(batch_size: int, trials: int) -> None:
    with pytest.raises(ValueError, match="3 routed tokens"):
        mean_distinct_experts(torch.zeros(3, 1, dtype=torch.long), batch_size, torch.Generator(), trials=trials)
