"""The two probes: steps that halve or stay, and who depends on whom."""

from __future__ import annotations

import pytest
import torch

from medarch.moe import MoEConfig, MoELayer
from medarch.moe.expert_choice import ExpertChoiceRouter
from medarch.moe.probes import influence, largest_step, scan_line
from medarch.moe.soft import DenseRouter, SoftMoE
from medarch.moe.switch import SwitchRouter

CONFIG = MoEConfig(7, 11, 5, 2, initializer_range=0.8)
BUILD = {
    "top-2": lambda g: MoELayer(CONFIG, g),
    "switch": lambda g: MoELayer(CONFIG, g, router=SwitchRouter(CONFIG, g)),
    "expert choice": lambda g: MoELayer(CONFIG, g, router=ExpertChoiceRouter(CONFIG, g)),
    "dense gate": lambda g: MoELayer(CONFIG, g, router=DenseRouter(CONFIG, g)),
    "soft moe": lambda g: SoftMoE(CONFIG, 2, g),
}


def make(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return BUILD[name](generator).double(), torch.randn(13, 7, generator=generator, dtype=torch.float64) * 2


@pytest.mark.parametrize("name", ["top-2", "switch", "expert choice"])
def test_choosing_jumps(name: str) -> None:
    """The largest step stays where the spacing is an eighth, in the output and in the gradient of the scores."""
    layer, tokens = make(name)
    coarse, fine = (scan_line(layer, tokens[0], tokens[1:-1], tokens[-1], steps) for steps in (201, 1601))
    assert largest_step(fine.output) > 0.7 * largest_step(coarse.output) > 0.01
    assert largest_step(fine.score_gradient) > 0.7 * largest_step(coarse.score_gradient) > 0.01


@pytest.mark.parametrize("name", ["dense gate", "soft moe"])
def test_mixing_does_not(name: str) -> None:
    layer, tokens = make(name)
    coarse, fine = (scan_line(layer, tokens[0], tokens[1:-1], tokens[-1], steps) for steps in (201, 1601))
    assert largest_step(fine.output) < 0.2 * largest_step(coarse.output)
    assert largest_step(fine.score_gradient) < 0.2 * largest_step(coarse.score_gradient)


def test_the_scan_begins_and_ends_with_the_two_tokens() -> None:
    layer, tokens = make("top-2")
    scan = scan_line(layer, tokens[0], tokens[1:-1], tokens[-1], 3)
    with torch.no_grad():
        torch.testing.assert_close(scan.output[0], layer(tokens[:1])[0][0])
        torch.testing.assert_close(scan.output[2], layer(tokens[-1:])[0][0])
    assert scan.position.tolist() == [0, 0.5, 1]
    with pytest.raises(ValueError, match="at least 2"):
        scan_line(layer, tokens[0], tokens[1:], tokens[-1], 1)


def test_who_depends_on_whom() -> None:
    replacement = torch.full((7,), 2.0, dtype=torch.float64)
    diagonal = torch.eye(13, dtype=torch.bool)
    earlier = torch.ones(13, 13).tril(-1).bool()
    for name in BUILD:
        layer, tokens = make(name)
        moved = influence(layer, tokens, replacement) > 1e-9
        if name in ("top-2", "switch", "dense gate"):
            assert torch.equal(moved, diagonal)
        elif name == "expert choice":
            assert 0 < int((moved & earlier).sum()) < int(earlier.sum())
        else:
            assert moved.all()


def test_a_capacity_reaches_forward_and_not_back() -> None:
    generator = torch.Generator().manual_seed(2)
    layer = MoELayer(CONFIG, generator, router=SwitchRouter(CONFIG, generator, capacity_factor=1.0)).double()
    tokens = torch.randn(13, 7, generator=generator, dtype=torch.float64) * 2
    moved = influence(layer, tokens, torch.full((7,), 2.0, dtype=torch.float64)) > 1e-9
    assert (moved & torch.ones(13, 13).triu(1).bool()).any()
    assert not (moved & torch.ones(13, 13).tril(-1).bool()).any()
