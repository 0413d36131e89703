"""The Switch router against the block of transformers, drops included, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medarch.moe import NO_EXPERT, MoEConfig, MoELayer
from medarch.moe.switch import SwitchRouter, save_switch_

CONFIG = MoEConfig(7, 11, 5, 2, hidden_act="gelu", initializer_range=0.8)


def switch_block(capacity: int, experts: int = 5) -> nn.Module:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    config = SwitchTransformersConfig(
        d_model=7, d_ff=11, num_experts=experts, expert_capacity=capacity, dense_act_fn="gelu", dropout_rate=0.0,
        router_jitter_noise=0.0, router_bias=False,
    )  # fmt: skip
    return SwitchTransformersSparseMLP(config).eval()


@pytest.mark.parametrize("capacity", [1, 2, 3, 13])
def test_equals_the_block_of_transformers(capacity: int, generator: torch.Generator) -> None:
    """Choices, drops, weights, output and all gradients, sequence by sequence."""
    layer = MoELayer(CONFIG, generator, router=SwitchRouter(CONFIG, generator, capacity=capacity))
    block = switch_block(capacity)
    save_switch_(layer, block)
    inputs = torch.randn(3, 13, 7, generator=generator)
    ours_in, theirs_in = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    output, routing = layer(ours_in)
    chosen, probability, logits = block.router(theirs_in)
    theirs = block(theirs_in)

    served = routing.indices[..., 0] != NO_EXPERT
    assert torch.equal(chosen.sum(dim=-1).bool(), served)
    assert torch.equal(chosen.argmax(dim=-1)[served], routing.indices[..., 0][served])
    assert served.all() == (capacity == 13)
    torch.testing.assert_close(routing.logits, logits)
    torch.testing.assert_close(routing.weights[served], probability[served])
    torch.testing.assert_close(output, theirs)

    cotangent = torch.randn(3, 13, 7, generator=generator)
    output.backward(cotangent)
    theirs.backward(cotangent)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad)
    assert layer.router.weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(layer.router.weight.grad, block.router.classifier.weight.grad)
    for expert in range(5):
        torch.testing.assert_close(layer.experts.up_proj.grad[expert], block.experts[f"expert_{expert}"].wi.weight.grad)


def test_capacity_factor_on_the_configuration_s_experts(generator: torch.Generator) -> None:
    """Thirteen equal tokens at factor 1.25 on five experts: ceil(3.25) = 4 are served, the first ones."""
    router = SwitchRouter(CONFIG, generator, capacity_factor=1.25)
    routing = router(torch.ones(13, 7))
    assert (routing.indices[:, 0] != NO_EXPERT).tolist() == [True] * 4 + [False] * 9


def test_jitter_acts_in_training_alone(generator: torch.Generator) -> None:
    router = SwitchRouter(CONFIG, generator, jitter=0.3)
    tokens = torch.randn(13, 7, generator=generator)
    assert not torch.equal(router.train()(tokens).logits, router(tokens).logits)
    assert torch.equal(router.eval()(tokens).logits, router(tokens).logits)


def test_refusals(generator: torch.Generator, annotations_off: None) -> None:
    with pytest.raises(ValueError, match=r"capacity_factor=1\.0 and capacity=3"):
        SwitchRouter(CONFIG, capacity_factor=1.0, capacity=3)
    with pytest.raises(ValueError, match="jitter"):
        SwitchRouter(CONFIG, jitter=1.0)
    with pytest.raises(ValueError, match="ungated"):
        save_switch_(MoELayer(MoEConfig(7, 11, 5)), switch_block(3))
    with pytest.raises(ValueError, match="no expert 3"):
        save_switch_(MoELayer(CONFIG, router=SwitchRouter(CONFIG)), switch_block(3, experts=3))
