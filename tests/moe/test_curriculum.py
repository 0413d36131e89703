"""Upcycling, opening and closing the gate, freezing: each does what it says, also under AdamW."""

import pytest
import torch

from medarch.moe import MoEConfig, MoELayer
from medarch.moe.curriculum import (
    active_experts,
    expert_similarity,
    freeze_experts,
    scale_learning_rate,
    set_active_experts,
    train_only,
    unfreeze_experts,
    upcycle,
)
from medarch.moe.dense import DenseMLP


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layer_of(**changes):
    return MoELayer(MoEConfig(**{"hidden_size": 11, "intermediate_size": 13, "num_experts": 5} | changes), seeded())


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("order", ["softmax-then-topk", "topk-then-softmax"])
def test_an_upcycled_layer_answers_as_the_dense_one(hidden_act, k, order):
    dense = DenseMLP(11, 13, hidden_act, 0.3, seeded(1)).double()
    config = MoEConfig(11, 13, 5, k, hidden_act, router_order=order, initializer_range=0.7)
    layer = upcycle(dense, config, seeded(2))
    tokens = torch.randn(3, 7, 11, generator=seeded(3), dtype=torch.float64)
    output, routing = layer(tokens)
    torch.testing.assert_close(output, dense(tokens), rtol=1e-12, atol=1e-12)
    # Had every token gone to the same experts with the same weights, this would show nothing.
    assert len(routing.indices.unique()) == 5
    assert routing.weights.std() > 0.01
    assert expert_similarity(layer) == pytest.approx(1)


def test_upcycling_refuses_weights_that_do_not_sum_to_one():
    with pytest.raises(ValueError, match="norm_topk_prob=False"):
        upcycle(DenseMLP(11, 13), MoEConfig(11, 13, 5, 1, norm_topk_prob=False))


def test_upcycling_leaves_the_dense_layer_alone():
    dense = DenseMLP(11, 13, generator=seeded(1))
    before = dense.up_proj.detach().clone()
    layer = upcycle(dense, layer_of().config, seeded(2))
    with torch.no_grad():
        layer.experts.gate_up_proj.mul_(2)
    assert torch.equal(dense.up_proj, before)


def test_upcycling_refuses_another_size():
    with pytest.raises(ValueError, match="intermediate_size is 13 in the mixture but 17"):
        upcycle(DenseMLP(11, 17), layer_of().config)
    with pytest.raises(ValueError, match="hidden_act is 'silu' in the mixture but 'gelu'"):
        upcycle(DenseMLP(11, 13, "gelu"), layer_of().config)


def test_similarity_by_hand():
    layer = layer_of(num_experts=3)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.zero_()
        layer.experts.gate_up_proj[:, 0, 0] = torch.tensor([2.0, 3.0, 0.0])
        layer.experts.down_proj[2, 0, 0] = 5.0
    # The first two point the same way, the third stands upright on both: (1 + 0 + 0) / 3.
    assert expert_similarity(layer) == pytest.approx(1 / 3)


def test_a_schedule_step_by_step():
    assert [active_experts(step, 12, (8, 4, 2)) for step in range(12)] == [8, 8, 8, 4, 4, 4, 2, 2, 2, 2, 2, 2]
    assert [active_experts(step, 5, (1, 2), share=0.4) for step in range(5)] == [1, 1, 2, 2, 2]
    assert active_experts(0, 7, (3,)) == 3
    assert active_experts(0, 7, (8, 2), share=0) == 2
    for step, steps, schedule, share in ((-1, 3, (2,), 0.5), (3, 3, (2,), 0.5), (0, 3, (), 0.5), (0, 3, (2,), 1.5)):
        with pytest.raises(ValueError, match="make no curriculum"):
            active_experts(step, steps, schedule, share)


def test_the_gate_opens_and_closes():
    layer = layer_of()
    tokens = torch.randn(17, 11, generator=seeded(1))
    two = layer(tokens)[0]
    for count in (5, 1, 2):
        set_active_experts(layer, count)
        output, routing = layer(tokens)
        assert routing.indices.shape == (17, count)
        assert layer.config.num_experts_per_tok == count
        if count == 1:
            assert (routing.weights < 0.99).all()
            output.square().sum().backward()
            assert layer.router.weight.grad.abs().max() > 0
        else:
            torch.testing.assert_close(routing.weights.sum(-1), torch.ones(17))
    assert torch.equal(output, two)
    with pytest.raises(ValueError, match="exceeds num_experts=5"):
        set_active_experts(layer, 6)


def train_some_steps(layer, steps=3):
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(61, 11, generator=seeded(step)))[0].square().sum().backward()
        optimizer.step()


def weights_of(layer):
    return [(up.detach().clone(), down.detach().clone()) for up, down in layer.experts.weights()]


def test_frozen_experts_stay_and_the_others_learn():
    layer = layer_of(initializer_range=0.3)
    train_some_steps(layer)  # an optimiser with a memory, and weights that decay would move
    before = weights_of(layer)
    freeze_experts(layer, [1, 3])
    train_some_steps(layer)
    unfreeze_experts(layer)
    for expert, (old, new) in enumerate(zip(before, weights_of(layer), strict=True)):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b) == (expert in (1, 3)), expert
    assert set(dict(layer.experts.named_parameters())) == {"gate_up_proj", "down_proj"}
    train_some_steps(layer, 1)
    assert not torch.equal(layer.experts.weights()[1][0], before[1][0])


def test_zeroing_gradients_alone_would_not_freeze():
    """Why freezing keeps a copy: if this ever fails, the copy can go."""
    layer = layer_of(initializer_range=0.3)
    before = weights_of(layer)
    for weight in layer.experts.parameters():
        weight.register_hook(lambda gradient: gradient * 0)
    train_some_steps(layer)
    assert not torch.equal(weights_of(layer)[1][0], before[1][0])


def test_all_experts_frozen():
    layer = layer_of()
    before = weights_of(layer)
    freeze_experts(layer)
    train_some_steps(layer)
    assert all(
        torch.equal(a, b)
        for old, new in zip(before, weights_of(layer), strict=True)
        for a, b in zip(old, new, strict=True)
    )
    assert layer.router.weight.grad is not None


def test_freezing_refuses():
    layer = layer_of()
    with pytest.raises(ValueError, match=r"experts \[0, 5\] are not all among the 5"):
        freeze_experts(layer, [0, 5])
    freeze_experts(layer, [0])
    with pytest.raises(ValueError, match="frozen already"):
        freeze_experts(layer, [1])


def test_which_part_is_trained():
    model = torch.nn.Sequential(torch.nn.Linear(11, 11), layer_of())
    experts = 5 * (2 * 13 * 11 + 11 * 13)
    counts = {"all": 132 + 55 + experts, "experts": experts, "all but experts": 132 + 55, "routers": 55}
    for part, count in counts.items():
        assert train_only(model, part) == count
    assert not model[1].experts.down_proj.requires_grad
    assert model[1].router.weight.requires_grad
    train_only(model, "experts")
    assert not model[1].router.weight.requires_grad
    with pytest.raises(ValueError, match="part 'half'"):
        train_only(model, "half")
    with pytest.raises(ValueError, match="0 mixtures"):
        train_only(torch.nn.Linear(3, 3), "all")


def test_a_slower_parameter_under_adam():
    """The first step of Adam is the learning rate long, whatever the gradient's size."""
    for factor in (1.0, 0.1):
        layer = layer_of(initializer_range=0.5)
        before = layer.router.weight.detach().clone()
        scale_learning_rate(layer.router, "weight", factor)
        torch.testing.assert_close(layer.router.weight, before)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, eps=1e-12)
        layer(torch.randn(61, 11, generator=seeded(1)))[0].square().sum().backward()
        optimizer.step()
        moved = (layer.router.weight - before).detach().abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * factor), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="factor=0"):
        scale_learning_rate(layer_of().router, "weight", 0)
